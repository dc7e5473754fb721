"""Masked autoregressive transforms: every coordinate is mapped by a network of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.nn.coupling import Bijection, Permutation
from dgm_models.nn.flow import Chain, Transform
from dgm_models.nn.layers import activation
from dgm_models.nn.networks import Mlp, Network


class Masked(nn.Linear):
    """A linear layer with a mask that is made once.

    Args:
        before, after: [in_dim] and [out_dim] int64: weight [i, j] is kept where `after[i] >= before[j]`.
    """

    mask: Tensor

    def __init__(self, before: Tensor, after: Tensor) -> None:
        super().__init__(len(before), len(after))
        self.register_buffer("mask", (after[:, None] >= before).to(self.weight.dtype))

    def kept(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kept(), self.bias)


class MaskedNetwork(nn.Module):
    """params[b, d, :] of the coordinates before d and of the context; 0 at initialisation.

    Coordinate d has degree d, hidden units cycle through the degrees that have somewhere to lead to: a unit of degree k
    reads the coordinates below k and is read by the parameters of those from k on. Units of degree 0 read the context
    alone, and there are none without one.

    Source: Germain et al. 2015, section 3.1, arXiv:1502.03509, with the degrees of Papamakarios et al. 2017.

    Args:
        dims: D.
        size: parameters a coordinate.
        network: widths, depth and activation; masks are of linear layers alone.
        context_dim: 0 without a context.
    Raises: ValueError for a network that is no mlp.
    """

    def __init__(self, dims: int, size: int, network: Network, context_dim: int) -> None:
        super().__init__()
        if not isinstance(network, Mlp):
            raise ValueError(f"network.name: {network.name}; autoregressive masks are of linear layers alone: use mlp")
        self.dims, self.size = dims, size
        least = 0 if context_dim or dims == 1 else 1
        hidden = torch.arange(network.width) % (dims - least) + least
        degrees = [torch.arange(dims) + 1] + [hidden] * network.depth
        self.layers = nn.ModuleList(Masked(a, b) for a, b in pairwise(degrees))
        self.last = Masked(hidden, torch.arange(dims).repeat_interleave(size))
        self.context = nn.Linear(context_dim, network.width, bias=False) if context_dim else None
        self.activation = activation(network.activation)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @property
    def first(self) -> Masked:
        layer = self.layers[0]
        assert isinstance(layer, Masked)
        return layer

    def start(self, n: int, context: Tensor | None) -> Tensor:
        """The first layer's sums [n, width] before any coordinate is known: what `admit` adds to and `step` reads."""
        sums = self.first.bias.expand(n, -1)
        return sums if self.context is None or context is None else sums + self.context(context.to(sums.dtype))

    def admit(self, sums: Tensor, d: int, x: Tensor) -> Tensor:
        """The sums with coordinate d [n]: one column of a product, not the whole."""
        return torch.addcmul(sums, x[:, None], self.first.weight[:, d] * self.first.mask[:, d])

    def step(self, sums: Tensor, d: int) -> Tensor:
        """Coordinate d's parameters [n, size]."""
        rows = slice(d * self.size, (d + 1) * self.size)
        return F.linear(self._hidden(sums), self.last.weight[rows] * self.last.mask[rows], self.last.bias[rows])

    def _hidden(self, sums: Tensor) -> Tensor:
        h: Tensor = self.activation(sums)
        for layer in self.layers[1:]:
            h = self.activation(layer(h))
        return h

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x [B, D] -> [B, D, size]."""
        sums = self.first(x)
        if self.context is not None and context is not None:
            sums = sums + self.context(context.to(sums.dtype))
        params: Tensor = self.last(self._hidden(sums))
        return params.reshape(-1, self.dims, self.size)


class MaskedAutoregressive(Transform):
    """z_d = bijection(x_d; params_d(x before d, context)), in one pass; the inverse takes D, one after another.

    Source: Papamakarios et al. 2017, section 3.1, arXiv:1705.07057.

    Args:
        bijection: of single coordinates.
        network: of vectors [B, D].
    """

    def __init__(self, bijection: Bijection, network: MaskedNetwork) -> None:
        super().__init__()
        self.bijection, self.network = bijection, network

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, slope = self.bijection.forward(x, self.network(x, context))
        return z, slope.sum(1)

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        sums = self.network.start(len(z), context)
        found: list[Tensor] = []
        for d, value in enumerate(z.unbind(1)):
            found.append(self.bijection.inverse(value, self.network.step(sums, d)))
            sums = self.network.admit(sums, d, found[-1])
            self.evaluations += 1
        return torch.stack(found, 1)


class Inverse(Transform):
    """A transform run the other way: what was quick in one direction is quick in the other.

    Args:
        inner: z -> x; its own inverse must be differentiable.
    """

    def __init__(self, inner: Transform) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z = self.inner.inverse(x, context)
        return z, -self.inner(z, context)[1]

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        self.evaluations += 1
        x: Tensor = self.inner(z, context)[0]
        return x


def masked_chain(
    dims: int, bijections: Sequence[Bijection], network: Network, context_dim: int, inverse: bool = False
) -> Chain:
    """An autoregressive transform of vectors [B, dims] for every bijection, the order reversed from one to the next.

    Args:
        dims: coordinates of a vector.
        bijections: of the layers, the first closest to the data.
        network: of every layer.
        context_dim: 0 without a context.
        inverse: the layers' inverses in their place.
    """
    parts: list[Transform] = []
    for i, bijection in enumerate(bijections):
        layer = MaskedAutoregressive(bijection, MaskedNetwork(dims, bijection.size, network, context_dim))
        parts += [Permutation(torch.arange(dims).flip(0))] if i else []
        parts += [Inverse(layer) if inverse else layer]
    return Chain(*parts)
