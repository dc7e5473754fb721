"""The linear VAE is probabilistic PCA: its marginal likelihood, its optimum and its posterior in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.method import build, encoded
from dgm_models.nn import latent
from dgm_models.nn.latent import LatentVariable, log_ratio, reparametrised
from dgm_models.nn.networks import Mlp
from dgm_models.ops.divergences import kl_to_standard_normal
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer
from dgm_models.vae.beta_vae import BetaElbo
from dgm_models.vae.vae import Elbo
from tests.support.linear import DATA, EIGENVALUES, LATENT, Linear, N, Signs, closed_form, marginal, rows


@pytest.fixture(scope="module")
def trained() -> LatentVariable:
    torch.manual_seed(0)
    model = LatentVariable(DATA, Linear(), LATENT, "auto")
    settings = Train(steps=700, batch_size=N, report_every=100)
    optim = Optims(Optim(lr=0.03, schedule="cosine"))
    Trainer(model, Elbo(), ArraySource(rows(), DATA), settings, optim, 0).run()
    return model


def bound(model: LatentVariable, k: int, repeats: int, x: Tensor) -> Tensor:
    """[repeats] mean bounds over x."""
    rng = torch.Generator().manual_seed(k)
    with torch.no_grad():
        return torch.stack([model.elbo(x, rng, k=k).double().mean() for _ in range(repeats)])


def test_linear_vae_reaches_the_likelihood_of_ppca(trained: LatentVariable) -> None:
    found = float(marginal(trained, rows()).mean())
    assert found <= closed_form() + 1e-6  # the maximum; float32 weights
    # one posterior draw an example and a rate that falls to 0: quadratic at the optimum, in about 15 weights
    assert found == pytest.approx(closed_form(), abs=0.005)


def test_linear_vae_finds_the_noise_and_the_subspace_of_ppca(trained: LatentVariable) -> None:
    with torch.no_grad():
        variance = float(trained.decoder.log_variance.exp())
        values = torch.linalg.svdvals(trained.decoder.mean.weight).double() ** 2
    assert variance == pytest.approx(
        float(EIGENVALUES[LATENT:].mean()), rel=0.03
    )  # as the likelihood: noise of the draws
    assert values.tolist() == pytest.approx((EIGENVALUES[:LATENT] - 0.5).tolist(), rel=0.05)
    assert torch.allclose(trained.decoder.mean.bias.detach(), rows().mean(0), atol=0.05)


def test_linear_vae_s_elbo_is_tight_at_the_optimum(trained: LatentVariable) -> None:
    found = bound(trained, 1, 40, rows())
    error = float(found.std()) / math.sqrt(40)
    gap = float(marginal(trained, rows()).mean() - found.mean())
    assert -3 * error < gap < 0.01  # the true posterior is diagonal Gaussian there, and the encoder can give it


@pytest.fixture(scope="module")
def loose() -> tuple[LatentVariable, Tensor]:
    """A linear VAE whose posterior is not the true one."""
    torch.manual_seed(1)
    model = LatentVariable(DATA, Linear(), LATENT, "auto")
    return model, rows()[:128]


def test_linear_vae_bounds_are_below_log_p_and_rise_with_k(loose: tuple[LatentVariable, Tensor]) -> None:
    model, x = loose
    repeats = {1: 200, 5: 60, 50: 20}
    found = {k: bound(model, k, n, x) for k, n in repeats.items()}
    means = [float(value.mean()) for value in found.values()] + [float(marginal(model, x).mean())]
    errors = [float(found[k].std()) / math.sqrt(n) for k, n in repeats.items()] + [0.0]
    for i in range(3):
        assert means[i + 1] - means[i] > 3 * math.hypot(errors[i], errors[i + 1])  # three standard errors


def test_linear_vae_bound_reaches_log_p_with_many_draws(loose: tuple[LatentVariable, Tensor]) -> None:
    model, x = loose
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = model.elbo(x[:16], rng, k=3000).double()
    # without - log k it would be 8 nats above; the importance weights' spread is about exp(2)
    assert float((found - marginal(model, x[:16])).abs().mean()) < 0.1


def test_elbo_loss_is_the_negative_elbo(loose: tuple[LatentVariable, Tensor]) -> None:
    model, x = loose
    keys = torch.arange(200 * 128)
    many = Batch(x.repeat(200, 1), keys, keys)
    found = -Elbo().loss(model, many).total.detach() / len(keys)  # the KL in closed form
    draws = bound(model, 1, 200, x)  # the KL by the same draws
    error = float(draws.std()) * math.sqrt(2 / 200)  # of the difference of two means of 200 repeats
    assert float(found) == pytest.approx(float(draws.mean()), abs=4 * error)  # four standard errors


def test_beta_elbo_with_beta_one_is_the_elbo(loose: tuple[LatentVariable, Tensor]) -> None:
    model, x = loose
    batch = encoded(model, x)
    with torch.no_grad():
        one, two, four = (
            objective.loss(model, batch) for objective in (Elbo(), BetaElbo(1.0, 1.0), BetaElbo(4.0, 1.0))
        )
    assert float(one.total) == pytest.approx(float(two.total), rel=1e-6)  # float32
    assert float(two.metrics["elbo"]) == pytest.approx(-float(two.total), rel=1e-6)
    assert float(four.total - one.total) == pytest.approx(
        3 * float(one.metrics["kl"]), rel=1e-4
    )  # a float32 difference


def test_normalised_beta_is_beta_times_latents_over_dims() -> None:
    method = build("vae/beta_vae", DataSpec("image", (1, 8, 8), 2), latent_dim=16, beta=4.0)
    batch = encoded(method.model, torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    # a sum over three examples, which the trainer divides by three
    assert float(method.objective.loss(method.model, batch).metrics["normalised_beta"]) == 3 * 4.0 * 16 / 64


def test_vae_terms_are_sums_over_the_event() -> None:
    """A mean over pixels would be a weight of D on the KL."""
    data = DataSpec("image", (1, 2, 3), 2)
    model = LatentVariable(data, Mlp(width=4, depth=1), 2, "auto")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x = torch.randint(2, (4, 1, 2, 3))
    reconstruction, kl = model.terms(x, model.posterior(x), torch.randn(4, 2))
    assert reconstruction.tolist() == pytest.approx([-6 * math.log(2)] * 4, rel=1e-6)  # six fair coins
    assert kl.tolist() == [0.0] * 4


# ---- the KL in closed form and by draws


def test_kl_in_closed_form_is_the_mean_of_its_estimate() -> None:
    """Exactly so: over all vectors of signs, whose first three moments are a normal's."""
    q = torch.randn(6, LATENT, dtype=torch.float64), torch.randn(6, LATENT, dtype=torch.float64)
    eps = Signs.of(torch.zeros(6, 1, dtype=torch.float64)).normal("", (1, LATENT)).reshape(6, 2**LATENT, LATENT)
    estimate = -log_ratio(reparametrised(q, eps), q).mean(1)
    assert torch.allclose(estimate, kl_to_standard_normal(*q), rtol=1e-12)  # float64


