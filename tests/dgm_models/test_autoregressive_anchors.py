"""Autoregressive models on spaces that can be counted: sums, 100,000 draws, a planted bug; mixtures of Gaussians."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_models import registry
from dgm_models.construct import ConfigError
from dgm_models.method import Method, build, fit
from dgm_models.nn.autoregression import Autoregressive
from dgm_models.ops.likelihoods import MixtureOfGaussians
from dgm_models.protocols import DataSpec
from tests.laws import cases

# 10 to 12 bits of every kind that may be discrete
BITS = {
    "vector": DataSpec("vector", (10,), 2), "image": DataSpec("image", (1, 3, 4), 2),
    "codes": DataSpec("codes", (2, 5), 2), "tokens": DataSpec("tokens", (11,), 2),
    "audio": DataSpec("audio", (1, 10), 2),
}  # fmt: skip
DISCRETE = [
    (row.name, sort.split(":")[0]) for row in registry.ROWS for sort in row.data
    if row.family == "autoregressive" and sort.endswith(":discrete")
]  # fmt: skip
ALPHA = 1e-6


def sharp(name: str, data: DataSpec, factor: float, **params: Any) -> Method:
    """The method with weights enlarged, so that its distribution is far from uniform."""
    method = build(name, data, **{**cases.small(name), **params})
    with torch.no_grad():
        for p in method.model.parameters():
            p.mul_(factor)
    method.model.eval()
    return method


@pytest.mark.parametrize(("name", "kind"), DISCRETE)
@torch.no_grad()
def test_probabilities_of_ten_to_twelve_bits_sum_to_one(name: str, kind: str) -> None:
    model = sharp(name, BITS[kind], 2.0).model
    log_p = model.log_prob(cases.every_state(model.data)).double()
    # float32 log-probabilities of about -8 are right to 5e-7; their errors are independent and average out
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(log_p.std()) > 0.2


@torch.no_grad()
def chance(model: Autoregressive, n: int = 100_000) -> float:
    """How probable it is that n draws from exp(log_prob), normalised, differ from it as these do (chi-squared)."""
    states = cases.every_state(model.data)
    p = model.log_prob(states).double().softmax(0)
    drawn = model.sample(n, torch.Generator().manual_seed(0)).flatten(1)
    levels = model.data.levels or 0
    place = torch.tensor([levels**i for i in reversed(range(model.data.dims))])
    counts = torch.bincount((drawn * place).sum(1), minlength=len(states)).double()
    common = p * n >= 5  # Pearson's rule for the approximation; the rest is one cell
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([p[common] * n, (p[~common].sum() * n)[None]]).clamp_min(1e-9)
    statistic, free = ((observed - expected) ** 2 / expected).sum(), len(observed) - 1
    return float(torch.special.gammaincc(torch.tensor(free / 2.0, dtype=torch.float64), statistic / 2))


COUNTED: list[tuple[str, dict[str, Any]]] = [
    ("made", {}), ("made", {"masks": 3, "random_order": False}), ("nade", {}), ("nade", {"order": "random"}),
    ("fvsbn", {}), ("histogram", {"form": "table"}), ("histogram", {"form": "markov"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params"), COUNTED, ids=str)
def test_draws_have_the_density(name: str, params: dict[str, Any]) -> None:
    assert chance(sharp(f"autoregressive/{name}", BITS["vector"], 2.0, **params).model) > ALPHA


def test_planted_mask_bug_is_caught_by_the_sum_and_by_the_draws() -> None:
    """`>=` for `>` in the output's mask: an output sees the value that it is to predict."""
    made = sharp("autoregressive/made", BITS["vector"], 2.0, masks=1).model
    states = cases.every_state(made.data)
    totals, chances = [], []
    for strict in (True, False):
        made.network.last.strict = strict
        made.network.keep_masks()
        totals.append(float(made.log_prob(states).detach().double().exp().sum()))
        chances.append(chance(made))
    assert totals[0] == pytest.approx(1.0, abs=1e-6) and chances[0] > ALPHA
    assert abs(totals[1] - 1) > 1e-3 and chances[1] < ALPHA


