"""The importance-weighted bound without its log k, and averages of logarithms, in a model with a known marginal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.metrics.likelihood import importance_weighted

X = 1.3  # z ~ N(0, 1), x | z ~ N(z, 1): x ~ N(0, 2), z | x ~ N(x / 2, 1 / 2)
LOG_P = -0.5 * math.log(2 * math.pi * 2) - X**2 / 4


def normal(x: Tensor, mean: Tensor | float, variance: float) -> Tensor:
    return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))


def log_weights(k: int, n: int, mean: float = 0.3, variance: float = 0.8) -> Tensor:
    """[k, n] log p(x, z) - log q(z | x) for a q that is not the posterior; float64."""
    rng = torch.Generator().manual_seed(0)
    z = mean + math.sqrt(variance) * torch.randn(k, n, generator=rng, dtype=torch.float64)
    x = torch.tensor(X, dtype=torch.float64)
    return normal(z, 0.0, 1.0) + normal(x, z, 1.0) - normal(z, mean, variance)


@pytest.mark.parametrize("k", [5, 50, 500])
def test_bound_without_log_k_exceeds_the_likelihood(k: int) -> None:
    found = log_weights(k, 2000)
    error = float(importance_weighted(found).std()) / math.sqrt(2000)
    right, wrong = float(importance_weighted(found).mean()), float(found.logsumexp(0).mean())
    assert right < LOG_P + 3 * error  # three standard errors
    assert wrong > LOG_P + 0.5 * math.log(k)  # a lower bound of nothing
    assert wrong - right == pytest.approx(math.log(k), abs=1e-9)


def test_bound_is_not_the_mean_of_the_logarithms() -> None:
    found = log_weights(500, 200)
    iw, elbo = float(importance_weighted(found).mean()), float(found.mean(0).mean())
    assert (
        abs(LOG_P - iw) < 0.01
    )  # the bias is var(w / p(x)) / (2 k), the standard error sqrt(var / (500 x 200)): below 0.005
    kl = 0.5 * (0.8 / 0.5 - 1 - math.log(0.8 / 0.5) + (0.3 - X / 2) ** 2 / 0.5)  # of q and the posterior
    assert LOG_P - elbo == pytest.approx(kl, abs=0.01)  # 10^5 draws: more of them give a better mean, no tighter bound


def test_bound_with_the_true_posterior_is_exact_for_every_k() -> None:
    found = log_weights(3, 50, mean=X / 2, variance=0.5)
    assert torch.allclose(found, torch.full_like(found, LOG_P), atol=1e-12)  # every weight is p(x): float64
    assert torch.allclose(importance_weighted(found), found[0], atol=1e-12)
