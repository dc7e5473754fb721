"""Score matching, sliced and denoising, and the Fisher divergence against closed forms for Gaussians, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dgm_models.construct import ConfigError
from dgm_models.energy.denoising_score_matching import DenoisingScoreMatching
from dgm_models.energy.exponential_family import Gaussian
from dgm_models.energy.score_matching import ScoreMatching
from dgm_models.energy.sliced_score_matching import SlicedScoreMatching
from dgm_models.method import build, encoded, fit
from dgm_models.metrics.fisher import fisher_divergence
from dgm_models.nn.score_matching import MatchesScores
from dgm_models.ops.scores import score, trace
from dgm_models.protocols import Batch, DataSpec

PLANE, THREE = DataSpec("vector", (2,)), DataSpec("vector", (3,))
MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=torch.float64)
SMOOTH = {"name": "mlp", "width": 16, "depth": 2, "activation": "tanh"}
EXACT = 1e-9  # rounding of 2e-16 in sums of some 1000 terms


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(n: int, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE, seed: int = 0) -> Tensor:
    """n rows whose mean and covariance are these, without the error of sampling."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T, correction=0)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def quadratic(mean: Tensor = MEAN, covariance: Tensor = COVARIANCE) -> Gaussian:
    """A Gaussian with this mean and covariance."""
    model = Gaussian(DataSpec("vector", (len(mean),))).double()
    root = torch.linalg.cholesky(torch.linalg.inv(covariance))
    with torch.no_grad():
        model.factor.copy_(root.tril(-1) + root.diagonal().log().diag())
        model.shift.copy_(torch.linalg.solve(covariance, mean))
    return model


def network(data: DataSpec = THREE) -> nn.Module:
    """An energy that is no quadratic, its weights enlarged."""
    model = build("energy/score_matching", data, network=SMOOTH).model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


def batch(x: Tensor) -> Batch:
    return Batch(x, torch.arange(len(x)), torch.arange(len(x)))


def found(model: nn.Module, objective: MatchesScores, x: Tensor) -> Tensor:
    """The loss of one example."""
    return objective.loss(model, batch(x)).total / len(x)


def trained(objective: MatchesScores, x: Tensor) -> Gaussian:
    """A Gaussian energy, at the objective's minimum over these rows."""
    model = Gaussian(PLANE).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=40, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = found(model, objective, x)
        total.backward()
        return total

    optimizer.step(closure)
    return model


# ---- derivatives


def test_trace_is_that_of_the_hessian() -> None:
    model, x = network(), normal(4, 3)
    s, leaf = score(lambda x: -model.energy(x), x)
    traces = trace(s, leaf).detach()
    for i in range(4):
        hessian = torch.autograd.functional.hessian(lambda x: -model.energy(x[None])[0], x[i])
        assert float(traces[i]) == pytest.approx(float(hessian.trace()), abs=EXACT)
    assert float(traces.std()) > 0.1  # it is no quadratic


# ---- score matching


def test_score_matching_loss_is_its_closed_form() -> None:
    """E |P (x - m)|^2 / 2 - tr P = tr(P P (C + d d^T)) / 2 - tr P, d the difference of the means."""
    mean, covariance = MEAN + 0.3, COVARIANCE + torch.eye(2) * 0.4
    precision = torch.linalg.inv(covariance)
    away = MEAN - mean
    expected = 0.5 * (precision @ precision @ (COVARIANCE + torch.outer(away, away))).trace() - precision.trace()
    loss = found(quadratic(mean, covariance), ScoreMatching(PLANE), rows(500))
    assert float(loss.detach()) == pytest.approx(float(expected), abs=EXACT)


def test_score_matching_finds_mean_and_covariance() -> None:
    model = trained(ScoreMatching(PLANE), rows(300))
    assert torch.allclose(model.mean, MEAN, atol=1e-6)  # the sample's moments are the exact minimum
    assert torch.allclose(model.covariance, COVARIANCE, atol=1e-6)


def test_score_matching_loss_is_half_the_fisher_divergence_less_the_data_s_constant() -> None:
    model, x = quadratic(MEAN + 0.3, 2 * COVARIANCE), rows(500)
    constant = 0.5 * torch.linalg.inv(COVARIANCE).trace()  # E |grad log p|^2 / 2 of the data
    whole = fisher_divergence(model.log_prob, x, lambda x: (MEAN - x) @ torch.linalg.inv(COVARIANCE)).value
    loss = found(model, ScoreMatching(PLANE), x)
    assert float(loss.detach()) == pytest.approx(0.5 * whole - float(constant), abs=EXACT)