# ---- the estimate that needs no encoder


def test_prior_estimate_reaches_log_p_with_many_draws(loose: tuple[LatentVariable, Tensor]) -> None:
    model, x = loose
    with torch.no_grad():
        found = model.prior_estimate(x[:16], torch.Generator().manual_seed(0), 20_000).double()
    # the weights' spread is about exp(2); without - log k it would be 10 nats above
    assert float((found - marginal(model, x[:16])).abs().mean()) < 0.05


def test_prior_estimate_is_unbiased_in_probability(loose: tuple[LatentVariable, Tensor]) -> None:
    model, x = loose
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        found = torch.stack([model.prior_estimate(x[:16], rng, 500).double() for _ in range(100)])
    ratio = (found - marginal(model, x[:16])).exp()  # [100, 16], each of mean 1
    error = ratio.std(0) / math.sqrt(100)
    assert float(((ratio.mean(0) - 1).abs() / error).max()) < 5  # five standard errors, 16 times


def test_prior_estimate_lies_below_the_bound_of_an_encoder_with_the_same_draws(trained: LatentVariable) -> None:
    x, k, repeats = rows()[:64], 10, 40
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        naive = torch.stack([trained.prior_estimate(x, rng, k).double().mean() for _ in range(repeats)])
    tight = bound(trained, k, repeats, x)
    error = math.hypot(float(naive.std()), float(tight.std())) / math.sqrt(repeats)
    assert float(tight.mean() - naive.mean()) > 10 * error  # what the encoder is for
    assert float(naive.mean()) < float(marginal(trained, x).mean())


@pytest.mark.parametrize("estimate", ["elbo", "prior_estimate"])
def test_draws_in_portions_are_the_draws_in_one_pass(
    estimate: str, loose: tuple[LatentVariable, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = loose
    x = x[:16]  # torch's normal draws go in portions of 16 numbers
    found = []
    for most in (2**24, 16 * 2 * 5 * 3):  # all at once; three draws a pass
        monkeypatch.setattr(latent, "PASS", most)
        with torch.no_grad():
            found.append(getattr(model, estimate)(x, torch.Generator().manual_seed(0), k=10))
    assert torch.allclose(*found, atol=1e-4)  # float32 sums in another order, of numbers near 10
