"""Samplers against closed forms: on a mixture of Gaussians a perfect network is known, so nothing is trained."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dgm_models.construct import ConfigError
from dgm_models.method import build, resampled
from dgm_models.ops.ode import rk45
from dgm_models.ops.paths import (
    Cosine,
    Karras,
    Linear,
    Path,
    Straight,
    VarianceExploding,
    VariancePreserving,
)
from dgm_models.ops.samplers import (
    Ancestral,
    AnnealedLangevin,
    Ddim,
    Denoise,
    DpmSolver,
    Edm,
    Euler,
    Guess,
    Heun,
    Ode,
    PredictorCorrector,
    Sampler,
)
from dgm_models.protocols import DataSpec
from tests.support.gaussians import TWO, Mixture

PATHS = [kind() for kind in Path.choices().values()]
QUICK: dict[str, Sampler] = {  # every sampler, with few steps
    "ancestral": Ancestral(steps=4), "ddim": Ddim(steps=4), "euler": Euler(steps=4), "heun": Heun(steps=4),
    "ode": Ode(tolerance=1e-2), "dpm_solver": DpmSolver(steps=4), "edm": Edm(steps=4, churn=2.0),
    "predictor_corrector": PredictorCorrector(steps=4), "annealed_langevin": AnnealedLangevin(steps=4, moves=2),
}  # fmt: skip
ALPHA = ("edm", "predictor_corrector", "annealed_langevin")  # they divide by alpha


def name(value: object) -> str:
    return str(getattr(value, "name", value))


def noise(path: Path, n: int, seed: int = 0, dims: int = 2) -> tuple[Tensor, torch.Generator]:
    """x_1 [n, dims] float64, and the generator that goes on."""
    rng = torch.Generator().manual_seed(seed)
    return float(path.sigma(torch.ones(()))) * torch.randn(n, dims, generator=rng, dtype=torch.float64), rng


class Counted:
    """A denoiser that keeps what it was asked."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.times = denoise, list[float]()

    def __call__(self, x: Tensor, t: Tensor) -> Guess:
        self.times.append(float(t))
        return self.denoise(x, t)


# ---- what every sampler does


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("sampler", QUICK.values(), ids=name)
def test_sampler_runs_every_path_on_which_it_is_defined(sampler: Sampler, path: Path) -> None:
    x, rng = noise(path, 50)
    denoise = Counted(TWO.denoiser(path))
    if isinstance(path, Straight) and sampler.name in ALPHA:
        with pytest.raises(ValueError, match=f"sampler.name: {sampler.name} .* straight .* use heun, ode, ddim or dpm"):
            sampler(denoise, path, x, rng)
        return
    found = sampler(denoise, path, x, rng)
    assert found.shape == x.shape and bool(found.isfinite().all())
    assert denoise.times[0] == pytest.approx(1, abs=1e-12)
    assert min(denoise.times) > path.first - 1e-12  # where a network is trained


def test_samplers_are_all_tried() -> None:
    assert set(QUICK) == set(Sampler.choices())


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [
        (Ancestral(steps=7), 7), (Ddim(steps=7), 7), (Euler(steps=7), 7), (Heun(steps=7), 13), (DpmSolver(steps=7), 7),
        (Edm(steps=18), 35), (Edm(steps=18, churn=30.0), 35), (PredictorCorrector(steps=7, corrections=2), 7 + 6 * 2),
        (AnnealedLangevin(steps=7, moves=3), 7 * 3 + 1),
    ],
)  # fmt: skip
def test_sampler_takes_the_evaluations_that_it_states(sampler: Sampler, evaluations: int) -> None:
    path = Karras()
    denoise = Counted(TWO.denoiser(path))
    sampler(denoise, path, *noise(path, 2))
    assert len(denoise.times) == evaluations


