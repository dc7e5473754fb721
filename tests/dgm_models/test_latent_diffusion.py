"""Latent diffusion: latents are codes, a prior of any family stands on them, and the whole is a model of the data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dgm_models.codecs import Standardized
from dgm_models.construct import ConfigError
from dgm_models.method import Method, build, compose, encoded, fingerprint, fit, load, save
from dgm_models.nn.composite import BoundedComposite, Composite
from dgm_models.nn.latent import LatentVariable
from dgm_models.protocols import Codes, DataSpec, capabilities
from dgm_models.sampling import sample
from tests.dgm_models.test_contract_composite import DATA, digits, distance

GRID = {"name": "grid", "width": 16, "blocks": 1, "halvings": 2}


def latents(decoder: Method, x: Tensor) -> tuple[Tensor, DataSpec]:
    """Latents drawn from their posteriors, and what they are as data: of mean 0 and variance 1 in a prior's space."""
    batch = encoded(decoder.model, x)
    assert isinstance(decoder.model, Codes)
    z, spec = decoder.model.codes(batch.x, batch.key), decoder.model.code_spec
    return z, DataSpec("codes", spec.shape, None, location=float(z.mean()), scale=float(z.std()))


@pytest.fixture(scope="module")
def decoder() -> Method:
    method = build("vae/beta_vae", DATA, network=GRID, latent_dim=16, beta=0.1)
    return fit(method, digits(), steps=120, batch_size=64, optim={"lr": 5e-3})


@pytest.fixture(scope="module")
def prior(decoder: Method) -> Method:
    z, data = latents(decoder, digits())
    network = {"name": "mlp", "width": 64, "depth": 2}
    method = build("diffusion/latent_diffusion", data, network=network, sampler={"name": "ddim", "steps": 20})
    return fit(method, z, steps=400, batch_size=100, average=0.98, optim={"lr": 3e-3})


def bound(method: Method, x: Tensor, k: int = 8) -> float:
    with torch.no_grad():
        return float(method.model.elbo(encoded(method.model, x).x, torch.Generator().manual_seed(0), k=k).mean())


def test_latents_are_a_quarter_of_the_data_and_keep_its_places(decoder: Method) -> None:
    z, data = latents(decoder, digits(40))
    assert data.shape == (4, 2, 2) and 4 * data.dims == DATA.dims
    y = Standardized(data).encode(z, torch.arange(len(z)))[0]
    assert float(y.mean()) == pytest.approx(0, abs=1e-5) and float(y.std()) == pytest.approx(1, abs=1e-5)
    model, corner = decoder.model, digits(1).clone()
    corner[0, 0, 7, 7] ^= 1  # three convolutions see 10 of 8 pixels from the last place, and 5 from the first
    apart = (model.codes(encoded(model, corner).x) - model.codes(encoded(model, digits(1)).x)).abs().sum((0, 1))
    assert float(apart[1, 1]) > float(apart[0, 0])


def test_codes_are_drawn_by_keys_or_are_the_means(decoder: Method) -> None:
    batch, model = encoded(decoder.model, digits(30)), decoder.model
    assert torch.equal(model.codes(batch.x).flatten(1), model.encode(batch.x))
    drawn = model.codes(batch.x, batch.key)
    assert torch.equal(drawn[10:], model.codes(batch.x[10:], batch.key[10:]))
    with torch.no_grad():
        mean, log_variance = model.posterior(batch.x)
    eps = (drawn.flatten(1) - mean) / (0.5 * log_variance).exp()
    assert float(eps.mean()) == pytest.approx(0, abs=0.25) and float(eps.std()) == pytest.approx(1, abs=0.15)


def test_codes_have_the_density_that_they_are_drawn_from(decoder: Method) -> None:
    x = encoded(decoder.model, digits(5)).x
    z, log_q = decoder.model.draw_codes(x, torch.Generator().manual_seed(0))
    mean, log_variance = decoder.model.posterior(x)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    assert torch.allclose(log_q, normal.log_prob(z.flatten(1)).sum(1), atol=1e-4)  # float32 sums of 16 terms


def test_latent_diffusion_draws_digits_where_the_decoder_s_own_prior_does_not(decoder: Method, prior: Method) -> None:
    whole = compose(prior, decoder)
    assert capabilities(whole.model) == ("samples", "bound") and whole.data == DATA
    learned, own = (distance(sample(method, 200)) for method in (whole, decoder))
    assert whole.model.evaluations == 21  # 20 of the prior and the decoder
    assert learned < 0.8 * own  # 200 pictures spread by about 3: a standard error of 0.2 of about 10


