"""Glow: generative flow with invertible 1x1 convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.construct import Positive
from dgm_models.nn.coupling import Bijection, Flatten, SplitCoupling, context_dim, vector_coupling, zero_last
from dgm_models.nn.dequantize import Dequantization, Space, codec_of, dequantized
from dgm_models.nn.flow import Chain, Flow, Transform
from dgm_models.nn.image_flow import (
    MultiScale,
    Shape,
    Squeeze,
    as_params,
    channel_halves,
    image_shape,
    squeezed,
    squeezings,
    with_planes,
)
from dgm_models.nn.networks import Mlp
from dgm_models.nn.normalisation import ActNorm
from dgm_models.objective import Objective
from dgm_models.protocols import DataSpec, Model


@dataclass(frozen=True)
class SigmoidScale(Bijection):
    """z = x sigmoid(h + 2) + t: the scale stays below 1, and is 0.88 where the network gives 0."""

    size: ClassVar[int] = 2

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        h = params[..., 1] + 2
        return torch.addcmul(params[..., 0], x, h.sigmoid()), F.logsigmoid(h)

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return (z - params[..., 0]) / (params[..., 1] + 2).sigmoid()


class InvertibleConvolution(Transform):
    """z = W x at every place, W = P L (U + diag(s)): log|det| = places * sum log|s|.

    P is a permutation and stays; L and U are triangular, with ones and zeros on their diagonals; the signs of s stay. W
    begins as a random rotation. A vector has one place.
    Source: Kingma and Dhariwal 2018, section 3.2, eq. 10 and 11, arXiv:1807.03039.

    Args:
        channels: of x.
    """

    order: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        scale = upper.diagonal()
        self.register_buffer("order", permutation.argmax(1))  # row i of P M is row order(i) of M
        self.register_buffer("sign", scale.sign().float())
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_scale = nn.Parameter(scale.abs().log().float())

    def _triangles(self) -> tuple[Tensor, Tensor]:
        """L and U + diag(s)."""
        eye = torch.eye(len(self.order), dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + eye, self.upper.triu(1) + (self.sign * self.log_scale.exp()).diag()

    def weight(self) -> Tensor:
        """W [C, C]."""
        lower, upper = self._triangles()
        return (lower @ upper)[self.order]

    def inverse_weight(self) -> Tensor:
        """W^-1 [C, C], solved in float64."""
        lower, upper = (triangle.double() for triangle in self._triangles())
        eye = torch.eye(len(self.order), dtype=torch.float64, device=lower.device)[self.order.argsort()]  # P^T
        inner = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        found: Tensor = torch.linalg.solve_triangular(upper, inner, upper=True)
        return found.to(self.lower.dtype)

    def _apply_weight(self, weight: Tensor, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 W and its log-determinant would part
            return F.linear(x, weight) if x.ndim == 2 else F.conv2d(x, weight[..., None, None])

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight()
        places = x[0, 0].numel()
        return self._apply_weight(weight, x), (places * self.log_scale.sum()).expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._apply_weight(self.inverse_weight(), z)


class ZeroConvolution(nn.Module):
    """A 3x3 convolution that begins as 0, its outputs multiplied by exp(3 l), one learned l a channel.

    Source: Kingma and Dhariwal 2018, section 3.3, arXiv:1807.03039, with the factor 3 of the authors' code.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = zero_last(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.log_scale = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.convolution(x) * (3 * self.log_scale).exp()[:, None, None]
        return out


class GlowNetwork(nn.Module):
    """A coupling's network, 0 at initialisation: 3x3, ActNorm, relu, 1x1, ActNorm, relu, 3x3 of `ZeroConvolution`.

    [B, inputs, H, W] and the context -> [B, outputs, H, W, size].
    """

    def __init__(self, inputs: int, outputs: int, size: int, width: int, context_dim: int) -> None:
        super().__init__()
        self.size = size
        self.first = nn.Conv2d(inputs + context_dim, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 1, bias=False)
        self.norms = nn.ModuleList([ActNorm(width), ActNorm(width)])
        self.last = ZeroConvolution(width, outputs * size)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = with_planes(x, context)
        for convolution, norm in zip((self.first, self.second), self.norms, strict=True):
            h = norm(convolution(h), None)[0].relu()
        return as_params(self.last(h), self.size)


def image_coupling(channels: int, width: int, context_dim: int) -> SplitCoupling:
    """The second half of the channels is mapped by a network of the first."""
    mask, bijection = channel_halves(channels, second=False), SigmoidScale()
    kept = sum(mask)
    return SplitCoupling(mask, bijection, GlowNetwork(kept, channels - kept, bijection.size, width, context_dim))


def image_scales(shape: Shape, halvings: int, steps: int, width: int, context_dim: int) -> MultiScale:
    """Scales of squeezing and `steps` steps; what leaves a scale as latents is mapped given what goes on."""
    scales: list[Transform] = []
    shapes: list[Shape] = []
    for scale in range(halvings):
        shape = squeezed(shape)
        parts: list[Transform] = [Squeeze()]
        for _ in range(steps):
            channels = shape[0]
            parts += [ActNorm(channels), InvertibleConvolution(channels), image_coupling(channels, width, context_dim)]
        if scale + 1 < halvings:
            parts.append(image_coupling(shape[0], width, context_dim))
        scales.append(Chain(*parts))
        shapes.append(shape)
        shape = (shape[0] // 2, *shape[1:])
    return MultiScale(scales, shapes)


def glow(
    data: DataSpec,
    channels: Positive = 128,
    steps: Positive = 8,
    halvings: Positive | None = None,
    space: Space = "linear",
    dequantization: Dequantization = "uniform",
    cond: Condition | None = None,
) -> tuple[Model, Objective]:
    """Glow: steps of ActNorm, an invertible 1x1 convolution and an affine coupling, over several scales.

    Vectors have the same steps with dense layers and one scale.

    Source: Kingma and Dhariwal 2018, arXiv:1807.03039; its models of 32 x 32 have 512 channels, 32 steps, 3 halvings,
    and are trained with Adam at 1e-3. Differs: the latents of a scale are mapped by a coupling given what goes on,
    which is the learned Gaussian of the authors' code with a bounded scale; the last scale has a standard normal.

    Args:
        data: what is modelled.
        channels: of a coupling's network; units of two hidden layers for vectors.
        steps: K, of every scale.
        halvings: L, scales; null: until the smaller side would be below 4, and at least one.
        space: where stored levels are modelled; real data are standardised.
        dequantization: of stored levels; "variational" gives a bound in place of a density.
        cond: what samples are asked for; every coupling reads it.
    """
    extra, image = context_dim(cond, data), image_shape(data.shape)
    transform: Transform
    if image:
        scales = squeezings(image, halvings) or squeezings(image, 1)
        transform = image_scales(image, scales, steps, channels, extra)
    else:
        network, mask = Mlp(width=channels, depth=2, activation="silu"), channel_halves(data.dims, second=False)
        parts: list[Transform] = []
        for _ in range(steps):
            coupling = vector_coupling(mask, SigmoidScale(), network, extra)
            parts += [ActNorm(data.dims), InvertibleConvolution(data.dims), coupling]
        transform = Flatten(Chain(*parts))
    flow = Flow(data, codec_of(data, space), transform, condition=cond)
    return dequantized(flow, dequantization, channels)
