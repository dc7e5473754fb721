"""Restoring from what is seen: exact posteriors of normal data and of mixtures, what is seen is met, every sampler."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dgm_models.codecs import Standardized
from dgm_models.method import build
from dgm_models.nn.energy import EnergyBased
from dgm_models.nn.networks import Mlp
from dgm_models.ops.mcmc import Langevin, Mala
from dgm_models.ops.paths import Karras, Linear, Path, Straight, VarianceExploding
from dgm_models.ops.restoration import Grey, Observation, Part, Smaller, View, Whole
from dgm_models.ops.samplers import Ancestral, Ddim, Denoise, Guess, Heun, PredictorCorrector, Sampler
from dgm_models.protocols import DataSpec, Restores
from dgm_models.sampling import restore
from tests.laws import cases

D = 6
PLACES = torch.arange(D)
COVARIANCE = (0.8 ** (PLACES[:, None] - PLACES).abs()).double()
KNOWN = PLACES < 3
Y = torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64)
VIEWS = {"part": Part(torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0)) > 0.5), "smaller": Smaller(2),
         "grey": Grey(3), "whole": Whole()}  # fmt: skip


def gaussian(path: Path) -> Denoise:
    """E[x_0 | x_t] of N(0, COVARIANCE)."""

    def denoise(x: Tensor, t: Tensor) -> Guess:
        alpha, sigma = path.alpha(t), path.sigma(t)
        noisy = alpha**2 * COVARIANCE + sigma**2 * torch.eye(D, dtype=torch.float64)
        return Guess(x @ torch.linalg.solve(noisy, alpha * COVARIANCE))

    return denoise


def posterior(noise: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of N(0, COVARIANCE) given its first half with noise."""
    seen = COVARIANCE[KNOWN][:, KNOWN] + noise**2 * torch.eye(3, dtype=torch.float64)
    gain = torch.linalg.solve(seen, COVARIANCE[KNOWN]).T
    return gain @ Y, COVARIANCE - gain @ COVARIANCE[KNOWN]


def drawn(path: Path, sampler: Sampler, noise: float, rounds: int, n: int = 1000) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    seen = Observation(Y.expand(n, 3), Part(KNOWN), noise, rounds)
    x = path.sigma(torch.ones(1)) * torch.randn(n, D, generator=rng, dtype=torch.float64)
    return sampler(seen.denoise(gaussian(path), path), path, x, rng)


# ---- views


@pytest.mark.parametrize("name", VIEWS)
def test_view_has_its_pseudo_inverse_and_gain(name: str) -> None:
    view, x = VIEWS[name], torch.randn(5, 3, 4, 6, dtype=torch.float64)
    y = view.see(x)
    assert torch.allclose(view.see(view.back(y)), y)  # A A^+ = I
    flat = torch.func.jacrev(lambda x: view.see(x[None])[0].flatten())(x[0]).flatten(1)
    assert torch.allclose(flat @ flat.T, view.gain**2 * torch.eye(len(flat), dtype=torch.float64))
    assert torch.allclose(view.back(y)[0].flatten(), torch.linalg.pinv(flat) @ y[0].flatten())
    assert torch.allclose(view.see(torch.ones_like(x)), torch.ones_like(y))


# ---- Gaussian paths

EXACT = [(Linear(), Ddim(steps=50)), (Linear(), Ancestral(steps=100)), (Karras(), Heun(steps=18)),
         (Straight(), Heun(steps=20)), (VarianceExploding(), PredictorCorrector(steps=100))]  # fmt: skip


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize(("path", "sampler"), EXACT, ids=lambda each: each.name)
def test_inpainting_draws_from_the_conditional_law_of_normal_data(path: Path, sampler: Sampler, noise: float) -> None:
    x, (mean, covariance) = drawn(path, sampler, noise, 3), posterior(noise)
    if not noise:
        assert torch.allclose(x[:, KNOWN], Y.expand(len(x), 3), atol=1e-12)
    # 1000 draws: standard errors of 0.02; the rest is the samplers' steps and where sigma is above TRUSTED: 0.07
    assert float((x.mean(0) - mean).abs().max()) < 0.12
    assert float((torch.cov(x.T) - covariance).abs().max()) < 0.12


