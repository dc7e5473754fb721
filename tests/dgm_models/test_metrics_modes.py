"""Modes covered, on a ring of eight Gaussians of which some are missing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.metrics import modes as module
from dgm_models.metrics.modes import LEAST, WITHIN, modes

RADIUS, NOISE = 2.0, 0.2


def ring(n: int, seed: int, weights: list[float] | None = None, noise: float = NOISE) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(weights or [1.0] * 8), n, replacement=True, generator=rng)
    angle = labels.double() * math.pi / 4
    centres = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    return centres + noise * torch.randn(n, 2, generator=rng, dtype=torch.float64), labels


REAL, LABELS = ring(2000, 0)


def test_modes_of_the_data_s_own_distribution_are_all_covered() -> None:
    found = modes(REAL, LABELS, ring(2000, 1)[0])
    assert (found.covered.value, found.covered.low, found.covered.high) == (8, 8, 8)
    # a fresh row is as far from its nearest row as the data's rows are: WITHIN, up to 0.5% from either sample
    assert found.quality.value == pytest.approx(WITHIN, abs=0.02)
    # 250 over 250 rows a mode: 4 standard errors of 9%
    assert found.shares.tolist() == pytest.approx([WITHIN] * 8, abs=0.36)


@pytest.mark.parametrize("present", [1, 3, 7])
def test_modes_that_are_missing_are_not_counted(present: int) -> None:
    weights = [1.0] * present + [0.0] * (8 - present)
    found = modes(REAL, LABELS, ring(2000, 1, weights)[0])
    assert (found.covered.value, found.covered.low, found.covered.high) == (present, present, present)
    # neighbours meet where few rows are: a row in a hundred at most
    assert float(found.shares[present:].max()) < LEAST / 2
    assert found.quality.value > 0.9


def test_modes_with_few_of_their_samples_are_decided_by_the_stated_share() -> None:
    for share, covered in ((0.5 * LEAST, 7), (2 * LEAST, 8)):
        assert modes(REAL, LABELS, ring(4000, 1, [1.0] * 7 + [share])[0]).covered.value == covered


def test_modes_at_the_bar_are_doubted_by_the_interval() -> None:
    found = modes(REAL, LABELS, ring(400, 1, [1.0] * 7 + [LEAST])[0]).covered  # some 10 of 400
    assert (found.low, found.high) == (7, 8)
    assert found.n == 400


def test_modes_quality_is_the_share_of_samples_within_the_modes() -> None:
    good, _ = ring(1500, 1)
    between = 0.3 * torch.randn(500, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = modes(REAL, LABELS, torch.cat([good, between]))  # a quarter in the ring's empty middle
    assert found.covered.value == 8
    assert found.quality.value == pytest.approx(0.75 * WITHIN, abs=0.03)
    assert found.quality.low < found.quality.value < found.quality.high
    nothing = modes(REAL, LABELS, between)
    assert (nothing.covered.value, nothing.quality.value) == (0, 0)


def test_modes_of_another_spread_have_a_reach_of_their_own() -> None:
    wide = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tight = 0.01 * torch.randn(500, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 10
    real, labels = torch.cat([wide, tight]), torch.arange(1000) // 500
    fresh = torch.randn(300, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert modes(real, labels, torch.cat([fresh, tight])).covered.value == 2
    loose = 10 + 0.5 * fresh  # near the tight mode, but not within it
    found = modes(real, labels, torch.cat([fresh, loose]))
    assert found.covered.value == 1 and float(found.shares[1]) < LEAST


def test_modes_of_data_that_repeat_exactly() -> None:
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(3, 50, generator=rng, dtype=torch.float64).repeat_interleave(20, 0)
    labels = torch.arange(3).repeat_interleave(20)
    found = modes(real, labels, real[:40])
    assert found.covered.value == 2 and found.quality.value == 1.0


def test_modes_take_at_most_a_bounded_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 800)
    found = modes(REAL, LABELS, ring(1000, 1)[0])
    assert found.covered.n == found.quality.n == 800 and found.covered.value == 8


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:-1], "one label a row"),
        (torch.where(LABELS == 7, 8, LABELS), r"fewer than 10 real rows of label 7 \(0\)"),
    ],
)
def test_modes_refuse_labels_that_cannot_be_judged(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modes(REAL, labels, REAL)


def test_modes_refuse_features_of_another_width() -> None:
    with pytest.raises(ValueError, match="3 fake features, 2 real"):
        modes(REAL, LABELS, torch.randn(50, 3))