def test_bound_counts_prior_scale_and_posterior(decoder: Method) -> None:
    """log p(x|z) + log N(z; 0, I) - log q(z|x), though the prior models (z - 0.5) / 2."""
    spec = decoder.model.code_spec
    data = DataSpec("codes", spec.shape, None, location=0.5, scale=2.0)

    class Normal(LatentVariable):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.data, self.codec, self.condition = data, Standardized(data), None

        def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
            z = (2.0 * x + 0.5).flatten(1)  # standard normal in the latents' own units
            return (-0.5 * z.square() - 0.5 * math.log(2 * math.pi) + math.log(2.0)).sum(1)

    whole, model = BoundedComposite(Normal(), decoder.model), decoder.model
    x = encoded(model, digits(20)).x
    with torch.no_grad():
        found = whole.elbo(x, torch.Generator().manual_seed(0))
        z, log_q = model.draw_codes(x, torch.Generator().manual_seed(0))  # the same draw
        log_p = -0.5 * (z.flatten(1).square() + math.log(2 * math.pi)).sum(1)
        expected = model.log_likelihood(x, z) + log_p - log_q
        reconstruction = model.likelihood.log_prob(model.outputs(z.flatten(1)), x)
    assert torch.allclose(model.log_likelihood(x, z), reconstruction)
    assert torch.allclose(found, expected, atol=1e-3)  # float32 sums of numbers near 30


def test_prior_s_bound_is_averaged_and_a_density_is_not(decoder: Method, prior: Method) -> None:
    x = digits(60)
    whole = compose(prior, decoder)
    assert not whole.model.tightens
    with torch.no_grad():
        y, rng = encoded(whole.model, x).x, torch.Generator().manual_seed(0)
        one, many = whole.model.elbo(y.repeat(16, 1, 1, 1), rng), whole.model.elbo(y, rng, k=16)
    error = float(one.std()) / len(one) ** 0.5
    assert abs(float(one.mean() - many.mean())) < 4 * 2**0.5 * error  # four standard errors of a difference
    z, data = latents(decoder, digits())
    ppca = fit(build("vae/ppca", data, factors=6), z, steps=1, batch_size=600, optim={"name": "sgd", "lr": 1.0})
    gaussian = compose(ppca, decoder)
    assert gaussian.model.tightens and bound(gaussian, x, 16) > bound(gaussian, x, 1)


def test_composite_of_a_prior_without_a_density_only_samples(decoder: Method) -> None:
    _, data = latents(decoder, digits(20))
    z = build("gan/minimax", DataSpec("vector", (16,)), network={"name": "mlp", "width": 8}, latent_dim=2)
    z.model.data = data
    z.model.codec = Standardized(data)
    reshaped = z.model.sample
    z.model.sample = lambda *given: reshaped(*given).reshape(-1, *data.shape)  # type: ignore[method-assign]
    whole = compose(z, decoder)
    assert type(whole.model) is Composite and capabilities(whole.model) == ("samples",)
    assert sample(whole, 3).shape == (3, *DATA.shape)


def test_latent_diffusion_s_artifact_holds_scale_and_decoder(decoder: Method, prior: Method, tmp_path) -> None:
    whole = compose(prior, decoder)
    again = load(save(whole, tmp_path / "whole"))
    assert torch.equal(sample(again, 9, seed=2), sample(whole, 9, seed=2))
    assert again.model.prior.data == prior.data and again.model.prior.data.scale != 1
    assert again.decoder is not None and fingerprint(again.decoder) == fingerprint(decoder)


def test_latent_diffusion_models_real_codes_alone() -> None:
    with pytest.raises(ConfigError, match="models codes:real; this data is image:discrete"):
        build("diffusion/latent_diffusion", DATA)


def test_grid_refuses_what_is_no_grid() -> None:
    with pytest.raises(ValueError, match="15 numbers are no grid of 2 x 2; use 4 or a multiple"):
        build("vae/vae", DATA, network=GRID, latent_dim=15)
    with pytest.raises(ValueError, match="grid takes images"):
        build("vae/vae", DataSpec("vector", (4,)), network=GRID, latent_dim=4)
