"""log p by the probability-flow ODE against the exact density of a mixture of Gaussians, and as an evaluation asks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.likelihood import ode_log_prob
from dgm_models.method import Method, build, resampled
from dgm_models.nn import probability_flow
from dgm_models.ops.paths import Cosine, Karras, Linear, Path, Straight, VarianceExploding, VariancePreserving
from dgm_models.protocols import DataSpec
from tests.laws import cases
from tests.laws.cases import Case
from tests.support.gaussians import TWO, Mixture

MLP = {"name": "mlp", "width": 16, "depth": 1}


def denoiser(mixture: Mixture, path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: mixture.guess(x, path.alpha(t), path.sigma(t))


def rows(n: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    which = torch.multinomial(TWO.weights, n, replacement=True, generator=rng)
    return TWO.means[which] + TWO.stds[which, None] * torch.randn(n, 2, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("path", [Straight(), Cosine(), VarianceExploding(0.01, 1e5)], ids=lambda path: path.name)
def test_density_by_the_flow_is_the_mixture_s(path: Path) -> None:
    """These end in noise that knows next to nothing of the data, so the prior is the true one."""
    x = rows(16)
    found = probability_flow.log_prob(denoiser(TWO, path), path, x, tolerance=1e-7).y
    first = torch.tensor(path.first, dtype=torch.float64)
    assert torch.allclose(found, TWO.log_prob(x, 1.0, path.sigma(first) / path.alpha(first)), atol=1e-4)
    # of the data themselves: their density is that of data with the smallest noise, up to a term of its square
    assert torch.allclose(found, TWO.log_prob(x), atol=1e-4 if isinstance(path, Straight) else 5e-3)


@pytest.mark.parametrize("path", [Linear(), VariancePreserving(), Karras()], ids=lambda path: path.name)
def test_density_by_the_flow_is_that_of_its_own_prior(path: Path) -> None:
    """Of normal data the flow is linear, so its density under the prior N(0, r_1^2), not the true one, is known."""
    s, x = 0.5, torch.linspace(-1, 1.5, 8, dtype=torch.float64)[:, None]
    one = Mixture(torch.zeros(1, 1).double(), torch.tensor([s]).double(), torch.ones(1).double())
    found = probability_flow.log_prob(denoiser(one, path), path, x, tolerance=1e-8).y
    start, stop = path.ratio(torch.tensor([path.first, 1.0], dtype=torch.float64)).tolist()
    growth = math.hypot((1 - stop) * s, stop) / math.hypot((1 - start) * s, start)  # w keeps its place in N(0, sd_r^2)
    deviation = stop / growth / (1 - start)  # of x, whose (1 - start) x becomes N(0, stop^2)
    expected = -0.5 * (x[:, 0] / deviation).square() - math.log(deviation * math.sqrt(2 * math.pi))
    assert torch.allclose(found, expected, atol=1e-6)


def test_density_of_few_values_integrates_to_one() -> None:
    path = VariancePreserving()
    grid = torch.linspace(-3, 3, 40, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    found = probability_flow.log_prob(denoiser(TWO, path), path, x, tolerance=1e-4).y
    assert float(found.exp().sum() * (grid[1] - grid[0]) ** 2) == pytest.approx(1, abs=2e-3)


def test_hutchinson_is_unbiased_and_exact_over_all_signs() -> None:
    path, x = Straight(), rows(3)
    exact = probability_flow.log_prob(denoiser(TWO, path), path, x, tolerance=1e-7).y
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    every = signs[:, None].expand(4, 3, 2)
    whole = probability_flow.log_prob(denoiser(TWO, path), path, x, every, 1e-7).y
    assert torch.allclose(whole, exact, atol=1e-5)  # the mean over all signs is the trace
    each = torch.stack([probability_flow.log_prob(denoiser(TWO, path), path, x, v[None], 1e-7).y for v in every])
    assert torch.allclose(each.mean(0), exact, atol=1e-5)
    assert float((each - exact).abs().max()) > 1e-2  # one draw is not the trace


def method_of(dims: int, **params: object) -> Method:
    method = build("diffusion/flow_matching", DataSpec("vector", (dims,)), network=MLP, **params)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.normal_(0, 0.1, generator=rng)
    return method


def test_ode_log_prob_has_the_signs_of_the_rows_keys() -> None:
    method = method_of(probability_flow.EXACT_DIMS + 1)
    x = torch.randn(5, method.data.dims, generator=torch.Generator().manual_seed(0))
    one, kind = ode_log_prob(method, x, tolerance=1e-4)
    assert kind == "estimate" and one.dtype == torch.float64 and bool(one.isfinite().all())
    assert torch.allclose(ode_log_prob(method, x[:3], tolerance=1e-4)[0], one[:3], atol=5e-3)  # other steps, same signs
    assert not torch.allclose(ode_log_prob(method, x, seed=1, tolerance=1e-4)[0], one, atol=2e-2)
    exact = method_of(2)
    x = x[:, :2]
    same = [ode_log_prob(exact, x, seed=seed)[0] for seed in (0, 1)]
    assert torch.equal(*same)  # few values: the trace itself, which draws nothing


def test_hutchinson_draws_of_a_method_have_the_trace_as_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(3)
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).expand(200, 3)
    exact = ode_log_prob(method, x)[0]
    monkeypatch.setattr(probability_flow, "EXACT_DIMS", 0)
    drawn = ode_log_prob(method, x, probes=2)[0]
    assert float(drawn.std()) > 1e-3
    assert abs(float(drawn.mean() - exact.mean())) < 4 * float(drawn.std()) / math.sqrt(200) + 2e-3
    signs = noise.uniform(torch.arange(2000), "sign", (3,)) < 0.5
    assert float(signs.float().mean()) == pytest.approx(0.5, abs=0.03)


def test_ode_log_prob_takes_the_condition_and_no_setting_of_the_sampler() -> None:
    case = Case("diffusion/ddpm", "vector:real", asked=True)
    method, x = cases.made(case), cases.rows(case.spec, 4)
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.normal_(0, 0.15, generator=torch.Generator().manual_seed(1))
    zero, one = (ode_log_prob(method, x, torch.full((4,), label), tolerance=1e-2)[0] for label in (0, 1))
    assert not torch.allclose(zero, one, atol=1e-3)
    guided = resampled(method, {"guidance": 3.0})
    assert torch.equal(ode_log_prob(guided, x, torch.zeros(4, dtype=torch.int64), tolerance=1e-2)[0], zero)


def test_ode_log_prob_is_in_nats_of_stored_data() -> None:
    """Twice the scale, the same network: log 2 nats less for each of the two values."""
    narrow = method_of(2)
    wide = build("diffusion/flow_matching", DataSpec("vector", (2,), scale=2.0), network=MLP)
    wide.model.load_state_dict(narrow.model.state_dict())
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    one, two = ode_log_prob(narrow, x)[0], ode_log_prob(wide, 2 * x)[0]
    assert torch.allclose(two, one - 2 * math.log(2), atol=1e-5)  # float32


def test_ode_log_prob_refuses_what_it_cannot_do() -> None:
    vae = cases.made(Case("vae/vae", "image:discrete"))
    with pytest.raises(ValueError, match="vae/vae has no probability-flow ODE"):
        ode_log_prob(vae, cases.rows(vae.data, 2))
    with pytest.raises(ValueError, match="probes: 0 draws"):
        ode_log_prob(method_of(2), torch.zeros(2, 2), probes=0)
    with pytest.raises(ValueError, match=r"x: \(2, 3\); diffusion/flow_matching was built for \[N, \*\(2,\)\]"):
        ode_log_prob(method_of(2), torch.zeros(2, 3))
