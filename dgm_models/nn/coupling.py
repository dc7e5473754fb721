"""Couplings: one part of an event passes as it is, and a network of that part says how the rest is mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.nn.conditioner import IMAGE_DIM
from dgm_models.nn.flow import Transform
from dgm_models.nn.networks import Network
from dgm_models.protocols import DataSpec


def context_dim(condition: Condition | None, data: DataSpec, network: Network | None = None) -> int:
    """The length of the context vector that `Flow` hands to its transforms: 0 without a condition.

    Raises: ValueError when the condition is an image and there is no network to read it.
    """
    if condition is None:
        return 0
    spec = condition.spec(data)
    if spec.kind == "tokens":
        return spec.dims * (spec.levels or 0)
    if network is None:
        raise ValueError(f"cond: {condition.name} is an image, and this method has no network for images; use a label")
    return IMAGE_DIM


def with_context(x: Tensor, context: Tensor | None) -> Tensor:
    """[B, D] and [B, context_dim] -> [B, D + context_dim]."""
    return x if context is None else torch.cat([x, context.to(x.dtype)], 1)


def zero_last(network: nn.Module) -> nn.Module:
    """The network with the weights and biases of its last layer at 0, so that it gives 0."""
    last = [layer for layer in network.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return network


# ---- maps of single numbers


class Bijection:
    """An increasing map of every coordinate by parameters of its own; the identity where all of them are 0."""

    @property
    def size(self) -> int:
        """How many parameters a coordinate has."""
        raise NotImplementedError

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x [...] and params [..., size] -> (z [...], log dz/dx [...] in nats)."""
        raise NotImplementedError

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        """The x of `forward`'s z."""
        raise NotImplementedError


@dataclass(frozen=True)
class Additive(Bijection):
    """z = x + t."""

    size: ClassVar[int] = 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return x + params[..., 0], torch.zeros_like(x)

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return z - params[..., 0]


@dataclass(frozen=True)
class Affine(Bijection):
    """z = x exp(s) + t with s = bound tanh(raw / bound): no scale leaves [exp(-bound), exp(bound)] on either way.

    Args:
        bound: of |s|.
    """

    bound: float = 5.0
    size: ClassVar[int] = 2

    def _log_scale(self, params: Tensor) -> Tensor:
        return self.bound * torch.tanh(params[..., 1] / self.bound)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        s = self._log_scale(params)
        return torch.addcmul(params[..., 0], x, s.exp()), s

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return (z - params[..., 0]) * (-self._log_scale(params)).exp()


