"""Markov chains against closed forms: what they leave as it is, what they accept, what they cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from dgm_models.method import build, resampled
from dgm_models.ops.mcmc import Chain, Draws, Langevin, Mala, Metropolis, gradient
from dgm_models.protocols import DataSpec
from tests.support.energies import COVARIANCE, MEAN, Quadratic

CHAINS = 4000
EXACT = [Mala(steps=150, step=0.5), Metropolis(steps=400, scale=1.0)]
EVERY = [Langevin(steps=5, step=0.3), Mala(steps=5, step=0.3), Metropolis(steps=5, scale=0.5)]


def named(chain: Chain) -> str:
    return type(chain).__name__


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_square(x: Tensor) -> Tensor:
    return 0.5 * x.square().flatten(1).sum(1)


def settled(chain: Chain, start: Tensor, energy=half_square) -> Tensor:
    return chain(energy, start, generator())


# ---- what is sampled


@pytest.mark.parametrize("chain", EXACT, ids=named)
def test_chain_reaches_the_moments_of_a_gaussian(chain: Chain) -> None:
    model = Quadratic.of(MEAN, COVARIANCE, chain, spread=3.0)
    x = model.sample(CHAINS, generator())
    error = COVARIANCE.diagonal().sqrt() / math.sqrt(CHAINS)
    assert bool(((x.mean(0) - MEAN).abs() < 5 * error).all())  # five standard errors, and so below
    spread = torch.outer(COVARIANCE.diagonal(), COVARIANCE.diagonal()) + COVARIANCE.square()  # n Var of a covariance
    assert bool(((torch.cov(x.T) - COVARIANCE).abs() < 5 * (spread / CHAINS).sqrt()).all())


def two_modes(x: Tensor) -> Tensor:
    joint = torch.stack([Normal(-1.5, 0.5).log_prob(x) + math.log(0.3), Normal(1.5, 0.7).log_prob(x) + math.log(0.7)])
    return -joint.logsumexp(0)[:, 0]


@pytest.mark.parametrize("chain", [Mala(steps=400, step=1.0), Metropolis(steps=400, scale=2.0)], ids=named)
def test_chain_gives_two_modes_their_shares(chain: Chain) -> None:
    start = torch.full((CHAINS, 1), -1.5, dtype=torch.float64)  # all of them in the smaller mode
    x = settled(chain, start, two_modes)[:, 0]
    grid = torch.linspace(-8, 8, 3201, dtype=torch.float64)
    p = (-two_modes(grid[:, None])).softmax(0)
    for power in (0, 1, 2):  # moments of the smaller mode's side, from its share on
        expected, square = (float((p * (grid < 0) * grid**k).sum()) for k in (power, 2 * power))
        error = math.sqrt((square - expected**2) / CHAINS)
        assert float(((x < 0) * x**power).mean()) == pytest.approx(expected, abs=5 * error)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_langevin_has_the_variance_of_its_autoregression(temperature: float) -> None:
    """x <- (1 - step / 2) x + sqrt(step T) noise has variance T / (1 - step / 4): an error of first order."""
    found = {}
    for step in (0.8, 0.4):
        chain = Langevin(steps=math.ceil(12 / step), temperature=temperature, step=step)
        found[step] = float(settled(chain, torch.zeros(20 * CHAINS, 1, dtype=torch.float64)).var())
        expected = temperature / (1 - step / 4)
        assert found[step] == pytest.approx(expected, abs=5 * expected * math.sqrt(2 / (20 * CHAINS)))
    bias = {step: value / temperature - 1 for step, value in found.items()}
    assert bias[0.8] / bias[0.4] == pytest.approx(2.25, rel=0.25)  # (0.25 / 0.1111); its error is a tenth of this


@pytest.mark.parametrize("chain", [Mala(step=0.8, steps=40), Metropolis(scale=1.5, steps=60)], ids=named)
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_correction_has_no_error_at_any_step(chain: Chain, temperature: float) -> None:
    n = 20 * CHAINS
    chain = type(chain)(**{**vars(chain), "temperature": temperature})
    start = math.sqrt(temperature) * torch.randn(n, 1, generator=generator(1), dtype=torch.float64)
    assert float(settled(chain, start).var()) == pytest.approx(temperature, abs=5 * temperature * math.sqrt(2 / n))


def test_correction_holds_with_a_clipped_gradient() -> None:
    n = 20 * CHAINS
    start = torch.randn(n, 1, generator=generator(1), dtype=torch.float64)
    error = 5 * math.sqrt(2 / n)
    assert float(settled(Mala(steps=40, step=0.5, clip=0.3), start).var()) == pytest.approx(1, abs=error)
    assert float(settled(Langevin(steps=40, step=0.5, clip=0.3), start).var()) > 1 + 4 * error  # another distribution


# ---- what is accepted


class Told(Draws):
    """Draws that are given."""

    def __init__(self, eps: Tensor, u: float) -> None:
        self.eps, self.u = eps, u

    def normal(self, shape, dtype: torch.dtype) -> Tensor:
        return self.eps

    def uniform(self, shape, dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), self.u, dtype=dtype)


def quartic(x: Tensor) -> Tensor:
    return (0.25 * x**4 - 0.5 * x**2).sum(1)


def moved(chain: Chain, x: Tensor, eps: Tensor, u: float) -> bool:
    state = chain.move(quartic, chain.begin(quartic, x), Told(eps, u))
    assert bool(state.accepted[0]) == bool((state.x != x).all())
    return bool(state.accepted[0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_mala_accepts_by_the_ratio_of_detailed_balance(temperature: float) -> None:
    step = 0.6
    chain = Mala(step=step, temperature=temperature)
    deviation = math.sqrt(step * temperature)
    x = torch.tensor([[0.4, 1.3]], dtype=torch.float64)
    eps = torch.tensor([[1.1, 0.9]], dtype=torch.float64)

    def ahead(z: Tensor) -> Tensor:
        return z - 0.5 * step * (z**3 - z)  # the gradient of the quartic

    def log_q(after: Tensor, before: Tensor) -> float:
        return float(Normal(ahead(before), deviation).log_prob(after).sum())

    y = ahead(x) + deviation * eps
    ratio = float(quartic(x) - quartic(y)) / temperature + log_q(x, y) - log_q(y, x)
    assert ratio < -0.05  # a move that is not always taken
    assert moved(chain, x, eps, math.exp(ratio) - 1e-9)
    assert not moved(chain, x, eps, math.exp(ratio) + 1e-9)
    back = (x - ahead(y)) / deviation  # the way back has the ratio's inverse: it is always taken
    assert moved(chain, y, back, 1 - 1e-9)


def test_metropolis_accepts_by_the_ratio_of_densities() -> None:
    chain = Metropolis(scale=0.7, temperature=0.5)
    x, eps = torch.tensor([[0.9, -1.0]], dtype=torch.float64), torch.tensor([[0.8, -0.3]], dtype=torch.float64)
    ratio = float(quartic(x) - quartic(x + 0.7 * eps)) / 0.5
    assert ratio < -0.05
    assert moved(chain, x, eps, math.exp(ratio) - 1e-9)
    assert not moved(chain, x, eps, math.exp(ratio) + 1e-9)
    assert moved(chain, x + 0.7 * eps, -eps, 1 - 1e-9)


@pytest.mark.parametrize("chain", EVERY[1:], ids=named)
@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_places_without_an_energy_are_never_reached(chain: Chain, hole: float) -> None:
    def half(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] < 0, torch.full_like(x[:, 0], hole), half_square(x))

    state = chain.walk(half, torch.full((200, 1), 0.1), generator())
    assert bool((state.x >= 0).all()) and 0 < float(state.accepted.mean()) < chain.steps


# ---- whose draws, and what they cost


@pytest.mark.parametrize("chain", EVERY, ids=named)
def test_chain_with_a_key_depends_on_it_alone(chain: Chain) -> None:
    keys, x = torch.arange(6) * 7919, torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2)
    whole = chain.walk(quartic, x, keys)
    order = torch.tensor([4, 1, 5])
    some = chain.walk(quartic, x[order], keys[order])
    assert torch.equal(some.x, whole.x[order]) and torch.equal(some.accepted, whole.accepted[order])
    other = chain(quartic, x, keys + 1)
    assert not torch.equal(other, whole.x)


@pytest.mark.parametrize("chain", EVERY, ids=named)
def test_chain_of_no_steps_stays(chain: Chain) -> None:
    x = torch.ones(3, 2)
    assert torch.equal(type(chain)(steps=0)(quartic, x, generator()), x)


@pytest.mark.parametrize(("name", "evaluations"), [("langevin", 7), ("mala", 8), ("metropolis", 8)])
def test_samples_count_their_evaluations_and_leave_the_weights_alone(name: str, evaluations: int) -> None:
    method = build("energy/contrastive_divergence", DataSpec("vector", (2,)), network={"name": "mlp", "width": 8})
    model = resampled(method, {"name": name, "steps": 7}).model
    x = model.sample(64, generator())
    assert model.evaluations == evaluations
    assert 0.5 < model.accepted <= 1 and (model.accepted == 1 or name != "langevin")  # it rejects nothing
    assert not x.requires_grad and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_walk_keeps_no_graph_of_the_weights() -> None:
    model, asked = Quadratic(Langevin()), []

    def energy(x: Tensor) -> Tensor:
        asked.append(model.root.requires_grad)
        return Quadratic.energy(model, x)

    model.energy = energy  # type: ignore[method-assign]
    model.walk(torch.ones(2, 2), torch.arange(2), 3)
    assert asked == [False] * 3 and model.root.requires_grad


def test_gradient_is_that_of_every_row() -> None:
    x = torch.tensor([[0.4, 1.3], [-1.0, 2.0]], dtype=torch.float64)
    value, slope = gradient(quartic, x)
    assert torch.allclose(value, quartic(x)) and torch.allclose(slope, x**3 - x)


def test_published_settings_of_langevin_are_a_temperature() -> None:
    """A step of 10 with noise 0.005 and a clipped gradient, as in arXiv:1903.08689's code."""
    chain = Langevin(steps=1, step=10, temperature=0.005**2 / 10, clip=0.01)
    x, eps = torch.tensor([[3.0, 0.004]]), torch.tensor([[1.0, -2.0]])
    state = chain.move(half_square, chain.begin(half_square, x), Told(eps, 0.0))
    assert torch.allclose(state.x, x - 5 * torch.tensor([[0.01, 0.004]]) + 0.005 * eps)


def test_corrected_chain_keeps_the_noise_and_samples_the_energy_itself() -> None:
    assert Langevin(steps=3, temperature=0.1, step=2.0, clip=0.5).corrected() == Mala(3, 1.0, 0.2, 0.5)
    assert Metropolis(steps=3, temperature=0.1, scale=0.2).corrected() == Metropolis(3, 1.0, 0.2)
