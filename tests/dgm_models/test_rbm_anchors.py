"""Restricted Boltzmann machines small enough to write down every state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.energy import rbm as module
from dgm_models.energy.rbm import Rbm, rbm
from dgm_models.method import Method, build, fit
from dgm_models.protocols import DataSpec
from tests.laws.cases import every_state


def machine(levels: int = 2, dims: int = 4, hidden: int = 3, **params: int) -> Rbm:
    torch.manual_seed(1)
    model, _ = rbm(DataSpec("vector", (dims,), levels), hidden=hidden, **params)
    with torch.no_grad():
        for p in (model.weight, model.visible, model.hidden, model.base):
            p.normal_(0, 1)
    return model.double()


def joint(model: Rbm, x: Tensor, h: Tensor) -> Tensor:
    """[X, H] E(x, h), from the definition: a bias for every value above 0 of a place, and a row of W for each."""
    bias = torch.cat([torch.zeros(model.data.dims, 1), model.visible.reshape(model.data.dims, -1)], 1)
    weight = model.weight.reshape(model.data.dims, model.levels - 1, -1)
    weight = torch.cat([torch.zeros_like(weight[:, :1]), weight], 1)  # [D, levels, H]
    place = torch.arange(model.data.dims)
    rows = [-(bias[place, v].sum() + h @ model.hidden + h @ weight[place, v].sum(0)) for v in x.long()]
    return torch.stack(rows)


@pytest.mark.parametrize("levels", [2, 3])
def test_free_energy_and_log_z_are_sums_over_states(levels: int) -> None:
    model = machine(levels)
    x, h = every_state(model.data), every_state(DataSpec("vector", (3,), 2)).double()
    energies = joint(model, x, h)
    assert torch.allclose(model.energy(x), -(-energies).logsumexp(1), atol=1e-12)  # float64
    assert float(model.exact_log_z()) == pytest.approx(float((-energies).logsumexp((0, 1)).detach()), abs=1e-12)


@pytest.mark.parametrize(("dims", "hidden"), [(3, 9), (9, 3)])
def test_log_z_is_the_same_over_either_side(dims: int, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = machine(2, dims, hidden)
    monkeypatch.setattr(module, "CHUNK", 3)  # parts that do not divide the states
    x = every_state(model.data)
    assert float(model.exact_log_z()) == pytest.approx(float((-model.energy(x)).logsumexp(0).detach()), abs=1e-12)


def test_log_z_of_two_large_sides_is_refused() -> None:
    with pytest.raises(ValueError, match="21 hidden units and 21 places of 2 levels are too many"):
        machine(2, 21, 21).exact_log_z()


@pytest.mark.parametrize("levels", [2, 3])
def test_gibbs_chains_reach_the_distribution(levels: int) -> None:
    model, n = machine(levels, steps=30), 8_000
    p = (-model.energy(every_state(model.data)).detach() - model.exact_log_z()).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    drawn = model.sample(n, torch.Generator().manual_seed(0))
    assert model.evaluations == 30 and drawn.dtype == torch.int64
    place = torch.tensor([levels**i for i in reversed(range(4))])
    counts = torch.bincount((drawn * place).sum(1), minlength=len(p)).double()
    common = p * n >= 5  # Pearson's rule; the rest is one cell
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([p[common], p[~common].sum()[None]]) * n
    free = int(common.sum())
    statistic = float(((observed - expected).square() / expected.clamp_min(1e-9)).sum())
    assert statistic < free + 5 * math.sqrt(2 * free)  # five standard deviations of chi-squared


def test_chains_begin_at_the_frequencies() -> None:
    model = machine()
    drawn = model.start(20_000, torch.Generator().manual_seed(0)).double().mean(0)
    assert torch.allclose(drawn, model.base.sigmoid(), atol=5 * 0.5 / math.sqrt(20_000))  # five standard errors


def test_gibbs_chain_with_a_key_depends_on_it_alone() -> None:
    model = machine(3)
    x, keys = model.start(6, torch.arange(6)), torch.arange(6) * 31
    whole, order = model.walk(x, keys, 4)[0], torch.tensor([4, 1, 5])
    assert torch.equal(model.walk(x[order], keys[order], 4)[0], whole[order])
    assert not torch.equal(model.walk(x, keys + 1, 4)[0], whole)


# ---- training: two pairs of places that agree 9 times of 10

DATA = DataSpec("vector", (4,), 2)
STATES = every_state(DATA)
AGREE = torch.stack([STATES[:, 0] == STATES[:, 1], STATES[:, 2] == STATES[:, 3]]).double()
P = torch.where(AGREE > 0, 0.45, 0.05).prod(0)
ROWS = STATES.repeat_interleave((400 * P).round().long(), 0).to(torch.uint8)  # 81, 9 or 1 of each state


def divergence(method: Method) -> float:
    """KL(data || model) in nats, exact."""
    with torch.no_grad():
        log_p = -method.model.energy(STATES).double() - method.model.exact_log_z()
    return float((P * (P.log() - log_p)).sum())


@pytest.mark.parametrize("params", [{"start": "chains", "moves": 1}, {"start": "data", "moves": 3}], ids=str)
def test_training_finds_the_distribution(params: dict) -> None:
    method = build("energy/rbm", DATA, hidden=8, buffer=400, **params)
    apart = 2 * (math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1))  # of the best model of independent places
    assert divergence(method) == pytest.approx(apart, abs=0.01)  # the first weights are small
    with torch.no_grad():
        method.model.weight.mul_(100)  # out of the saddle at 0, where all hidden units are alike
    optim = {"name": "sgd", "lr": 0.5, "momentum": 0.8, "schedule": "linear"}
    fit(method, ROWS, steps=200, batch_size=400, optim=optim)
    assert divergence(method) < 0.2 * apart


def test_first_batch_sets_the_biases_to_its_frequencies() -> None:
    x = (torch.rand(512, 4, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.1, 0.3, 0.5, 0.9])).byte()
    method = build("energy/rbm", DATA, hidden=2)
    fit(method, x, steps=1, batch_size=512, optim={"name": "sgd", "lr": 1e-9})
    odds = (x.double().sum(0) + 1) / (512 - x.double().sum(0) + 1)
    for biases in (method.model.base, method.model.visible):
        assert torch.allclose(biases.double(), odds.log(), atol=1e-5)  # float32
