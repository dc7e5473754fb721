"""Probabilistic PCA: density, posterior and optimum against their formulas, and the linear VAE against all three."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm_models.method import build, fit
from dgm_models.nn.latent import LatentVariable
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.protocols import DataSpec
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer
from dgm_models.vae.ppca import ClosedForm, Ppca
from tests.support.linear import DATA, DIMS, EIGENVALUES, LATENT, Linear, N, closed_form, rows, true_posterior


def random() -> Ppca:
    torch.manual_seed(0)
    model = Ppca(DATA, LATENT).double()
    with torch.no_grad():
        model.mean.normal_()
        model.log_variance.fill_(-0.7)
    return model


def covariance(model: Ppca) -> Tensor:
    with torch.no_grad():
        weight = model.weight.double()
        return weight @ weight.T + model.log_variance.double().exp() * torch.eye(DIMS, dtype=torch.float64)


def solved(batch: int = N, steps: int = 1) -> Trainer:
    """The closed form through the trainer, in float64."""
    torch.manual_seed(0)
    settings = Train(steps=steps, batch_size=batch, report_every=1)
    optim = Optims(Optim(name="sgd", lr=1.0))
    trainer = Trainer(
        Ppca(DATA, LATENT).double(), ClosedForm(DIMS), ArraySource(rows().double(), DATA), settings, optim, 0
    )
    trainer.run()
    return trainer


def test_ppca_density_is_the_normal_of_its_covariance() -> None:
    model, x = random(), rows().double()
    expected = torch.distributions.MultivariateNormal(model.mean, covariance(model)).log_prob(x)
    assert torch.allclose(model.log_prob(x), expected, rtol=1e-10)  # float64


def test_ppca_density_integrates_to_one() -> None:
    torch.manual_seed(0)
    model = Ppca(DataSpec("vector", (2,)), 1)
    side = torch.linspace(-12, 12, 401, dtype=torch.float64)
    with torch.no_grad():
        mass = float(model.log_prob(torch.cartesian_prod(side, side)).exp().sum() * (side[1] - side[0]) ** 2)
    assert mass == pytest.approx(1.0, abs=1e-9)  # the trapezium rule of a smooth function that vanishes at the ends


def test_ppca_posterior_is_that_of_the_joint_normal() -> None:
    """Conditioning the joint normal of (z, x) on x, by the blocks of its covariance."""
    model, x = random(), rows()[:7].double()
    weight, joint = model.weight.detach(), covariance(model)
    gain = weight.T @ torch.linalg.inv(joint)
    mean, spread = model.gaussian_posterior(x)
    assert torch.allclose(mean, (x - model.mean) @ gain.T, rtol=1e-9)
    assert torch.allclose(spread, torch.eye(LATENT, dtype=torch.float64) - gain @ weight, rtol=1e-9, atol=1e-12)
    assert torch.equal(model.encode(x), mean.detach())


def test_ppca_samples_have_its_moments() -> None:
    model, n = random(), 40_000
    x = model.sample(n, torch.Generator().manual_seed(0))
    centred = x - model.mean.detach()
    products = centred[:, :, None] * centred[:, None, :]
    assert bool((centred.mean(0).abs() < 5 * centred.std(0) / math.sqrt(n)).all())  # five standard errors
    assert bool(((products.mean(0) - covariance(model)).abs() < 5 * products.std(0) / math.sqrt(n)).all())


def test_closed_form_is_the_eigenvalue_formula() -> None:
    trainer = solved()
    model, x = trainer.model, rows().double()
    found = float(model.log_prob(x).detach().mean())
    assert found == pytest.approx(closed_form(), abs=1e-6)  # rows() are float32
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    sigma2 = values[: DIMS - LATENT].mean()
    expected = (vectors[:, -LATENT:] * (values[-LATENT:] - sigma2)) @ vectors[:, -LATENT:].T
    weight = model.weight.detach()
    assert np.allclose((weight @ weight.T).numpy(), expected, atol=1e-9)
    assert float(model.log_variance.detach().exp()) == pytest.approx(sigma2, rel=1e-9)
    assert sigma2 == pytest.approx(float(EIGENVALUES[LATENT:].mean()), rel=1e-5)
    assert torch.allclose(model.mean.detach(), x.mean(0), atol=1e-12)
    largest = weight.gather(0, weight.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all()) and float(weight[:, 0].norm()) > float(weight[:, 1].norm())


def test_closed_form_is_a_maximum() -> None:
    model, x = solved().model, rows().double()
    loss = -model.log_prob(x).mean()
    loss.backward()
    assert all(float(p.grad.abs().max()) < 1e-9 for p in model.parameters())  # float64
    best = float(-loss.detach())
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(20):
            kept = [p.clone() for p in model.parameters()]
            for p in model.parameters():
                p += 0.05 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
            assert float(model.log_prob(x).mean()) < best
            for p, old in zip(model.parameters(), kept, strict=True):
                p.copy_(old)


def test_closed_form_of_an_epoch_of_batches_is_that_of_all_rows() -> None:
    whole, batches = solved(), solved(batch=N // 8, steps=8)
    for one, two in zip(whole.model.parameters(), batches.model.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-9)  # float64
    assert float(batches.objective.seen) == N
    early = solved(batch=N // 8, steps=1)
    assert not torch.allclose(early.model.weight, whole.model.weight, atol=1e-2)


def test_closed_form_of_data_within_a_plane_is_finite() -> None:
    x = rows()
    x[:, 2:] = 0.0
    method = build("vae/ppca", DATA, factors=2)
    fit(method, x, steps=1, batch_size=N, optim={"name": "sgd", "lr": 1.0})
    assert all(bool(p.isfinite().all()) for p in method.model.parameters())


def test_gradient_reaches_the_closed_form() -> None:
    torch.manual_seed(0)
    model = Ppca(DATA, LATENT).double()
    settings, optim = Train(steps=120, batch_size=N, report_every=120), Optims(Optim(lr=0.1, schedule="cosine"))
    Trainer(model, MaximumLikelihood(), ArraySource(rows().double(), DATA), settings, optim, 0).run()
    found = float(model.log_prob(rows().double()).detach().mean())
    assert found <= closed_form() + 1e-6  # rows() are float32
    assert found == pytest.approx(closed_form(), abs=1e-4)  # no noise, a rate that falls to 0


def test_linear_vae_with_the_weights_of_ppca_has_its_likelihood_and_posterior() -> None:
    ppca = solved().model
    vae = LatentVariable(DATA, Linear(), LATENT, "auto").double()
    x = rows()[:16].double()
    with torch.no_grad():
        vae.decoder.mean.weight.copy_(ppca.weight)
        vae.decoder.mean.bias.copy_(ppca.mean)
        vae.decoder.log_variance.copy_(ppca.log_variance)
        mean, spread = true_posterior(vae, x)
        assert torch.allclose(mean, ppca.gaussian_posterior(x)[0], rtol=1e-9)
        # at the optimum the columns of W are orthogonal: a diagonal posterior can be the true one
        assert float(spread[0, 1].abs()) < 1e-9
        found = vae.prior_estimate(x, torch.Generator().manual_seed(0), 40_000)
    assert float((found - ppca.log_prob(x)).detach().abs().mean()) < 0.05  # the weights' spread is about exp(2)


def test_ppca_leaves_a_dimension_to_the_noise() -> None:
    with pytest.raises(ValueError, match="factors: 5 of 5 dimensions leave none to the noise"):
        build("vae/ppca", DATA, factors=5)
