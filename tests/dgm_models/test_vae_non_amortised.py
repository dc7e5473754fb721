"""The posterior that is searched for every example: what it depends on, what it reaches, what it costs the decoder."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dgm_models.method import build, encoded, fit
from dgm_models.nn.latent import LatentVariable
from dgm_models.protocols import DataSpec
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer
from dgm_models.vae.non_amortised import FittedElbo, NonAmortised
from tests.support.linear import DATA, LATENT, Linear, closed_form, marginal, rows, true_posterior


def linear(inner_steps: int, dtype: torch.dtype = torch.float64) -> NonAmortised:
    """A linear decoder whose posterior has correlation 0: the family of q holds it."""
    torch.manual_seed(1)
    model = NonAmortised(DATA, Linear(), LATENT, "auto", inner_steps, 0.5)
    with torch.no_grad():
        model.decoder.mean.weight.copy_(torch.linalg.qr(model.decoder.mean.weight)[0] * torch.tensor([2.0, 0.7]))
    return model.to(dtype)


def bound(model: LatentVariable, x: Tensor, repeats: int = 20) -> tuple[float, float]:
    """The mean ELBO over x and its standard error."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([model.elbo(x, rng).double().mean() for _ in range(repeats)])
    return float(draws.mean()), float(draws.std()) / math.sqrt(repeats)


def test_fitted_posterior_approaches_the_true_one() -> None:
    model, x = linear(400), rows()[:32].double()
    mean, log_variance = model.posterior(x)
    expected, covariance = true_posterior(model, x)
    # Adam at a falling rate with one draw a step: some hundredths
    assert float((mean - expected).abs().max()) < 0.1
    assert float((log_variance - covariance.diagonal().log()).abs().max()) < 0.2


def test_fitted_posterior_begins_at_the_prior_and_tightens_with_steps() -> None:
    x = rows()[:64].double()
    found = [bound(linear(steps), x) for steps in (1, 3, 8, 20)]
    for (before, _), (after, error) in pairwise(found):
        assert after - before > 5 * error
    log_p = float(marginal(linear(1), x).mean())
    assert -0.05 < log_p - found[-1][0] < 0.05  # nats; the family holds the true posterior


def test_fitted_posterior_depends_on_its_example_alone() -> None:
    model, x = linear(10), rows()[:8].double()
    whole = torch.stack(model.posterior(x))
    alone = torch.cat([torch.stack(model.posterior(row[None])) for row in x], 1)
    assert torch.allclose(whole, alone, atol=1e-12)  # float64


def test_fitted_posterior_is_the_same_at_every_call_and_leaves_no_gradient() -> None:
    model, x = linear(5), rows()[:8].double()
    with torch.no_grad():
        first = model.posterior(x)
    second = model.posterior(x)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two) and not one.requires_grad and not two.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(model.encode(x), first[0])


def test_fitted_elbo_trains_the_decoder_at_the_posterior_that_stands_still() -> None:
    model, objective = linear(5), FittedElbo()
    batch = objective.prepare(model, encoded(model, rows()[:8].double()))
    assert set(batch.extra) == {"mean", "log_variance"}
    loss = objective.loss(model, batch)
    loss.total.backward()
    assert {name for name, _ in model.named_parameters()} == {
        n for n, p in model.named_parameters() if p.grad is not None
    }
    q = batch.extra["mean"], batch.extra["log_variance"]
    expected = sum(
        model.terms(batch.x, q, batch.normal("posterior", (LATENT,)))[i].sum() * (-1) ** (i + 1) for i in (0, 1)
    )
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_non_amortised_linear_vae_reaches_the_likelihood_of_ppca() -> None:
    torch.manual_seed(0)
    model = NonAmortised(DATA, Linear(), LATENT, "auto", 20, 0.5)
    settings = Train(steps=80, batch_size=256, report_every=80)
    optim = Optims(Optim(lr=0.15, schedule="cosine"))
    Trainer(model, FittedElbo(), ArraySource(rows(), DATA), settings, optim, 0).run()
    found = float(marginal(model, rows()).mean())
    # the posterior of 20 steps is not the best one, and the decoder leans towards where the bound is tight
    assert closed_form() - 0.05 < found <= closed_form() + 1e-6


def test_non_amortised_encoder_does_not_exist() -> None:
    model, _ = build("vae/non_amortised", DataSpec("image", (1, 4, 4), 2), latent_dim=2)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"decoder"}


def test_non_amortised_validates_in_training() -> None:
    """Validation runs without gradient; the inner optimisation has its own."""
    data = DataSpec("vector", (2,))
    method = build(
        "vae/non_amortised", data, network={"name": "mlp", "width": 8, "depth": 1}, latent_dim=1, inner_steps=2
    )
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    fit(method, x, valid=x, steps=4, batch_size=8, validate_every=2, keep="best", report_every=4)
    assert math.isfinite(method.history[-1][1]["valid/loss"])
