"""Curved arms around the origin; the label is the arm."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from pipelines.data import toy
from pipelines.data.raw import Array


@dataclass(frozen=True)
class Pinwheel(toy.Toy):
    """x = R(rate exp|f|) f, f ~ 1/arms sum_k N(R(2 pi k / arms) (1, 0), radial^2 along the arm, noise^2 across).

    The swirl R turns every circle in itself, so it keeps areas: p(x) = p_f(R(-rate exp|x|) x), with no factor,
    and the entropy is that of f.

    Args:
        rows: how many to draw.
        noise: the standard deviation across an arm, 0.02 to 1.
        radial: the standard deviation along an arm, 0.02 to 1.
        rate: how strongly the arms are curved, 0 to 1; 0 is straight.
        arms: how many.

    Source: the pinwheel of Johnson et al. 2016, arXiv:1603.06277. Differs: the angle depends on |f|, not on f's
    first coordinate, which makes the Jacobian one.
    """

    noise: float = 0.1
    radial: float = 0.3
    rate: float = 0.25
    arms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        toy.check_spread("noise", self.noise, 0.02, 1.0)
        toy.check_spread("radial", self.radial, 0.02, 1.0)
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate: {self.rate}; expected 0 to 1")
        if not 1 <= self.arms <= 100:
            raise ValueError(f"arms: {self.arms}; expected 1 to 100")

    @property
    def components(self) -> int:
        return self.arms

    def entropy(self) -> float:
        return toy.grid_integrals(replace(self, rate=0.0), min(self.noise, self.radial) / 3)[1]

    def box(self) -> tuple[float, float, float, float]:
        end = 1 + 8 * max(self.noise, self.radial)
        return -end, end, -end, end

    def _draw(self, keys: Tensor) -> tuple[Array, Array]:
        labels = toy.choice(keys, self.arms)
        straight = (1.0, 0.0) + toy.normal(keys, "noise") * (self.radial, self.noise)
        return self._swirl(toy.rotate(straight, 2 * math.pi / self.arms * labels), self.rate), labels

    def _log_density(self, x: Array) -> Array:
        feature = self._swirl(x, -self.rate)
        angle = 2 * math.pi / self.arms * np.arange(self.arms)
        offset = (toy.rotate(feature[:, None], -angle) - (1.0, 0.0)) / (self.radial, self.noise)  # [N, arms, 2]
        scale = math.log(2 * math.pi * self.radial * self.noise * self.arms)
        return toy.log_sum_exp(-0.5 * (offset**2).sum(2)) - scale

    @staticmethod
    def _swirl(x: Array, rate: float) -> Array:
        radius = np.minimum(np.hypot(x[:, 0], x[:, 1]), 50.0)  # exp stays finite where the density is 0 anyway
        return toy.rotate(x, rate * np.exp(radius))
