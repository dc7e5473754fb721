"""How autoregressive networks take values in: in which order, whole levels as inputs, and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_models.codecs import centred
from dgm_models.conditions import Condition
from dgm_models.nn.conditioner import Conditioner
from dgm_models.protocols import DataSpec

ONE_HOT_LEVELS = 32  # up to here an input is one-hot; above, one number in [-1, 1] unless levels have no order

Order = Literal["raster", "random"]


def in_order(data: DataSpec, order: Order, seed: int) -> Tensor:
    """[D, 1] int64, for `Autoregressive.places`: one value a place, in the stored order or in one drawn by the seed."""
    if order == "raster":
        return torch.arange(data.dims)[:, None]
    return torch.randperm(data.dims, generator=torch.Generator().manual_seed(seed))[:, None]


@dataclass(frozen=True)
class Entry:
    """Values as a network's inputs, `size` numbers each.

    Two levels are one number, -1 or 1, or 0 or 1 where not `signed`. Up to 32 levels, and codes, are one-hot. More are
    one number in [-1, 1], and real values are entered as they are.
    """

    data: DataSpec
    signed: bool = True

    @property
    def size(self) -> int:
        levels = self.data.levels
        if levels is None or levels == 2 or (self.data.kind != "codes" and levels > ONE_HOT_LEVELS):
            return 1
        return levels

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, K] model-space values -> [B, K, size]."""
        if self.size > 1:
            return F.one_hot(x, self.size).to(dtype)
        if self.data.levels == 2 and not self.signed:
            return x.to(dtype)[..., None]
        return centred(x, self.data).to(dtype)[..., None]


def label_conditioner(condition: Condition | None, data: DataSpec) -> Conditioner:
    """The conditioner of a network over flat vectors, which reads labels alone.

    Raises: ValueError for a condition that is an image.
    """
    conditioner = Conditioner(condition, data)
    if condition and not conditioner.vector_dim:
        raise ValueError(f"cond: {condition.name} is an image, and this network reads labels; use {{name: label}}")
    return conditioner
