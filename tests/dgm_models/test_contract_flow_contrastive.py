"""Contract: a game of an energy and a flow (flow contrastive estimation) finds a Gaussian by the ordinary trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import Standardized
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model, capabilities
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer

MEAN = torch.tensor([1.0, -0.5])
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.8]])


class Quadratic(nn.Module):
    """energy(x) = |R (x - m)|^2 / 2; log p(x) = -energy(x) - log_z with log_z learned."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))
        self.root = nn.Parameter(torch.eye(2))
        self.log_z = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * ((x - self.mean) @ self.root.T).square().sum(1)

    def log_prob(self, x: Tensor) -> Tensor:
        return -self(x) - self.log_z


class Affine(nn.Module):
    """x = m + L z with L lower triangular, its diagonal positive."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))
        self.log_diagonal = nn.Parameter(torch.zeros(2))
        self.below = nn.Parameter(torch.zeros(()))

    @property
    def factor(self) -> Tensor:
        corner = torch.zeros(2, 2)
        corner[1, 0] = 1.0
        return self.log_diagonal.exp().diag() + self.below * corner

    def forward(self, z: Tensor) -> Tensor:
        return self.mean + z @ self.factor.T

    def log_prob(self, x: Tensor) -> Tensor:
        z = torch.linalg.solve_triangular(self.factor, (x - self.mean).T, upper=False).T
        return -0.5 * z.square().sum(1) - math.log(2 * math.pi) - self.log_diagonal.sum()


class Game(Model):
    def __init__(self, data: DataSpec) -> None:
        super().__init__(data, Standardized(data))
        self.energy_network, self.flow = Quadratic(), Affine()

    def players(self) -> dict[str, nn.Module]:
        return {"energy": self.energy_network, "flow": self.flow}

    def energy(self, x: Tensor) -> Tensor:
        return self.energy_network(x)

    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        return self.flow(torch.randn(n, 2, generator=rng)).detach()


class FlowContrastive(Objective):
    """V = E_data log sigmoid(log p - log q) + E_q log sigmoid(log q - log p): the energy raises it, the flow lowers it.

    Source: Gao et al. 2020, arXiv:1912.00589.
    """

    def turns(self) -> Sequence[Turn]:
        return Turn("energy", self.energy_turn), Turn("flow", self.flow_turn)

    def value(self, model: Game, batch: Batch) -> Tensor:
        def log_odds(x: Tensor) -> Tensor:
            return model.energy_network.log_prob(x) - model.flow.log_prob(x)

        fake = model.flow(batch.normal("latent", (2,)))
        return (F.logsigmoid(log_odds(batch.x)) + F.logsigmoid(-log_odds(fake))).sum()

    def energy_turn(self, model: Game, batch: Batch) -> Loss:
        return Loss(-self.value(model, batch))

    def flow_turn(self, model: Game, batch: Batch) -> Loss:
        return Loss(self.value(model, batch))


@pytest.fixture(scope="module")
def trained() -> Trainer:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 2, generator=rng, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # moments without sampling error
    x = (x @ torch.linalg.cholesky(COVARIANCE.double()).T + MEAN.double()).float()
    data = DataSpec("vector", (2,))
    settings = Train(steps=500, batch_size=512, report_every=50)
    optim = Optims(Optim(lr=0.03, betas=(0.5, 0.9), schedule="linear"))
    trainer = Trainer(Game(data), FlowContrastive(), ArraySource(x, data), settings, optim, 0)
    trainer.run()
    return trainer


# 512 examples a step and a rate that falls to 0: what is left is the noise of the last tens of batches, 1 / sqrt(10^4)
TOLERANCE = 0.04


def test_flow_contrastive_flow_finds_the_moments(trained: Trainer) -> None:
    flow = trained.model.flow
    assert torch.allclose(flow.mean, MEAN, atol=TOLERANCE)
    assert torch.allclose(flow.factor @ flow.factor.T, COVARIANCE, atol=TOLERANCE)


def test_flow_contrastive_energy_finds_the_moments(trained: Trainer) -> None:
    energy = trained.model.energy_network
    assert torch.allclose(energy.mean, MEAN, atol=TOLERANCE)
    assert torch.allclose(torch.linalg.inv(energy.root.T @ energy.root), COVARIANCE, atol=2 * TOLERANCE)


def test_flow_contrastive_energy_learns_its_log_partition_function(trained: Trainer) -> None:
    energy = trained.model.energy_network
    expected = math.log(2 * math.pi) - float(torch.linalg.slogdet(energy.root.detach())[1])
    assert float(energy.log_z.detach()) == pytest.approx(expected, abs=TOLERANCE)


def test_flow_contrastive_game_ends_at_its_value(trained: Trainer) -> None:
    last = trained.history[-1][1]
    assert last["energy/loss"] == pytest.approx(math.log(4), abs=0.01)  # nobody tells data from samples: V = -log 4
    assert last["flow/loss"] == pytest.approx(-math.log(4), abs=0.01)
    assert abs(trained.history[0][1]["energy/loss"] - math.log(4)) > 0.1  # ten tolerances away in the first 50 steps


def test_flow_contrastive_model_has_the_capabilities_of_both_players(trained: Trainer) -> None:
    assert capabilities(trained.model) == ("samples", "energy")
