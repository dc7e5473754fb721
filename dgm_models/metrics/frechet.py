"""The Frechet distance of feature distributions: FID when the features are Inception's, FD-<extractor> otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm_models.metrics.estimate import Deleted, Estimate, checked, jackknife

MIN_GROUPS, MAX_GROUPS = 24, 4096
_WORK = 5e8  # groups x d^3 of one jackknife: about a second


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    With C = F F^T, the trace of (C_a C_b)^(1/2) is the sum of the singular values of F_a^T F_b: no matrix square root
    of an unsymmetric product, no imaginary parts, no added epsilon, and singular covariances are exact.

    Args:
        mean_a, mean_b: [d].
        cov_a, cov_b: [d, d], symmetric, positive semi-definite.
    Returns: in squared units of the features, >= 0 up to rounding; lower is better.
    Raises: ValueError when shapes disagree, a value is not finite, or a covariance is not symmetric or not positive.

    Source: Dowson, Landau 1982; Heusel et al. 2017, eq. 6, arXiv:1706.08500. Differs: papers' FID is this function on
    `moments` of 50,000 rows, with the bias that `frechet` removes.

    >>> zero, one = torch.zeros(2), torch.eye(2)
    >>> round(frechet_distance(zero, one, zero + 3, 4 * one), 9)  # 3^2 + 3^2 + (1 - 2)^2 + (1 - 2)^2
    20.0
    """
    d = mean_a.numel()
    for name, tensor, shape in (
        ("mean_a", mean_a, (d,)), ("cov_a", cov_a, (d, d)), ("mean_b", mean_b, (d,)), ("cov_b", cov_b, (d, d)),
    ):  # fmt: skip
        if tuple(tensor.shape) != shape or d == 0:
            raise ValueError(
                f"frechet_distance: {name}: shape {tuple(tensor.shape)}, expected {shape} as mean_a has it"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"frechet_distance: {name}: not finite; look for the features that made it so")
    factor_a, factor_b = _factor("cov_a", cov_a.double()), _factor("cov_b", cov_b.double())
    cross = torch.linalg.svdvals(factor_a.mT @ factor_b).sum()
    traces = cov_a.double().trace() + cov_b.double().trace()
    return float((mean_a.double() - mean_b.double()).square().sum() + traces - 2 * cross)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and unbiased covariance [d, d], float64, of features [n, d].

    Raises: ValueError when fewer than 2 rows, not finite, or all rows are equal.
    """
    features = checked("moments: features", features, 2)
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.mT @ centred / (len(features) - 1)


def frechet(real: Tensor, fake: Tensor, rows_per_dim: float = 10.0) -> Estimate:
    """Frechet distance of the distributions behind two samples, free of the bias of order 1/n, with a 95% interval.

    The plain distance of two samples of one distribution is positive (d = 64, n = 5000: 0.45). The jackknife over the
    rows of both samples removes that and gives the interval. Delete-one where that costs under about a second, else
    groups, at least 24. The estimate may be negative: then the samples are closer than their size can tell.

    Args:
        real: [n, d] features of data.
        fake: [m, d] features of samples.
        rows_per_dim: fewest rows for each feature. Below 10 what is left of the bias (of order 1/n^2) is no longer
            small; lower it only for high-dimensional extractors, and say so beside the number.
    Returns: in squared units of the features; lower is better.
    Raises: ValueError when rows are fewer than rows_per_dim d, not finite, all equal, or of unequal width.

    Source: Heusel et al. 2017, arXiv:1706.08500; the bias: Binkowski et al. 2018, arXiv:1801.01401, and
    Chong, Forsyth 2020, arXiv:1911.07023. Differs: jackknife in place of a fit over 1/n.
    """
    rows = _rows("frechet", rows_per_dim, real=real, fake=fake)
    whole, without_real, without_fake = _distances(*rows)
    return jackknife(whole, without_real, without_fake).interval(min(map(len, rows)))


def frechet_difference(real: Tensor, a: Tensor, b: Tensor, rows_per_dim: float = 10.0) -> Estimate:
    """frechet(real, a) - frechet(real, b), where the noise of the shared real rows cancels as far as it is shared.

    Each real row is left out of both distances at once, so the interval is that of the difference: it is what decides
    between two models, which two overlapping intervals do not.

    Args:
        real: [n, d] features of data.
        a, b: [m, d], [l, d] features of samples of two models, drawn independently of each other.
        rows_per_dim: as `frechet`.
    Returns: in squared units of the features; negative when `a` is better.
    Raises: as `frechet`.

    Source: as `frechet`.
    """
    rows = _rows("frechet_difference", rows_per_dim, real=real, a=a, b=b)
    whole_a, real_a, without_a = _distances(rows[0], rows[1])
    whole_b, real_b, without_b = _distances(rows[0], rows[2])
    return jackknife(
        whole_a - whole_b,
        Deleted(real_a.values - real_b.values, real_a.sizes),
        Deleted(without_a.values - whole_b, without_a.sizes),
        Deleted(whole_a - without_b.values, without_b.sizes),
    ).interval(min(map(len, rows)))


def _rows(caller: str, rows_per_dim: float, **samples: Tensor) -> list[Tensor]:
    rows = [checked(f"{caller}: {name}", tensor, 2) for name, tensor in samples.items()]
    for name, each in zip(samples, rows, strict=True):
        n, d = each.shape
        if d != rows[0].shape[1]:
            raise ValueError(
                f"{caller}: {name}: d = {d} features, but real has d = {rows[0].shape[1]}; use one extractor"
            )
        if n < rows_per_dim * d or n < MIN_GROUPS:
            needed = max(MIN_GROUPS, int(-(-rows_per_dim * d // 1)))
            raise ValueError(
                f"{caller}: {name}: n = {n} rows of d = {d} features; at least {needed} are needed"
                f" ({rows_per_dim:g} a feature): draw more rows, or use an extractor with fewer features"
            )
    return rows


def _distances(real: Tensor, fake: Tensor) -> tuple[float, Deleted, Deleted]:
    """The distance of all rows, without each group of real rows, and without each group of fake rows."""
    shift = real.mean(0)
    real, fake = real - shift, fake - shift  # sums of squares about the real mean keep their digits
    (mean_real, cov_real), (mean_fake, cov_fake) = moments(real), moments(fake)
    factor_real, factor_fake = _factor("real", cov_real), _factor("fake", cov_fake)
    # The whole goes through the same arithmetic as its parts: the jackknife multiplies their difference by n.
    whole = float(_to_gaussian(mean_real, cov_real, factor_real, mean_fake[None], cov_fake[None]))
    return (
        whole,
        _without(real, mean_real, mean_fake, cov_fake, factor_fake),
        _without(fake, mean_fake, mean_real, cov_real, factor_real),
    )


def _without(rows: Tensor, mean: Tensor, other_mean: Tensor, other_cov: Tensor, other_factor: Tensor) -> Deleted:
    """Distances from N(other_mean, other_cov) to the rows without each of their groups."""
    n, d = rows.shape
    groups = int(min(n, MAX_GROUPS, max(MIN_GROUPS, _WORK // d**3)))
    if groups < n:  # rows often come sorted by class: a group must be a random draw
        rows = rows[torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(rows.device)]
    centred = rows - mean
    scatter = centred.mT @ centred
    values, sizes = [], []
    step = max(1, 2**22 // d**2)
    for start in range(0, groups, step):
        # group g is the rows g, g + groups, ...: sizes differ by one at most
        members = [centred[g::groups] for g in range(start, min(start + step, groups))]
        size = torch.tensor([len(each) for each in members], dtype=rows.dtype, device=rows.device)
        total = torch.stack([each.sum(0) for each in members])  # [g, d]
        if groups == n:
            squares = total[:, :, None] * total[:, None, :]  # [g, d, d]
        else:
            squares = torch.stack([each.mT @ each for each in members])
        left = n - size
        means = -total / left[:, None]  # of what is left, about `mean`
        outer = means[:, :, None] * means[:, None, :]
        covs = (scatter - squares - left[:, None, None] * outer) / (left - 1)[:, None, None]
        values.append(_to_gaussian(other_mean, other_cov, other_factor, mean + means, covs))
        sizes.append(size)
    return Deleted(torch.cat(values), torch.cat(sizes))


def _to_gaussian(mean: Tensor, cov: Tensor, factor: Tensor, means: Tensor, covs: Tensor) -> Tensor:
    """[G] distances from one Gaussian (its covariance also as factor factor^T) to G of them."""
    squares = torch.linalg.eigvalsh(factor.mT @ covs @ factor)  # squared singular values, ascending
    # an exact zero comes out as rounding noise, and the root would make 1e-8 of 1e-16
    noise = squares[:, -1:].clamp_min(0) * squares.shape[1] * torch.finfo(squares.dtype).eps
    cross = torch.where(squares > noise, squares, 0).sqrt().sum(1)
    traces = cov.trace() + covs.diagonal(dim1=1, dim2=2).sum(1)
    distances: Tensor = (means - mean).square().sum(1) + traces - 2 * cross
    return distances


def _factor(name: str, cov: Tensor) -> Tensor:
    """F [d, d] with F F^T = cov, for singular covariances too."""
    scale = float(cov.abs().max())
    if not torch.allclose(cov, cov.mT, rtol=0.0, atol=1e-6 * scale):
        raise ValueError(f"frechet_distance: {name}: not symmetric; a covariance equals its transpose")
    values, vectors = torch.linalg.eigh(cov)
    if float(values[0]) < -1e-5 * scale:  # what float32 moments of many features can lose
        raise ValueError(
            f"frechet_distance: {name}: eigenvalue {float(values[0]):.3g} is negative; sum the moments in float64"
        )
    factor: Tensor = vectors * values.clamp_min(0).sqrt()
    return factor
