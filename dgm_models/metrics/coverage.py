"""Fidelity, diversity and copying, from nearest neighbours in a feature space.

The ball of a row reaches to its k-th nearest neighbour in its own sample. Neighbours are found once: each half sample
of the jackknife only counts again which of them it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from dgm_models.metrics.estimate import HALVES, Estimate, checked, delete_half, half_samples

_BLOCK = 2048
_DEPTH = 20  # nearest rows kept for the half samples: none is left with probability 2^-20


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]; higher is better: fakes that look real, and reals that the fakes reach."""

    precision: Estimate
    recall: Estimate


class DensityCoverage(NamedTuple):
    """Higher is better: density in [0, inf), 1 for equal distributions; coverage in [0, 1]."""

    density: Estimate
    coverage: Estimate


class Copies(NamedTuple):
    """The verdict on copying and what it rests on.

    Attributes:
        share: estimated share of the samples that are copies, in [0, 1]; lower is better, fresh draws have about 0.
        nearer: z of the Mann-Whitney test C_T: samples are as far from the training rows as held-out rows are.
            Below -2.6: nearer. A blurred or low-variety model is nearer too, without copying.
        attached: z of the test that a sample's nearest row is no more often a training row than chance has it.
        copied: a copier of training rows, at level `alpha`.
        alpha: the share of honest samplers that are flagged, at most.
    """

    share: Estimate
    nearer: float
    attached: float
    copied: bool
    alpha: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall, each with a 95% jackknife interval.

    precision: share of fakes inside some real row's ball; recall: share of reals inside some fake row's ball.

    Args:
        real: [n, d] features of data.
        fake: [m, d] features of samples; take m = n, both depend on the sample sizes.
        k: neighbours that make a ball.
    Returns: two shares, the values at this n and m (no bias is removed); higher is better. Equal distributions do not
        reach 1: state beside them what held-out data reach.
    Raises: ValueError when rows are fewer than 10 k or 20, not finite, all equal, or of unequal width.

    Source: Kynkaanniemi et al. 2019, eq. 1-2, arXiv:1904.06991. Differs: intervals.
    """
    real, fake = _pair("precision_recall", real, fake, k)
    n = min(len(real), len(fake))
    precision, recall = _Balls(real, fake, k).held, _Balls(fake, real, k).held
    return PrecisionRecall(
        delete_half(float(precision[0]), precision[1:]).share(n, len(fake)),
        delete_half(float(recall[0]), recall[1:]).share(n, len(real)),
    )


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage, each with a 95% jackknife interval.

    density: real balls that hold a fake, over k, on average; coverage: share of real balls that hold any fake.

    Args:
        real: [n, d] features of data.
        fake: [m, d] features of samples; take m = n, coverage depends on both.
        k: neighbours that make a ball.
    Returns: values at this n and m (no bias is removed); higher is better. Equal distributions with n = m have density
        1 in expectation, and coverage 1 - prod_{i<k} (n - 1 - i) / (2n - 1 - i), 0.97 for k = 5.
    Raises: ValueError when rows are fewer than 10 k or 20, not finite, all equal, or of unequal width.

    Source: Naeem et al. 2020, arXiv:2002.09797. Differs: intervals.
    """
    real, fake = _pair("density_coverage", real, fake, k)
    n, balls = min(len(real), len(fake)), _Balls(real, fake, k)
    density = delete_half(float(balls.density[0]), balls.density[1:]).interval(n)
    return DensityCoverage(
        Estimate(density.value, max(0.0, density.low), density.high, n),
        delete_half(float(balls.filled[0]), balls.filled[1:]).share(n, len(real)),
    )


