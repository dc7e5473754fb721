"""MintNet: flows of masked convolutions with a triangular Jacobian."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import continuous
from dgm_models.conditions import Condition
from dgm_models.construct import NonNegative, Positive, Range
from dgm_models.nn.coupling import context_dim
from dgm_models.nn.fixed_point import fixed_point
from dgm_models.nn.flow import Chain, Flow, Transform
from dgm_models.nn.image_flow import Reshape, Shape, Squeeze, image_shape, squeezed, squeezings
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.protocols import DataSpec

LEAST = 1e-3  # of t, so that no slope vanishes
PATIENCE, ROUNDS = 100, 8  # of the inverse: iterations (of D values 2 D) before the step is halved, and how often it is


def positive(raw: Tensor) -> Tensor:
    return F.softplus(raw)


def raw_of(value: float) -> float:
    """The number whose `positive` is the value."""
    return math.log(math.expm1(value))


class MaskedLayer(nn.Module):
    """A convolution from `before` groups of C channels to `after`, whose output c at a place reads what is before it.

    Before it are all channels at earlier places in raster order, and the channels below c at its own. What it reads of
    channel c itself at its own place is the diagonal [after, before, C], of given signs. Channels are ordered by group.

    Args:
        channels: C.
        before, after: groups.
        kernel: side of the filters, odd; 1 for vectors.
        sign: [after, before] of the diagonal.
        scale: of the diagonal's size at the start.
    """

    mask: Tensor
    sign: Tensor

    def __init__(self, channels: int, before: int, after: int, kernel: int, sign: Tensor, scale: float) -> None:
        super().__init__()
        layer = nn.Conv2d(before * channels, after * channels, kernel)
        assert layer.bias is not None
        self.weight, self.bias = layer.weight, layer.bias
        self.raw = nn.Parameter(raw_of(scale) + 0.5 * torch.randn(after, before, channels))
        place = torch.arange(kernel**2).reshape(kernel, kernel)
        earlier = (place < kernel**2 // 2).float().expand(after * channels, before * channels, -1, -1).clone()
        index = torch.arange(channels)
        below = (index[:, None] > index).float().repeat(after, before)
        earlier[:, :, kernel // 2, kernel // 2] = below
        self.register_buffer("mask", earlier)
        self.register_buffer("sign", sign[..., None])

    def size(self) -> Tensor:
        """|diagonal| [after, before, C]."""
        return positive(self.raw)

    def kept(self) -> Tensor:
        """The weight as it is applied, [after C, before C, k, k]."""
        diagonal = (self.size() * self.sign).diag_embed().movedim(1, 2).flatten(2).flatten(0, 1)
        around = self.weight.shape[-1] // 2
        return self.weight * self.mask + F.pad(diagonal[..., None, None], (around,) * 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before C, H, W] -> [B, after C, H, W]."""
        weight = self.kept()
        if weight.shape[-1] == 1 and x[0, 0].numel() == 1:  # a vector: a product is faster than a convolution
            return F.linear(x.flatten(1), weight.flatten(1), self.bias)[..., None, None]
        return F.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)


