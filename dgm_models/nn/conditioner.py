"""How networks read a condition: as more coordinates of a vector, or as more channels of data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.nn.networks import Network
from dgm_models.protocols import DataSpec

IMAGE_DIM = 64  # coordinates of an image condition's vector


def check(condition: Condition | None, cond: Tensor | None) -> None:
    """Raises ValueError when a condition is given that the model does not take, or missing where it takes one."""
    if condition is None and cond is not None:
        raise ValueError("cond: this model was built without a condition")
    if condition is not None and cond is None:
        raise ValueError(f"cond: missing; this model was built with {{name: {condition.name}}}")


class Conditioner(nn.Module):
    """One player's reading of a condition; without a condition it changes nothing.

    Args:
        condition: what is asked for, or None.
        data: what is modelled.
        network: turns an image into the vector of `vector`. Without one, an image can only be joined; a
            player that does not call `vector` gives none, so that it has no parameter without a gradient.
    Attributes:
        vector_dim: the length of `vector`: the number of classes, that of tokens times that of their values, or 64 for
            an image; 0 without a condition.
        planes: what `join` appends: as many as the vector has for labels and tokens, or the image's channels; 0
            without a condition.
    Raises: ValueError when the data cannot have the condition.
    """

    def __init__(self, condition: Condition | None, data: DataSpec, network: Network | None = None) -> None:
        super().__init__()
        self.condition = condition
        self.spec = condition.spec(data) if condition else None
        self.vector_dim = self.planes = 0
        self.network: nn.Module | None = None
        if self.spec and self.spec.kind == "tokens":
            self.vector_dim = self.planes = self.spec.dims * (self.spec.levels or 0)
        elif self.spec:
            self.planes = self.spec.shape[0]
            if network:
                self.vector_dim = IMAGE_DIM
                self.network = network.down(self.spec.shape, IMAGE_DIM)

    def vector(self, cond: Tensor | None) -> Tensor:
        """[B, vector_dim]: one-hot for labels and for each token, a network's output for images."""
        check(self.condition, cond)
        assert cond is not None and self.spec is not None
        if self.spec.kind == "tokens":
            return (cond[..., None] == torch.arange(self.spec.levels or 0, device=cond.device)).flatten(1).float()
        assert self.network is not None
        found: Tensor = self.network(cond)
        return found

    def with_vector(self, z: Tensor, cond: Tensor | None) -> Tensor:
        """[B, D] -> [B, D + vector_dim]."""
        check(self.condition, cond)
        return z if cond is None else torch.cat([z, self.vector(cond).to(z.dtype)], 1)

    def join(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """[B, C, ...] -> [B, C + planes, ...]: a label's one-hot is constant over the remaining axes."""
        check(self.condition, cond)
        if cond is None or self.spec is None:
            return x
        planes = cond
        if self.spec.kind == "tokens":
            planes = self.vector(cond).reshape(len(x), self.planes, *[1] * (x.ndim - 2))
        return torch.cat([x, planes.to(x.dtype).expand(-1, -1, *x.shape[2:])], 1)

    def joined(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one joined example of data of that shape."""
        return (shape[0] + self.planes, *shape[1:])