def test_model_counts_the_evaluations_of_its_sampler() -> None:
    method = build("diffusion/ddpm", DataSpec("vector", (2,)), network={"name": "mlp", "width": 8, "depth": 1})
    for settings, expected in (({"name": "heun", "steps": 5}, 9), ({"name": "edm"}, 35), ({"name": "ddim"}, 50)):
        model = resampled(method, settings).model
        model.sample(2, torch.Generator().manual_seed(0))  # type: ignore[operator]
        assert model.evaluations == expected
    model = resampled(method, {"name": "ode", "tolerance": 1e-2}).model
    model.sample(2, torch.Generator().manual_seed(0))  # type: ignore[operator]
    assert model.evaluations % 6 == 2  # 6 a step, one more at first, the guess at the end


def test_sampler_settings_out_of_range_are_named() -> None:
    method = build("diffusion/ddpm", DataSpec("vector", (2,)), network={"name": "mlp", "width": 8, "depth": 1})
    with pytest.raises(ConfigError, match=r"sampling\.share: 4\.0 is not a number above 0 and below 4"):
        resampled(method, {"name": "annealed_langevin", "share": 4.0})
    with pytest.raises(ConfigError, match=r"sampling\.steps: unknown key"):
        resampled(method, {"name": "ode", "steps": 9})


# ---- the probability-flow ODE


def order(kind: type[Sampler], path: Path, steps: int) -> float:
    """The slope of log error over log step: the error is that of x_0 against steps of a tolerance of 1e-10."""
    x, rng = noise(path, 100)
    denoise = TWO.denoiser(path)
    exact = Ode(tolerance=1e-10)(denoise, path, x, rng)
    errors = [
        float((kind(steps=n)(denoise, path, x, rng) - exact).square().mean().sqrt())  # type: ignore[call-arg]
        for n in (steps, 2 * steps)
    ]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("path", [VariancePreserving(), Straight(), Karras(), VarianceExploding()], ids=name)
def test_sampler_error_falls_with_the_order_of_the_solver(path: Path) -> None:
    assert order(Euler, path, 80) == pytest.approx(1, abs=0.1)
    assert order(Heun, path, 80) == pytest.approx(2, abs=0.1)
    if not isinstance(path, Straight):
        assert order(Edm, path, 80) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("path", [Karras(), VarianceExploding()], ids=name)
def test_dpm_solver_is_of_order_2(path: Path) -> None:
    assert order(DpmSolver, path, 80) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("path", [Linear(), Cosine(), VariancePreserving(), Straight()], ids=name)
def test_dpm_solver_is_nearer_than_euler_with_as_many_evaluations(path: Path) -> None:
    x, rng = noise(path, 100)  # a time without data, and long last steps: where its order is not that of the formula
    denoise = TWO.denoiser(path)
    exact = Ode(tolerance=1e-8)(denoise, path, x, rng)
    one, two = (
        float((sampler(denoise, path, x, rng) - exact).square().mean().sqrt())
        for sampler in (Euler(steps=40), DpmSolver(steps=40))
    )
    assert two < 0.5 * one


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_euler_is_ddim_without_noise(path: Path) -> None:
    x, rng = noise(path, 20)
    denoise = TWO.denoiser(path)
    one, two = Euler(steps=9)(denoise, path, x, rng), Ddim(steps=9)(denoise, path, x, rng)
    assert torch.allclose(one, two, atol=1e-9)  # float64; eps is a difference of numbers up to 80


LINE = Mixture(TWO.means[:, :1], TWO.stds, TWO.weights)  # in one dimension the flow keeps quantiles