class MintLayer(Transform):
    """z = t x + W3 h(W2 h(W1 x + b1) + b2) + b3, with masked W, t > 0 and h = ELU: a triangular Jacobian.

    Its diagonal is t + sum_ij d3_i d2_ij d1_j h' h', in which the product of the three diagonals is not negative: d1_j
    and d3_i have a sign for each group, and d2_ij has the product of the two. log|det| is the sum of its logarithm.
    The inverse is x <- x - alpha (f(x) - z) / diagonal.

    Source: Song, Meng, Ermon 2019, arXiv:1907.07945, algorithm 1 for the inverse. Differs: the signs alternate over the
    groups and stay, where the paper's are those of free d1 and d3, in which the map has jumps; an example whose
    inverse has not come to rest within 100 (or 2 D) iterations goes on with half of alpha.

    Args:
        shape: of an event; a vector is [D, 1, 1].
        groups: K, hidden channels for every channel.
        kernel: side of the filters.
        alpha: of the inverse.
        context_dim: of the vector that is added before the first activation, 0 without a context.
    """

    def __init__(self, shape: Shape, groups: int, kernel: int, alpha: float, context_dim: int) -> None:
        super().__init__()
        channels, self.alpha = shape[0], alpha
        sign = 1.0 - 2.0 * (torch.arange(groups) % 2)
        one = torch.ones(1)
        self.first = MaskedLayer(channels, 1, groups, kernel, torch.outer(sign, one), 1.0)
        self.second = MaskedLayer(channels, groups, groups, kernel, torch.outer(sign, sign), 1 / groups)
        self.third = MaskedLayer(channels, groups, 1, kernel, torch.outer(one, sign), 0.2 / groups)
        self.raw = nn.Parameter(torch.full(shape, raw_of(1 - LEAST)))
        self.context = nn.Linear(context_dim, groups * channels, bias=False) if context_dim else None

    def _mapped(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """f(x) and the Jacobian's diagonal, both [B, C, H, W]."""
        first = self.first(x)
        if self.context is not None and context is not None:
            first = first + self.context(context.to(x.dtype))[..., None, None]
        second = self.second(F.elu(first))
        t = positive(self.raw) + LEAST
        z = t * x + self.third(F.elu(second))
        shape = (-1, x.shape[1])
        first, second = (a.clamp(max=0).exp().unflatten(1, shape) for a in (first, second))  # h' [B, K, C, H, W]
        inner = first * self.first.size()[:, 0, :, None, None]
        inner = torch.einsum("ijc,bjchw->bichw", self.second.size(), inner)
        slope = t + (second * inner * self.third.size()[0, :, :, None, None]).sum(1)
        return z, slope

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, slope = self._mapped(x, context)
        return z, slope.log().flatten(1).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        patience = max(PATIENCE, 2 * z[0].numel())  # with alpha = 1 a linear triangular map takes D

        def step(x: Tensor, iteration: int) -> Tensor:
            found, slope = self._mapped(x, context)
            return x - self.alpha * 0.5 ** (iteration // patience) * (found - z) / slope

        x, iterations = fixed_point(step, z, patience * ROUNDS)
        self.evaluations += iterations
        return x


class Reverse(Transform):
    """The other order of all values: channels, rows and columns from last to first; log|det| = 0."""

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.flip(1, 2, 3), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return z.flip(1, 2, 3)


def mint_net(
    data: DataSpec,
    groups: Positive = 32,
    layers: Positive = 4,
    halvings: NonNegative | None = None,
    alpha: Annotated[float, Range(0, 2, "both")] = 1.0,
    cond: Condition | None = None,
) -> tuple[Flow, MaximumLikelihood]:
    """MintNet: layers with triangular Jacobians of positive diagonal, in alternating orders of the values.

    Source: Song, Meng, Ermon 2019, arXiv:1907.07945.

    Args:
        data: what is modelled; examples that are no images are vectors, with dense layers.
        groups: K, hidden channels for every channel of the data.
        layers: how many, of images those of one scale.
        halvings: of an image's sides; null: until the smaller would be below 4.
        alpha: step of the inverse's iteration, which is locally convergent below 2.
        cond: what samples are asked for; every layer reads it.
    """
    extra, image = context_dim(cond, data), image_shape(data.shape)
    shape: Shape = image or (data.dims, 1, 1)
    parts: list[Transform] = [Reshape(data.shape, shape)]
    for scale in range(1 + (squeezings(shape, halvings) if image else 0)):
        if scale:
            parts.append(Squeeze())
            shape = squeezed(shape)
        for _ in range(layers):
            parts += [MintLayer(shape, groups, 3 if image else 1, alpha, extra), Reverse()]
    parts.append(Reshape(shape, (data.dims,)))
    return Flow(data, continuous(data), Chain(*parts), condition=cond), MaximumLikelihood()