@pytest.mark.parametrize("name", ["made", "nade", "fvsbn"])
def test_conditional_probabilities_sum_to_one_for_every_label(name: str) -> None:
    data = replace(BITS["vector"], shape=(6,), classes=3)
    model = sharp(f"autoregressive/{name}", data, 2.0, cond={"name": "label"}).model
    states, found = cases.every_state(data), []
    for label in range(3):
        found.append(model.log_prob(states, torch.full((len(states),), label)).detach().double())
        assert float(found[-1].exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert float((found[0] - found[1]).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["made", "nade", "fvsbn"])
def test_condition_that_is_an_image_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cond: edges is an image, and this network reads labels"):
        build(f"autoregressive/{name}", DataSpec("image", (1, 4, 4), 2), cond={"name": "edges"})


# ---- mixtures of Gaussians


def params(n: int, components: int, spread: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return spread * torch.randn(n, 3 * components, 1, generator=rng, dtype=torch.float64)


def test_mixture_of_gaussians_is_the_density_of_the_mixture() -> None:
    p, x = params(6, 4), torch.randn(6, 1, dtype=torch.float64)
    logits, means, scales = p[..., 0].split(4, 1)
    expected = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits), torch.distributions.Normal(means, scales.exp())
    ).log_prob(x[:, 0])
    torch.testing.assert_close(MixtureOfGaussians(4).log_prob(p, x), expected, rtol=1e-12, atol=1e-12)


def test_mixture_of_gaussians_is_finite_far_away_and_at_the_ends_of_its_clamps() -> None:
    p = (50 * params(8, 3)).float().requires_grad_()
    log_p = MixtureOfGaussians(3).log_prob(p, torch.full((8, 1), 1000.0))
    log_p.sum().backward()
    assert bool(log_p.isfinite().all()) and bool(p.grad.isfinite().all())


def test_mixture_of_gaussians_samples_have_its_moments() -> None:
    n, part, p = 40_000, MixtureOfGaussians(3), params(1, 3)
    x = part.sample(p.expand(n, -1, -1), torch.Generator().manual_seed(0))[:, 0]
    logits, means, log_scales = p[0, :, 0].split(3)
    weights = logits.softmax(0)
    mean = float(weights @ means)
    variance = float(weights @ (means.square() + (2 * log_scales).exp())) - mean**2
    assert float(x.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / n))  # five standard errors
    spread = float((x - mean).square().std()) / math.sqrt(n)
    assert float(x.var()) == pytest.approx(variance, abs=5 * spread)


def test_real_density_in_two_dimensions_integrates_to_one() -> None:
    data = DataSpec("vector", (2,))
    model = build("autoregressive/mixture_of_gaussians", data, components=3, width=16, depth=1).model.double()
    side = torch.linspace(-12, 12, 401, dtype=torch.float64)
    with torch.no_grad():
        mass = float(model.log_prob(torch.cartesian_prod(side, side)).exp().sum() * (side[1] - side[0]) ** 2)
    # the trapezium rule; along x_1 the network's units are not smooth
    assert mass == pytest.approx(1.0, abs=1e-3)


def test_mixtures_learn_two_modes_that_one_gaussian_cannot() -> None:
    """x_2 = +-x_1 with noise: log p(x) of the truth is known up to the noise of a finite sample."""
    rng, data = torch.Generator().manual_seed(0), DataSpec("vector", (2,))
    first = torch.randn(2000, generator=rng) * 0.3 + 2.0
    sign = (torch.rand(2000, generator=rng) < 0.5).float() * 2 - 1
    x = torch.stack([first, sign * first + 0.2 * torch.randn(2000, generator=rng)], 1)
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.09) + 0.5 * math.log(2 * math.pi * math.e * 0.04) + math.log(2)
    found = {}
    for components in (1, 4):
        method = build("autoregressive/mixture_of_gaussians", data, components=components, width=32, depth=1)
        fit(method, x, steps=200, batch_size=250, optim={"lr": 0.03, "schedule": "cosine"}, report_every=200)
        with torch.no_grad():
            found[components] = -float(method.model.log_prob(x).mean())
    assert found[4] < entropy + 0.1 and found[1] > entropy + 0.5
