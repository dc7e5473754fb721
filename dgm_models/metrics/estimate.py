"""Estimate: a number, its 95% interval and the rows behind it; and the one way every metric gets its interval.

The way is the jackknife: recompute the statistic without one row (or one group of rows) of each sample in turn. By the
Efron-Stein inequality its variance is too large rather than too small on average, for every symmetric statistic, smooth
or not; that is why nearest neighbours, kernels and eigenvalues can share it. It also removes a bias of order 1/n, which
a percentile bootstrap would add a second time.
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
    """One sample's share in a jackknife.

    Attributes:
        values: [G] float64, the statistic with each of G groups of the sample's rows left out.
        sizes: [G] rows in each group, or None for groups of one row.
    """

    values: Tensor
    sizes: Tensor | None = None


@dataclass(frozen=True)
class Jackknifed:
    """What a jackknife knows: the value without its bias of order 1/n, the variance, and the variance's freedom."""

    corrected: float
    variance: float
    freedom: float


def deletion(whole: float, *samples: Deleted) -> Jackknifed:
    """The delete-a-group jackknife of a statistic of one or more independent samples.

    With h = rows / rows of the group and pseudo-value p = h whole - (h - 1) left_out, a sample has the bias
    whole - sum(p / h) and the variance mean((p - sum(p / h))^2 / (h - 1)); both add over samples.

    Args:
        whole: the statistic of all rows.
        samples: for each sample, the statistic without each of its groups.
    Returns: the corrected value, in the statistic's unit, its variance, and Welch-Satterthwaite degrees of freedom.
    Raises: ValueError when a sample has fewer than 2 groups.

    Source: Busing, Meijer, van der Leeden 1999, "Delete-m jackknife for unequal m", eq. 5-7; Efron, Stein 1981 for the
    sign of the variance's error. Differs: several samples, each deleted in its own turn.
    """
    bias, variance, spread = 0.0, 0.0, 0.0
    for sample in samples:
        groups = len(sample.values)
        if groups < 2:
            raise ValueError(f"jackknife: {groups} group(s) of rows; at least 2 are needed: give more rows")
        left_out = sample.values.double()
        sizes = torch.ones_like(left_out) if sample.sizes is None else sample.sizes.to(left_out)
        ratio = sizes.sum() / sizes
        pseudo = ratio * whole - (ratio - 1) * left_out
        mean = float((pseudo / ratio).sum())
        share = float(((pseudo - mean) ** 2 / (ratio - 1)).mean())
        bias += whole - mean
        variance += share
        spread += share**2 / (groups - 1)
    return Jackknifed(whole - bias, variance, variance**2 / spread if spread > 0 else math.inf)


def jackknife(whole: float, *samples: Deleted, n: int, correct: bool = True) -> Estimate:
    """Value and 95% t interval, value +- t se, from what `deletion` knows.

    Args:
        whole, samples: as `deletion`.
        n: rows of the smallest sample.
        correct: remove the bias of order 1/n. Not for unbiased statistics, nor where the convention is a value at n.
    Returns: in the statistic's unit.
    """
    known = deletion(whole, *samples)
    value = known.corrected if correct else whole
    half = student_quantile(known.freedom) * math.sqrt(known.variance)
    return Estimate(value, value - half, value + half, n)


def jackknife_share(whole: float, *samples: Deleted, n: int, rows: int) -> Estimate:
    """A share in [0, 1] of `rows` rows and its 95% Wilson interval, at the rows that its jackknife variance is worth.

    A share of 1 - 1/rows or a variance of zero would give a symmetric interval that leaves [0, 1] or has no width. The
    Wilson interval of an effective count of rows, whole (1 - whole) / variance and at most `rows`, does neither.

    Args:
        whole, samples: as `deletion`; whole in [0, 1].
        n: rows of the smallest sample.
        rows: the number of rows that the share counts.
    Returns: a share; low and high in [0, 1].

    Source: Wilson 1927; Korn, Graubard 1998 for the effective count.
    """
    known = deletion(whole, *samples)
    binomial = whole * (1 - whole)
    worth = min(float(rows), binomial / known.variance) if binomial > 0 and known.variance > 0 else float(rows)
    square = student_quantile(known.freedom) ** 2 / worth
    centre = (whole + square / 2) / (1 + square)
    half = math.sqrt(square * (binomial + square / 4)) / (1 + square)
    return Estimate(whole, max(0.0, min(whole, centre - half)), min(1.0, max(whole, centre + half)), n)


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
