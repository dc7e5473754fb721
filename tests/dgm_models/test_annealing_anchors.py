"""Annealed importance sampling against known normalisers: on which side it errs, and how far."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dgm_models.energy.rbm import Rbm, rbm
from dgm_models.ops import annealing
from dgm_models.ops.annealing import GROUPS, Bracket, Bridge, anneal, betas, bracket
from dgm_models.ops.mcmc import Chain, Langevin, Metropolis
from dgm_models.protocols import DataSpec
from tests.laws.cases import every_state
from tests.support.energies import COVARIANCE, MEAN, Quadratic

N = 5 * GROUPS


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def machine(levels: int = 2) -> Rbm:
    """An RBM of 8 places and 6 hidden units, far from independent; its chains begin at other biases than its own."""
    torch.manual_seed(3)
    model, _ = rbm(DataSpec("vector", (8,), levels), hidden=6, steps=60)
    with torch.no_grad():
        for p, scale in ((model.weight, 2.0), (model.visible, 0.5), (model.hidden, 1.0), (model.base, 0.5)):
            p.normal_(0, scale)
    return model.double()


def gaussian(chain: Chain = Langevin(steps=60, step=0.2)) -> Quadratic:
    return Quadratic.of(MEAN, 0.2 * COVARIANCE, chain, spread=1.5)


def exact(model: Rbm | Quadratic) -> float:
    if isinstance(model, Rbm):
        return float(model.exact_log_z())
    return math.log(2 * math.pi) - float(torch.linalg.slogdet(model.root.detach())[1])


def error(groups: Tensor) -> float:
    return float(groups.std()) / math.sqrt(len(groups))


MODELS = {
    "rbm": machine,
    "rbm of three levels": lambda: machine(3),
    "gaussian by mala": gaussian,
    "gaussian by metropolis": lambda: gaussian(Metropolis(steps=200, scale=0.4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_bracket_holds_the_known_log_z_and_closes(name: str) -> None:
    model = MODELS[name]()
    log_z = exact(model)
    runs = [model.bracket_log_z(N, 3, generator(seed)) for seed in range(4)]
    coarse = Bracket(*(torch.cat(each) for each in zip(*runs, strict=True)))
    fine = model.bracket_log_z(N, 200, generator())
    assert fine.lower.shape == fine.upper.shape == (GROUPS,)
    # the directions of both errors stand clear of chance with few temperatures; many leave less than a third of them
    assert float(coarse.lower.mean()) < log_z - 3 * error(coarse.lower)  # three standard errors
    assert float(coarse.upper.mean()) > log_z + 3 * error(coarse.upper)
    assert float(fine.lower.mean()) < log_z + 3 * error(fine.lower)
    assert float(fine.upper.mean()) > log_z - 3 * error(fine.upper)
    assert float(fine.upper.mean() - fine.lower.mean()) < (coarse.upper.mean() - coarse.lower.mean()) / 3


def bridge(model: Rbm) -> Bridge:
    """The model's own bridge, as `bracket` gets it."""
    held: list[Bridge] = []

    def keep(given: Bridge, x: Tensor, temperatures: int, rng: torch.Generator) -> Bracket:
        held.append(given)
        return Bracket(x, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annealing, "bracket", keep)
        model.bracket_log_z(GROUPS, 1, generator())
    return held[0]


@pytest.mark.parametrize("temperatures", [1, 6])
def test_weights_have_the_ratio_of_normalisers_as_mean_in_both_directions(temperatures: int) -> None:
    model, n = machine(), 10_000
    path, states = bridge(model), every_state(model.data)
    p = (-model.energy(states).detach()).softmax(0)
    drawn = states[torch.multinomial(p, n, replacement=True, generator=generator())]
    rising = betas(temperatures)
    for x, order, sign in ((path.start(n, generator()), rising, 1), (drawn, rising[::-1], -1)):
        w = (anneal(path, x, order, generator(1)) - sign * (exact(model) - path.log_z)).exp()
        assert float(w.mean()) == pytest.approx(1, abs=4 * float(w.std()) / math.sqrt(n))  # four standard errors


def test_moves_leave_every_density_of_the_bridge_as_it_is() -> None:
    """The transition matrix of Gibbs sampling at every beta, from 5000 moves of each of 16 states."""
    torch.manual_seed(0)
    model, _ = rbm(DataSpec("vector", (4,), 2), hidden=3)
    with torch.no_grad():
        for p in (model.weight, model.visible, model.hidden, model.base):
            p.normal_(0, 3)
    path, states, n = bridge(model), every_state(model.data), 5000
    place = torch.tensor([8, 4, 2, 1])
    for beta in (0.0, 0.4, 1.0):
        p = (-path.energy(states, beta).detach().double()).softmax(0)
        after = path.move(states.repeat_interleave(n, 0), beta, generator())
        ends = (after * place).sum(1).reshape(16, n)
        matrix = torch.stack([torch.bincount(row, minlength=16) for row in ends]).double() / n
        assert bool(((p @ matrix - p).abs() < 5 * (p / n).sqrt() + 1e-9).all())  # five standard errors, at most
        assert float((matrix - p).abs().max()) > 0.1 or beta == 0  # a move is no fresh draw


def test_upper_bound_rests_on_draws_from_the_model() -> None:
    """A Gaussian twice as wide as the one that is known, with one temperature: log w = -3 x^2 / 8 from above."""
    model = Quadratic.of(torch.zeros(2), 4 * torch.eye(2), Langevin(), spread=1.0)

    def energy(x: Tensor, beta: float) -> Tensor:
        return torch.lerp(model.around(x), model.energy(x).detach(), beta)

    path = Bridge(model.start, math.log(2 * math.pi), energy, lambda x, beta, rng: x)
    log_z = exact(model)
    drawn = 2 * torch.randn(10 * N, 2, generator=generator(), dtype=torch.float64)
    right, wrong = (bracket(path, x, 1, generator()).upper for x in (drawn, torch.zeros_like(drawn)))
    assert float(right.mean()) > log_z - 3 * error(right)
    assert float(wrong.mean()) == pytest.approx(math.log(2 * math.pi))  # chains from the mean say log Z(0)
    assert log_z == pytest.approx(math.log(8 * math.pi))  # which is lower


def test_temperatures_go_from_the_known_density_to_the_model() -> None:
    found = betas(10)
    assert len(found) == 11 and found[0] == 0 and found[-1] == 1
    steps = [after - before for before, after in pairwise(found)]
    assert min(steps) > 0 and steps[0] < steps[4] and steps[9] < steps[5]
    assert betas(1) == [0, 1]


def test_chains_that_make_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="chains: 30 do not make 20 groups"):
        machine().bracket_log_z(30, 5, generator())
