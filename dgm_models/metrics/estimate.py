"""Estimate: a number, its 95% interval and the rows behind it; and the one way every metric gets its interval.

The way is the jackknife: recompute the statistic without some of the rows. By the Efron-Stein inequality its variance
is too large rather than too small on average, for every symmetric statistic; that is why likelihoods, eigenvalues,
kernels and nearest neighbours can share it. Smooth statistics leave out one row (or a group of rows) in turn, which
also removes a bias of order 1/n that a percentile bootstrap would add a second time; nearest neighbours leave out
random halves.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

CONFIDENCE = 0.95
MIN_ROWS = 20
HALVES = 100


@dataclass(frozen=True)
class Estimate:
    """A value inside its own interval.

    Attributes:
        value: the estimate.
        low, high: ends of the interval; low <= value <= high.
        n: rows of the smallest sample that it rests on.
    """

    value: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if not all(math.isfinite(number) for number in (self.value, self.low, self.high)):
            raise ValueError(
                f"estimate: {self.value} [{self.low}, {self.high}] is not finite; look at the inputs' range"
            )
        if not self.low <= self.value <= self.high:
            raise ValueError(f"estimate: {self.value} lies outside of its own interval [{self.low}, {self.high}]")


@dataclass(frozen=True)
class Deleted:
    """One sample's part in a delete-a-group jackknife.

    Attributes:
        values: [G] float64, the statistic with each of G groups of the sample's rows left out.
        sizes: [G] rows in each group, or None for groups of one row.
    """

    values: Tensor
    sizes: Tensor | None = None


@dataclass(frozen=True)
class Spread:
    """A statistic, its variance, and the degrees of freedom with which the variance is known."""

    value: float
    variance: float
    freedom: float

    def interval(self, n: int) -> Estimate:
        """value +- t se, the 95% t interval; n is the number of rows of the smallest sample."""
        half = student_quantile(self.freedom) * math.sqrt(self.variance)
        return Estimate(self.value, self.value - half, self.value + half, n)

    def share(self, n: int, rows: int) -> Estimate:
        """The 95% Wilson interval of a share, at as many rows as its variance says it is worth.

        Near 0 and 1 the symmetric interval leaves [0, 1], or has no width when all of a few rows agree. Wilson's, at
        value (1 - value) / variance rows, but at most `rows`, does neither.

        Args:
            n: rows of the smallest sample.
            rows: the number of rows that the share counts.
        Returns: a share with 0 <= low <= value <= high <= 1.

        Source: Wilson 1927; Korn, Graubard 1998 for the rows it is worth.
        """
        binomial = self.value * (1 - self.value)
        worth = min(float(rows), binomial / self.variance) if binomial > 0 and self.variance > 0 else float(rows)
        square = student_quantile(self.freedom) ** 2 / worth
        centre = (self.value + square / 2) / (1 + square)
        half = math.sqrt(square * (binomial + square / 4)) / (1 + square)
        low, high = max(0.0, centre - half), min(1.0, centre + half)
        return Estimate(self.value, min(low, self.value), max(high, self.value), n)


def jackknife(whole: float, *samples: Deleted, correct: bool = True) -> Spread:
    """The delete-a-group jackknife of a statistic of one or more independent samples.

    With h = rows / rows of the group and pseudo-values p = h whole - (h - 1) left_out, a sample adds the bias
    whole - sum(p / h) and the variance mean((p - sum(p / h))^2 / (h - 1)).

    Args:
        whole: the statistic of all rows.
        samples: for each sample, the statistic without each of its groups.
        correct: subtract the bias of order 1/n. Not for unbiased statistics, nor where the value at n is what is meant.
    Returns: in the statistic's unit; Welch-Satterthwaite degrees of freedom.
    Raises: ValueError when a sample has fewer than 2 groups.

    Source: Busing, Meijer, van der Leeden 1999, "Delete-m jackknife for unequal m"; Efron, Stein 1981 for the sign of
    the variance's error. Differs: several samples, each deleted in its own turn.
    """
    bias, variance, doubt = 0.0, 0.0, 0.0
    for sample in samples:
        groups = len(sample.values)
        if groups < 2:
            raise ValueError(f"jackknife: {groups} group(s) of rows; at least 2 are needed: give more rows")
        left_out = sample.values.double()
        sizes = torch.ones_like(left_out) if sample.sizes is None else sample.sizes.to(left_out)
        ratio = sizes.sum() / sizes
        pseudo = ratio * whole - (ratio - 1) * left_out
        mean = float((pseudo / ratio).sum())
        part = float(((pseudo - mean) ** 2 / (ratio - 1)).mean())
        bias += whole - mean
        variance += part
        doubt += part**2 / (groups - 1)
    return Spread(whole - bias if correct else whole, variance, variance**2 / doubt if doubt > 0 else math.inf)


def half_samples(rows: int, seed: int) -> Tensor:
    """[HALVES, rows] bool: which rows each of many random half samples keeps; the same for the same arguments."""
    draws = torch.rand(HALVES, rows, generator=torch.Generator().manual_seed(seed))
    return draws.argsort(1) < rows // 2


def delete_half(whole: float, halves: Tensor) -> Spread:
    """The delete-half jackknife, for statistics that are no smooth function of the rows, such as nearest neighbours.

    var = kept / deleted * Var(statistic of a half sample), here with kept = deleted. A local term that joins r rows is
    counted 2 - 2^(1-r) times in place of the r times of delete-one: the interval is at most 1.4 times too wide.

    Args:
        whole: the statistic of all rows.
        halves: [B] the statistic of B random halves (of every sample at once), drawn by `half_samples`.
    Returns: in the statistic's unit; no bias is removed.

    Source: Shao, Wu 1989, "A general theory for jackknife variance estimation". Differs: random halves.
    """
    return Spread(whole, float(halves.double().var()), len(halves) - 1.0)


@functools.lru_cache(maxsize=1024)
def student_quantile(freedom: float) -> float:
    """The t with P(|T| <= t) = 0.95 for Student's T of `freedom` >= 1 degrees; 1.95996 for infinitely many.

    P(|T| <= sqrt(v) tan a) is the integral of cos^(v-1) from 0 to a over that from 0 to pi/2; relative error 1e-6.
    """
    if freedom > 1e5:
        return NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    angle = np.linspace(0.0, math.pi / 2, 100_001)
    density = np.cos(angle[:-1] + angle[1] / 2) ** (freedom - 1)  # midpoints
    mass = np.concatenate([[0.0], np.cumsum(density)])
    return math.sqrt(freedom) * math.tan(float(np.interp(CONFIDENCE * mass[-1], mass, angle)))


def checked(name: str, features: Tensor, minimum: int = MIN_ROWS, *, varied: bool = True) -> Tensor:
    """`features` in float64, once they are fit to be measured.

    Args:
        name: what the rows are called in errors.
        features: [n, d], any real dtype.
        minimum: fewest rows.
        varied: refuse rows that are all alike.
    Returns: [n, d] float64.
    Raises: ValueError when the shape is not [n, d] with d > 0, a value is not finite, rows are too few or all alike.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name}: shape {tuple(features.shape)}, expected [n, d] with d > 0; flatten each example")
    if len(features) < minimum:
        raise ValueError(f"{name}: {len(features)} rows, at least {minimum} are needed; draw more")
    features = features.detach().double()
    finite = features.isfinite().all(1)
    if not finite.all():
        raise ValueError(
            f"{name}: {int((~finite).sum())} of {len(features)} rows are not finite (first: row"
            f" {int(finite.logical_not().nonzero()[0])}); find what produced them, do not drop them"
        )
    if varied and bool((features == features[0]).all()):
        raise ValueError(f"{name}: all {len(features)} rows are equal; a constant has no distribution to compare")
    return features
