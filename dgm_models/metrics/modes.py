"""Modes covered: how many of the data's labelled modes a sampler reaches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dgm_models.metrics.estimate import Estimate, Spread, checked

MOST = 5000  # rows of each sample that are used
WITHIN = 0.95  # a mode reaches as far around its rows as this share of them lies from their nearest
LEAST = 0.2  # of a mode's expected samples make it a covered one
MIN_MODE = 10  # rows of a mode
_BLOCK = 2048


class Modes(NamedTuple):
    """What a sampler reaches of K modes.

    Attributes:
        covered: number of modes, 0 to K; higher is better.
        quality: share of samples that lie within some mode; equal distributions reach about `WITHIN`.
        shares: [K] of the samples that lie within each mode, over the mode's share of the data.
    """

    covered: Estimate
    quality: Estimate
    shares: Tensor


def modes(real: Tensor, labels: Tensor, fake: Tensor) -> Modes:
    """Modes covered and the share of samples of high quality.

    A sample belongs to the mode (label) of its nearest real row. It lies within the mode if it is no farther from that
    row than `WITHIN` of the mode's rows are from their nearest other row of the mode. A mode is covered when at least
    `LEAST` as many samples lie within it as its share of the data is of all samples.

    Args:
        real: [n, d] features of data.
        labels: [n] int64 of these rows: the modes 0..K-1.
        fake: [m, d] features of samples. At most `MOST` rows of each are used, chosen by a fixed seed.
    Returns: `Modes`. The interval of `covered` counts the modes whose share lies above the bar with the whole, or with
        any, of its 95% Wilson interval; the real rows count as given.
    Raises: ValueError when rows are fewer than 20, not finite or of unequal width, labels do not fit, or a mode has
        fewer than `MIN_MODE` rows.

    Source: the counts of modes and of high-quality samples of Srivastava et al. 2017, arXiv:1705.07761.
    Differs: modes are labelled rows, with a spread of their own, in place of Gaussians with a known one; a mode needs a
    share of its samples in place of one.
    """
    real, fake = checked("modes: real", real), checked("modes: fake", fake, varied=False)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"modes: {fake.shape[1]} fake features, {real.shape[1]} real; use one extractor")
    if labels.shape != real.shape[:1]:
        raise ValueError(f"modes: labels: shape {tuple(labels.shape)} for {len(real)} real rows; one label a row")
    rng = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(real), generator=rng)[:MOST].to(real.device)
    real, labels = real[chosen], labels.to(real.device)[chosen]
    fake = fake[torch.randperm(len(fake), generator=rng)[:MOST].to(fake.device)]
    sizes = torch.bincount(labels)
    few = [f"{label} ({int(size)})" for label, size in enumerate(sizes) if size < MIN_MODE]
    if few:
        raise ValueError(f"modes: fewer than {MIN_MODE} real rows of label {', '.join(few)}; take more rows")

    reach = torch.stack([_nearest(rows, rows, itself=True)[0].quantile(WITHIN) for rows in _by(real, labels)])
    distance, row = _nearest(fake, real)
    mode = labels[row]
    rounding = 1e-7 * float(real.norm(dim=1).max())  # an exact copy is not at distance zero, nor is its like in `reach`
    within = distance <= reach[mode] + rounding
    counts = torch.bincount(mode[within], minlength=len(sizes))
    expected = sizes / sizes.sum()
    bars = (LEAST * expected).tolist()
    found = [_share(int(count), len(fake)) for count in counts]
    covered = Estimate(
        float(sum(each.value >= bar for each, bar in zip(found, bars, strict=True))),
        float(sum(each.low >= bar for each, bar in zip(found, bars, strict=True))),
        float(sum(each.high >= bar for each, bar in zip(found, bars, strict=True))),
        min(len(real), len(fake)),
    )
    return Modes(covered, _share(int(within.sum()), len(fake)), counts / len(fake) / expected)


def _by(rows: Tensor, labels: Tensor) -> list[Tensor]:
    return [rows[labels == label] for label in range(int(labels.max()) + 1)]


def _share(count: int, rows: int) -> Estimate:
    share = count / rows
    return Spread(share, share * (1 - share) / rows, math.inf).share(rows, rows)


def _nearest(queries: Tensor, rows: Tensor, *, itself: bool = False) -> tuple[Tensor, Tensor]:
    """[m] distances to the nearest row and which it is; `itself`: queries are the rows, none its own nearest."""
    found = []
    for start in range(0, len(queries), _BLOCK):
        part = queries[start : start + _BLOCK]
        distances = torch.cdist(part, rows)
        if itself:
            own = torch.arange(len(part), device=rows.device)
            distances[own, own + start] = math.inf
        found.append(distances.min(1))
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])
