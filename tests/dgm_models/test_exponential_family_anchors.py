"""Exponential families against textbook densities, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.construct import ConfigError
from dgm_models.energy.exponential_family import Categorical, Gaussian, Laplace
from dgm_models.method import build, encoded, fit
from dgm_models.protocols import DataSpec
from tests.laws.cases import every_state

THREE, BITS = DataSpec("vector", (3,)), DataSpec("vector", (4,), 3)
EXACT = 1e-10  # rounding of 2e-16 through a Cholesky factor and sums of some 1000 terms


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(model: torch.nn.Module) -> torch.nn.Module:
    model.double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * normal(*p.shape, seed=i))
    return model


def gaussian() -> Gaussian:
    return moved(Gaussian(THREE))  # type: ignore[return-value]


def test_gaussian_is_that_of_its_mean_and_covariance() -> None:
    model, x = gaussian(), 2 * normal(50, 3)
    expected = torch.distributions.MultivariateNormal(model.mean, model.covariance).log_prob(x)
    assert torch.allclose(model.log_prob(x), expected, atol=EXACT)
    assert float((model.covariance - torch.eye(3)).detach().abs().max()) > 0.1


def test_laplace_is_that_of_its_rates() -> None:
    model, x = moved(Laplace(THREE)), 2 * normal(50, 3)
    expected = torch.distributions.Laplace(0.0, (-model.log_rate).exp()).log_prob(x).sum(1)
    assert torch.allclose(model.log_prob(x), expected, atol=EXACT)


def test_categorical_of_two_levels_is_bernoulli_s() -> None:
    model = moved(Categorical(DataSpec("vector", (4,), 2)))
    x = every_state(model.data)
    odds = model.logits[:, 1] - model.logits[:, 0]
    expected = torch.distributions.Bernoulli(logits=odds).log_prob(x.double()).sum(1)
    assert torch.allclose(model.log_prob(x), expected, atol=EXACT)


@pytest.mark.parametrize("kind", [Gaussian, Laplace, Categorical])
def test_density_is_natural_parameters_times_statistics_less_log_z(kind: type) -> None:
    data = BITS if kind is Categorical else THREE
    model = moved(kind(data))
    x = every_state(data) if kind is Categorical else 2 * normal(50, 3)
    assert torch.allclose(model.log_prob(x), model.statistics(x) @ model.eta - model.log_z, atol=EXACT)


def test_gradient_of_log_z_is_the_mean_of_the_statistics() -> None:
    """d log Z / d eta = E T, through the parameters: log Z has the slope of eta . E T with E T held fixed."""
    model = gaussian()
    second = model.covariance + torch.outer(model.mean, model.mean)
    expected = torch.cat([model.mean, second.flatten()]).detach()
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(model.log_z, parameters)
    for one, other in zip(slopes, torch.autograd.grad(model.eta @ expected, parameters), strict=True):
        assert torch.allclose(one, other, atol=EXACT)
    categorical = moved(Categorical(BITS))
    (slope,) = torch.autograd.grad(categorical.log_z, categorical.logits)
    assert torch.allclose(slope, categorical.logits.softmax(1), atol=EXACT)


def test_maximum_likelihood_makes_the_moments_those_of_the_data() -> None:
    model, objective = build("energy/exponential_family", THREE)
    model.double()
    x = normal(400, 3) @ normal(3, 3, seed=1) + normal(3, seed=2)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = objective.loss(model, encoded(model, x)).total / len(x)
        total.backward()
        return total

    optimizer.step(closure)
    assert torch.allclose(
        model.mean, x.mean(0), atol=1e-5
    )  # gradients of 1e-10, enlarged by the inverse of the curvature
    assert torch.allclose(model.covariance, torch.cov(x.T, correction=0), atol=1e-5)


def test_categorical_trained_by_the_trainer_has_the_frequencies() -> None:
    x = (
        (torch.rand(2000, 4, generator=torch.Generator().manual_seed(0)) * 3)
        .clamp_max(2)
        .square()
        .div(2)
        .floor()
        .byte()
    )
    method = build("energy/exponential_family", BITS)
    fit(method, x, steps=60, batch_size=2000, optim={"name": "sgd", "lr": 2.0})
    expected = torch.stack([(x == level).float().mean(0) for level in range(3)], 1)
    assert torch.allclose(method.model.logits.softmax(1), expected, atol=1e-3)


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_samples_have_the_statistics_of_the_density(kind: type) -> None:
    model, n = moved(kind(THREE)), 20_000
    found = model.statistics(model.sample(n, torch.Generator().manual_seed(0))).detach()
    if kind is Gaussian:
        second = model.covariance + torch.outer(model.mean, model.mean)
        expected = torch.cat([model.mean, second.flatten()]).detach()
    else:
        expected = (-model.log_rate).exp().detach()
    assert bool(((found.mean(0) - expected).abs() < 5 * found.std(0) / math.sqrt(n)).all())  # five standard errors


def test_laplace_samples_lie_on_both_sides() -> None:
    x = moved(Laplace(THREE)).sample(20_000, torch.Generator().manual_seed(0))
    assert bool(((x > 0).double().mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(20_000))


@pytest.mark.parametrize(
    ("statistics", "data", "message"),
    [
        ("gaussian", BITS, "statistics: 'gaussian' is of real data, and this data has 3 levels"),
        ("categorical", THREE, "statistics: 'categorical' is of whole levels"),
        ("poisson", THREE, "'poisson' is not known"),
    ],
)
def test_statistics_of_other_data_are_refused(statistics: str, data: DataSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("energy/exponential_family", data, statistics=statistics)
