"""The eight dark unit squares of a 4 x 4 board on [-2, 2]^2; no labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipelines.data import toy
from pipelines.data.raw import Array


@dataclass(frozen=True)
class Checkerboard(toy.Toy):
    """p(x) = 1/8 where floor(x_1) + floor(x_2) is even and both lie in [-2, 2), else 0; entropy log 8.

    Args:
        rows: how many to draw.
    """

    def entropy(self) -> float:
        return math.log(8)

    def box(self) -> tuple[float, float, float, float]:
        return -2.0, 2.0, -2.0, 2.0

    def _draw(self, keys: Tensor) -> tuple[Array, None]:
        square = toy.choice(keys, 8)
        row, place = np.divmod(square, 2)
        corner = np.stack([2 * place + row % 2 - 2, row - 2], axis=1)
        within = (np.floor(toy.uniform(keys, "within", 2) * 2**20) + 0.5) / 2**20  # exact in float32: none on an edge
        return corner + within, None

    def _log_density(self, x: Array) -> Array:
        dark = (np.floor(x).sum(1) % 2 == 0) & (x >= -2).all(1) & (x < 2).all(1)
        return np.where(dark, -math.log(8), -np.inf)
