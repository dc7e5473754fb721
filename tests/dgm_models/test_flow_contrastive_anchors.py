"""Flow contrastive estimation: its value, its gradients, its solution for a Gaussian, and which flows it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm_models.codecs import Standardized
from dgm_models.construct import ConfigError
from dgm_models.energy.flow_contrastive import FLOWS, EnergyAndFlow, FlowContrastive, section
from dgm_models.method import build, encoded
from dgm_models.nn.flow import Flow, Transform
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.objective import Objective
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer

PLANE = DataSpec("vector", (2,))
MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=torch.float64)
SMALL: dict[str, dict[str, Any]] = {
    "flows/real_nvp": {"channels": 4, "blocks": 1, "layers": 2},
    "flows/nice": {"network": {"name": "mlp", "width": 4, "depth": 1, "activation": "tanh"}, "layers": 2},
    "flows/glow": {"channels": 4, "steps": 2},
    "flows/neural_spline": {"network": {"name": "mlp", "width": 4, "depth": 1, "activation": "tanh"}, "layers": 2},
}
NETWORK = {"name": "mlp", "width": 8, "depth": 1, "activation": "tanh"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(n: int, seed: int = 0) -> Tensor:
    """n rows with this mean and covariance, without the error of sampling."""
    x = normal(n, 2, seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T, correction=0)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(COVARIANCE).T + MEAN


def batch(x: Tensor) -> Batch:
    return Batch(x, torch.arange(len(x)), torch.arange(len(x)))


class Quadratic(nn.Module):
    """E(x) = |R (x - m)|^2 / 2, log p(x) = -E(x) - log_z with log_z learned."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))
        self.root = nn.Parameter(torch.eye(2))
        self.log_z = nn.Parameter(torch.zeros(1))

    def energy(self, x: Tensor) -> Tensor:
        return 0.5 * ((x - self.mean) @ self.root.T).square().sum(1)

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return -self.energy(x) - self.log_z


class Affine(Transform):
    """z = A (x - m), A lower triangular with a positive diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))
        self.factor = nn.Parameter(torch.zeros(2, 2))

    @property
    def root(self) -> Tensor:
        return self.factor.tril(-1) + self.factor.diagonal().exp().diag()

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return (x - self.mean) @ self.root.T, self.factor.diagonal().sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.mean + torch.linalg.solve_triangular(self.root, z.T, upper=False).T


def gaussians() -> EnergyAndFlow:
    return EnergyAndFlow(Quadratic(), Flow(PLANE, Standardized(PLANE), Affine()))  # type: ignore[arg-type]


def at_the_solution() -> EnergyAndFlow:
    """Both players at the data's density."""
    model = gaussians().double()
    precision = torch.linalg.cholesky(torch.linalg.inv(COVARIANCE))
    root = torch.linalg.inv(torch.linalg.cholesky(COVARIANCE))
    with torch.no_grad():
        model.normalised.mean.copy_(MEAN)
        model.normalised.root.copy_(precision.T)
        model.normalised.log_z.fill_(math.log(2 * math.pi) + 0.5 * float(torch.logdet(COVARIANCE)))
        model.flow.transform.mean.copy_(MEAN)
        model.flow.transform.factor.copy_(root.tril(-1) + root.diagonal().log().diag())
    return model


def moved(name: str) -> EnergyAndFlow:
    """The method with a small flow, all weights moved from where they begin."""
    model = build("energy/flow_contrastive", PLANE, network=NETWORK, flow={"name": name, **SMALL[name]}).model.double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.3 * normal(*p.shape, seed=i))
    return model


# ---- the value and its gradients


def test_value_at_the_solution_is_minus_log_4() -> None:
    model, x = at_the_solution(), rows(200)
    loss, nll = FlowContrastive(MaximumLikelihood()).value(model, batch(x))
    assert float(loss.total.detach()) / 200 == pytest.approx(math.log(4), abs=1e-9)
    entropy = 1 + math.log(2 * math.pi) + 0.5 * float(torch.logdet(COVARIANCE))
    assert float(nll.detach()) / 200 == pytest.approx(entropy, abs=1e-9)


