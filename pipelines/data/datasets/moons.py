"""Two interleaved half circles with Gaussian noise; the label is the half circle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipelines.data import toy
from pipelines.data.raw import Array


@dataclass(frozen=True)
class Moons(toy.Toy):
    """p(x) = 1/2 sum_arcs 1/pi int_0^pi N(x; arc(t), noise^2 I) dt, arcs (cos t, sin t) and (1 - cos t, 1/2 - sin t).

    The integral over the arc is Gauss-Legendre quadrature, so the density is that of a mixture at its nodes.

    Args:
        rows: how many to draw.
        noise: the standard deviation across the arcs, 0.02 to 2.
    """

    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        toy.check_spread("noise", self.noise, 0.02, 2.0)

    @property
    def components(self) -> int:
        return 2

    def entropy(self) -> float:
        return toy.mixture_entropy(self, *self._mixture(), self.noise)

    def box(self) -> tuple[float, float, float, float]:
        end = 8 * self.noise
        return -1 - end, 2 + end, -0.5 - end, 1 + end

    def _draw(self, keys: Tensor) -> tuple[Array, Array]:
        labels = toy.choice(keys, 2)
        t = math.pi * toy.uniform(keys, "arc")[:, 0]
        centre = np.where(labels[:, None] == 0, _outer(t), _inner(t))
        return centre + self.noise * toy.normal(keys, "noise"), labels

    def _log_density(self, x: Array) -> Array:
        return toy.log_mixture(x, *self._mixture(), self.noise)

    def _mixture(self) -> tuple[Array, Array]:
        """(centres [K, 2], weights [K])."""
        node, weight = np.polynomial.legendre.leggauss(math.ceil(6 / self.noise) + 16)  # at most 0.8 noise apart
        t = math.pi * (node + 1) / 2
        return np.concatenate([_outer(t), _inner(t)]), np.tile(weight / 4, 2)


def _outer(t: Array) -> Array:
    return np.stack([np.cos(t), np.sin(t)], axis=1)


def _inner(t: Array) -> Array:
    return np.stack([1 - np.cos(t), 0.5 - np.sin(t)], axis=1)
