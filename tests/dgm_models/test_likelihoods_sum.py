"""Every likelihood of whole levels is a probability: it sums to one, and its samples and mode have it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.codecs import centred
from dgm_models.ops.divergences import kl_to_standard_normal
from dgm_models.ops.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Logistic, likelihood
from dgm_models.protocols import DataSpec

WHOLE = [
    (Bernoulli(), 2),
    *((Categorical(n), n) for n in (2, 17, 256)),
    *((Logistic(n), n) for n in (2, 17, 256, 1000)),
]


def params(part: Likelihood, spread: float, n: int = 8) -> Tensor:
    """[n, num_params, 1]: the params of n single values."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, part.num_params, 1, generator=rng) * spread


def table(part: Likelihood, levels: int, p: Tensor) -> Tensor:
    """[n, levels] log-probabilities, float64."""
    each = p.repeat_interleave(levels, 0)
    x = torch.arange(levels).repeat(len(p))[:, None]
    return part.log_prob(each, x).reshape(len(p), levels).double()


def name(value: object) -> str:
    return type(value).__name__ if not isinstance(value, int) else str(value)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(("part", "levels"), WHOLE, ids=name)
def test_likelihood_sums_to_one_over_the_levels(part: Likelihood, levels: int, spread: float) -> None:
    log_p = table(part, levels, params(part, spread))
    assert bool(log_p.isfinite().all())
    # float32: the logistic's arguments are differences of numbers up to `levels` over the scale, right to 1e-7 of these
    assert float((log_p.exp().sum(1) - 1).abs().max()) < 2e-5


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_logistic_is_finite_at_the_ends_of_its_clamps(levels: int) -> None:
    p = torch.tensor([[-30.0, -30.0], [30.0, -30.0], [-30.0, 30.0], [0.0, 30.0]])[:, :, None].requires_grad_(True)
    log_p = Logistic(levels).log_prob(p.repeat_interleave(levels, 0), torch.arange(levels).repeat(4)[:, None])
    assert bool(log_p.isfinite().all())
    log_p.sum().backward()
    assert bool(p.grad.isfinite().all())


@pytest.mark.parametrize(("part", "levels"), [*WHOLE[:3], WHOLE[5]], ids=name)
def test_likelihood_samples_have_its_probabilities(part: Likelihood, levels: int) -> None:
    p, n = params(part, 1.0, n=1), 20_000
    drawn = part.sample(p.expand(n, -1, -1), torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64 and drawn.shape == (n, 1)
    shares = torch.bincount(drawn[:, 0], minlength=levels).double() / n
    expected = table(part, levels, p)[0].exp()
    assert (
        float(((shares - expected).abs() / (expected * (1 - expected) / n + 1e-6).sqrt()).max()) < 5
    )  # five standard errors


@pytest.mark.parametrize(("part", "levels"), WHOLE, ids=name)
def test_likelihood_mode_is_near_the_most_probable_level(part: Likelihood, levels: int) -> None:
    p = params(part, 0.5)
    log_p = table(part, levels, p)
    mode = part.mode(p)[:, 0]
    if isinstance(part, Logistic):  # the rounded location; the edge cells hold the tails and may hold more
        inner = log_p[:, 1:-1].argmax(1) + 1 if levels > 2 else log_p.argmax(1)
        inside = (mode > 0) & (mode < levels - 1)
        assert bool(((mode - inner).abs()[inside] <= 1).all())  # half a cell of float32 rounding either way
    else:
        assert torch.equal(mode, log_p.argmax(1))


def test_gaussian_is_the_normal_density() -> None:
    p = torch.randn(5, 2, 3, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.distributions.Normal(p[:, 0], (0.5 * p[:, 1]).exp()).log_prob(x).sum(1)
    assert torch.allclose(Gaussian().log_prob(p, x), expected, rtol=1e-12)  # float64


def test_gaussian_samples_have_its_moments() -> None:
    p = torch.tensor([[[1.5]], [[math.log(4.0)]]]).reshape(1, 2, 1).expand(20_000, -1, -1)
    x = Gaussian().sample(p, torch.Generator().manual_seed(0))
    assert float(x.mean()) == pytest.approx(1.5, abs=5 * 2 / math.sqrt(20_000))  # five standard errors
    assert float(x.std()) == pytest.approx(2.0, abs=5 * 2 / math.sqrt(2 * 20_000))


def test_kl_to_standard_normal_is_the_divergence() -> None:
    mean, log_variance = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(q, p).sum(1)
    assert torch.allclose(kl_to_standard_normal(mean, log_variance), expected, rtol=1e-12)  # float64


@pytest.mark.parametrize(
    ("levels", "kind"),
    [(2, Bernoulli), (3, Categorical), (32, Categorical), (33, Logistic), (256, Logistic), (None, Gaussian)],
)
def test_likelihood_auto_follows_the_levels(levels: int | None, kind: type) -> None:
    assert isinstance(likelihood("auto", DataSpec("vector", (2,), levels)), kind)


@pytest.mark.parametrize(
    ("named", "levels"), [("gaussian", 2), ("bernoulli", 3), ("categorical", None), ("logistic", None)]
)
def test_likelihood_refuses_data_that_it_cannot_describe(named: str, levels: int | None) -> None:
    with pytest.raises(ValueError, match="likelihood: "):
        likelihood(named, DataSpec("vector", (2,), levels))  # type: ignore[arg-type]


def test_centred_maps_the_levels_onto_minus_one_to_one() -> None:
    x = torch.arange(5)
    assert centred(x, DataSpec("vector", (5,), 5)).tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    real = torch.randn(3)
    assert centred(real, DataSpec("vector", (3,))) is real