def test_flow_gains_nothing_at_the_solution_and_the_energy_nothing_but_noise() -> None:
    model, objective, n = at_the_solution(), FlowContrastive(MaximumLikelihood()), 20_000
    x = rows(n)
    slopes = torch.autograd.grad(objective.energy_turn(model, batch(x)).total / n, list(model.normalised.parameters()))
    # log-odds are 0: a slope is half the difference of two means over n rows, of numbers up to about 3
    assert max(float(slope.abs().max()) for slope in slopes) < 5 * 3 / math.sqrt(n)
    slopes = torch.autograd.grad(objective.flow_turn(model, batch(x)).total / n, list(model.flow.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 5 * 3 / math.sqrt(n)


def test_value_is_twice_the_jensen_shannon_divergence_for_the_best_energy() -> None:
    model, x = at_the_solution(), rows(20_000)
    with torch.no_grad():
        model.flow.transform.mean.add_(torch.tensor([1.0, 0.0]))  # q moves away, p stays the data's density
    value = -float(FlowContrastive(MaximumLikelihood()).value(model, batch(x))[0].total.detach()) / len(x)
    axis = torch.linspace(-8, 8, 400, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        p, q = model.log_prob(points).exp(), model.flow.log_prob(points).exp()
    cell, middle = float(axis[1] - axis[0]) ** 2, 0.5 * (p + q)
    divergence = 0.5 * float((torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).nan_to_num().sum()) * cell
    assert divergence > 0.05
    assert value == pytest.approx(2 * divergence - math.log(4), abs=5 / math.sqrt(len(x)))


@pytest.mark.parametrize("name", FLOWS)
def test_flow_turn_follows_the_whole_derivative_of_the_value(name: str) -> None:
    """Through the density and through the draws: equal to a difference quotient along a direction."""
    model, objective, x = moved(name), FlowContrastive(MaximumLikelihood()), rows(40)
    parameters = [p for p in model.flow.parameters() if p.requires_grad]
    directions = [normal(*p.shape, seed=100 + i) for i, p in enumerate(parameters)]
    found = torch.autograd.grad(objective.flow_turn(model, batch(x)).total, parameters, allow_unused=True)
    assert all(slope is not None for slope in found)
    slope = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
    step, totals = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(sign * step * d)
            totals.append(float(objective.flow_turn(model, batch(x)).total))
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(sign * step * d)
    quotient = (totals[0] - totals[1]) / (2 * step)
    assert slope == pytest.approx(quotient, rel=1e-5, abs=1e-5)  # an error of step^2, and rounding of 1e-14 / step


@pytest.mark.parametrize("name", FLOWS)
def test_draws_have_the_density_of_the_flow(name: str) -> None:
    """E_q[p / q] over the flow's draws is the integral of p, here a Gaussian with lighter tails."""
    model, n = moved(name), 4000
    x = model.rsample(batch(normal(n, 2))).detach()
    p = torch.distributions.MultivariateNormal(x.mean(0), 0.25 * torch.cov(x.T))
    ratio = (p.log_prob(x) - model.flow.log_prob(x).detach()).exp()
    assert float(ratio.mean()) == pytest.approx(1.0, abs=5 * float(ratio.std()) / math.sqrt(n))


def test_pretraining_is_maximum_likelihood_and_ends() -> None:
    model, x = moved("flows/real_nvp"), rows(40)
    game, warm = FlowContrastive(MaximumLikelihood()), FlowContrastive(MaximumLikelihood(), pretrain=2)
    parameters = [p for p in model.flow.parameters() if p.requires_grad]

    def slopes(objective: FlowContrastive) -> list[Tensor]:
        return list(torch.autograd.grad(objective.flow_turn(model, batch(x)).total, parameters))

    likelihood = torch.autograd.grad(-model.flow.log_prob(x).sum(), parameters)
    for step in range(2):
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(slopes(warm), likelihood, strict=True))
        warm.advance(model, step)
    assert all(torch.equal(a, b) for a, b in zip(slopes(warm), slopes(game), strict=True))
    assert not torch.allclose(slopes(warm)[0], likelihood[0])


# ---- the solution


@pytest.fixture(scope="module")
def trained() -> Trainer:
    model, x = gaussians(), rows(4096).float()
    settings = Train(steps=400, batch_size=512, report_every=50)
    optim = Optims(Optim(lr=0.03, betas=(0.5, 0.9), schedule="linear"))
    objective = FlowContrastive(MaximumLikelihood(), pretrain=50)
    trainer = Trainer(model, objective, ArraySource(x, PLANE), settings, optim, 0)
    trainer.run()
    return trainer


# 512 examples a step and a rate that falls to 0: what is left is the noise of the last tens of batches, 1 / sqrt(10^4)
TOLERANCE = 0.04


def test_flow_and_energy_find_the_moments(trained: Trainer) -> None:
    model = trained.model
    flow, energy = model.flow.transform, model.normalised
    assert torch.allclose(flow.mean, MEAN.float(), atol=TOLERANCE)
    assert torch.allclose(torch.linalg.inv(flow.root.T @ flow.root), COVARIANCE.float(), atol=2 * TOLERANCE)
    assert torch.allclose(energy.mean, MEAN.float(), atol=TOLERANCE)
    assert torch.allclose(torch.linalg.inv(energy.root.T @ energy.root), COVARIANCE.float(), atol=2 * TOLERANCE)


def test_log_z_is_that_of_the_energy(trained: Trainer) -> None:
    energy = trained.model.normalised
    expected = math.log(2 * math.pi) - float(torch.linalg.slogdet(energy.root.detach())[1])
    assert float(energy.log_z.detach()) == pytest.approx(expected, abs=TOLERANCE)


def test_nobody_tells_data_from_the_flow_at_the_end(trained: Trainer) -> None:
    first, last = trained.history[0][1], trained.history[-1][1]
    assert last["energy/loss"] == pytest.approx(math.log(4), abs=0.01)
    assert last["energy/accuracy"] == pytest.approx(0.5, abs=0.02)
    assert last["flow/nll"] < first["flow/nll"] - 0.1


# ---- what it is made of


@pytest.mark.parametrize("name", FLOWS)
def test_section_builds_the_registered_flow(name: str) -> None:
    flow, objective = section(name)(**{k: v for k, v in SMALL[name].items() if k != "network"}).build(PLANE)
    assert isinstance(flow, Flow) and isinstance(objective, Objective)
    params = build("energy/flow_contrastive", PLANE, flow={"name": name, **SMALL[name]}).params["flow"]
    assert params == {"name": name, **build(name, PLANE, **SMALL[name]).params}  # every default is written down


def test_energy_and_flow_share_the_flow_s_space() -> None:
    data = DataSpec("vector", (4,), 5)
    method = build("energy/flow_contrastive", data, network=NETWORK, flow={"name": "flows/real_nvp", "layers": 2})
    assert method.model.codec == method.model.flow.codec == method.model.normalised.codec
    x = encoded(method.model, torch.zeros(3, 4, dtype=torch.uint8)).x
    assert method.model.log_prob(x).shape == (3,)
    assert torch.equal(method.model.log_prob(x), -method.model.energy(x) - method.model.normalised.log_z)


@pytest.mark.parametrize(
    ("flow", "data", "message"),
    [
        ({"name": "flows/maf"}, PLANE, "'flows/maf' is not known"),
        ({"name": "flows/nice", "layrs": 2}, PLANE, r"method\.flow\.layrs: unknown key; did you mean \"layers\""),
        ({"name": "flows/real_nvp", "dequantization": "variational"}, DataSpec("vector", (4,), 2), "use uniform"),
        ({"name": "flows/real_nvp", "cond": {"name": "label"}}, DataSpec("vector", (2,), classes=3), "leave it out"),
    ],
)
def test_flows_that_cannot_play_are_refused(flow: dict[str, Any], data: DataSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("energy/flow_contrastive", data, flow=flow)


def test_several_energy_updates_draw_batches_of_their_own() -> None:
    one, five = FlowContrastive(MaximumLikelihood()), FlowContrastive(MaximumLikelihood(), energy_steps=5)
    assert [(turn.player, turn.updates, turn.fresh) for turn in one.turns()] == [
        ("energy", 1, False),
        ("flow", 1, False),
    ]
    assert [(turn.player, turn.updates, turn.fresh) for turn in five.turns()] == [
        ("energy", 5, True),
        ("flow", 1, False),
    ]
