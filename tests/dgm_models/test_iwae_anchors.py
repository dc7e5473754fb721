"""The importance-weighted objective on the linear VAE: its value, and the gradients of both estimators."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.method import build, encoded
from dgm_models.nn.latent import LatentVariable, log_ratio
from dgm_models.objective import Objective
from dgm_models.protocols import Batch, DataSpec
from dgm_models.vae.iwae import Gradient, ImportanceWeighted
from dgm_models.vae.vae import Elbo
from tests.support.linear import DATA, LATENT, Linear, Signs, marginal, rows, true_posterior


def linear() -> LatentVariable:
    """A linear VAE in float64 whose posterior is not the true one."""
    torch.manual_seed(1)
    return LatentVariable(DATA, Linear(), LATENT, "auto").double()


def exact() -> LatentVariable:
    """A linear VAE in float64 whose posterior is the true one: the columns of W are orthogonal."""
    model = linear()
    with torch.no_grad():
        model.decoder.mean.weight.copy_(torch.linalg.qr(model.decoder.mean.weight)[0] * torch.tensor([2.0, 0.7]))
        _, covariance = true_posterior(model, rows()[:1])
        assert float(covariance[0, 1].abs()) < 1e-12
        at_zero, _ = true_posterior(model, torch.zeros(1, 5))
        slope = torch.stack([true_posterior(model, unit[None])[0][0] - at_zero[0] for unit in torch.eye(5)], 1)
        model.encoder.mean.weight.copy_(slope)
        model.encoder.mean.bias.copy_(at_zero[0])
        model.encoder.log_variance.copy_(covariance.diagonal().log())
    return model


def many(x: Tensor, repeats: int, start: int = 0) -> Batch:
    """Every example `repeats` times, with keys of its own."""
    key = torch.arange(start, start + len(x) * repeats)
    return Batch(x.double().repeat(repeats, 1), key, key)


def gradients(model: LatentVariable, objective: Objective, batch: Batch) -> dict[str, Tensor]:
    total = objective.loss(model, batch).total
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total, parameters), strict=True))


def test_iwae_loss_is_the_log_of_the_mean_weight() -> None:
    model, k = linear(), 7
    batch = many(rows()[:4], 1)
    with torch.no_grad():
        mean, log_variance = model.posterior(batch.x)
        z = mean[:, None] + (0.5 * log_variance).exp()[:, None] * batch.normal("posterior", (k, LATENT))
        normal = torch.distributions.Normal
        prior = normal(0.0, 1.0).log_prob(z).sum(2)
        q = normal(mean[:, None], (0.5 * log_variance).exp()[:, None]).log_prob(z).sum(2)
        decoded = model.decoder(z.flatten(0, 1))
        given = normal(decoded[:, :5], (0.5 * decoded[:, 5:]).exp())
        joint = given.log_prob(batch.x.repeat_interleave(k, 0)).sum(1).reshape(4, k)
        expected = (prior + joint - q).exp().mean(1).log().sum()  # the weights are of the size of exp(-10)
        loss = ImportanceWeighted(k, "reparametrised").loss(model, batch)
    assert float(loss.total) == pytest.approx(-float(expected), rel=1e-10)  # float64
    assert float(loss.metrics["elbo"]) == pytest.approx(float((prior + joint - q).mean(1).sum()), rel=1e-10)


@pytest.mark.parametrize("gradient", ["reparametrised", "doubly_reparametrised"])
def test_iwae_gradient_with_one_draw_is_the_vae_s(gradient: Gradient) -> None:
    """Exactly so in the mean over the draws: for a linear model all are quadratic in them, or linear."""
    model = linear()
    batch = Signs.of(rows()[:8].double())
    one, vae = (gradients(model, objective, batch) for objective in (ImportanceWeighted(1, gradient), Elbo()))
    for name, found in one.items():
        assert torch.allclose(found, vae[name], rtol=1e-9, atol=1e-9), name  # float64


def test_iwae_gradient_with_several_draws_is_another() -> None:
    model, batch = linear(), many(rows()[:8], 50)
    one, five = (gradients(model, ImportanceWeighted(k, "reparametrised"), batch) for k in (1, 5))
    assert float((one["encoder.log_variance"] - five["encoder.log_variance"]).abs().max()) > 10.0  # of 400 examples


@pytest.mark.parametrize("gradient", ["reparametrised", "doubly_reparametrised"])
def test_iwae_loss_at_the_true_posterior_is_log_p_for_every_draw(gradient: Gradient) -> None:
    model, x = exact(), rows()[:8]
    for k in (1, 5):
        found = ImportanceWeighted(k, gradient).loss(model, many(x, 1)).total.detach()
        assert float(found) == pytest.approx(-float(marginal(model, x).sum()), rel=1e-9)  # float64


def test_iwae_doubly_reparametrised_gradient_of_the_encoder_vanishes_at_the_true_posterior() -> None:
    model, batch = exact(), many(rows()[:8], 1)
    doubly, plain = (
        gradients(model, ImportanceWeighted(5, name), batch) for name in ("doubly_reparametrised", "reparametrised")
    )
    for name in (name for name in doubly if name.startswith("encoder")):
        assert float(doubly[name].abs().max()) < 1e-9, name  # float64
        assert float(plain[name].abs().max()) > 0.1, name  # the score of q at the draws: noise alone


def test_iwae_estimators_have_one_mean_and_the_second_less_noise() -> None:
    model, x, repeats, batches, k = linear(), rows()[:1], 100, 100, 20
    draws = {
        name: torch.stack(
            [
                torch.cat([found[f"encoder.{part}"].flatten() for part in ("mean.bias", "log_variance")])
                for i in range(batches)
                for found in [gradients(model, ImportanceWeighted(k, name), many(x, repeats, i * repeats))]
            ]
        )
        / repeats
        for name in ("reparametrised", "doubly_reparametrised")
    }
    one, two = draws.values()
    error = ((one.var(0) + two.var(0)) / batches).sqrt()  # not paired: an overestimate for the same draws
    assert float(((one.mean(0) - two.mean(0)).abs() / error).max()) < 4  # four standard errors
    assert float(two.mean(0).abs().max()) > 5 * float(error.max())  # there is a mean to agree on
    assert float((two.var(0) / one.var(0)).max()) < 0.7


def test_iwae_estimators_give_the_decoder_the_same_gradient() -> None:
    model, batch = linear(), many(rows()[:8], 1)
    one, two = (
        gradients(model, ImportanceWeighted(5, name), batch) for name in ("reparametrised", "doubly_reparametrised")
    )
    for name in (name for name in one if name.startswith("decoder")):
        assert torch.allclose(one[name], two[name], rtol=1e-10), name  # float64


def test_log_ratio_is_that_of_the_densities() -> None:
    q = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    z = torch.randn(3, 4, 2, dtype=torch.float64)
    normal = torch.distributions.Normal
    under_q = normal(q[0][:, None], (0.5 * q[1]).exp()[:, None]).log_prob(z).sum(2)
    assert torch.allclose(log_ratio(z, q), normal(0.0, 1.0).log_prob(z).sum(2) - under_q, rtol=1e-10)  # float64


def test_iwae_s_first_draw_is_the_vae_s() -> None:
    """One loss, one name of the draw: with K = 1 the two methods see the same z."""
    batch = many(rows()[:3], 1)
    assert torch.equal(batch.normal("posterior", (1, LATENT))[:, 0], batch.normal("posterior", (LATENT,)))


def test_iwae_loss_of_a_decoder_of_zeros_is_the_uniform_code() -> None:
    """A decoder of zeros is a fair coin for every value, whatever z is: the bound is exact for every K."""
    data = DataSpec("image", (1, 3, 3), 2)
    method = build("vae/iwae", data, network={"name": "mlp", "width": 4, "depth": 1}, latent_dim=2, importance=6)
    with torch.no_grad():
        for p in method.model.parameters():
            p.zero_()
    batch = encoded(method.model, torch.randint(2, (5, 1, 3, 3)).to(torch.uint8))
    total = method.objective.loss(method.model, batch).total.detach()
    assert float(total) == pytest.approx(5 * 9 * math.log(2), rel=1e-6)  # float32