@dataclass(frozen=True)
class MixtureCdf(Bijection):
    """z = logit F(x), F the distribution function of K logistic distributions: x is that mixture where z is logistic.

    All parameters 0 are no identity but components side by side: equal ones would stay equal in training. The inverse
    is found by halving an interval that holds it, to the last digits of its type.

    Source: Ho et al. 2019, section 3.2, arXiv:1902.00275.

    Args:
        components: K.
        bound: of a log-scale's distance to that of the beginning.
    """

    components: int
    bound: float = 5.0

    @property
    def size(self) -> int:
        """K logits, K means, K log-scales."""
        return 3 * self.components

    def _parts(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means and log-scales, each [..., K]."""
        logits, means, raw = params.reshape(*params.shape[:-1], 3, self.components).unbind(-2)
        centres = torch.linspace(-2.0, 2.0, self.components, dtype=params.dtype, device=params.device)
        return logits.log_softmax(-1), means + centres, self.bound * torch.tanh(raw / self.bound) - 1.0

    @staticmethod
    def _sides(x: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """log F, log(1 - F) and the log-density of x [...]."""
        log_weights, means, log_scales = parts
        u = (x[..., None] - means) * (-log_scales).exp()
        below, above = F.logsigmoid(u), F.logsigmoid(-u)
        density = (log_weights + below + above - log_scales).logsumexp(-1)
        return (log_weights + below).logsumexp(-1), (log_weights + above).logsumexp(-1), density

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        below, above, density = self._sides(x, self._parts(params))
        return below - above, density - below - above

    @torch.no_grad()
    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        parts = self._parts(params)
        alone = parts[1] + parts[2].exp() * z[..., None]  # each component's own answer: the mixture's lies among them
        low, high = alone.amin(-1), alone.amax(-1)
        for _ in range(64 if z.dtype == torch.float64 else 32):
            middle = 0.5 * (low + high)
            below, above, _ = self._sides(middle, parts)
            less = below - above < z
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        return 0.5 * (low + high)


# ---- transforms


class Coupling(Transform):
    """z = x where the mask is True, elsewhere the bijection of x by a network of what is True.

    The Jacobian is triangular, so log|det| is the sum of the bijection's log-slopes.
    Source: Dinh et al. 2015, section 3.2, arXiv:1410.8516; Dinh et al. 2017, section 3.4, arXiv:1605.08803.

    Args:
        mask: [*event] bool: what passes as it is.
        bijection: of the other coordinates.
        network: (x [B, *event], 0 where the mask is False; context [B, context_dim] or None) -> [B, *event, size].
    """

    mask: Tensor

    def __init__(self, mask: Tensor, bijection: Bijection, network: nn.Module) -> None:
        super().__init__()
        self.bijection, self.network = bijection, network
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, slope = self.bijection.forward(x, self.network(x * self.mask, context))
        return torch.where(self.mask, x, z), (slope * ~self.mask).flatten(1).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        self.evaluations += 1
        x = self.bijection.inverse(z, self.network(z * self.mask, context))
        return torch.where(self.mask, z, x)


class SplitCoupling(Transform):
    """`Coupling` along the first axis of an event (a vector's coordinates, an image's channels), without the zeros.

    Args:
        mask: which of the n coordinates or channels pass as they are, k of them.
        bijection: of the others.
        network: (x [B, k, ...], context [B, context_dim] or None) -> [B, n - k, ..., size].
    """

    kept: Tensor
    moved: Tensor
    back: Tensor

    def __init__(self, mask: Sequence[bool], bijection: Bijection, network: nn.Module) -> None:
        super().__init__()
        self.bijection, self.network = bijection, network
        kept, moved = ([i for i, passes in enumerate(mask) if passes == wanted] for wanted in (True, False))
        self.register_buffer("kept", torch.tensor(kept))
        self.register_buffer("moved", torch.tensor(moved))
        self.register_buffer("back", torch.tensor([*kept, *moved]).argsort())

    def _merge(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat([kept, moved], 1).index_select(1, self.back)

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = x.index_select(1, self.kept)
        z, slope = self.bijection.forward(x.index_select(1, self.moved), self.network(kept, context))
        return self._merge(kept, z), slope.flatten(1).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        self.evaluations += 1
        kept = z.index_select(1, self.kept)
        return self._merge(kept, self.bijection.inverse(z.index_select(1, self.moved), self.network(kept, context)))


class VectorNetwork(nn.Module):
    """A coupling's network over vectors: [B, inputs] and the context -> [B, outputs, size], 0 at initialisation."""

    def __init__(self, network: Network, inputs: int, outputs: int, size: int, context_dim: int) -> None:
        super().__init__()
        self.shape = (outputs, size)
        self.body = zero_last(network.down((inputs + context_dim,), outputs * size))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        params: Tensor = self.body(with_context(x, context))
        return params.reshape(-1, *self.shape)


def vector_coupling(mask: Sequence[bool], bijection: Bijection, network: Network, context_dim: int) -> SplitCoupling:
    """A coupling of vectors [B, D] by a mask of D coordinates.

    Raises: ValueError when nothing or everything would pass as it is.
    """
    kept, dims = sum(mask), len(mask)
    if not 0 < kept < dims:
        raise ValueError(f"data.shape: a coupling divides the coordinates in two parts, and there are {dims}; use maf")
    return SplitCoupling(mask, bijection, VectorNetwork(network, kept, dims - kept, bijection.size, context_dim))


def alternating(
    dims: int, layers: int, bijection: Bijection, network: Network, context_dim: int
) -> list[SplitCoupling]:
    """Couplings of vectors [B, dims]: the first moves the odd coordinates, the second the even ones, and so on."""
    masks = [[coordinate % 2 == passing for coordinate in range(dims)] for passing in (0, 1)]
    return [vector_coupling(masks[i % 2], bijection, network, context_dim) for i in range(layers)]


class Permutation(Transform):
    """z_i = x_order(i) along the first axis of the event; log|det| = 0.

    Args:
        order: [n] int64.
    """

    order: Tensor
    back: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.index_select(1, self.order), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return z.index_select(1, self.back)


class Scaling(Transform):
    """z = x exp(s), one learned s for every coordinate, 0 at first; log|det| = sum of s.

    Source: Dinh et al. 2015, section 3.3, arXiv:1410.8516.

    Args:
        shape: of s: the event's, or one that is broadcast over it, such as [C, 1, 1].
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.expand(x.shape[1:]).sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return z * (-self.log_scale).exp()


class Flatten(Transform):
    """A transform of vectors, of events of any shape; the latents have the event's shape.

    Args:
        inner: the transform of vectors.
    """

    def __init__(self, inner: Transform) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner(x.flatten(1), context)
        return z.reshape(x.shape), log_det

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.inner.inverse(z.flatten(1), context).reshape(z.shape)