def test_null_space_alone_gives_the_seen_values_too_little_weight() -> None:
    """Without the guess's covariance what is seen is read through x_t alone, as if it had x_t's noise."""
    x, (mean, covariance) = drawn(Linear(), Ddim(steps=100), 0.0, 0), posterior(0.0)
    assert torch.allclose(x[:, KNOWN], Y.expand(len(x), 3), atol=1e-12)
    near = int(KNOWN.sum())  # the first value that is not seen
    assert 0.1 < float(x[:, near].mean() / mean[near]) < 0.7
    assert float(x[:, near].var() / covariance[near, near]) > 1.5


def test_denoising_draws_from_the_posterior_of_a_mixture() -> None:
    """x_0 is -1 or 1 with a little spread, y = 0.1 with noise 0.4: the weights, and not only moments, are exact."""
    path, spread, noise, n = Linear(), 0.1, 0.4, 4000
    centres = torch.tensor([-1.0, 1.0], dtype=torch.float64)

    def denoise(x: Tensor, t: Tensor) -> Guess:
        alpha, sigma = path.alpha(t), path.sigma(t)
        variance = (alpha * spread) ** 2 + sigma**2
        weight = (-0.5 * (x - alpha * centres).square() / variance).softmax(1)
        means = centres + alpha * spread**2 / variance * (x - alpha * centres)
        return Guess((weight * means).sum(1, keepdim=True))

    rng = torch.Generator().manual_seed(0)
    seen = Observation(torch.full((n, 1), 0.1, dtype=torch.float64), Whole(), noise)
    start = torch.randn(n, 1, generator=rng, dtype=torch.float64)
    x = Ddim(steps=200)(seen.denoise(denoise, path), path, start, rng)
    total = spread**2 + noise**2
    weight = (-0.5 * (0.1 - centres).square() / total).softmax(0)
    means = (centres / spread**2 + 0.1 / noise**2) / (spread**-2 + noise**-2)
    right = x[:, 0] > 0
    error = math.sqrt(float(weight.prod()) / n)
    assert float(right.double().mean()) == pytest.approx(float(weight[1]), abs=4 * error)
    assert float(x[right].mean()) == pytest.approx(float(means[1]), abs=0.02)
    assert float(x[right].std()) == pytest.approx((spread**-2 + noise**-2) ** -0.5, rel=0.1)


def test_correction_stops_where_what_is_left_is_noise() -> None:
    """The share 1 - noise^2 / (mean square of y - guess): 0 where the guess is as near as the noise lets it be."""
    y = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    known = torch.tensor([True, True, True, True, False])
    path, t = Linear(), torch.tensor(0.5, dtype=torch.float64)
    for noise, share in ((0.0, 1.0), (0.5, 0.75), (1.0, 0.0), (2.0, 0.0)):
        seen = Observation(y, Part(known), noise, 0)
        found = seen.denoise(lambda x, t: Guess(torch.zeros_like(x)), path)(torch.zeros(1, 5).double(), t).x
        assert torch.allclose(found[:, :4], share * y) and float(found[0, 4]) == 0


# ---- energies


class Normal(nn.Module):
    """x^T (COVARIANCE^-1 - I) x / 2: with the shell's Gaussian of spread 1 the energy of N(0, COVARIANCE)."""

    def forward(self, x: Tensor) -> Tensor:
        precision = torch.linalg.inv(COVARIANCE) - torch.eye(D, dtype=torch.float64)
        return 0.5 * ((x @ precision) * x).sum(1, keepdim=True)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5])
