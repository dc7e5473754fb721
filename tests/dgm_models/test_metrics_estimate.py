"""Estimate and the jackknives against what is known exactly."""

from __future__ import annotations

import math

import pytest
import torch

from dgm_models.metrics.estimate import Deleted, Estimate, Spread, checked, half_samples, jackknife, student_quantile


def test_estimate_refuses_a_value_outside_of_its_interval() -> None:
    with pytest.raises(ValueError, match=r"3.0 lies outside of its own interval \[1.0, 2.0\]"):
        Estimate(3.0, 1.0, 2.0, 10)
    with pytest.raises(ValueError, match="not finite"):
        Estimate(math.nan, 1.0, 2.0, 10)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227), (999, 1.96234), (math.inf, 1.95996)],
)
def test_student_quantile_agrees_with_tables(freedom: float, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, rel=3e-6)  # the table's digits


def test_jackknife_removes_the_bias_of_the_plain_variance_exactly() -> None:
    x = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left_out = torch.stack([torch.cat([x[:i], x[i + 1 :]]).var(correction=0) for i in range(30)])
    assert jackknife(float(x.var(correction=0)), Deleted(left_out)).value == pytest.approx(float(x.var()), rel=1e-12)


def test_jackknife_of_a_mean_needs_no_correction_with_groups_of_any_size() -> None:
    x = torch.randn(31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.tensor([1, 2, 3, 4, 5, 6, 10])
    groups = torch.tensor_split(x, sizes.cumsum(0)[:-1])
    left_out = torch.stack([(x.sum() - group.sum()) / (31 - len(group)) for group in groups])
    spread = jackknife(float(x.mean()), Deleted(left_out, sizes))
    assert spread.value == pytest.approx(float(x.mean()), rel=1e-12)
    assert spread.freedom == pytest.approx(6)
    assert 0.2 < spread.variance * 31 / float(x.var()) < 5  # six degrees of freedom


def test_jackknife_adds_the_variances_of_independent_samples() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (20, 50))
    without_x = (x.sum() - x) / 19 - y.mean()
    without_y = x.mean() - (y.sum() - y) / 49
    spread = jackknife(float(x.mean() - y.mean()), Deleted(without_x), Deleted(without_y))
    assert spread.variance == pytest.approx(float(x.var() / 20 + y.var() / 50), rel=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        jackknife(0.0, Deleted(torch.zeros(1)))


def test_half_samples_keep_half_of_the_rows_and_repeat() -> None:
    kept = half_samples(21, 0)
    assert kept.sum(1).eq(10).all()
    assert kept.equal(half_samples(21, 0))
    assert not kept.equal(half_samples(21, 1))


@pytest.mark.parametrize("value", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("variance", [0.0, 1e-6, 0.01])
def test_share_interval_stays_in_the_unit_interval_and_has_width(value: float, variance: float) -> None:
    share = Spread(value, variance, 99).share(n=100, rows=100)
    assert 0 <= share.low <= share.value == value <= share.high <= 1
    assert share.high - share.low > 0.03  # 3.7 / (100 + 3.9), with no failure in 100 rows


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(30), r"what: shape \(30,\), expected \[n, d\]"),
        (torch.zeros(0, 3), "what: 0 rows, at least 20"),
        (torch.randn(19, 3), "what: 19 rows, at least 20"),
        (torch.full((30, 3), math.nan), "what: 30 of 30 rows are not finite"),
        (torch.ones(30, 3), "what: all 30 rows are equal"),
    ],
)
def test_checked_refuses_features_that_cannot_be_measured(features: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked("what", features)