def distribution(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """P(alpha X + sigma eps <= x) for X of `LINE`, x [B, 1]."""
    deviation = ((alpha * LINE.stds).square() + sigma**2).sqrt()
    return (LINE.weights * torch.special.ndtr((x - alpha * LINE.means[:, 0]) / deviation)).sum(1)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_rk45_meets_its_tolerance_where_the_flow_is_known(tolerance: float) -> None:
    path = Straight()
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    denoise = LINE.denoiser(path)

    def slope(r: float, w: Tensor) -> Tensor:
        return (w - denoise(w, torch.tensor(r, dtype=torch.float64)).x) / r

    found = rk45(slope, x, 1.0, 0.01, tolerance)
    one, near = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64)
    before, after = distribution(x, 1 - one, one), distribution(found.y, 1 - near, near)
    density = LINE.log_prob(found.y, 1 - near, near).exp()
    # a step's error is below the tolerance (1 + |w|); 7 to 30 steps, whose errors the flow to data mostly shrinks
    assert float(((after - before).abs() / density).max()) < 10 * tolerance
    assert found.evaluations % 6 == 1


def test_rk45_goes_both_ways_and_counts() -> None:
    calls = []

    def decay(s: float, y: Tensor) -> Tensor:
        calls.append(s)
        return -y

    y = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    there = rk45(decay, y, 0.0, 3.0, 1e-9)
    assert torch.allclose(there.y, y * math.exp(-3), rtol=1e-7) and there.evaluations == len(calls)
    assert torch.allclose(rk45(decay, there.y, 3.0, 0.0, 1e-9).y, y, rtol=1e-6)


def test_rk45_refuses_what_no_step_can_follow() -> None:
    rng = torch.Generator().manual_seed(0)

    def rough(s: float, y: Tensor) -> Tensor:
        return torch.randn(y.shape, generator=rng, dtype=y.dtype) * 1e9

    with pytest.raises(ValueError, match="tolerance: 1e-09 is met by no step at 0; give a larger one"):
        rk45(rough, torch.zeros(2, 2).double(), 0, 1, 1e-9)
    with pytest.raises(ValueError, match="is met by no step"):
        rk45(lambda s, y: y * math.nan, torch.ones(2, 2), 0, 1)


# ---- samplers that draw

DRAWN = 4000
NARROW = VarianceExploding(0.03, 8.0)


@pytest.mark.parametrize(
    ("sampler", "path"),
    [
        (Ancestral(steps=100), Linear()),
        (Ancestral(steps=100, spread="large"), VariancePreserving()),
        (Ddim(steps=100, eta=1.0), Cosine()),
        (Edm(steps=40, churn=10.0), Karras()),
        (Edm(steps=40, churn=10.0, churn_min=0.05, churn_max=5.0), NARROW),
        (PredictorCorrector(steps=100), VariancePreserving()),
        (PredictorCorrector(steps=60), NARROW),
        (AnnealedLangevin(steps=8, moves=40, share=0.3), VarianceExploding(0.1, 4.0)),
    ],
    ids=name,
)
def test_drawn_samples_have_the_mixture_s_moments_and_weights(sampler: Sampler, path: Path) -> None:
    x = sampler(TWO.denoiser(path), path, *noise(path, DRAWN)).double()
    # standard errors are 0.011, 0.008 and 0.0072; the steps themselves leave about as much
    assert torch.allclose(x.mean(0), TWO.mean(), atol=0.04)
    assert torch.allclose(x.T.cov(), TWO.covariance(), atol=0.04)
    assert float(TWO.posterior(x)[:, 0].mean()) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("sampler", "share"),
    [
        (AnnealedLangevin(steps=2, moves=40, share=0.4), 0.4),
        (PredictorCorrector(steps=2, corrections=20, snr=0.5), 1.0),
    ],
    ids=["annealed_langevin", "predictor_corrector"],
)
def test_langevin_steps_have_the_stationary_variance_of_their_size(sampler: Sampler, share: float) -> None:
    """y <- (1 - a / 2) y + s sqrt(a) noise settles at s^2 / (1 - a / 4), for data of standard deviation about 0."""
    path = VarianceExploding(0.5, 1.0)  # a is `share`, or 4 snr^2
    point = Mixture(torch.zeros(1, 1).double(), torch.ones(1).double() * 1e-3, torch.ones(1).double())
    x, rng = noise(path, DRAWN, dims=1)
    state = list[Tensor]()

    def denoise(x: Tensor, t: Tensor) -> Guess:
        state.append(x)
        return point.denoiser(path)(x, t)

    sampler(denoise, path, x, rng)
    assert float(state[-1].var()) == pytest.approx(0.5**2 / (1 - share / 4), rel=0.09)  # 4 standard errors