def copies(train: Tensor, held_out: Tensor, fake: Tensor, alpha: float = 0.01) -> Copies:
    """Does the sampler return training rows? Two tests, each at alpha / 2, in features or in pixels.

    attached: if a sampler has seen only the distribution, training and held-out rows are exchangeable to it, so the
    nearest row of a sample is a training row with probability n / (n + h). z is that of the permutation of the rows'
    labels, given how many samples each row attracts: it holds whatever the sampler's distribution is.
    nearer: C_T of the source: are samples nearer to the training rows than held-out rows are? It also sees a sampler
    that returns a handful of training rows, but flags blur as well: it counts only when half of the samples or more
    have a training row twice as near as any held-out row, and nearer than 19 of 20 held-out rows have theirs.

    Args:
        train: [n, ...] rows that the model was trained on, as features or pixels (flattened here).
        held_out: [h, ...] rows of the same distribution that it was not trained on. With h far below n only sheer
            copying is seen.
        fake: [m, ...] samples; they may be all alike.
        alpha: the chance to flag an honest sampler, at most.
    Returns: `Copies`; copied is True for a sampler that returns training rows, exactly or with little noise.
    Raises: ValueError when rows are fewer than 20, not finite, or of unequal width, or alpha is not in (0, 1).

    Source: Meehan, Chaudhuri, Dasgupta 2020, arXiv:2004.05675. Differs: global instead of by cell; the
    exchangeability test and the share are added.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"copies: alpha: {alpha!r} is not between 0 and 1")
    named = {"train": train, "held_out": held_out, "fake": fake}
    train, held_out, fake = (checked(f"copies: {k}", v.flatten(1), varied=k != "fake") for k, v in named.items())
    if not train.shape[1] == held_out.shape[1] == fake.shape[1]:
        raise ValueError(
            f"copies: {train.shape[1]} train, {held_out.shape[1]} held_out and {fake.shape[1]} fake values a row;"
            " compare rows of one space"
        )
    n, h, m = len(train), len(held_out), len(fake)

    to_train, train_rows = _nearest(fake, train, _DEPTH)  # [m, depth]
    to_held, held_rows = _nearest(fake, held_out, _DEPTH)
    usual = _nearest(held_out, train, 1)[0][:, 0].contiguous()  # [h] how near to the training rows a fresh draw is
    nearer = _mann_whitney(to_train[:, 0].contiguous(), usual)
    plain = (4 * to_train[:, 0] < to_held[:, 0]) & (to_train[:, 0] < usual.quantile(0.05))

    # The nearest of all rows; in a tie the held-out row is the nearer one, which speaks for the sampler.
    order = torch.cat([to_held, to_train], 1).argsort(dim=1, stable=True)
    rows = torch.cat([held_rows, train_rows + h], 1).gather(1, order)[:, :_DEPTH]
    attracted = torch.bincount(rows[:, 0], minlength=n + h).double()  # samples that each row is the nearest to
    chance = n / (n + h)
    total = float(attracted[h:].sum())
    variance = n * h / ((n + h) * (n + h - 1)) * float((attracted - attracted.mean()).square().sum())
    attached = (total - m * chance) / math.sqrt(variance) if variance > 0 else 0.0

    kept_rows = torch.cat([half_samples(h, 1), half_samples(n, 2)], 1).to(rows.device)
    halves = []
    for kept, kept_fakes in zip(kept_rows, half_samples(m, 0).to(rows.device), strict=True):
        first = kept[rows].to(torch.int8).argmax(1)  # the nearest that is left
        halves.append((rows.gather(1, first[:, None])[:, 0] >= h)[kept_fakes].double().mean())
    distinct = int(m**2 / float(attracted.square().sum()))  # samples of one row are worth one
    near = delete_half(total / m, torch.stack(halves)).share(min(n, h, m), distinct)
    value, low = (max(0.0, (each - chance) / (1 - chance)) for each in (near.value, near.low))
    high = min(1.0, value + (near.high - near.value) / (1 - chance))  # by luck below chance: none is no certainty
    bar = NormalDist().inv_cdf(1 - alpha / 2)
    copied = attached > bar or (nearer < -bar and float(plain.double().mean()) >= 0.5)
    return Copies(Estimate(value, low, high, near.n), nearer, attached, copied, alpha)


def _pair(caller: str, real: Tensor, fake: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k < 1:
        raise ValueError(f"{caller}: k: {k!r} is below 1")
    least = max(20, 10 * k)
    real, fake = checked(f"{caller}: real", real, least), checked(f"{caller}: fake", fake, least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"{caller}: {fake.shape[1]} fake features, {real.shape[1]} real; use one extractor")
    return real, fake


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks ([b] rows of x, [b, len(y)] squared distances); those lost in rounding are exactly zero."""
    shift = y.mean(0)
    y = y - shift
    y_norms = y.square().sum(1)
    block = max(1, min(_BLOCK, 2**24 // len(y)))
    for start in range(0, len(x), block):
        part = x[start : start + block] - shift
        sums = part.square().sum(1, keepdim=True) + y_norms
        squares = sums - 2 * part @ y.mT
        yield slice(start, start + len(part)), torch.where(squares > 1e-13 * sums, squares, 0)


class _Balls:
    """Which queries lie in which centres' balls: [1 + HALVES] numbers each, of all rows and of every half sample.

    Attributes:
        held: share of queries in some ball.
        filled: share of balls with some query.
        density: queries in a ball, summed over balls, over k times the queries.
    """

    def __init__(self, centres: Tensor, queries: Tensor, k: int) -> None:
        n, m, device = len(centres), len(queries), centres.device
        everything = torch.ones(1, dtype=torch.bool)
        kept_centres = torch.cat([everything.expand(1, n), half_samples(n, 1)]).to(device)
        kept_queries = torch.cat([everything.expand(1, m), half_samples(m, 0)]).to(device)

        # A half keeps fewer than k of 4k + 12 neighbours with probability 2e-5.
        depth = min(n - 1, 4 * k + 12)
        distances, neighbours = _nearest(centres, centres, depth, others=True)  # [n, depth]
        closer = torch.zeros(1 + HALVES, n, depth + 1, dtype=torch.int16, device=device)
        for kept, counts in zip(kept_centres, closer, strict=True):  # kept neighbours among the nearest 0, 1, ... depth
            torch.cumsum(kept[neighbours], 1, dtype=torch.int16, out=counts[:, 1:])

        held = torch.zeros(1 + HALVES, dtype=torch.float64, device=device)
        pairs = torch.zeros_like(held)
        filled = torch.zeros(1 + HALVES, n, dtype=torch.bool, device=device)
        for rows, squares in _squared_distances(queries, centres):
            # a query lies in a ball when fewer than k kept neighbours are strictly closer to the centre than it is
            query, centre = (squares <= distances[:, -1]).nonzero().unbind(1)
            rank = torch.cat(
                [
                    torch.searchsorted(distances[centre[at]], squares[query[at], centre[at]][:, None])[:, 0]
                    for at in (slice(start, start + 2**20) for start in range(0, len(query) or 1, 2**20))
                ]
            )
            for half in range(1 + HALVES):
                here = kept_queries[half, rows]
                inside = (closer[half, centre, rank] < k) & kept_centres[half, centre] & here[query]
                found = torch.zeros_like(here)
                found[query[inside]] = True
                held[half] += found.sum()
                pairs[half] += inside.sum()
                filled[half, centre[inside]] = True
        queries_kept, centres_kept = kept_queries.sum(1), kept_centres.sum(1)
        self.held = held / queries_kept
        self.filled = filled.sum(1).double() / centres_kept
        self.density = pairs / (k * queries_kept)


def _nearest(queries: Tensor, rows: Tensor, count: int, *, others: bool = False) -> tuple[Tensor, Tensor]:
    """[m, count] squared distances to the nearest rows, ascending, and which they are; `others`: not to itself."""
    values, indices = [], []
    for part, squares in _squared_distances(queries, rows):
        if others:
            own = torch.arange(part.start, part.stop, device=rows.device)
            squares[own - part.start, own] = math.inf
        found = squares.topk(count, dim=1, largest=False)
        values.append(found.values)
        indices.append(found.indices)
    return torch.cat(values), torch.cat(indices)


def _mann_whitney(x: Tensor, y: Tensor) -> float:
    """z of the number of pairs with x > y, a tie counted half; negative when x is smaller."""
    m, n = len(x), len(y)
    ordered, pooled = y.sort().values, torch.cat([x, y]).sort().values
    wins = float((torch.searchsorted(ordered, x) + torch.searchsorted(ordered, x, right=True)).sum()) / 2
    ties = (torch.searchsorted(pooled, pooled, right=True) - torch.searchsorted(pooled, pooled)).double()
    variance = m * n / 12 * (m + n + 1 - float((ties**2 - 1).sum()) / ((m + n) * (m + n - 1)))
    return (wins - m * n / 2) / math.sqrt(variance) if variance > 0 else 0.0
