"""Precision, recall, density, coverage against their slow definitions; copiers against honest samplers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dgm_models.metrics import coverage as coverage_module
from dgm_models.metrics.coverage import Copies, copies, density_coverage, precision_recall
from dgm_models.metrics.estimate import half_samples


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_balls(centres: Tensor, queries: Tensor, k: int) -> tuple[float, float, float]:
    """Share of queries in a ball, share of balls with a query, density."""
    own = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    radius = own.fill_diagonal_(torch.inf).sort(1).values[:, k - 1]
    inside = torch.cdist(queries, centres, compute_mode="donot_use_mm_for_euclid_dist") <= radius
    return (
        float(inside.any(1).double().mean()),
        float(inside.any(0).double().mean()),
        float(inside.sum() / (k * len(queries))),
    )


@pytest.mark.parametrize("block", [2048, 17])
def test_shares_equal_their_definitions_for_all_rows_and_for_half_samples(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage_module, "_BLOCK", block)
    real, fake = normal(90, 5, seed=1), 0.8 * normal(110, 5, seed=2) + 0.4
    precision, recall = precision_recall(real, fake)
    density, covered = density_coverage(real, fake)
    assert precision.value == pytest.approx(slow_balls(real, fake, 3)[0])
    assert recall.value == pytest.approx(slow_balls(fake, real, 3)[0])
    assert (covered.value, density.value) == pytest.approx(slow_balls(real, fake, 5)[1:])
    balls = coverage_module._Balls(real, fake, 3)
    for half in range(5):
        slow = slow_balls(real[half_samples(90, 1)[half]], fake[half_samples(110, 0)[half]], 3)
        fast = balls.held[1 + half], balls.filled[1 + half], balls.density[1 + half]
        assert [float(each) for each in fast] == pytest.approx(slow)


def test_shares_are_one_for_the_same_rows_and_zero_far_away() -> None:
    real = normal(100, 4)
    same, far = (*precision_recall(real, real), density_coverage(real, real).coverage), real + 100
    assert [each.value for each in same] == [1, 1, 1]
    assert all(each.low < 1 == each.high for each in same)  # a hundred rows do not prove perfection
    apart = *precision_recall(real, far), *density_coverage(real, far)
    assert [each.value for each in apart] == [0, 0, 0, 0]


def test_precision_and_recall_tell_a_dropped_mode_from_junk() -> None:
    sign = torch.where(torch.arange(300) % 2 == 0, 4.0, -4.0)[:, None]
    real = normal(300, 3, seed=1) + sign
    dropped = precision_recall(real, normal(300, 3, seed=2) + 4)
    junk = precision_recall(real, torch.cat([(normal(300, 3, seed=3) + sign)[:150], 9 * normal(150, 3, seed=4)]))
    assert dropped.precision.low > 0.8
    assert dropped.recall.high < 0.6
    assert junk.precision.high < 0.75
    assert junk.recall.low > 0.75


def test_shares_refuse_what_they_cannot_measure() -> None:
    good = normal(60, 4)
    for function in (precision_recall, density_coverage):
        with pytest.raises(ValueError, match="k: 0"):
            function(good, good, k=0)
        with pytest.raises(ValueError, match="60 rows, at least 70"):
            function(good, good, k=7)
        with pytest.raises(ValueError, match="3 fake features, 4 real"):
            function(good, good[:, :3])
        with pytest.raises(ValueError, match="not finite"):
            function(good, good / 0)
        with pytest.raises(ValueError, match="all 60 rows are equal"):
            function(good, good[:1].expand(60, 4))


Sampler = Callable[[Tensor, Tensor, int], Tensor]


def pick(rows: Tensor, count: int, seed: int) -> Tensor:
    return rows[torch.randint(len(rows), (count,), generator=torch.Generator().manual_seed(seed))]


COPIERS: dict[str, Sampler] = {
    "exact": lambda train, held_out, seed: pick(train, 300, seed),
    "noisy": lambda train, held_out, seed: pick(train, 300, seed) + 0.01 * normal(300, train.shape[1], seed=seed),
    "five rows": lambda train, held_out, seed: pick(train[:5], 300, seed),
    "one row": lambda train, held_out, seed: train[:1].expand(300, -1),
}
HONEST: dict[str, Sampler] = {
    "fresh": lambda train, held_out, seed: normal(300, train.shape[1], seed=seed),
    "blurred": lambda train, held_out, seed: 0.5 * normal(300, train.shape[1], seed=seed),
    "collapsed": lambda train, held_out, seed: pick(0.7 * normal(8, train.shape[1], seed=seed), 300, seed),
    "junk": lambda train, held_out, seed: 3 * normal(300, train.shape[1], seed=seed),
}


def outcomes(sampler: Sampler, d: int, train_rows: int, times: int) -> list[Copies]:
    found = []
    for i in range(times):
        train, held_out = normal(train_rows, d, seed=1000 + i), normal(300, d, seed=2000 + i)
        found.append(copies(train, held_out, sampler(train, held_out, 3000 + i)))
    return found


@pytest.mark.parametrize("train_rows", [300, 1200])
@pytest.mark.parametrize("d", [2, 16])
@pytest.mark.parametrize("name", COPIERS)
def test_copies_flags_a_sampler_that_returns_training_rows(name: str, d: int, train_rows: int) -> None:
    for each in outcomes(COPIERS[name], d, train_rows, 3):
        assert each.copied
        assert each.share.value > 0.8


@pytest.mark.parametrize("train_rows", [300, 1200])
@pytest.mark.parametrize("d", [2, 16])
@pytest.mark.parametrize("name", HONEST)
def test_copies_does_not_flag_an_honest_sampler(name: str, d: int, train_rows: int) -> None:
    found = outcomes(HONEST[name], d, train_rows, 12)
    assert sum(each.copied for each in found) <= 1  # twice at alpha = 0.01: 0.6%
    assert sum(each.share.low > 0 for each in found) <= 2
    assert all(each.share.high > each.share.value for each in found if each.share.value < 1)


def test_copies_twin_that_looks_at_distances_alone_flags_blur() -> None:
    assert all(each.nearer < -5 and not each.copied for each in outcomes(HONEST["blurred"], 16, 300, 5))


def test_copies_finds_the_share_of_a_sampler_that_copies_sometimes() -> None:
    def sometimes(train: Tensor, held_out: Tensor, seed: int) -> Tensor:
        return torch.cat([pick(train, 120, seed), normal(180, train.shape[1], seed=seed)])

    found = outcomes(sometimes, 16, 300, 20)
    assert all(each.copied for each in found)
    assert sum(each.share.low <= 0.4 <= each.share.high for each in found) >= 18
    assert sum(each.share.value for each in found) / 20 == pytest.approx(0.4, abs=0.05)


def test_copies_takes_pixels_and_does_not_count_rows_that_held_out_data_share() -> None:
    pixels = torch.randint(0, 2, (300, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    result = copies(pixels[:100], pixels[100:200], pixels[200:])  # 16 images: all of them are in the training set
    assert not result.copied
    assert result.share.value == 0


def test_copies_refuses_what_it_cannot_measure() -> None:
    good = normal(60, 4)
    with pytest.raises(ValueError, match="alpha: 1"):
        copies(good, good, good, alpha=1)
    with pytest.raises(ValueError, match="held_out: 10 rows"):
        copies(good, good[:10], good)
    with pytest.raises(ValueError, match="3 fake values a row"):
        copies(good, good, good[:, :3])
    with pytest.raises(ValueError, match="fake: 60 of 60 rows are not finite"):
        copies(good, good, good * torch.nan)
    with pytest.raises(ValueError, match="train: all 60 rows are equal"):
        copies(good[:1].expand(60, 4), good, good)
