"""Does every code tell one known factor, and one code every factor: the mutual information gap in two conventions, DCI.

Intervals are delete-a-group jackknives over `GROUPS` groups of rows; row i is in group i mod GROUPS, so rows may not be
sorted. They are of the number at this n: no bias is removed, since published numbers have theirs in them. Neither the
choice of the factors' grid nor the spread over training seeds, which is large, is in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dgm_models.metrics.estimate import MIN_ROWS, Deleted, Estimate, checked, jackknife

GROUPS = 20
BINS = 20  # of disentanglement_lib
PIECES = 8  # of each function in `dci`
ROWS_A_COEFFICIENT = 4
RIDGE = 1e-6  # of a variance near 0.1: it only keeps codes that never vary from having any coefficient
_BLOCK = 1 << 22  # densities held at once


@dataclass(frozen=True)
class Gap:
    """A mutual information gap.

    Attributes:
        score: the mean over factors; higher is better, 1 where one code tells each factor wholly and no other tells it.
        factors: each factor's own gap, a share of its entropy.
        information: [D, F] nats between each code and each factor.
        entropy: [F] nats of each factor.
    """

    score: Estimate
    factors: tuple[Estimate, ...]
    information: Tensor
    entropy: Tensor


def mig_histogram(means: Tensor, factors: Tensor) -> Gap:
    """(1/F) sum_k (I(z_1; v_k) - I(z_2; v_k)) / H(v_k), z_1 and z_2 the two codes that tell most of v_k.

    Each code is cut into 20 bins of one width between its extremes: of V > 20 equally frequent values no more than
    log 20 / log V can be told. With few rows every I is too large, by about (B - 1)(V - 1) / (2 n) nats for B bins in
    use, and the gap too small. Five codes that are the factors of dSprites (3, 6, 40, 32, 32 values) and five of noise
    get 0.83 with 1,000 rows, 0.87 with 2,000, 0.89 with 5,000, and 0.91 in the limit.

    Args:
        means: [n, D] posterior means, D >= 2.
        factors: [n, F] integers from 0, each with at least two values.
    Raises: ValueError for wrong shapes, few rows, a value that is not finite, a constant factor.

    Source: Chen et al. 2018, eq. 6, arXiv:1802.04942, for the gap; Locatello et al. 2019, arXiv:1811.12359, for bins.
    """
    codes, factors = _checked("mig_histogram", means, factors)
    group = _groups(len(codes))
    low, high = codes.amin(0), codes.amax(0)
    bins = ((codes - low) / (high - low).clamp_min(1e-300) * BINS).long().clamp(0, BINS - 1)
    information, entropy = [], []
    for factor in factors.T:
        values = _size(factor)
        tables = [_tables((group * BINS + code) * values + factor, (BINS, values)) for code in bins.T]
        entropy.append(_entropy(tables[0].sum(1)))
        information.append(torch.stack([_information(table) for table in tables], 1))
    return _gap(torch.stack(information, 2), torch.stack(entropy, 1), group)


def mig_sampled(means: Tensor, log_variances: Tensor, factors: Tensor, eps: Tensor) -> Gap:
    """The gap of `mig_histogram` for codes z = mean + std * eps drawn from q(z|x), without bins.

    I(z_j; v_k) = E[log q(z_j|v_k) - log q(z_j)]; q(z_j) is the mean of q(z_j|x) over the rows, q(z_j|v_k) that over the
    rows with this v_k; the expectation is over the rows' own draws, one a row. So the rows count as the whole
    population, as in the paper; taken as a sample of more, every I is too large, the more the narrower the posteriors
    and the fewer the rows of a value. Codes with a posterior deviation of 0.0025 that are the factors of dSprites, and
    five that ignore x, get 0.86 with 1,000 rows, 0.93 with 2,000, 0.97 with 5,000, and 1 in the limit.

    Args:
        means, log_variances: [n, D] of the posteriors, D >= 2.
        factors: as `mig_histogram`.
        eps: [n, D] standard normal.
    Raises: as `mig_histogram`.

    Source: Chen et al. 2018, eq. 6 and appendix C, arXiv:1802.04942. Differs: one draw a row instead of 10,000 in all.
    """
    codes, factors = _checked("mig_sampled", means, factors)
    precision = torch.exp(-0.5 * checked("mig_sampled: log_variances", log_variances, varied=False))
    if precision.shape != codes.shape or eps.shape != codes.shape:
        raise ValueError(
            f"mig_sampled: means {tuple(codes.shape)}, log_variances {tuple(precision.shape)}, eps {tuple(eps.shape)}; "
            "expected one shape"
        )
    group = _groups(len(codes))
    kept = torch.cat([torch.ones(len(codes), 1), group[:, None] != torch.arange(GROUPS)], 1)  # [n, 1 + G]
    everyone = torch.zeros_like(group)
    information = []
    for mean, scale, noise in zip(codes.T, precision.T, eps.double().T, strict=True):
        z = mean + noise / scale
        marginal = _log_mean_density(z, mean, scale, everyone, kept)
        given = [_log_mean_density(z, mean, scale, factor, kept) for factor in factors.T]
        information.append(torch.stack([((each - marginal) * kept).sum(0) for each in given], 1))
    counts = [_tables(group * _size(factor) + factor, (_size(factor),)) for factor in factors.T]
    entropy = torch.stack([_entropy(count) for count in counts], 1)
    return _gap(torch.stack(information, 1) / kept.sum(0).double()[:, None, None], entropy, group)


def _log_mean_density(z: Tensor, mean: Tensor, scale: Tensor, factor: Tensor, kept: Tensor) -> Tensor:
    """log of the mean of N(z_s; mean_r, 1 / scale_r^2) over the rows r with the factor value of row s, plus a constant.

    Args:
        z, mean, scale: [n] of one code.
        factor: [n] integers.
        kept: [n, 1 + G] 1 where a row counts, else 0; the first column is of ones.
    Returns: [n, 1 + G] nats, one for each column of `kept`; finite where row s itself counts.
    """
    found = torch.zeros(kept.shape, dtype=torch.float64)
    for value in range(_size(factor)):
        rows = (factor == value).nonzero()[:, 0]
        sizes = kept[rows].sum(0).clamp_min(1)
        step = max(1, _BLOCK // max(1, len(rows)))
        for some in (rows[start : start + step] for start in range(0, len(rows), step)):
            distance = (z[some, None] - mean[rows]) * scale[rows]
            density = scale[rows].float() * torch.exp(-0.5 * distance.float() ** 2)  # float32 halves the time
            mean_density = density @ kept[rows] / sizes
            found[some] = mean_density.where(kept[some] > 0, 1.0).double().log()
    return found


@dataclass(frozen=True)
class Dci:
    """Disentanglement, completeness and informativeness; all higher is better.

    Attributes:
        disentanglement: 1 where every code that matters matters for one factor alone; 0 where for all alike.
        completeness: 1 where every factor is told by one code alone; 0 where by all alike.
        informativeness: R^2 of the factors on rows that the functions were not fitted to, the mean over factors.
        importance: [D, F] the share of each factor's variance that each code's function has.
        told: [F] R^2 of each factor on held-out rows.
    """

    disentanglement: Estimate
    completeness: Estimate
    informativeness: Estimate
    importance: Tensor
    told: Tensor


def dci(codes: Tensor, factors: Tensor) -> Dci:
    """Predicts every factor from the codes by sum_i f_i(z_i) and asks which f_i vary: R_ik = Var f_i(z_i) / Var v_k.

    Disentanglement is sum_i w_i (1 - H(R_i. / sum_k R_ik)), entropy to base F and w_i the code's share of all R;
    completeness is the same of the factors, to base D. The f_i are continuous and linear between the codes' quantiles
    0, 1/8, .. 1, fitted by least squares to the value's number; informativeness is by 20-fold cross-validation.

    A code that tells nothing still gets R of about 8 / n times the variance that is not explained: with few rows, or
    with factors that are told badly, disentanglement and completeness are too low.

    Args:
        codes: [n, D], D >= 2.
        factors: [n, F] integers from 0, F >= 2, each with at least two values; their order is taken for a scale.
    Raises: ValueError as `mig_histogram`, and for fewer rows than 4 for each coefficient.

    Source: Eastwood and Williams 2018, ICLR. Differs: the regressors (there lasso and random forests, gradient boosting
    in Locatello et al. 2019), so what several codes tell only together counts as not told, and the order of a factor
    without order matters; informativeness is R^2 and not an error; completeness is weighted like disentanglement.
    """
    codes, factors = _checked("dci", codes, factors)
    n, width = codes.shape
    if factors.shape[1] < 2:
        raise ValueError("dci: one factor; at least 2 are needed: with one there is nothing to disentangle")
    if n < ROWS_A_COEFFICIENT * width * PIECES:
        raise ValueError(
            f"dci: {n} rows for {width} codes; {ROWS_A_COEFFICIENT * width * PIECES} are needed, {ROWS_A_COEFFICIENT} "
            f"for each of {PIECES} coefficients a code: give more rows"
        )
    group = _groups(n)
    knots = codes.quantile(torch.linspace(0, 1, PIECES + 1, dtype=torch.float64), dim=0)  # [9, D]
    rise = (knots[1:] - knots[:-1]).clamp_min(1e-300)
    ramps = ((codes[:, None] - knots[:-1]) / rise).clamp(0, 1)  # [n, 8, D]: 0 before a piece, 1 after it
    design = torch.cat([torch.ones(n, 1, dtype=torch.float64), ramps.transpose(1, 2).flatten(1)], 1)
    target = factors.double()
    both = torch.cat([design, (target - target.mean(0)) / target.std(0)], 1)
    moments = torch.stack([rows.T @ rows for rows in (both[group == g] for g in range(int(group.max()) + 1))])
    fitted = _left_out(moments)  # [1 + G, 1 + 8 D + F, ..]: all that a fit needs, for all rows and without each group
    last = design.shape[1]
    count = fitted[:, :1, :1]
    centre = fitted[:, :1] / count
    spread = fitted / count - centre.transpose(1, 2) * centre  # covariances
    inner = spread[:, 1:last, 1:last] + RIDGE * torch.eye(last - 1, dtype=torch.float64)
    weight = torch.linalg.solve(inner, spread[:, 1:last, last:])  # [1 + G, 8 D, F]
    blocks = spread[:, 1:last, 1:last].reshape(-1, width, PIECES, width, PIECES)
    own = weight.reshape(-1, width, PIECES, factors.shape[1])
    variance = torch.einsum("gipk,gipiq,giqk->gik", own, blocks, own)
    importance = (variance / spread[:, last:, last:].diagonal(dim1=1, dim2=2)[:, None]).clamp_min(0.0)

    intercept = centre[1:, :, last:] - centre[1:, :, 1:last] @ weight[1:]
    line = torch.cat([intercept, weight[1:]], 1)  # [G, 1 + 8 D, F], fitted without the group on which it errs:
    inside, cross = moments[:, :last, :last], moments[:, :last, last:]
    square = moments[:, last:, last:].diagonal(dim1=1, dim2=2)
    error = square - 2 * (line * cross).sum(1) + (line * (inside @ line)).sum(1)  # [G, F]
    told = 1 - _left_out(error) / _left_out(square)
    return Dci(
        _estimate(_concentration(importance), group),
        _estimate(_concentration(importance.transpose(1, 2)), group),
        _estimate(told.mean(1), group),
        importance[0],
        told[0],
    )


def _checked(name: str, codes: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in float64 and factors as int64, once they are fit to be compared."""
    codes = checked(f"{name}: codes", codes, MIN_ROWS, varied=False)
    if codes.shape[1] < 2:
        raise ValueError(f"{name}: one code; at least 2 are needed: a gap is between two codes")
    if factors.ndim != 2 or len(factors) != len(codes) or factors.shape[1] == 0 or factors.is_floating_point():
        raise ValueError(
            f"{name}: factors of shape {tuple(factors.shape)}, {factors.dtype}; expected integers [{len(codes)}, F]"
        )
    for number, factor in enumerate(factors.T):
        if int(factor.min()) < 0 or int(factor.min()) == int(factor.max()):
            raise ValueError(
                f"{name}: factor {number} has values {int(factor.min())} to {int(factor.max())}; expected at least "
                "two, from 0 on: leave out factors that do not vary"
            )
    return codes, factors.long()


