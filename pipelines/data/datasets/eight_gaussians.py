"""Eight Gaussians on a circle of radius 2; the label is the component."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipelines.data import toy
from pipelines.data.raw import Array

RADIUS = 2.0


@dataclass(frozen=True)
class EightGaussians(toy.Toy):
    """p(x) = 1/8 sum_k N(x; 2 (cos k pi/4, sin k pi/4), noise^2 I).

    Args:
        rows: how many to draw.
        noise: the standard deviation of every component, 0.02 to 2.
    """

    noise: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        toy.check_spread("noise", self.noise, 0.02, 2.0)

    @property
    def components(self) -> int:
        return 8

    def entropy(self) -> float:
        return toy.mixture_entropy(self, *self._mixture(), self.noise)

    def box(self) -> tuple[float, float, float, float]:
        end = RADIUS + 8 * self.noise
        return -end, end, -end, end

    def _mixture(self) -> tuple[Array, Array]:
        """(centres [8, 2], weights [8])."""
        angle = np.arange(8) * (math.pi / 4)
        return RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=1), np.full(8, 1 / 8)

    def _draw(self, keys: Tensor) -> tuple[Array, Array]:
        labels = toy.choice(keys, 8)
        return self._mixture()[0][labels] + self.noise * toy.normal(keys, "noise"), labels

    def _log_density(self, x: Array) -> Array:
        return toy.log_mixture(x, *self._mixture(), self.noise)
