"""Products of experts: of two Gaussians, the Gaussian whose precision is the sum."""

from __future__ import annotations

import math

import pytest
import torch

from dgm_models.codecs import continuous
from dgm_models.method import build
from dgm_models.nn.energy import EnergyBased
from dgm_models.nn.networks import Mlp
from dgm_models.nn.product import Product, product
from dgm_models.ops.mcmc import Langevin, Mala, Metropolis
from dgm_models.protocols import DataSpec, capabilities
from tests.support.energies import COVARIANCE, MEAN, Quadratic

OTHER_MEAN = torch.tensor([-1.0, 1.0], dtype=torch.float64)
OTHER = torch.tensor([[0.5, -0.3], [-0.3, 1.5]], dtype=torch.float64)
CHAIN = Mala(steps=100, step=0.3)


def pair() -> Product:
    return product(Quadratic.of(MEAN, COVARIANCE, CHAIN, 1.0), Quadratic.of(OTHER_MEAN, OTHER, CHAIN, 2.0))


def test_product_of_two_gaussians_is_sampled() -> None:
    one, two = torch.linalg.inv(COVARIANCE), torch.linalg.inv(OTHER)
    covariance = torch.linalg.inv(one + two)
    mean = covariance @ (one @ MEAN + two @ OTHER_MEAN)
    x = pair().sample(4000, torch.Generator().manual_seed(0))
    error = (covariance.diagonal() / 4000).sqrt()
    assert bool(((x.mean(0) - mean).abs() < 5 * error).all())  # five standard errors, and so below
    spread = torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance.square()
    assert bool(((torch.cov(x.T) - covariance).abs() < 5 * (spread / 4000).sqrt()).all())


def test_log_z_of_a_product_is_the_overlap_of_its_experts() -> None:
    """log int exp(-E1 - E2) = log N(m1; m2, C1 + C2) + log Z1 + log Z2."""
    model = pair()
    overlap = torch.distributions.MultivariateNormal(OTHER_MEAN, COVARIANCE + OTHER).log_prob(MEAN)
    each = [math.log(2 * math.pi) + 0.5 * float(torch.linalg.slogdet(c)[1]) for c in (COVARIANCE, OTHER)]
    found = model.bracket_log_z(100, 100, torch.Generator().manual_seed(0))
    errors = [float(side.std()) / math.sqrt(len(side)) for side in found]
    expected = float(overlap) + sum(each)
    assert float(found.lower.mean()) < expected + 3 * errors[0]  # three standard errors
    assert float(found.upper.mean()) > expected - 3 * errors[1]
    assert float(found.upper.mean() - found.lower.mean()) < 0.3


def test_product_adds_the_energies_and_begins_at_the_product_of_the_gaussians() -> None:
    model = pair()
    x = torch.randn(5, 2, dtype=torch.float64)
    first, second = model.experts
    assert torch.equal(model.energy(x), first.energy(x) + second.energy(x))
    assert model.spread == pytest.approx((1 + 1 / 4) ** -0.5)
    assert {"samples", "energy"} <= set(capabilities(model)) and not model.training
    assert product(first, second, sampler=Metropolis()).sampling == Metropolis()


def test_product_of_products_is_a_product() -> None:
    one, two = Quadratic.of(MEAN, COVARIANCE, CHAIN), Quadratic.of(OTHER_MEAN, OTHER, CHAIN)
    x = torch.randn(5, 2, dtype=torch.float64)
    nested, flat = product(product(one, two), one), Product([one, two, one], CHAIN)
    assert torch.allclose(nested.energy(x), flat.energy(x)) and nested.spread == pytest.approx(flat.spread)


def test_trained_methods_of_one_dataset_make_a_product() -> None:
    data, network = DataSpec("vector", (2,)), {"name": "mlp", "width": 4}
    parts = [
        build(name, data, network=network, chain={"name": "langevin", "steps": 5}).model
        for name in ("energy/contrastive_divergence", "energy/persistent_cd")
    ]
    assert product(*parts).sample(7, torch.Generator().manual_seed(0)).shape == (7, 2)


def test_product_of_other_data_is_refused() -> None:
    one, two = (EnergyBased(DataSpec("vector", (n,)), Mlp(4, 1), Langevin(), 1.0) for n in (2, 3))
    with pytest.raises(ValueError, match="give them one dataset"):
        product(one, two)
    with pytest.raises(ValueError, match="product: 1 experts"):
        product(one)
    moved = EnergyBased(DataSpec("vector", (2,), scale=2.0), Mlp(4, 1), Langevin(), 1.0)
    assert continuous(moved.data) != one.codec  # another model space
    with pytest.raises(ValueError, match="give them one dataset"):
        product(one, moved)
