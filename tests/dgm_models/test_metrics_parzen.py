"""The Parzen estimate against its formula and against densities that are known."""

from __future__ import annotations

import math

import pytest
import torch

from dgm_models.metrics.parzen import _log_densities, parzen

WIDTHS = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]


def normal(n: int, dims: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_parzen_is_the_log_of_a_mixture_of_gaussians() -> None:
    samples, rows = normal(30, 3, 0), normal(7, 3, 1)
    kernel = torch.distributions.MultivariateNormal(torch.zeros(3).double(), 0.3**2 * torch.eye(3).double())
    expected = kernel.log_prob(rows[:, None] - samples[None]).logsumexp(1) - math.log(30)
    (found,) = _log_densities(samples, rows, [0.3])
    assert torch.allclose(found, expected, atol=1e-9, rtol=0)  # float64; squares by a matrix product


def test_parzen_of_a_gaussian_comes_near_its_negative_entropy() -> None:
    found = parzen(normal(20_000, 1, 0), normal(500, 1, 1), normal(2000, 1, 2), WIDTHS)
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    assert found.test.low - 0.02 < -entropy < found.test.high + 0.02  # a window of 0.1 to 0.2 broadens it by 1%
    assert found.test.n == 2000


def test_parzen_prefers_samples_of_the_data_s_own_distribution() -> None:
    valid, test = normal(300, 2, 1), normal(600, 2, 2)
    own = parzen(normal(2000, 2, 0), valid, test, WIDTHS).test
    shifted = parzen(normal(2000, 2, 0) + 1, valid, test, WIDTHS).test
    assert own.low > shifted.high


def test_parzen_refuses_a_width_at_the_end_of_its_candidates() -> None:
    with pytest.raises(ValueError, match="an end of"):
        parzen(normal(2000, 1, 0), normal(300, 1, 1), normal(300, 1, 2), [2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match="at least three"):
        parzen(normal(50, 1, 0), normal(50, 1, 1), normal(50, 1, 2), [0.1, 0.2])
    with pytest.raises(ValueError, match="same coordinates"):
        parzen(normal(50, 2, 0), normal(50, 1, 1), normal(50, 1, 2))
