"""Conditional VAEs: what is asked for is what comes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgm_models.method import Method, build, encoded, fit
from dgm_models.protocols import DataSpec
from dgm_models.sampling import sample

DATA = DataSpec("vector", (2,), classes=3)
CENTRES = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
METHODS = ("vae/vae", "vae/beta_vae", "vae/iwae", "vae/non_amortised")
SMALL = {"network": {"name": "mlp", "width": 32, "depth": 1, "activation": "silu"}, "latent_dim": 2}


def data(n: int) -> tuple[Tensor, Tensor]:
    """Three clouds of standard deviation 0.3; the label is the cloud."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n,), generator=rng)
    return CENTRES[labels] + 0.3 * torch.randn(n, 2, generator=rng), labels


def trained(name: str) -> Method:
    own = {"inner_steps": 5} if name == "vae/non_amortised" else {"beta": 1.0} if name == "vae/beta_vae" else {}
    method = build(name, DATA, cond={"name": "label"}, **SMALL, **own)
    x, labels = data(1024)
    return fit(method, x, cond=labels, steps=150, batch_size=128, optim={"lr": 0.01}, report_every=150)


@pytest.mark.parametrize("name", METHODS)
def test_conditional_samples_are_of_the_class_that_was_asked_for(name: str) -> None:
    method = trained(name)
    labels = torch.arange(3).repeat_interleave(100)
    x = sample(method, 300, cond=labels)
    nearest = torch.cdist(x, CENTRES).argmin(1)
    assert float((nearest == labels).float().mean()) > 0.97  # six standard deviations lie between two centres
    for label in range(3):
        assert torch.allclose(x[labels == label].mean(0), CENTRES[label], atol=0.3)
    # the bound of the true class is far above that of another
    x, labels = data(200)
    model, rng = method.model, torch.Generator().manual_seed(0)
    with torch.no_grad():
        own, other = (
            model.elbo(encoded(model, x, labels=labels).x, rng, cond, 5) for cond in (labels, (labels + 1) % 3)
        )
    assert float(own.mean()) > float(other.mean()) + 2.0
    assert float(own.mean()) > -1.5  # the entropy of a cloud is 2 log 0.3 + 1 + log 2 pi = 0.43 nats


@pytest.mark.parametrize("name", METHODS)
def test_conditional_codes_and_reconstructions_read_the_condition(name: str) -> None:
    method = build(name, DATA, cond={"name": "label"}, **SMALL)
    model, (x, labels) = method.model, data(8)
    y = encoded(model, x, labels=labels).x
    z = torch.zeros(8, 2)
    assert not torch.equal(model.encode(y, labels), model.encode(y, (labels + 1) % 3))
    assert not torch.equal(model.decode(z, labels), model.decode(z, (labels + 1) % 3))


@pytest.mark.parametrize("call", ["elbo", "prior_estimate", "sample", "encode", "decode"])
def test_conditional_model_refuses_to_guess_what_is_asked_for(call: str) -> None:
    rng, x = torch.Generator(), torch.zeros(4, 2)
    arguments = {"elbo": (x, rng), "prior_estimate": (x, rng, 2), "sample": (4, rng), "encode": (x,), "decode": (x,)}
    conditional, plain = (build("vae/vae", DATA, **SMALL, cond=cond).model for cond in ({"name": "label"}, None))
    with pytest.raises(ValueError, match="cond: missing"):
        getattr(conditional, call)(*arguments[call])
    with pytest.raises(ValueError, match="cond: this model was built without a condition"):
        getattr(plain, call)(*arguments[call], cond=torch.zeros(4, dtype=torch.int64))


def test_unconditional_model_passes_over_the_labels_of_its_data() -> None:
    method = build("vae/vae", DATA, **SMALL)
    x, labels = data(64)
    fit(method, x, cond=labels, steps=2, batch_size=16)


def test_image_condition_reaches_encoder_and_decoder() -> None:
    images = DataSpec("image", (1, 8, 8), 2)
    method = build("vae/vae", images, network={"name": "conv", "channels": 4, "stages": 1}, cond={"name": "edges"})
    model = method.model
    x = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    x[:, :, 2:6, 2:6] = 1
    cond = model.conditions(x, None, torch.arange(2))
    assert cond is not None and cond.shape == (2, 1, 8, 8)
    y = encoded(model, x).x
    assert not torch.equal(model.encode(y, cond), model.encode(y, -cond))
    z = torch.zeros(2, model.latent_dim)
    assert not torch.equal(model.outputs(z, cond), model.outputs(z, -cond))