def test_energy_restores_the_conditional_law_with_any_noise(noise: float) -> None:
    """One step fits all: with a noise of 0.02 the law of what is seen is 50 times narrower than of what is not."""
    data = DataSpec("vector", (D,))
    model = EnergyBased(data, Mlp(width=2, depth=1), Mala(steps=200, step=0.2), 1.0).double()
    model.network = Normal()
    n, rng = 1000, torch.Generator().manual_seed(0)
    model.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    x, (mean, covariance) = model.restore(Observation(Y.expand(n, 3), Part(KNOWN), noise), rng), posterior(noise)
    assert model.evaluations == 201 and 0.4 < model.accepted < 1
    if not noise:
        assert torch.allclose(x[:, KNOWN], Y.expand(n, 3), atol=1e-12)
    assert float((x.mean(0) - mean).abs().max()) < 0.1  # 1000 chains: a standard error of 0.025
    assert float((torch.cov(x.T) - covariance).abs().max()) < 0.12


# ---- the library's door


@pytest.mark.parametrize("name", ["diffusion/ddpm", "energy/contrastive_divergence"])
def test_restore_keeps_what_is_known_bit_for_bit_and_follows_its_seed(name: str) -> None:
    data = DataSpec("image", (1, 4, 4), 5)
    method = build(name, data, **cases.small(name))
    assert isinstance(method.model, Restores)
    x, known = cases.rows(data, 11), torch.zeros(1, 4, 4, dtype=torch.bool)
    known[:, :2] = True
    found = restore(method, Part(known).see(x), Part(known), seed=1)
    assert found.shape == x.shape and found.dtype == x.dtype
    assert torch.equal(found[:, :, :2], x[:, :, :2]) and not torch.equal(found[:, :, 2:], x[:, :, 2:])
    assert torch.equal(restore(method, Part(known).see(x)[:9], Part(known), seed=1), found[:9])
    assert not torch.equal(restore(method, Part(known).see(x), Part(known), seed=2), found)


def test_restore_meets_means_before_levels_are_rounded() -> None:
    data = DataSpec("image", (3, 4, 4), None, location=2.0, scale=3.0)
    method = build(
        "diffusion/ddpm", DataSpec("vector", (48,), None, location=2.0, scale=3.0), **cases.small("diffusion/ddpm")
    )
    method.model.data = method.data = data
    method.model.codec = Standardized(data)
    method.model.network.shape = data.shape
    x = cases.rows(data, 4)
    for view in (Smaller(2), Grey(3)):
        found = restore(method, view.see(x), view)
        assert torch.allclose(view.see(found), view.see(x), atol=1e-4)  # float32 numbers of about 10


def bad(view: View = Smaller(2), name: str = "diffusion/ddpm", y: Tensor | None = None, noise: float = 0.0) -> Tensor:
    data = DataSpec("image", (1, 4, 4), 5)
    return restore(build(name, data, **cases.small(name)), torch.zeros(2, 1, 2, 2) if y is None else y, view, noise)


def test_restore_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="vae/vae cannot restore examples; `dgm models` lists those that can"):
        bad(name="vae/vae")
    with pytest.raises(ValueError, match=r"y: \(2, 1, 4, 4\); of diffusion/ddpm's data \(1, 4, 4\) expected"):
        bad(y=torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"image \(1, 4, 4\): no such view of it"):
        bad(Smaller(3))
    with pytest.raises(ValueError, match="noise: 0; all of the example is seen as it is"):
        bad(Whole(), y=torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="noise: -1"):
        bad(noise=-1.0)
    with pytest.raises(ValueError, match="rounds: -1"):
        Observation(torch.zeros(1, 1), Whole(), rounds=-1)


def test_every_chain_restores() -> None:
    data = DataSpec("vector", (D,))
    for chain in (Langevin(steps=3), Mala(steps=3)):
        model = EnergyBased(data, Mlp(width=4, depth=1), chain, 1.0)
        seen = Observation(Y.float().expand(5, 3), Part(KNOWN))
        x = model.restore(seen, torch.Generator().manual_seed(0))
        assert torch.allclose(x[:, KNOWN], seen.y) and x.isfinite().all()
