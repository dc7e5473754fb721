"""DDPM against closed forms: marginals, posteriors and steps of its chain, the variance that it can learn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.construct import ConfigError
from dgm_models.method import Method, build, encoded, fit
from dgm_models.nn.diffusion import Diffusion
from dgm_models.ops.paths import Cosine, Linear, Tabulated
from dgm_models.ops.samplers import Ancestral, Ddim, Guess
from dgm_models.protocols import DataSpec
from tests.support.gaussians import TWO

CHAINS = [Linear(), Cosine(), Linear(length=100), Cosine(length=100)]


def betas(path: Tabulated) -> Tensor:
    """[length] float64, as the papers write them."""
    i = torch.arange(1, path.length + 1, dtype=torch.float64)
    if isinstance(path, Linear):
        rising = path.beta_first + (i - 1) / (path.length - 1) * (path.beta_last - path.beta_first)
        return rising * 1000 / path.length

    def f(i: Tensor) -> Tensor:
        return ((i / path.length + 0.008) / 1.008 * math.pi / 2).cos() ** 2

    return (1 - f(i) / f(i - 1)).clamp(max=0.999)


def at(path: Tabulated, i: int) -> tuple[float, float]:
    """alpha and sigma after i steps."""
    t = torch.tensor(i / path.length, dtype=torch.float64)
    return float(path.alpha(t)), float(path.sigma(t))


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: f"{path.name}-{path.length}")
def test_chain_s_marginals_are_products_of_its_steps(path: Tabulated) -> None:
    mean, variance = 1.0, 0.0
    for i, beta in enumerate(betas(path).tolist(), 1):
        mean, variance = mean * math.sqrt(1 - beta), variance * (1 - beta) + beta  # q(x_i | x_i-1)
        alpha, sigma = at(path, i)
        assert alpha == pytest.approx(mean, rel=1e-9)
        assert sigma == pytest.approx(math.sqrt(variance), rel=1e-9)


@pytest.mark.parametrize("spread", ["small", "large"])
@pytest.mark.parametrize("path", CHAINS[2:], ids=lambda path: path.name)
def test_ancestral_steps_are_the_posteriors_of_the_chain(path: Tabulated, spread: str) -> None:
    """Mean and deviation of every step, against Ho et al. 2020, eq. 6 and 7, with a guess that does not move."""
    beta, guess, states = betas(path), torch.tensor([[0.7]], dtype=torch.float64), list[float]()

    def denoise(x: Tensor, t: Tensor) -> Guess:
        states.append(float(x))
        return Guess(guess)

    rng = torch.Generator().manual_seed(3)
    last = Ancestral(steps=path.length, spread=spread)(denoise, path, torch.ones(1, 1).double() * 1.3, rng)  # type: ignore[arg-type]
    rng.manual_seed(3)
    kept = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])
    for place, i in enumerate(range(path.length, 1, -1)):
        b, after, before = beta[i - 1], kept[i], kept[i - 1]
        mean = (before.sqrt() * b / (1 - after)) * guess + ((1 - b).sqrt() * (1 - before) / (1 - after)) * states[place]
        variance = (1 - before) / (1 - after) * b if spread == "small" else b
        drawn = mean + variance.sqrt() * torch.randn(1, 1, generator=rng, dtype=torch.float64)
        assert states[place + 1] == pytest.approx(float(drawn), rel=1e-9, abs=1e-9)
    assert torch.allclose(last, guess)  # alpha is 1 at the end: nothing of the noise is left


@pytest.mark.parametrize("steps", [100, 10])
@pytest.mark.parametrize("path", CHAINS[2:], ids=lambda path: path.name)
def test_ddim_with_eta_1_is_the_chain_itself(path: Tabulated, steps: int) -> None:
    """The same draws give the same samples: mean and variance of every step are those of `ancestral`, "small"."""
    x, denoise = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)).double(), TWO.denoiser(path)
    one = Ancestral(steps=steps)(denoise, path, x, torch.Generator().manual_seed(0))
    two = Ddim(steps=steps, eta=1.0)(denoise, path, x, torch.Generator().manual_seed(0))
    assert torch.allclose(one, two, rtol=1e-8, atol=1e-8)
    half = Ddim(steps=steps, eta=0.5)(denoise, path, x, torch.Generator().manual_seed(0))
    assert not torch.allclose(half, two, atol=1e-2)


@pytest.mark.parametrize("path", CHAINS[:2], ids=lambda path: path.name)
def test_ddim_eta_scales_the_variance_of_the_posterior(path: Tabulated) -> None:
    """sigma_tau(eta)^2 of Song et al. 2021, eq. 16, as the variance of the last draw over many rows."""
    for eta in (0.2, 1.0):
        states = list[Tensor]()

        def denoise(x: Tensor, t: Tensor) -> Guess:
            states.append(x)  # noqa: B023
            return Guess(torch.zeros_like(x))

        x = torch.ones(20_000, 1, dtype=torch.float64)
        Ddim(steps=2, eta=eta)(denoise, path, x, torch.Generator().manual_seed(0))
        kept = (1 - betas(path)).cumprod(0)
        after, before = kept[999], kept[499]
        expected = eta**2 * (1 - before) / (1 - after) * (1 - after / before)
        assert float(states[1].var()) == pytest.approx(float(expected), rel=0.04)  # 4 standard errors


@pytest.mark.parametrize("path", CHAINS[:2], ids=lambda path: path.name)
@pytest.mark.parametrize("steps", [1, 10, 50, 300, 1000])
def test_grid_begins_at_the_last_step_and_ends_at_data(path: Tabulated, steps: int) -> None:
    for spacing in ("uniform", "quadratic"):
        grid = path.grid(steps, spacing)  # type: ignore[arg-type]
        assert (float(grid.t[0]), float(grid.t[-1])) == (1.0, 0.0)
        assert (float(grid.alpha[-1]), float(grid.sigma[-1])) == (1.0, 0.0)
        assert len(grid) == steps and bool((grid.t.diff() < 0).all())
        places = grid.t * path.length
        assert torch.allclose(places, places.round(), atol=1e-9)  # steps of the chain, each once


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 1000])
def test_grid_of_some_steps_is_the_paper_s(steps: int) -> None:
    """tau_i = c i and tau_i = c i^2 (Song et al. 2021, appendix D.2), counted from 1, the last one at T."""
    i = torch.arange(1, steps + 1, dtype=torch.float64)
    uniform, quadratic = (Linear().grid(steps, spacing).t[:-1].flip(0) * 1000 for spacing in ("uniform", "quadratic"))  # type: ignore[arg-type]
    assert torch.allclose(uniform, i * (1000 // steps))
    assert float((quadratic - torch.maximum(1000 * (i / steps) ** 2, i)).abs().max()) < 0.5 + 1e-9  # rounded


# ---- a learned variance

REAL = DataSpec("vector", (2,))


def trained(steps: int, **params: object) -> Method:
    method = build(
        "diffusion/ddpm", REAL, network={"name": "mlp", "width": 48, "depth": 2},
        path={"name": "linear", "length": 20, "beta_last": 0.01}, **params,
    )  # fmt: skip
    if steps:
        fit(method, toy(2000, 0), steps=steps, batch_size=256, optim={"lr": 3e-3})
    return method


def toy(n: int, seed: int) -> Tensor:
    """Rows [n, 2] of the mixture."""
    rng = torch.Generator().manual_seed(seed)
    which = torch.multinomial(TWO.weights, n, replacement=True, generator=rng)
    eps = torch.randn(n, 2, generator=rng, dtype=torch.float64)
    return (TWO.means[which] + TWO.stds[which, None] * eps).float()


def bound(method: Method, x: Tensor) -> float:
    """The mean of the bound over rows, with about every step of the chain taken."""
    assert isinstance(method.model, Diffusion)
    with torch.no_grad():
        return float(method.model.elbo(x, torch.Generator().manual_seed(0), k=19).double().mean())


def test_learned_variance_lies_between_the_two_fixed_ones_and_beyond() -> None:
    path, x = Linear(length=100), torch.ones(4, 1, dtype=torch.float64)
    found = {}
    for spread, fraction in (("small", None), ("large", None), ("learned", 0.0), ("learned", 1.0), ("learned", 0.5)):

        def denoise(x: Tensor, t: Tensor, fraction: float | None = fraction) -> Guess:
            return Guess(torch.zeros_like(x), None if fraction is None else torch.full_like(x, fraction))

        sampler = Ancestral(steps=100, spread=spread)  # type: ignore[arg-type]
        states = list[Tensor]()
        sampler(lambda x, t: states.append(x) or denoise(x, t), path, x, torch.Generator().manual_seed(0))  # noqa: B023 # type: ignore[func-returns-value]
        found[spread, fraction] = states[-1]
    assert torch.allclose(found["learned", 0.0], found["small", None])
    assert torch.allclose(found["learned", 1.0], found["large", None])
    assert not torch.allclose(found["learned", 0.5], found["large", None], rtol=1e-3)
    with pytest.raises(ValueError, match=r"sampler\.spread: this network has not learned a variance"):
        Ancestral(steps=5, spread="learned")(TWO.denoiser(path), path, torch.ones(2, 2), torch.Generator())


def test_hybrid_loss_gives_the_mean_the_gradient_of_the_squared_error_alone() -> None:
    torch.manual_seed(0)
    method = trained(0, learned_variance=True, variance_weight=0.7)
    model, objective = method
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = encoded(model, toy(64, 1))
    last = model.network.body.last  # its rows are the noise, then the variance
    gradients = []
    for weight in (0.0, 0.7):
        objective.weight = weight
        model.zero_grad()
        objective.loss(model, batch).total.backward()
        gradients.append(last.weight.grad.clone())
    assert torch.equal(gradients[0][:2], gradients[1][:2]) and bool((gradients[1][:2] != 0).any())
    assert bool((gradients[0][2:] == 0).all()) and bool((gradients[1][2:] != 0).all())


def test_hybrid_loss_is_the_bound_s_steps_without_that_to_data() -> None:
    """Its expectation over the steps is the sum of the KL of every step; the step to data counts nothing."""
    method = trained(0, learned_variance=True, variance_weight=1.0)
    model, objective = method
    x, length = toy(500, 2), 20
    eps = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    total, expected = 0.0, 0.0
    for i in range(1, length + 1):
        t = torch.full((500,), i / length, dtype=torch.float64)
        noisy = model.noisy(x, t, eps)
        found = model.outputs(noisy, t)
        total += float(objective.besides(model, x, noisy, t, found)["variance_loss"].detach()) / length
        if i > 1:
            expected += float(model.step_kl(x, model.guess(noisy, t), t, t - 1 / length).sum().detach())
        else:
            assert total == 0.0
    assert total == pytest.approx(expected, rel=1e-6)


def test_learned_variance_tightens_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same means with the smallest variance, the largest, and the one of normal data."""
    method, x = trained(150, learned_variance=True, variance_weight=0.05), toy(1000, 5)
    learned, read = bound(method, x), method.model.read
    for fraction in (0.0, 1.0, None):

        def other(*given: Tensor, fraction: float | None = fraction) -> Guess:
            guess = read(*given)
            return guess._replace(fraction=None if fraction is None else torch.full_like(guess.x, fraction))

        monkeypatch.setattr(method.model, "read", other)
        assert learned > bound(method, x) + 0.05  # nats


def test_learned_variance_needs_a_chain() -> None:
    with pytest.raises(ConfigError, match=r"path\.name: straight has no steps whose variance could be learned"):
        build("diffusion/ddpm", REAL, path={"name": "straight"}, predicts="velocity", learned_variance=True)
