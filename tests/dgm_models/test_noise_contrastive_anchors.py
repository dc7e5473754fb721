"""Noise contrastive estimation against closed forms for Gaussians, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.energy.noise_contrastive import LEAST, NoiseContrastive
from dgm_models.likelihood import log_prob
from dgm_models.method import build, encoded, fit
from dgm_models.nn.self_normalised import SelfNormalised, contrast
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.optim import Optim

PLANE = DataSpec("vector", (2,))
MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=torch.float64)
LOG_Z = math.log(2 * math.pi) + 0.5 * float(torch.logdet(COVARIANCE))  # (D/2) log 2 pi + log det(covariance) / 2
EXACT = 1e-9  # rounding of 2e-16 in sums of some 1000 terms


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(n: int) -> Tensor:
    """n rows with this mean and covariance, without the error of sampling."""
    x = normal(n, 2)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T, correction=0)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(COVARIANCE).T + MEAN


def batch(x: Tensor) -> Batch:
    return Batch(x, torch.arange(len(x)), torch.arange(len(x)))


class Quadratic(nn.Module):
    """log p(x) = -|R (x - m)|^2 / 2 - log_z with log_z learned."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.root = nn.Parameter(torch.eye(2, dtype=torch.float64))
        self.log_z = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return -0.5 * ((x - self.mean) @ self.root.T).square().sum(1) - self.log_z


def prepared(x: Tensor, ratio: int = 1) -> NoiseContrastive:
    objective = NoiseContrastive(DataSpec("vector", x.shape[1:]), ratio).double()
    objective.initialize(None, batch(x))
    return objective


@pytest.mark.parametrize("ratio", [1, 4])
def test_noise_contrastive_finds_mean_covariance_and_log_z(ratio: int) -> None:
    x = rows(16_384)
    model, objective = Quadratic(), prepared(x, ratio)
    # another Gaussian than the data's: with the data's own, log p - log q is constant at the solution
    objective.root.mul_(1.5)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = objective.loss(model, batch(x)).total / len(x)
        total.backward()
        return total

    optimizer.step(closure)
    # estimates from 16384 rows and as many of noise or more: their standard error is some 0.01
    assert torch.allclose(model.mean, MEAN, atol=0.05)
    assert torch.allclose(torch.linalg.inv(model.root.T @ model.root), COVARIANCE, atol=0.06)
    assert float(model.log_z.detach()) == pytest.approx(LOG_Z, abs=0.05)
    assert abs(LOG_Z) > 0.5


@pytest.mark.parametrize("ratio", [1, 3])
def test_noise_contrastive_loss_is_the_cross_entropy_of_the_classes(ratio: int) -> None:
    """P(data | x) = p / (p + n q), with one example for n rows of noise."""
    x = rows(50)
    model, objective = Quadratic(), prepared(x, ratio)
    noise = objective.draw(batch(x))
    assert noise.shape == (50 * ratio, 2)

    def share(x: Tensor) -> Tensor:
        p, q = model.log_prob(x).exp(), objective.log_q(x).exp()
        return p / (p + ratio * q)

    expected = -share(x).log().sum() - (1 - share(noise)).log().sum()
    assert float(objective.loss(model, batch(x)).total.detach()) == pytest.approx(float(expected.detach()), abs=EXACT)


def test_noise_density_is_that_of_its_draws() -> None:
    x = rows(20_000)
    objective = prepared(x)
    drawn = objective.draw(batch(x))
    expected = torch.distributions.MultivariateNormal(objective.mean, objective.root @ objective.root.T)
    assert torch.allclose(objective.log_q(drawn), expected.log_prob(drawn), atol=EXACT)
    assert torch.allclose(drawn.mean(0), MEAN, atol=5 / math.sqrt(20_000))
    assert torch.allclose(torch.cov(drawn.T), COVARIANCE, atol=5 * math.sqrt(2 / 20_000))


def test_noise_has_the_moments_of_the_data_with_correlations_shrunk() -> None:
    x = rows(98)
    objective = prepared(x)
    found = objective.root @ objective.root.T
    kept = 98 / 100
    shrunk = kept * COVARIANCE + (1 - kept) * COVARIANCE.diagonal().diag()
    assert torch.allclose(found, shrunk, atol=EXACT) and torch.allclose(objective.mean, MEAN, atol=EXACT)


def test_noise_is_a_density_with_fewer_rows_than_dimensions_and_for_constants() -> None:
    x = torch.cat([normal(3, 5), torch.ones(3, 1)], 1)
    objective = prepared(x)
    assert torch.linalg.eigvalsh(objective.root @ objective.root.T).min() > 0.5 * LEAST
    assert bool(objective.log_q(x).isfinite().all())


def test_contrast_counts_right_answers_of_data_and_noise_alike() -> None:
    loss = contrast(torch.tensor([1.0, -1.0]), torch.tensor([-1.0, -1.0, -1.0, 1.0]))
    assert float(loss.metrics["accuracy"]) / 2 == pytest.approx(0.5 * (1 / 2 + 3 / 4))
    expected = F.softplus(torch.tensor([-1.0, 1.0])).sum() + F.softplus(torch.tensor([-1.0, -1.0, -1.0, 1.0])).sum()
    assert float(loss.total) == pytest.approx(float(expected))


def test_log_z_begins_as_that_of_the_gaussian_and_moves_by_its_rate() -> None:
    data, spread = DataSpec("vector", (3,)), 2.0
    model = build("energy/noise_contrastive", data, spread=spread, log_z_rate=7.0).model
    assert isinstance(model, SelfNormalised)
    before = float(model.log_z.detach())
    assert before == pytest.approx(1.5 * math.log(2 * math.pi * spread**2), abs=1e-5)
    optimizer = Optim(name="adam", lr=0.01, weight_decay=0.5).build(model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model.excess)] == 0.0
    model.log_z.backward()
    optimizer.step()
    assert before - float(model.log_z.detach()) == pytest.approx(7.0 * 0.01, rel=1e-3)  # a step of Adam is lr


def test_noise_contrastive_network_is_nearly_normalised_after_training() -> None:
    x = rows(4096).float()
    method = build(
        "energy/noise_contrastive", PLANE, network={"name": "mlp", "width": 16, "depth": 1, "activation": "tanh"}
    )
    fit(method, x, steps=300, batch_size=256, optim={"lr": 1e-2, "schedule": "cosine"})
    axis = torch.linspace(-8, 8, 161)
    with torch.no_grad():
        mass = float(method.model.log_prob(torch.cartesian_prod(axis, axis)).exp().sum()) * 0.1**2
    assert mass == pytest.approx(1.0, abs=0.1)
    nats, kind = log_prob(method, x)
    entropy = LOG_Z + 1
    assert kind == "estimate"
    assert -float(nats.mean()) == pytest.approx(entropy, abs=0.1)


def test_noise_contrastive_refuses_an_energy_without_log_z() -> None:
    energy = build("energy/score_matching", PLANE).model
    with pytest.raises(ValueError, match="EnergyBased has no log_prob"):
        NoiseContrastive(PLANE).loss(energy, encoded(energy, torch.zeros(2, 2)))
