"""Laws of likelihoods: what a model calls a probability sums to one, its samples have it, and bounds stay below it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dgm_models.method import Method, encoded
from tests.laws import cases
from tests.laws.cases import Case, with_capability

ENUMERABLE = {
    "vector:discrete": (8,), "image:discrete": (1, 2, 2), "tokens:discrete": (3,), "codes:discrete": (2, 2),
    "audio:discrete": (1, 2),
}  # fmt: skip


def sharp(case: Case, factor: float = 2.0) -> Method:
    """The method on a space that can be enumerated (at most 2^10 states), its weights enlarged: far from uniform."""
    spec = replace(case.spec, shape=ENUMERABLE[case.sort]) if case.sort in ENUMERABLE else case.spec
    method = cases.made(case, spec)
    with torch.no_grad():
        for p in method.model.parameters():
            p.mul_(factor)
    method.model.eval()
    return method


def space(method: Method) -> Tensor:
    x = cases.every_state(method.data)
    assert len(x) <= 2**10
    return encoded(method.model, x).x


# an estimate is no density: a learned log Z is wrong before it is learned
DENSITIES = [case for case in with_capability("density", sorts=":discrete") if not cases.made(case).model.estimated]
# a flow has a density of dequantised levels, which does not sum to one over the levels themselves
PROBABILITIES = [case for case in DENSITIES if case.row.family != "flows"]
BOUNDS = with_capability("bound")
# more draws tighten these; diffusion models have a bound of dequantised levels, of which more draws give the mean
TIGHTENED = [case for case in BOUNDS if case.row.family != "diffusion"]
REAL_DENSITIES = [case for case in with_capability("density", sorts=":real") if not cases.made(case).model.estimated]


@pytest.mark.parametrize("case", PROBABILITIES, ids=str)
def test_density_sums_to_one(case: Case) -> None:
    method = sharp(case, 4.0)
    log_p = method.model.log_prob(space(method)).detach().double()
    # float32 log-probabilities of about -7 are right to 5e-7; their errors are independent and average out
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(log_p.std()) > 0.5  # far from uniform: a leak between the conditionals would show


@pytest.mark.parametrize("case", PROBABILITIES, ids=str)
def test_density_is_that_of_the_samples(case: Case) -> None:
    method = sharp(case)
    x, n = space(method), 4096
    p = method.model.log_prob(x).detach().double().exp()
    drawn = method.model.sample(n, torch.Generator().manual_seed(0)).flatten(1)
    place = torch.tensor([method.data.levels**i for i in reversed(range(method.data.dims))])  # type: ignore[operator]
    counts = torch.bincount((drawn * place).sum(1), minlength=len(x)).double()
    common = p * n >= 5  # Pearson's rule for the approximation by a chi-squared law; the rest is one cell
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([p[common] * n, (p[~common].sum() * n)[None]])
    free = len(observed) - 1
    statistic = float(((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum())
    assert free >= 20
    assert statistic < free + 5 * math.sqrt(2 * free)  # five standard deviations of chi-squared


@pytest.mark.parametrize("case", DENSITIES, ids=str)
def test_density_keeps_the_order_of_its_batch(case: Case) -> None:
    method = sharp(case)
    x = space(method)[:32]
    whole = method.model.log_prob(x).detach()
    parts = torch.cat([method.model.log_prob(part).detach() for part in x.split(5)])
    assert (
        float((whole - parts).abs().max()) < 1e-4
    )  # other block sizes of the same float32 products, of numbers near 30


def bounds(method: Method, x: Tensor, k: int, repeats: int) -> Tensor:
    """[repeats, B] nats, each row from draws of its own."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return torch.stack([method.model.elbo(x, rng, k=k).double() for _ in range(repeats)])


