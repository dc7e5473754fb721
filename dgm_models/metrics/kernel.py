"""The kernel distance of feature distributions: KID when the features are Inception's."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm_models.metrics.estimate import Deleted, Estimate, checked, jackknife

_BLOCK = 4096  # rows of a kernel block: 128 MB in float64


def kernel_distance(real: Tensor, fake: Tensor) -> Estimate:
    """Squared maximum mean discrepancy under k(x, y) = (x.y / d + 1)^3, unbiased, with a 95% jackknife interval.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j): zero in expectation, so negative
    half of the time, when the distributions are one. All pairs are used; leaving one row out costs a row sum.

    Args:
        real: [n, d] features of data, n >= 20.
        fake: [m, d] features of samples, m >= 20.
    Returns: KID, not multiplied by 1000; lower is better.
    Raises: ValueError when rows are too few, not finite, all equal, or of unequal width.

    Source: Binkowski et al. 2018, arXiv:1801.01401; Gretton et al. 2012, eq. 3. Differs: one U-statistic
    over all pairs in place of the mean over subsets of 1000, which has more variance and no interval.
    """
    real = checked("kernel_distance: real", real)
    fake = checked("kernel_distance: fake", fake)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"kernel_distance: {fake.shape[1]} fake features, {real.shape[1]} real; use one extractor")
    n, m = len(real), len(fake)
    real_rows = _row_sums(real, real) - _kernel(real, real)  # [n] over the other real rows
    fake_rows = _row_sums(fake, fake) - _kernel(fake, fake)
    real_cross, fake_cross = _row_sums(real, fake), _row_sums(fake, real)
    within_real, within_fake, cross = real_rows.sum(), fake_rows.sum(), real_cross.sum()

    def distance(real_pairs: Tensor, fake_pairs: Tensor, mixed: Tensor, rows: int, fakes: int) -> Tensor:
        means = real_pairs / (rows * (rows - 1)) + fake_pairs / (fakes * (fakes - 1))
        return means - 2 * mixed / (rows * fakes)

    return jackknife(
        float(distance(within_real, within_fake, cross, n, m)),
        Deleted(distance(within_real - 2 * real_rows, within_fake, cross - real_cross, n - 1, m)),
        Deleted(distance(within_real, within_fake - 2 * fake_rows, cross - fake_cross, n, m - 1)),
        correct=False,
    ).interval(min(n, m))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """k of rows one by one: [n, d], [n, d] -> [n]."""
    return ((x * y).sum(1) / x.shape[1] + 1) ** 3


def _row_sums(x: Tensor, y: Tensor) -> Tensor:
    """[n]: sum over the rows of y of k(x_i, y_j)."""
    sums = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), _BLOCK):
        for other in range(0, len(y), _BLOCK):
            gram = x[start : start + _BLOCK] @ y[other : other + _BLOCK].mT / x.shape[1] + 1
            sums[start : start + _BLOCK] += (gram * gram * gram).sum(1)
    return sums
