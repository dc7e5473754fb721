"""Contrastive divergence and its persistent chains on a Gaussian, and what chains do to a training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.method import Method, build
from dgm_models.nn.contrastive_divergence import ContrastiveDivergence, Replay
from dgm_models.ops.mcmc import Mala
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer
from tests.support.energies import COVARIANCE, DATA, MEAN, Quadratic, rows

OBJECTIVES = {
    "cd": lambda: ContrastiveDivergence(5),
    "persistent": lambda: ContrastiveDivergence(5, replay=Replay((2,), torch.float32, 1000, 0.05)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_energy_finds_the_moments_of_a_gaussian(name: str) -> None:
    settings = Train(steps=150, batch_size=256, report_every=150, average=0.95)
    model, optim = Quadratic(Mala(step=0.5)), Optims(Optim(lr=0.08, schedule="linear"))
    trainer = Trainer(model, OBJECTIVES[name](), ArraySource(rows(), DATA), settings, optim, 0)
    trainer.run()
    mean, covariance = trainer.final().moments()
    # the noise of the last tens of batches, 1 / sqrt(10^4), and a few of it
    assert torch.allclose(mean, MEAN, atol=0.06)
    assert torch.allclose(covariance, COVARIANCE, atol=0.12)
    assert 0.5 < trainer.history[-1][1]["accepted"] < 1  # the share of the chains' moves


def batch(n: int = 6, first: int = 0, x: Tensor | None = None) -> Batch:
    key = noise.fold(torch.arange(first, first + n), "test")
    return Batch(torch.randn(n, 2, generator=torch.Generator().manual_seed(first)) if x is None else x, key, key)


def test_loss_has_no_gradient_through_the_chains() -> None:
    model, objective = Quadratic(Mala(step=0.5)), ContrastiveDivergence(4)
    with torch.no_grad():
        prepared = objective.prepare(model, batch())
    negatives = prepared.extra["negatives"]
    assert not negatives.requires_grad and model.root.requires_grad
    assert not torch.equal(negatives, prepared.x)
    objective.loss(model, prepared).total.backward()
    # dE/dm = -R^T R (x - m) with R = I, m = 0
    expected = (negatives - prepared.x).sum(0)
    assert torch.allclose(model.mean.grad, expected, atol=1e-5)


def test_loss_pulls_energies_to_zero() -> None:
    model = Quadratic(Mala(step=0.5))
    prepared = ContrastiveDivergence(1).prepare(model, batch())
    plain, pulled = (ContrastiveDivergence(1, weight).loss(model, prepared).total for weight in (0.0, 0.1))
    data, chains = model.energy(prepared.x), model.energy(prepared.extra["negatives"])
    assert torch.allclose(plain, (data - chains).sum())
    assert torch.allclose(pulled - plain, 0.1 * (data.square() + chains.square()).sum(), atol=1e-5)


# ---- chains that go on


def replayed(buffer: int, fresh: float = 0.0, moves: int = 3) -> ContrastiveDivergence:
    return ContrastiveDivergence(moves, replay=Replay((2,), torch.float32, buffer, fresh))


@torch.no_grad()
def test_chains_take_turns_and_go_on_from_where_they_stood() -> None:
    model, objective = Quadratic(Mala(step=0.5)), replayed(buffer=10)
    replay = objective.replay
    first = objective.prepare(model, batch(6)).extra["negatives"]
    assert torch.equal(replay.chains[:6], first) and replay.ages.tolist() == [3] * 6 + [0] * 4
    begun = model.start(6, noise.fold(batch(6).key, "begin"))
    assert torch.equal(first, model.walk(begun, noise.fold(batch(6).key, "chain"), 3)[0])
    before = replay.chains.clone()
    second = objective.prepare(model, batch(6, 100)).extra["negatives"]
    assert replay.ages.tolist() == [6, 6, 3, 3, 3, 3, 3, 3, 3, 3] and int(replay.position) == 2
    assert torch.equal(replay.chains[[6, 7, 8, 9, 0, 1]], second) and torch.equal(replay.chains[2:6], before[2:6])
    went_on = model.walk(before[:2], noise.fold(batch(6, 100).key, "chain")[4:], 3)[0]
    assert torch.equal(second[4:], went_on)


@torch.no_grad()
def test_last_of_several_rows_on_one_chain_is_kept() -> None:
    model, objective = Quadratic(Mala(step=0.5)), replayed(buffer=4)
    found = objective.prepare(model, batch(6)).extra["negatives"]
    assert torch.equal(objective.replay.chains[[2, 3, 0, 1]], found[2:])
    assert objective.replay.ages.tolist() == [3] * 4 and int(objective.replay.position) == 2


@torch.no_grad()
def test_share_of_the_chains_begins_anew() -> None:
    model, objective = Quadratic(Mala(step=0.5)), replayed(buffer=2000, fresh=0.3, moves=1)
    for first in (0, 10_000):
        objective.prepare(model, batch(2000, first))
    renewed = float((objective.replay.ages == 1).double().mean())
    assert renewed == pytest.approx(0.3, abs=5 * (0.21 / 2000) ** 0.5)  # five standard errors
    assert set(objective.replay.ages.tolist()) == {1, 2}


@torch.no_grad()
def test_validation_leaves_the_chains_where_they_are() -> None:
    model, objective = Quadratic(Mala(step=0.5)), replayed(buffer=10)
    objective.prepare(model, batch(6))
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    model.eval()
    found = objective.prepare(model, batch(6, 50)).extra["negatives"]
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    part = replace(batch(6, 50), x=batch(6, 50).x[2:4], key=batch(6, 50).key[2:4], id=batch(6, 50).id[2:4])
    assert torch.equal(objective.prepare(model, part).extra["negatives"], found[2:4])  # by key: the same on every rank


def test_chains_are_a_part_of_the_checkpoint() -> None:
    names = {"replay.chains", "replay.ages", "replay.position"}
    method = build("energy/persistent_cd", DATA, network={"name": "mlp", "width": 4}, buffer=7)
    assert method.objective.state_dict().keys() == names
    assert method.objective.state_dict()["replay.chains"].shape == (7, 2)
    assert not names & method.model.state_dict().keys()  # samples are of fresh chains


def test_network_that_couples_the_examples_is_refused() -> None:
    method: Method = build(
        "energy/contrastive_divergence", DataSpec("image", (1, 16, 16), 4), network={"name": "dcgan"}
    )
    given = batch(2, x=torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="network: EnergyBased holds a layer that couples the examples"):
        method.objective.prepare(method.model, given)
