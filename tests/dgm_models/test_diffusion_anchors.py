"""Diffusion models against closed forms: targets, scores, floors of losses, the bound, what a training learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dgm_models.diffusion.ncsn import Ladder, level_ratio
from dgm_models.diffusion.score_sde import Likelihood
from dgm_models.method import Method, build, encoded, fit, load, save
from dgm_models.nn.backbones import NoisyMlp
from dgm_models.nn.diffusion import Denoising, Diffusion
from dgm_models.ops.paths import (
    Cosine,
    Karras,
    Linear,
    Path,
    Straight,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from dgm_models.ops.samplers import Ddim, Guess
from dgm_models.protocols import Batch, DataSpec
from tests.dgm_models.exact_mixture import PAIR, SQUARE, exactly, normal, spaced

PATHS: list[Path] = [
    Linear(), Cosine(), VariancePreserving(), SubVariancePreserving(), VarianceExploding(), Karras(), Straight(),
    Ladder(0.02, 10.0, 60, 1),
]  # fmt: skip
PREDICTS = ["noise", "data", "velocity", "direction", "edm"]
PAIRS = [(path, what) for path in PATHS for what in PREDICTS if (path.name, what) != ("straight", "noise")]


def called(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value)


def shell(path: Path, predicts: str = "velocity", dims: int = 1, spread: float = 1.0) -> Diffusion:
    return Diffusion(DataSpec("vector", (dims,)), path, NoisyMlp(8, 1), predicts, Ddim(steps=5), spread=spread)  # type: ignore[arg-type]


def batch_of(x: Tensor, seed: int = 0) -> Batch:
    return Batch(x, torch.arange(len(x)), torch.arange(len(x))).fold("test", seed)


def draws(n: int, dims: int, seed: int = 1) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- what the network's output is


@pytest.mark.parametrize(("path", "predicts"), PAIRS, ids=called)
def test_target_gives_the_data_back(path: Path, predicts: str) -> None:
    model = shell(path, predicts, dims=2, spread=0.7)
    t = spaced(path, 50)
    x, eps = SQUARE.draw(50), draws(50, 2)
    scales, target, noisy = model.scaling(t), model.target(x, t, eps), model.noisy(x, t, eps)
    back = scales.skip[:, None] * noisy + scales.out[:, None] * target
    # rounding of x_t, enlarged by 1 / alpha, at most 2e4, where the noise is predicted
    assert float((back - x).abs().max()) < 1e-10
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    told = {
        "noise": eps, "data": x, "velocity": (alpha * eps - sigma * x), "direction": eps - x, "edm": target,
    }[predicts]  # fmt: skip
    length = (alpha.square() + sigma.square()) if predicts == "velocity" else 1.0
    assert float((target - told / (length if predicts != "velocity" else 1.0)).abs().max()) < 1e-8 * float(
        told.abs().max()
    )


@pytest.mark.parametrize(("path", "predicts"), PAIRS, ids=called)
def test_target_in_single_precision_keeps_its_digits_where_the_noise_is_small(path: Path, predicts: str) -> None:
    model = shell(path, predicts)
    t = torch.full((64,), path.first, dtype=torch.float64)
    x, eps = PAIR.draw(64), draws(64, 1)
    exact = model.target(x, t, eps)
    rounded = model.target(x.float(), t, eps.float()).double()
    assert float((rounded - exact).abs().max()) < 1e-6 * float(exact.abs().max())  # a few units in the last place


def test_target_twin_that_subtracts_loses_its_digits() -> None:
    model = shell(SubVariancePreserving(), "noise")
    t = torch.full((64,), 1e-3, dtype=torch.float64)
    x, eps = PAIR.draw(64).float(), draws(64, 1).float()
    scales = model.scaling(t)
    naive = (x - model.column(scales.skip, x) * model.noisy(x, t, eps)) / model.column(scales.out, x)
    assert float((naive - eps).abs().max()) > 1e-4 and float((model.target(x, t, eps) - eps).abs().max()) < 1e-6


def test_network_that_predicts_noise_on_a_path_that_ends_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match="predicts: noise says nothing of the data at the end of path straight"):
        shell(Straight(), "noise")


@pytest.mark.parametrize("path", PATHS[:-1], ids=called)
def test_slope_of_the_straight_coordinates_is_that_of_the_path(path: Path) -> None:
    """dx_t/dt = alpha' x_0 + sigma' eps, and d(x_t / (alpha + sigma))/dt = (eps - x_0) dr/dt."""
    t = spaced(path, 41)[1:-1] + 1e-5  # between the steps of a chain, where log alpha^2 is linear
    h, x, eps = 1e-6, draws(39, 1, 3)[:, 0], draws(39, 1, 4)[:, 0]

    def slope(f) -> Tensor:
        return (f(t + h) - f(t - h)) / (2 * h)

    def scaled(t: Tensor) -> Tensor:
        return (path.alpha(t) * x + path.sigma(t) * eps) / (path.alpha(t) + path.sigma(t))

    scale, rate = path.alpha(t) + path.sigma(t), slope(path.ratio)
    # differences over 2e-6 of numbers up to 80 have 8 digits
    assert torch.allclose(slope(scaled), (eps - x) * rate, atol=1e-6)
    direct = slope(path.alpha) * x + slope(path.sigma) * eps
    growth = slope(path.alpha) + slope(path.sigma)
    again = scale * (eps - x) * rate + growth * scaled(t)
    assert torch.allclose(again, direct, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("path", "predicts"), PAIRS, ids=called)
def test_score_is_the_gradient_of_the_noisy_density(path: Path, predicts: str) -> None:
    model = exactly(shell(path, predicts, dims=2, spread=0.7), SQUARE)
    t = spaced(path, 60)
    x = model.noisy(SQUARE.draw(60), t, draws(60, 2)).requires_grad_()
    alpha, sigma = path.alpha(t), path.sigma(t)
    (gradient,) = torch.autograd.grad(SQUARE.log_prob(x, alpha, sigma).sum(), x)
    with torch.no_grad():
        assert torch.allclose(model.denoise(x, t), SQUARE.denoise(x, alpha, sigma), atol=1e-9)
        assert torch.allclose(model.score(x, t), gradient, rtol=1e-6, atol=1e-9)


# ---- the floor of a loss: what is left when the network is right

METHODS = {
    "diffusion/ddpm": {},
    "diffusion/ncsn": {"sigma_max": 5.0, "levels": 30},
    "diffusion/score_sde": {"path": {"name": "variance_preserving"}},
    "diffusion/edm": {"sigma_data": 0.6},
    "diffusion/flow_matching": {},
}
VARIANTS = [
    *METHODS.items(),
    ("diffusion/ddpm", {"predicts": "velocity", "path": {"name": "cosine"}}),
    ("diffusion/ncsn", {"sigma_max": 5.0, "levels": 30, "noise_conditional": False}),
    ("diffusion/score_sde", {"path": {"name": "sub_variance_preserving"}}),
    ("diffusion/score_sde", {"path": {"name": "variance_exploding"}}),
    ("diffusion/score_sde", {"path": {"name": "variance_preserving"}, "weighting": "likelihood"}),
]


def made(name: str, data: DataSpec, **params) -> Method:
    settings = {"network": {"name": "mlp", "width": 64, "depth": 2}, "sampler": {"name": "ddim", "steps": 20}}
    return build(name, data, **(settings | params))


@pytest.mark.parametrize(("name", "params"), VARIANTS, ids=str)
def test_loss_of_the_right_network_is_the_floor(name: str, params: dict) -> None:
    """Of normal data the floor at a time t is (s^-2 + snr)^-1 / out^2; the loss is its mean over the times."""
    s, n = 0.6, 20_000
    mixture = normal(s)
    model, objective = made(name, mixture.data, **params)
    exactly(model, mixture)
    batch = batch_of(mixture.draw(n))
    t = objective.times(model, batch)
    floor = 1 / (s**-2 + model.path.snr(t)) / model.scaling(t).out.square()
    found = objective.loss(model, batch)
    weight = float(found.total) / float(found.metrics["error_per_dim"])
    # for the same times: the square of a normal variable has a relative deviation of sqrt(2); four standard errors
    error = math.sqrt(2 * float(floor.square().sum())) / n
    assert float(found.metrics["error_per_dim"]) / n == pytest.approx(float(floor.mean()), abs=4 * error)
    assert (weight > 1) == (params.get("weighting") == "likelihood")


@pytest.mark.parametrize("path", [VariancePreserving(), SubVariancePreserving(), VarianceExploding()], ids=called)
def test_likelihood_weighting_is_the_information_along_the_path(path: Path) -> None:
    """1/2 integral of snr Var[x_0|x_t] d log(snr) = 1/2 log((1 + s^2 snr_first) / (1 + s^2 snr_1)) for normal data."""
    s, n = 0.6, 20_000
    model = exactly(shell(path, "noise"), normal(s))
    batch = batch_of(normal(s).draw(n))
    objective = Likelihood()
    total = float(objective.loss(model, batch).total) / n
    snr = path.snr(torch.tensor([path.first, 1.0], dtype=torch.float64))
    told = 0.5 * float((1 + s**2 * snr).log().diff().abs())
    most = 0.5 * float(snr.log().diff().abs())  # of one example: times the square of a normal variable
    assert total == pytest.approx(told, abs=4 * most * math.sqrt(3 / n))  # four standard errors at most
    level = model.path.snr(objective.times(model, batch)).log().sort().values
    even = torch.linspace(float(snr.log()[1]), float(snr.log()[0]), n, dtype=torch.float64)
    assert float((level - even).abs().max()) < 2 * most * 2 / math.sqrt(n)  # Kolmogorov's distance, at 1e-3


def test_edm_sees_and_is_asked_for_unit_variance() -> None:
    for s in (0.5, 1.7):
        model = shell(Karras(), "edm", spread=s)
        t = spaced(Karras(), 9).repeat_interleave(20_000)
        x, eps = s * draws(len(t), 1), draws(len(t), 1, 2)
        seen = model.column(model.scaling(t).into, x) * model.noisy(x, t, eps)
        for value in (seen, model.target(x, t, eps)):
            variance = value.reshape(9, -1).var(1)
            assert float((variance - 1).abs().max()) < 5 * math.sqrt(2 / 20_000)  # five standard errors
        assert float(model.scaling(t[:1]).c) == pytest.approx(250 * math.log(0.002))  # 1000 times ln(sigma) / 4


def test_edm_draws_the_logarithm_of_its_noise_from_a_normal_law() -> None:
    model, objective = made("diffusion/edm", PAIR.data)
    batch = batch_of(PAIR.draw(20_000))
    level = model.path.sigma(objective.times(model, batch)).log()
    assert float(level.mean()) == pytest.approx(-1.2, abs=4 * 1.2 / math.sqrt(20_000))
    assert float(level.std()) == pytest.approx(1.2, abs=4 * 1.2 / math.sqrt(40_000))


# ---- the chain of DDPM


def test_step_kl_is_that_of_the_textbook_posterior() -> None:
    """q(x_i-1 | x_i, x_0) has the mean and the variance of Ho et al. 2020, eq. 7."""
    path = Linear()
    model = shell(path)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bars = (1 - betas).cumprod(0)
    i = torch.tensor([2, 10, 500, 1000])
    beta, bar, before = betas[i - 1], bars[i - 1], bars[i - 2]
    small = (1 - before) / (1 - bar) * beta
    x, guess, noisy = draws(4, 1, 5), draws(4, 1, 6), draws(4, 1, 7)

    def mean(x_0: Tensor) -> Tensor:
        first = (before.sqrt() * beta / (1 - bar))[:, None] * x_0
        return (first + ((1 - beta).sqrt() * (1 - before) / (1 - bar))[:, None] * noisy)[:, 0]

    for fraction, variance in ((0.0, small), (1.0, beta), (0.3, (0.7 * small.log() + 0.3 * beta.log()).exp())):
        told = kl_divergence(Normal(mean(x), small.sqrt()), Normal(mean(guess), variance.sqrt()))
        found = model.step_kl(x, Guess(guess, torch.full_like(x, fraction)), i / 1000.0, (i - 1) / 1000.0)
        assert torch.allclose(found, told, rtol=1e-4)  # times in float32


# ---- the variational bound


def bound(model: Diffusion, x: Tensor, k: int, repeats: int) -> tuple[Tensor, Tensor]:
    """The mean of the bound [B] over repeats, and its standard error [B]."""
    rng = torch.Generator().manual_seed(0)
    found = model.elbo(x.repeat_interleave(repeats, 0), rng, k=k).reshape(len(x), repeats)
    return found.mean(1), found.std(1) / math.sqrt(repeats)


@pytest.mark.parametrize("path", [*PATHS, Linear(beta_last=5e-4, length=1)], ids=called)
def test_bound_of_normal_data_is_its_closed_form(path: Path) -> None:
    """Every reverse step is then exact, and what is lost is E_q(x_1|x) log q(x_1) / N(x_1; 0, sigma(1)^2)."""
    s = 0.6
    model = exactly(shell(path, "velocity", spread=s), normal(s))
    x = torch.tensor([[0.0], [0.5], [-1.5]], dtype=torch.float64)
    end = torch.ones(1, dtype=torch.float64)
    alpha, sigma = float(path.alpha(end)), float(path.sigma(end))
    whole = alpha**2 * s**2 + sigma**2
    square = (alpha * x[:, 0]) ** 2 + sigma**2  # E x_1^2
    lost = 0.5 * (square * (1 / sigma**2 - 1 / whole) - math.log(whole / sigma**2))
    mean, error = bound(model, x, 50, 2000)
    assert float(error.max()) < 0.05
    told = normal(s).log_prob(x) - lost
    assert bool(((mean - told).abs() < 4 * error).all()), (mean, told, error)


@pytest.mark.parametrize("path", PATHS, ids=called)
def test_bound_is_below_the_density_and_near_it_where_the_network_is_right(path: Path) -> None:
    model = exactly(shell(path, "velocity"), PAIR)
    x = PAIR.draw(1000)
    gap = PAIR.log_prob(x) - bound(model, x, 50, 8)[0]
    chance = float(gap.std()) / math.sqrt(len(x))
    # a chain of 1000 steps loses a few thousandths of a nat; the ladder's 60 steps, which end at 0.02 and 10, more
    assert -3 * chance < float(gap.mean()) < (0.1 if isinstance(path, Ladder) else 0.02) + 3 * chance
    assert chance < 0.03


def test_bound_of_a_wrong_network_is_lower() -> None:
    model = exactly(shell(VariancePreserving()), normal(1.2))
    x = PAIR.draw(400)
    assert float((PAIR.log_prob(x) - bound(model, x, 20, 4)[0]).mean()) > 0.1


# ---- what a short training learns


@pytest.mark.parametrize(("name", "params"), METHODS.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_trained_network_is_near_the_right_one(name: str, params: dict) -> None:
    """The excess of the loss over its floor is E |F - F_right|^2.

    Measured after 200 steps: 3 to 8 % of that of F = 0; 15 % leaves room for other draws.
    """
    method = made(name, PAIR.data, **params)
    fit(
        method, PAIR.draw(20_000).float(), steps=200, batch_size=256, average=0.98,
        optim={"lr": 5e-3, "schedule": "cosine"},
    )  # fmt: skip
    model, objective = method
    batch = batch_of(PAIR.draw(20_000, seed=5).float(), seed=1)
    with torch.no_grad():
        t = objective.times(model, batch)
        x, eps = batch.x, batch.normal("noise", (1,))
        noisy = model.noisy(x, t, eps)
        found = model.outputs(noisy, t)[:, 0]
        right = exactly(model, PAIR).outputs(noisy.double(), t)[:, 0]
    excess, all_of_it = float((found - right).square().mean()), float(right.square().mean())
    assert excess < 0.15 * all_of_it


# ---- the levels of NCSN


@pytest.mark.parametrize(("dims", "levels"), [(3072, 232), (12288, 500)])
def test_level_ratio_gives_the_published_numbers_of_levels(dims: int, levels: int) -> None:
    """Song and Ermon 2020, table of settings: CIFAR-10 from 50 and CelebA 64 from 90, both to 0.01."""
    sigma_max = {3072: 50.0, 12288: 90.0}[dims]
    found = 1 + math.log(sigma_max / 0.01) / math.log(level_ratio(dims))
    assert found == pytest.approx(levels, rel=0.1)


def test_level_ratio_shares_half_of_the_noise() -> None:
    assert level_ratio(2) == 2.0
    for dims in (20, 64, 3072):
        g = level_ratio(dims)
        centre, unit = math.sqrt(2 * dims) * (g - 1), Normal(0.0, 1.0)
        shared = unit.cdf(torch.tensor(centre + 3 * g)) - unit.cdf(torch.tensor(centre - 3 * g))
        assert float(shared) == pytest.approx(0.5, abs=1e-5)  # float32


def test_largest_level_is_the_largest_distance_of_the_first_batch_and_is_kept(tmp_path) -> None:
    x = SQUARE.draw(64).float()
    method = fit(build("diffusion/ncsn", SQUARE.data, network={"name": "mlp", "width": 8}), x, steps=2, batch_size=64)
    path = method.model.path
    assert float(path.sigma_max) == pytest.approx(float(torch.pdist(x.double()).max()), rel=1e-6)
    told = math.ceil(math.log(float(path.sigma_max) / 0.01) / math.log(level_ratio(2))) + 1
    assert len(path.chain) == int(path.levels) == told
    again = load(save(method, tmp_path / "artifact")).model.path
    assert torch.equal(again.sigma_max, path.sigma_max) and len(again.chain) == told
    given = build("diffusion/ncsn", SQUARE.data, sigma_max=2.5, levels=10)
    assert type(given.objective) is Denoising and float(given.model.path.sigma_max) == 2.5


def test_network_that_is_not_told_the_level_sees_the_data_as_they_are() -> None:
    seen: list[Tensor] = []
    model, _ = made("diffusion/ncsn", SQUARE.data, noise_conditional=False, sigma_max=3.0)
    model.network.register_forward_pre_hook(lambda module, given: seen.extend(given[:2]))
    t = model.path.draw(torch.rand(8))
    x = SQUARE.draw(8).float()
    score = model.score(x, t)
    assert torch.equal(seen[0], x) and not seen[1].any()
    said = model.outputs(x, t)[:, 0]
    assert torch.allclose(score, -said / model.path.sigma(t)[:, None].float())


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("diffusion/ncsn", {"levels": 1}, "levels: 1 is no ladder"),
        ("diffusion/ncsn", {"sigma_max": 0.001}, "sigma_min: 0.01 is not below sigma_max, 0.001"),
        ("diffusion/score_sde", {"path": {"name": "karras"}}, "path: karras is no stochastic differential equation"),
    ],
)
def test_methods_refuse_what_their_paper_does_not_have(name: str, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, PAIR.data, **params)


def test_bound_of_a_trained_method_is_below_the_density() -> None:
    method = made("diffusion/edm", PAIR.data)
    fit(method, PAIR.draw(4000).float(), steps=100, batch_size=128, optim={"lr": 3e-3})
    x = encoded(method.model, PAIR.draw(200, seed=9).float()).x
    with torch.no_grad():
        found = method.model.elbo(x, torch.Generator().manual_seed(0), k=50)
    assert float((PAIR.log_prob(x.double()) - found).mean()) > 0
