"""Means, bits and the importance-weighted bound."""

from __future__ import annotations

import math

import pytest
import torch

from dgm_models.metrics.likelihood import bits_per_dim, importance_weighted, mean_estimate


def test_mean_estimate_is_the_t_interval() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    found = mean_estimate(values)
    half = 2.776445 * float(values.double().std()) / math.sqrt(5)  # t of 4 degrees
    assert (found.value, found.low, found.high) == pytest.approx((4, 4 - half, 4 + half), rel=1e-6)
    assert found.n == 5


def test_mean_estimate_sums_in_float64() -> None:
    values = torch.full((1000,), 1e6) + torch.arange(1000) % 2  # float32 sums lose the half
    assert mean_estimate(values).value == pytest.approx(1e6 + 0.5, rel=1e-12)


def test_bits_per_dim_of_uniform_bytes_is_eight() -> None:
    nats = torch.full((3,), 784 * math.log(256.0), dtype=torch.float64)
    assert bits_per_dim(nats, 784).tolist() == pytest.approx([8, 8, 8])


def test_importance_weighted_bound_is_the_elbo_for_one_draw_and_rises_with_more() -> None:
    log_weights = torch.randn(64, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert importance_weighted(log_weights[:1]).equal(log_weights[0])
    bounds = [float(importance_weighted(log_weights[:k]).mean()) for k in (1, 4, 16, 64)]
    assert bounds == sorted(bounds)
    assert bounds[-1] < 0.5 + 0.02  # log E[exp(N(0, 1))], and the noise of 500 examples
    assert bounds[-1] == pytest.approx(0.5, abs=0.05)


def test_importance_weighted_bound_neither_overflows_nor_counts_dead_draws_as_none() -> None:
    weights = torch.tensor([[-2000.0, 1000.0], [-math.inf, 1000.0]])
    assert importance_weighted(weights).tolist() == pytest.approx([-2000 - math.log(2), 1000])


def test_likelihood_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match=r"values: 1 of 2 are not finite"):
        mean_estimate(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match=r"expected \[n\]"):
        mean_estimate(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"1 example"):
        mean_estimate(torch.zeros(1))
    with pytest.raises(ValueError, match="dims: 0"):
        bits_per_dim(torch.zeros(3), 0)
    with pytest.raises(ValueError, match="nats: 1 of 1 are not finite"):
        bits_per_dim(torch.tensor([math.inf]), 3)
    with pytest.raises(ValueError, match=r"expected \[k, n\]"):
        importance_weighted(torch.zeros(3))
    with pytest.raises(ValueError, match="nan or"):
        importance_weighted(torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="all 2 weights of 1 of 3 examples"):
        importance_weighted(torch.tensor([[0.0, 0.0, -math.inf]] * 2))
