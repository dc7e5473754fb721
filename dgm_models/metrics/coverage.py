"""Fidelity, diversity and copying, from nearest neighbours in a feature space.

Every ball of a row reaches to its k-th nearest neighbour in its own sample. Leaving a row out removes its ball and lets
those balls grow to the (k+1)-th neighbour that had it among the k; all deletions together cost one pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from dgm_models.metrics.estimate import Deleted, Estimate, checked, jackknife, jackknife_share

_BLOCK = 2048


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

    Source: Kynkaanniemi et al. 2019, algorithm 1, arXiv:1904.06991. Differs: intervals.
    """
    real, fake = _pair("precision_recall", real, fake, k)
    return PrecisionRecall(_inside(fake, real, k), _inside(real, fake, k))


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

    Source: Naeem et al. 2020, eq. 3-4 and lemma 2, arXiv:2002.09797. Differs: intervals.
    """
    real, fake = _pair("density_coverage", real, fake, k)
    n, m = len(real), len(fake)
    radii, neighbours = _balls(real, k)
    held = torch.zeros(m, dtype=real.dtype, device=real.device)  # balls that hold the fake
    sole = torch.zeros(m, dtype=real.dtype, device=real.device)  # balls that hold it and no other
    inside = torch.zeros(n, dtype=real.dtype, device=real.device)  # fakes in the ball
    grown = torch.zeros_like(inside)  # fakes in the ball once it has grown
    for rows, squares in _squared_distances(real, fake):
        small = squares <= radii[rows, 0:1]
        held += small.sum(0)
        sole += (small & (small.sum(1, keepdim=True) == 1)).sum(0)
        inside[rows] = small.sum(1).to(real.dtype)
        grown[rows] = (squares <= radii[rows, 1:2]).sum(1).to(real.dtype)
    total, covered = inside.sum(), (inside > 0).to(real.dtype)

    def regrown(gain: Tensor) -> Tensor:  # [n]: what the balls gain that had each row as a neighbour
        return torch.zeros_like(gain).index_add_(0, neighbours.flatten(), gain.repeat_interleave(k))

    density = jackknife(
        float(total / (k * m)),
        Deleted((total - inside + regrown(grown - inside)) / (k * m)),
        Deleted((total - held) / (k * (m - 1))),
        n=min(n, m), correct=False,
    )  # fmt: skip
    coverage = jackknife_share(
        float(covered.mean()),
        Deleted((covered.sum() - covered + regrown((grown > 0).to(real.dtype) - covered)) / (n - 1)),
        Deleted((covered.sum() - sole) / n),
        n=min(n, m), rows=n,
    )  # fmt: skip
    floor = max(0.0, min(density.low, density.value))
    return DensityCoverage(Estimate(density.value, floor, density.high, density.n), coverage)


def copies(train: Tensor, held_out: Tensor, fake: Tensor, alpha: float = 0.01) -> Copies:
    """Does the sampler return training rows? Two tests, each at alpha / 2, in features or in pixels.

    attached: if a sampler has seen only the distribution, training and held-out rows are exchangeable to it, so the
    nearest row of a sample is a training row with probability n / (n + h). z is that of the permutation of the rows'
    labels, given how many samples each row attracts: it holds whatever the sampler's distribution is.
    nearer: C_T of the source: are samples nearer to the training rows than held-out rows are? It also sees a sampler
    that returns a handful of training rows, but flags blur as well: it counts only when half of the samples or more
    are copies by their nearest row, and half are twice as near to it as to any held-out row.

    Args:
        train: [n, ...] rows that the model was trained on, as features or pixels (flattened here).
        held_out: [h, ...] rows of the same distribution that it was not trained on. With h far below n only sheer
            copying is seen.
        fake: [m, ...] samples; they may be all alike.
        alpha: the chance to flag an honest sampler, at most.
    Returns: `Copies`; copied is True for a sampler that returns training rows, exactly or with little noise.
    Raises: ValueError when rows are fewer than 20, not finite, or of unequal width, or alpha is not in (0, 1).

    Source: Meehan, Chaudhuri, Dasgupta 2020, section 4, arXiv:2004.05675. Differs: global instead of by cell; the
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

    fake_distances, near_train = _nearest(fake, train)  # [m, 2]: the two nearest
    to_held, near_held = _nearest(fake, held_out)
    nearer = _mann_whitney(fake_distances[:, 0], _nearest(held_out, train)[0][:, 0])

    # The two nearest of all rows; in a tie the held-out row is the nearer one, which speaks for the sampler.
    order = torch.cat([to_held, fake_distances], 1).argsort(1, stable=True)
    rows = torch.cat([near_held, near_train + h], 1).gather(1, order)
    first, second = rows[:, 0], rows[:, 1]
    from_train = (first >= h).double()
    attracted = torch.bincount(first, minlength=n + h).double()  # [h + n] samples that each row is nearest to
    chance = n / (n + h)
    spread = n * h / ((n + h) * (n + h - 1)) * float((attracted - attracted.mean()).square().sum())
    attached = float(from_train.sum() - m * chance) / math.sqrt(spread) if spread > 0 else 0.0

    # Without a row, its samples fall to their second nearest.
    moved = torch.zeros_like(attracted).index_add_(0, first, (second >= h).double() - from_train)
    total = from_train.sum()
    near = jackknife_share(
        float(total / m), Deleted((total - from_train) / (m - 1)), Deleted((total + moved[h:]) / m),
        Deleted((total + moved[:h]) / m), n=min(n, h, m), rows=m,
    )  # fmt: skip
    value, low, high = (max(0.0, (each - chance) / (1 - chance)) for each in (near.value, near.low, near.high))
    bar = NormalDist().inv_cdf(1 - alpha / 2)
    twice = float((4 * fake_distances[:, 0] < to_held[:, 0]).double().mean())
    copied = attached > bar or (nearer < -bar and value >= 0.5 and twice >= 0.5)
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
    block = max(1, min(_BLOCK, 2**25 // len(y)))
    for start in range(0, len(x), block):
        part = x[start : start + block] - shift
        sums = part.square().sum(1, keepdim=True) + y_norms
        squares = sums - 2 * part @ y.mT
        yield slice(start, start + len(part)), torch.where(squares > 1e-13 * sums, squares, 0)


def _balls(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[n, 2] squared radii to the k-th and the (k+1)-th neighbour, [n, k] the k neighbours."""
    radii, neighbours = [], []
    for part, squares in _squared_distances(rows, rows):
        own = torch.arange(part.start, part.stop, device=rows.device)
        squares[own - part.start, own] = math.inf
        values, index = squares.topk(k + 1, dim=1, largest=False)
        radii.append(values[:, k - 1 :])
        neighbours.append(index[:, :k])
    return torch.cat(radii), torch.cat(neighbours)


def _inside(queries: Tensor, centres: Tensor, k: int) -> Estimate:
    """The share of queries inside some centre's ball."""
    n, m = len(centres), len(queries)
    radii, neighbours = _balls(centres, k)
    inside = torch.zeros(m, dtype=queries.dtype, device=queries.device)
    change = torch.zeros(n, dtype=queries.dtype, device=queries.device)  # queries won by leaving out each centre
    for rows, squares in _squared_distances(queries, centres):
        small = squares <= radii[:, 0]
        count = small.sum(1)
        inside[rows] = (count > 0).to(queries.dtype)
        few = (count <= 1).nonzero()[:, 0]  # more than one ball: no single deletion matters
        keep = small[few].to(torch.int8).argmax(1)  # the only ball, where there is one
        alone = count[few] == 1
        query, centre = (squares[few] <= radii[:, 1]).nonzero().unbind(1)  # balls that hold the query once grown
        growers = neighbours[centre]  # [pairs, k]: leaving out one of these lets the ball grow
        caught = (query[:, None] * n + growers)[~alone[query]].unique() % n
        change += torch.bincount(caught, minlength=n)
        saved = torch.zeros_like(alone)
        saved[query[(growers == keep[query][:, None]).any(1)]] = True
        change -= torch.bincount(keep[alone & ~saved], minlength=n)
    total = inside.sum()
    return jackknife_share(
        float(total / m), Deleted((total - inside) / (m - 1)), Deleted((total + change) / m), n=min(n, m), rows=m
    )


def _nearest(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[m, 2] squared distances to the two nearest rows, [m, 2] which they are."""
    found = [squares.topk(2, dim=1, largest=False) for _, squares in _squared_distances(queries, rows)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def _mann_whitney(x: Tensor, y: Tensor) -> float:
    """z of the count of pairs with x > y, ties counted half and their variance corrected; negative when x is smaller."""
    m, n = len(x), len(y)
    ordered = y.sort().values
    wins = float(torch.searchsorted(ordered, x).sum() + torch.searchsorted(ordered, x, right=True).sum()) / 2
    ties = torch.cat([x, y]).unique(return_counts=True)[1].double()
    lost = float((ties**3 - ties).sum()) / ((m + n) * (m + n - 1))
    variance = m * n / 12 * (m + n + 1 - lost)
    return (wins - m * n / 2) / math.sqrt(variance) if variance > 0 else 0.0