@pytest.mark.parametrize("case", REAL_DENSITIES, ids=str)
def test_density_of_real_data_is_that_of_the_samples(case: Case) -> None:
    """E_p[q(x) / p(x)] = 1 over the model's own samples, for every density q with lighter tails."""
    method, n = sharp(case, 1.0), 20_000
    drawn = method.model.sample(n, torch.Generator().manual_seed(0))
    flat, log_p = drawn.flatten(1).double(), method.model.log_prob(drawn).detach().double()
    mean, spread = flat.mean(0), torch.cov(flat.T)
    for shift in (0.0, 0.5, -0.5):  # half the samples' covariance, so that the ratio's variance is finite
        centre = mean + shift * flat.std(0)
        q = torch.distributions.MultivariateNormal(centre, 0.25 * spread)
        ratio = (q.log_prob(flat) - log_p).exp()
        error = float(ratio.std()) / math.sqrt(n)
        assert error < 0.05
        assert float(ratio.mean()) == pytest.approx(1.0, abs=5 * error)  # five standard errors


@pytest.mark.parametrize("case", BOUNDS, ids=str)
def test_bound_says_whether_more_draws_tighten_it(case: Case) -> None:
    assert cases.made(case).model.tightens == (case in TIGHTENED)


@pytest.mark.parametrize("case", TIGHTENED, ids=str)
def test_bound_rises_with_the_number_of_draws(case: Case) -> None:
    method = sharp(case, 1.0)  # enlarged weights give single draws of infinite variance
    x = encoded(method.model, cases.rows(method.data, 16)).x
    draws = [bounds(method, x, k, repeats).mean(1) for k, repeats in ((1, 256), (5, 128), (50, 64))]
    means = [float(value.mean()) for value in draws]
    errors = [float(value.std()) / math.sqrt(len(value)) for value in draws]
    for i in range(2):  # beyond chance: three standard errors
        assert means[i + 1] - means[i] > 3 * math.hypot(errors[i], errors[i + 1])


@pytest.mark.parametrize("case", [case for case in TIGHTENED if case.sort in ENUMERABLE], ids=str)
def test_bound_is_of_a_distribution_that_sums_to_one(case: Case) -> None:
    """For every k exp(bound) is an unbiased estimate of p(x), and by Jensen's inequality exp(E[bound]) is below it."""
    method = sharp(case, 1.0)
    x = space(method)
    for k, repeats in ((1, 64), (50, 8)):
        found = bounds(method, x, k, repeats)
        sums = found.exp().sum(1)  # [repeats]
        error = float(sums.std()) / math.sqrt(repeats)
        assert error < 0.02
        assert float(sums.mean()) == pytest.approx(1.0, abs=4 * error)  # four standard errors
        assert float(found.mean(0).exp().sum()) < 1.0
    # at k = 50 the mean bound is tight: without - log k the sum would be 50
    assert float(found.mean(0).exp().sum()) > 0.9


@pytest.mark.parametrize("case", BOUNDS, ids=str)
def test_bound_follows_its_generator(case: Case) -> None:
    method = sharp(case)
    x = encoded(method.model, cases.rows(method.data, 4)).x
    one, two, other = (method.model.elbo(x, torch.Generator().manual_seed(seed), k=2) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("case", with_capability("latents"), ids=str)
def test_latents_decode_to_model_space(case: Case) -> None:
    method = sharp(case)
    x = encoded(method.model, cases.rows(method.data, 5)).x
    z = method.model.encode(x)
    assert z.shape[0] == 5 and z.ndim == 2
    y = method.model.decode(z)
    assert y.shape == x.shape and not y.requires_grad
    stored = method.model.codec.decode(y)
    assert stored.dtype == cases.rows(method.data, 1).dtype


@pytest.mark.parametrize("case", with_capability("features"), ids=str)
def test_features_come_with_probabilities(case: Case) -> None:
    method = sharp(case)
    found, probabilities = method.model.features(encoded(method.model, cases.rows(method.data, 5)).x)
    assert found.ndim == 2 and len(found) == 5
    assert probabilities.shape == (5, method.data.classes)
    assert torch.allclose(probabilities.sum(1), torch.ones(5), atol=1e-6)  # a float32 softmax of 3 terms