def test_score_matching_trains_a_flow() -> None:
    flow = build("flows/real_nvp", PLANE, channels=16, blocks=1, layers=2)
    x = rows(4096).float()
    method = fit(
        replace(flow, objective=ScoreMatching(PLANE)), x, steps=120, batch_size=256,
        optim={"lr": 2e-2, "betas": (0.9, 0.99), "schedule": "cosine"},
    )  # fmt: skip
    entropy = 0.5 * float(torch.logdet(COVARIANCE)) + math.log(2 * math.pi) + 1
    gap = -float(method.model.log_prob(x).detach().mean()) - entropy
    assert -0.02 < gap < 0.05  # 4096 rows know the entropy to 0.016; the flow began at 0.72


def test_score_matching_trains_a_mixture_of_gaussians() -> None:
    data, n = DataSpec("vector", (1,)), 4096
    side = torch.where(normal(n, 1) < 0, -1.0, 1.0)
    x = (side + 0.7 * normal(n, 1, seed=1)).float()
    method = build("autoregressive/mixture_of_gaussians", data, components=2, width=4, depth=1)
    before = -float(method.model.log_prob(x).detach().mean())
    fit(
        replace(method, objective=ScoreMatching(data)),
        x,
        steps=150,
        batch_size=256,
        optim={"lr": 4e-2, "schedule": "cosine"},
    )
    parts = torch.distributions.Normal(torch.tensor([-1.0, 1.0]), 0.7)
    apart = (parts.log_prob(x).logsumexp(1) - math.log(2)) - method.model.log_prob(x).detach()
    assert before > 1.5
    assert abs(float(apart.mean())) < 0.02  # the divergence; its own standard error over 4096 rows is below 0.005


# ---- sliced score matching


@pytest.mark.parametrize("directions", ["rademacher", "normal"])
@pytest.mark.parametrize("reduced", [False, True])
def test_sliced_score_matching_is_unbiased(directions: str, reduced: bool) -> None:
    model, n = network(), 20_000
    x = normal(1, 3).expand(n, 3)  # one point, a direction for every row
    exact = float(found(model, ScoreMatching(THREE), x[:1]).detach())
    objective = SlicedScoreMatching(directions, reduced=reduced)  # type: ignore[arg-type]
    values = objective.each(lambda x: -model.energy(x), batch(x)).detach()
    error = float(values.std()) / math.sqrt(n)
    assert 1e-3 < error < 0.2  # rows do not share a direction
    assert float(values.mean()) == pytest.approx(exact, abs=5 * error)  # five standard errors


def test_sliced_score_matching_varies_less_in_its_reduced_form_and_with_more_directions() -> None:
    model, x = network(), normal(1, 3).expand(5000, 3)

    def spread(**settings: object) -> float:
        objective = SlicedScoreMatching("normal", **settings)  # type: ignore[arg-type]
        return float(objective.each(lambda x: -model.energy(x), batch(x)).detach().std())

    assert spread(reduced=True) < 0.9 * spread(reduced=False)
    assert spread(projections=4) == pytest.approx(0.5 * spread(projections=1), rel=0.15)  # 1 / sqrt(4)


@pytest.mark.parametrize("reduced", [False, True])
def test_sliced_score_matching_finds_mean_and_covariance(reduced: bool) -> None:
    model = trained(SlicedScoreMatching(projections=2, reduced=reduced), rows(8192))
    assert torch.allclose(model.mean, MEAN, atol=0.05)  # 16384 directions: 1 / sqrt(16384) = 0.008, some of them
    assert torch.allclose(model.covariance, COVARIANCE, atol=0.05)


# ---- denoising score matching


def test_denoising_score_matching_finds_the_covariance_of_noisy_data() -> None:
    noise = 0.7
    model = trained(DenoisingScoreMatching(noise), rows(16_384))
    noisy = COVARIANCE + noise**2 * torch.eye(2)
    assert torch.allclose(model.mean, MEAN, atol=0.05)  # a regression on 16384 draws: five times 1 / sqrt(16384)
    assert torch.allclose(model.covariance, noisy, atol=0.08)
    assert float((model.covariance - COVARIANCE).detach().abs().max()) > 0.3


