"""The Frechet distance against closed forms and against its own slow definition."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from dgm_models.metrics import frechet as frechet_module
from dgm_models.metrics.estimate import Deleted, jackknife
from dgm_models.metrics.frechet import frechet, frechet_difference, frechet_distance, moments


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d: int, seed: int) -> Tensor:
    factor = normal(d, 2 * d, seed=seed)
    return factor @ factor.mT / (2 * d)


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    d = 6
    a, b, shift = normal(d, seed=1).exp(), normal(d, seed=2).exp(), normal(d, seed=3)
    turn = torch.linalg.qr(normal(d, d, seed=4)).Q
    value = frechet_distance(shift, turn * a.square() @ turn.mT, torch.zeros_like(shift), turn * b.square() @ turn.mT)
    assert value == pytest.approx(float(shift.square().sum() + (a - b).square().sum()), rel=1e-12)


def test_frechet_distance_of_any_gaussians_is_the_trace_formula_and_symmetric() -> None:
    mean_a, mean_b, cov_a, cov_b = normal(5, seed=1), normal(5, seed=2), covariance(5, 3), covariance(5, 4)
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()  # trace of the root of an unsymmetric product
    expected = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots)
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(mean_b, cov_b, mean_a, cov_a) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(mean_a, cov_a, mean_a, cov_a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_is_exact_for_singular_covariances() -> None:
    mean_a, mean_b, cov_a, cov_b = normal(3, seed=1), normal(3, seed=2), covariance(3, 3), covariance(3, 4)
    embed = torch.linalg.qr(normal(9, 9, seed=5)).Q[:, :3]  # 3 of 9 dimensions, turned
    flat = [embed @ mean_a, embed @ cov_a @ embed.mT, embed @ mean_b, embed @ cov_b @ embed.mT]
    full = frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert frechet_distance(*flat) == pytest.approx(full, abs=1e-7)  # a root of rounding noise, 9 times
    nothing = torch.zeros(3, 3)
    assert frechet_distance(mean_a, nothing, mean_b, cov_b) == pytest.approx(
        float((mean_a - mean_b).square().sum() + cov_b.trace()), rel=1e-12
    )


def test_frechet_equals_the_jackknife_by_its_definition() -> None:
    real, fake = normal(40, 3, seed=1), 1.3 * normal(50, 3, seed=2) + 0.2

    def distance(x: Tensor, y: Tensor) -> float:
        return frechet_distance(*moments(x), *moments(y))

    def without(rows: Tensor, i: int) -> Tensor:
        return torch.cat([rows[:i], rows[i + 1 :]])

    without_real = torch.tensor([distance(without(real, i), fake) for i in range(40)], dtype=torch.float64)
    without_fake = torch.tensor([distance(real, without(fake, i)) for i in range(50)], dtype=torch.float64)
    slow = jackknife(distance(real, fake), Deleted(without_real), Deleted(without_fake)).interval(40)
    fast = frechet(real, fake)
    for name in ("value", "low", "high"):
        assert getattr(fast, name) == pytest.approx(getattr(slow, name), abs=1e-9)
    assert fast.n == slow.n == 40


def test_frechet_ignores_features_that_are_constant_in_both_and_the_place_of_the_origin() -> None:
    real, fake = normal(200, 4, seed=1), 1.3 * normal(200, 4, seed=2) + 0.2
    still = torch.ones(200, 3, dtype=torch.float64)
    base, dead = frechet(real, fake), frechet(torch.cat([real, still], 1), torch.cat([fake, still], 1))
    far = frechet(real + 1e4, fake + 1e4)
    for name in ("value", "low", "high"):
        assert getattr(dead, name) == pytest.approx(getattr(base, name), abs=1e-8)
        assert getattr(far, name) == pytest.approx(getattr(base, name), abs=1e-6)  # 1e4^2 against float64's 1e-16


def test_frechet_groups_large_samples_and_forgets_the_order_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet_module, "_WORK", 0)  # as for thousands of features
    d, n = 48, 480
    scale = torch.linspace(0.5, 1.5, d, dtype=torch.float64)
    real, fake = normal(n, d, seed=1) * scale, normal(n, d, seed=2) * scale
    fake[:, 0] += 1
    truth = 1.0
    mixed = frechet(real, fake)
    assert mixed.low <= truth <= mixed.high
    assert abs(mixed.value - truth) < 0.5 < frechet_distance(*moments(real), *moments(fake)) - truth  # the bias: 2.6
    by_class = frechet(real[real[:, 1].argsort()], fake[fake[:, 1].argsort()])
    assert (by_class.high - by_class.low) / (mixed.high - mixed.low) == pytest.approx(1, abs=0.5)


def test_frechet_of_16_features_takes_well_under_a_second() -> None:
    real, fake = normal(360, 16, seed=1), normal(360, 16, seed=2)
    start = time.perf_counter()
    frechet(real, fake)
    assert time.perf_counter() - start < 1  # 0.02 s measured


def test_frechet_difference_is_the_difference_of_values_with_a_shared_real_sample() -> None:
    real = normal(200, 4, seed=1)
    a, b = 1.3 * normal(200, 4, seed=2), 1.3 * normal(200, 4, seed=3)
    difference, first, second = frechet_difference(real, a, b), frechet(real, a), frechet(real, b)
    assert difference.value == pytest.approx(first.value - second.value, abs=1e-9)
    apart = ((first.high - first.low) ** 2 + (second.high - second.low) ** 2) ** 0.5
    assert difference.high - difference.low < apart  # the real rows' noise cancels
    back = frechet_difference(real, b, a)
    assert (back.value, back.low) == pytest.approx((-difference.value, -difference.high), abs=1e-9)
    same = frechet_difference(real, a, a)
    assert same.value == pytest.approx(0, abs=1e-9)


def test_frechet_refuses_what_it_cannot_measure() -> None:
    good = normal(200, 16)
    with pytest.raises(ValueError, match=r"fake: n = 100 rows of d = 16 features; at least 160 are needed"):
        frechet(good, good[:100])
    with pytest.raises(ValueError, match=r"real: n = 159"):
        frechet(good[:159], good)
    with pytest.raises(ValueError, match="d = 8 features, but real has d = 16"):
        frechet(good, good[:, :8])
    broken = good.clone()
    broken[7, 3] = torch.inf
    with pytest.raises(ValueError, match=r"frechet_difference: b: 1 of 200 rows are not finite \(first: row 7\)"):
        frechet_difference(good, good, broken)
    with pytest.raises(ValueError, match="all 200 rows are equal"):
        frechet(good, torch.ones(200, 16))
    with pytest.raises(ValueError, match="0 rows"):
        frechet(good[:0], good)
    assert frechet(good[:100], normal(100, 16, seed=1), rows_per_dim=5).n == 100


def test_frechet_distance_refuses_what_is_no_covariance() -> None:
    zero, one = torch.zeros(2), torch.eye(2)
    with pytest.raises(ValueError, match="cov_b: shape"):
        frechet_distance(zero, one, zero, torch.eye(3))
    with pytest.raises(ValueError, match="cov_b: not symmetric"):
        frechet_distance(zero, one, zero, torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="cov_a: eigenvalue -1 is negative"):
        frechet_distance(zero, -one, zero, one)
    with pytest.raises(ValueError, match="mean_b: not finite"):
        frechet_distance(zero, one, zero + torch.nan, one)
