"""Two-dimensional data whose density is a known function, so that a model's likelihood has a known optimum."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dgm_models import noise as keyed
from pipelines.data.raw import Array, Raw, Source

T = TypeVar("T", Array, Tensor)
CHUNK = 1 << 11  # points at a time: a mixture with hundreds of components stays in the processor's cache


@dataclass(frozen=True)
class Toy(ABC):
    """Rows are a function of (settings, seed, row number): more rows begin with the same rows.

    Args:
        rows: how many to draw.
    """

    rows: int = 20_000

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows: {self.rows}; expected at least 1")

    def read(self, seed: int) -> Raw:
        name = type(self).__name__
        x, labels = self._draw(keyed.fold(torch.arange(self.rows), "toy", name, seed))
        return Raw(
            x=x.astype(np.float32),
            labels=labels,
            kind="vector",
            classes=self.components if labels is not None else 0,
            licence="generated; no rights reserved",
            source=Source(f"generated: {self}, seed {seed}"),
            entropy_nats=self.entropy(),
        )

    def log_density(self, x: T) -> T:
        """The exact log-density.

        Args:
            x: [N, 2], numpy or torch (CPU).
        Returns: [N] nats, float64, of the same library; -inf outside the support.
        """
        points = np.asarray(x, dtype=np.float64)
        chunks = [self._log_density(points[start : start + CHUNK]) for start in range(0, len(points), CHUNK)]
        values = np.concatenate(chunks) if chunks else np.empty(0)
        return torch.from_numpy(values) if isinstance(x, Tensor) else values

    @property
    def components(self) -> int:
        """How many labels there are."""
        return 0

    @abstractmethod
    def entropy(self) -> float:
        """-E[log p] of one example in nats: the least negative log-likelihood that any model can reach."""

    @abstractmethod
    def box(self) -> tuple[float, float, float, float]:
        """(left, right, bottom, top): what lies outside has less than 1e-10 of the mass."""

    @abstractmethod
    def _draw(self, keys: Tensor) -> tuple[Array, Array | None]:
        """([N, 2] float64, [N] labels or None) from [N] keys."""

    @abstractmethod
    def _log_density(self, x: Array) -> Array: ...


def uniform(keys: Tensor, stream: str, count: int = 1) -> Array:
    """[N, count] in (0, 1), float64."""
    return keyed.uniform(keys, stream, (count,), torch.float64).numpy()


def normal(keys: Tensor, stream: str, count: int = 2) -> Array:
    """[N, count] standard normal, float64."""
    return keyed.normal(keys, stream, (count,), torch.float64).numpy()


def choice(keys: Tensor, count: int) -> Array:
    """[N] int32, uniform over 0..count-1."""
    return (uniform(keys, "component")[:, 0] * count).astype(np.int32)


def rotate(x: Array, angle: Array | float) -> Array:
    """x [..., 2] turned by `angle` (radians, counter-clockwise)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], axis=-1)


def log_sum_exp(a: Array) -> Array:
    """[N] from [N, K], without overflow."""
    top = a.max(axis=1, keepdims=True)
    total: Array = np.log(np.exp(a - top).sum(axis=1)) + top[:, 0]
    return total


def log_mixture(x: Array, centres: Array, weights: Array, noise: float) -> Array:
    """log sum_k w_k N(x; c_k, noise^2 I) at x [N, 2], for centres [K, 2] and weights [K] that sum to 1."""
    distance: Array = (x**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * x @ centres.T  # [N, K]
    return log_sum_exp(np.log(weights) - distance / (2 * noise**2)) - math.log(2 * math.pi * noise**2)


def mixture_entropy(toy: Toy, centres: Array, weights: Array, noise: float) -> float:
    """-integral of p log p in nats for the density of `log_mixture`.

    On a grid N(x; c, noise^2 I) is a product of a factor of the column and one of the row, so the density is a
    matrix product. Cells are a third of `noise`; see `grid_integrals` for the error.
    """
    left, right, bottom, top = toy.box()
    sides = [np.arange(low, high, noise / 3) for low, high in ((left, right), (bottom, top))]
    column, row = (
        np.exp(-((side[:, None] - centres[:, axis]) ** 2) / (2 * noise**2)) for axis, side in enumerate(sides)
    )
    p = (column * weights) @ row.T / (2 * math.pi * noise**2)
    p = p[p > 0]
    return -float((p * np.log(p)).sum()) * (noise / 3) ** 2


def grid_integrals(toy: Toy, step: float) -> tuple[float, float]:
    """(integral of p, -integral of p log p in nats) by the midpoint rule with cells of at most `step`.

    For a density made of Gaussians the error falls like exp(-2 (pi sd / step)^2): a third of the sd is exact.
    """
    left, right, bottom, top = toy.box()
    columns, rows = (math.ceil((high - low) / step) for low, high in ((left, right), (bottom, top)))
    width, height = (right - left) / columns, (top - bottom) / rows
    x = left + width * (np.arange(columns) + 0.5)
    mass = entropy = 0.0
    for j in range(rows):
        line = toy.log_density(np.stack([x, np.full(columns, bottom + height * (j + 0.5))], axis=1))
        line = line[np.isfinite(line)]  # p log p is 0 where p is 0
        mass += float(np.exp(line).sum()) * width * height
        entropy -= float((np.exp(line) * line).sum()) * width * height
    return mass, entropy


def check_spread(name: str, value: float, low: float, high: float) -> None:
    """Raises: ValueError for a standard deviation outside [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name}: {value}; expected {low} to {high}")
