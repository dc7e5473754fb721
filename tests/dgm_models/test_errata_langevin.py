"""Langevin dynamics whose step and noise do not go together samples another temperature."""

from __future__ import annotations

import math

import pytest
import torch


def variance(step: float, noise: float, curvature: float = 1.0) -> float:
    """The stationary variance of x <- x - (step / 2) E'(x) + noise N(0, 1) for E(x) = curvature x^2 / 2, exactly.

    x is an autoregression with the factor a = 1 - step curvature / 2, of variance noise^2 / (1 - a^2).
    """
    return noise**2 / (1 - (1 - step * curvature / 2) ** 2)


def simulated(step: float, noise: float, chains: int = 20_000) -> float:
    rng = torch.Generator().manual_seed(0)
    x = torch.zeros(chains, dtype=torch.float64)
    for _ in range(
        math.ceil(12 / step)
    ):  # the memory of the start falls as exp(-step / 2 t): exp(-6) squared at the end
        x = x - step / 2 * x + noise * torch.randn(chains, generator=rng, dtype=torch.float64)
    return float(x.var())


@pytest.mark.parametrize(("step", "noise"), [(0.1, math.sqrt(0.1)), (0.1, 0.1), (0.2, 0.05)])
def test_stationary_variance_is_that_of_the_autoregression(step: float, noise: float) -> None:
    expected = variance(step, noise)
    error = expected * math.sqrt(2 / 20_000)
    assert simulated(step, noise) == pytest.approx(expected, abs=5 * error)  # five standard errors


def test_matched_step_and_noise_sample_the_energy() -> None:
    errors = [abs(variance(step, math.sqrt(step)) - 1) for step in (0.4, 0.2, 0.1)]
    assert errors[2] < 0.03  # of order step / 4
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # the discretisation's error is of first order


@pytest.mark.parametrize(("step", "noise"), [(0.01, 0.01), (0.01, 0.2), (0.02, 0.05)])
def test_unmatched_step_and_noise_sample_the_energy_over_a_temperature(step: float, noise: float) -> None:
    """exp(-E / T) with T = noise^2 / step: one symbol for both would be T = step."""
    temperature = noise**2 / step
    assert variance(step, noise) == pytest.approx(temperature, rel=0.01)  # of order step / 4
    assert abs(temperature - 1) > 0.5
    for curvature in (0.5, 3.0):  # one temperature for every Gaussian
        assert variance(step, noise, curvature) == pytest.approx(temperature / curvature, rel=0.02)