def test_denoising_score_matching_ends_at_the_noise_that_is_left() -> None:
    """At the score of noisy data the loss is (D - noise^2 tr(P)) / 2, P the precision of noisy data."""
    noise, n = 0.7, 16_384
    noisy = COVARIANCE + noise**2 * torch.eye(2)
    values = DenoisingScoreMatching(noise).each(quadratic(MEAN, noisy).log_prob, batch(rows(n))).detach()
    expected = 0.5 * (2 - noise**2 * float(torch.linalg.inv(noisy).trace()))
    assert float(values.mean()) == pytest.approx(expected, abs=5 * float(values.std()) / math.sqrt(n))


# ---- the Fisher divergence


def test_fisher_divergence_of_two_gaussians_is_its_closed_form() -> None:
    mean, covariance = MEAN + 0.3, COVARIANCE + torch.eye(2) * 0.4
    p, q = torch.linalg.inv(COVARIANCE), torch.linalg.inv(covariance)
    expected = float(((p - q) @ COVARIANCE @ (p - q)).trace() + (q @ (MEAN - mean)).square().sum())
    model, x = quadratic(mean, covariance), rows(500)
    whole = fisher_divergence(model.log_prob, x, lambda x: (MEAN - x) @ p)
    part = fisher_divergence(model.log_prob, x)
    assert whole.value == pytest.approx(expected, abs=EXACT)
    assert part.value == pytest.approx(expected - float(p.trace()), abs=EXACT)
    assert part.low < part.value < part.high and part.n == 500


def test_fisher_divergence_is_zero_for_the_data_s_own_density_alone() -> None:
    x, precision = rows(500), torch.linalg.inv(COVARIANCE)

    def data_score(x: Tensor) -> Tensor:
        return (MEAN - x) @ precision

    assert fisher_divergence(quadratic().log_prob, x, data_score).value == pytest.approx(0, abs=EXACT)
    assert fisher_divergence(quadratic(MEAN + 0.1).log_prob, x, data_score).value > 0.01


def test_fisher_divergence_does_not_see_a_constant() -> None:
    model, x = quadratic(), rows(500)
    assert fisher_divergence(lambda x: model.log_prob(x) + 3, x) == fisher_divergence(model.log_prob, x)


# ---- what is refused


def test_score_matching_refuses_many_dimensions() -> None:
    with pytest.raises(ConfigError, match=r"784 dimensions .* use energy/sliced_score_matching or energy/denoising"):
        build("energy/score_matching", DataSpec("image", (1, 28, 28), 256))


@pytest.mark.parametrize("name", ["score_matching", "sliced_score_matching"])
def test_losses_of_second_derivatives_refuse_kinks(name: str) -> None:
    with pytest.raises(ConfigError, match="take a network whose activation is silu, gelu or tanh"):
        build(f"energy/{name}", PLANE, network={"name": "mlp", "activation": "relu"})
    build("energy/denoising_score_matching", PLANE, network={"name": "mlp", "activation": "relu"})


@pytest.mark.parametrize("name", ["denoising_score_matching", "noise_contrastive"])
def test_energies_refuse_batch_statistics(name: str) -> None:
    with pytest.raises(ConfigError, match=r"set network\.norm_down to none or layer"):
        build(f"energy/{name}", DataSpec("image", (1, 16, 16), 2), network={"name": "dcgan", "channels": 2})


def test_score_matching_refuses_models_without_a_slope() -> None:
    made = build("autoregressive/made", DataSpec("vector", (4,), 2), width=4, depth=1)
    with pytest.raises(ValueError, match="MaskedAutoregression models whole levels"):
        ScoreMatching(made.data).loss(made.model, encoded(made.model, torch.zeros(2, 4, dtype=torch.uint8)))
    vae = build("vae/vae", PLANE, network=SMOOTH, latent_dim=1)
    with pytest.raises(ValueError, match="has neither an energy nor a density"):
        ScoreMatching(PLANE).loss(vae.model, encoded(vae.model, torch.zeros(2, 2)))


def test_score_matching_asks_a_conditional_density_for_the_batch_s_conditions() -> None:
    data = replace(PLANE, classes=2)
    flow = build("flows/real_nvp", data, channels=4, blocks=1, layers=2, cond={"name": "label"})
    with torch.no_grad():
        for i, p in enumerate(flow.model.parameters()):
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    x = normal(6, 2).float()
    one, two = (
        float(ScoreMatching(data).loss(flow.model, encoded(flow.model, x, labels=torch.full((6,), k))).total.detach())
        for k in (0, 1)
    )
    assert abs(one - two) > 1e-3