def test_edm_without_churn_draws_nothing() -> None:
    x, rng = noise(Karras(), 20)
    denoise, before = TWO.denoiser(Karras()), rng.get_state()
    plain = Edm(steps=9)(denoise, Karras(), x, rng)
    assert torch.equal(rng.get_state(), before)
    assert torch.equal(plain, Edm(steps=9, churn=5.0, churn_min=1e3)(denoise, Karras(), x, rng))  # no s is above 80
    assert not torch.equal(plain, Edm(steps=9, churn=5.0)(denoise, Karras(), x, rng))


def test_edm_evaluates_at_the_noise_that_it_raised() -> None:
    path = Karras()
    denoise = Counted(TWO.denoiser(path))
    Edm(steps=10, churn=4.0, churn_max=20.0)(denoise, path, *noise(path, 5))
    grid = path.grid(10)
    for i in range(10):
        told = float(path.sigma(torch.tensor(denoise.times[2 * i], dtype=torch.float64)))
        s = float(grid.sigma[i])
        assert told == pytest.approx(s * 1.4 if i and s <= 20 else s, rel=1e-9)


# ---- guidance


def test_guidance_is_the_closed_form_of_two_gaussians() -> None:
    """Scores that are combined linearly belong to p(x) (p(x|c) / p(x))^g: a Gaussian, where both are Gaussians."""
    path, g = Straight(), 1.5
    one = torch.ones(1, dtype=torch.float64)
    given, plain = (Mixture(torch.tensor([[mean]]).double(), one * std, one) for mean, std in ((0.8, 0.5), (0.0, 1.0)))
    x, rng = noise(path, 50, dims=1)

    def guided(x: Tensor, t: Tensor) -> Guess:
        return Guess(torch.lerp(plain.denoiser(path)(x, t).x, given.denoiser(path)(x, t).x, g))

    found = Ode(tolerance=1e-8)(guided, path, x, rng)
    # the flow of a guess that is linear in w: dw/dr = (w - a(r) - b(r) w) / r, integrated in closed form by quadrature
    r = torch.linspace(1, 1e-3, 200_001, dtype=torch.float64)
    slopes, starts = torch.zeros_like(r), torch.zeros_like(r)
    for mixture, share in ((plain, 1 - g), (given, g)):
        variance = (1 - r).square() * mixture.stds**2 + r**2
        gain = (1 - r) * mixture.stds**2 / variance
        slopes += share * gain
        starts += share * (1 - gain * (1 - r)) * mixture.means[0, 0]
    growth = torch.cumulative_trapezoid((1 - slopes) / r, r)
    growth = torch.cat([torch.zeros(1, dtype=torch.float64), growth])
    forced = torch.trapezoid(-(-growth).exp() * starts / r, r)
    w = growth[-1].exp() * (x + forced)
    assert torch.allclose(found, starts[-1] + slopes[-1] * w, atol=1e-5)


def test_guidance_of_a_model_is_linear_in_its_guesses() -> None:
    method = build(
        "diffusion/ddpm", DataSpec("vector", (2,), classes=2), network={"name": "mlp", "width": 8, "depth": 1},
        cond={"name": "label"},
    )  # fmt: skip
    model = method.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    x, t, label = torch.randn(4, 2), torch.tensor(0.4, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    found = []
    for guidance in (0.0, 1.0, 3.0):
        model.sampling = dataclasses.replace(model.sampling, guidance=guidance)
        found.append(model.denoiser(label)(x, t).x)  # type: ignore[operator]
    assert torch.allclose(found[2], found[0] + 3 * (found[1] - found[0]), atol=1e-5)  # float32
    assert not torch.allclose(found[0], found[1], atol=1e-3)