def _groups(n: int) -> Tensor:
    """[n] which group of the jackknife a row is in."""
    return torch.arange(n) % GROUPS


def _size(factor: Tensor) -> int:
    return int(factor.max()) + 1


def _left_out(parts: Tensor) -> Tensor:
    """Sums [G, ..] of each group -> [1 + G, ..]: of all rows, and without each group."""
    total = parts.sum(0, keepdim=True)
    return torch.cat([total, total - parts])


def _tables(cells: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Numbers of cells [n], the group first -> counts [1 + G, *shape]."""
    counts = torch.bincount(cells, minlength=GROUPS * math.prod(shape))
    return _left_out(counts.reshape(GROUPS, *shape).double())


def _entropy(counts: Tensor) -> Tensor:
    """[.., V] -> [..] nats."""
    p = counts / counts.sum(-1, keepdim=True)
    return -torch.xlogy(p, p).sum(-1)


def _information(table: Tensor) -> Tensor:
    """Joint counts [.., B, V] -> [..] nats."""
    return _entropy(table.sum(-1)) + _entropy(table.sum(-2)) - _entropy(table.flatten(-2))


def _gap(information: Tensor, entropy: Tensor, group: Tensor) -> Gap:
    """From [1 + G, D, F] and [1 + G, F], the first of all rows."""
    first, second = information.topk(2, dim=1).values.unbind(1)
    gaps = (first - second) / entropy
    each = tuple(_estimate(gap, group) for gap in gaps.T)
    return Gap(_estimate(gaps.mean(1), group), each, information[0], entropy[0])


def _concentration(importance: Tensor) -> Tensor:
    """[.., A, B] -> [..]: the mean over A of 1 - entropy to base B of the row's shares, weighted by the row's sum."""
    sums = importance.sum(-1)
    shares = importance / sums.clamp_min(1e-300)[..., None]
    scores = 1 + torch.xlogy(shares, shares).sum(-1) / math.log(importance.shape[-1])
    return (sums * scores).sum(-1) / sums.sum(-1).clamp_min(1e-300)


def _estimate(values: Tensor, group: Tensor) -> Estimate:
    """From [1 + G], the first of all rows."""
    spread = jackknife(float(values[0]), Deleted(values[1:], torch.bincount(group)), correct=False)
    return spread.interval(len(group))
