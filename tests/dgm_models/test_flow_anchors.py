"""Flows over vectors against closed forms and against their papers' formulas, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm_models.construct import ConfigError
from dgm_models.method import build
from dgm_models.nn.coupling import Affine, Coupling, MixtureCdf, Permutation, SplitCoupling
from dgm_models.nn.flow import Flow
from dgm_models.nn.masked_flow import MaskedAutoregressive, MaskedNetwork
from dgm_models.nn.networks import Mlp
from dgm_models.nn.spline import LEAST, RationalQuadratic
from dgm_models.protocols import DataSpec

PLANE, FIVE = DataSpec("vector", (2,)), DataSpec("vector", (5,), classes=3)
NETWORK = {"name": "mlp", "width": 16, "depth": 2, "activation": "tanh"}
EXACT = 1e-10  # rounding of 2e-16 through a few layers


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(module: torch.nn.Module, size: float = 0.5) -> Any:
    """The module in float64 with weights of that size."""
    module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(size * normal(*p.shape, seed=i))
    return module


def flow(name: str, data: DataSpec = FIVE, **params: Any) -> Flow:
    model = build(f"flows/{name}", data, network=NETWORK, **params).model
    assert isinstance(model, Flow)
    return moved(model, 0.3)


# ---- NICE


def test_nice_volume_is_its_diagonal() -> None:
    model = flow("nice")
    log_det = model.transform(3 * normal(7, 5), None)[1]
    scales = dict(model.named_parameters())["transform.inner.parts.4.log_scale"]
    assert torch.allclose(log_det, scales.sum().expand(7), atol=EXACT)
    assert abs(float(scales.detach().sum())) > 0.1


def test_nice_couplings_move_every_coordinate_by_all_others() -> None:
    model = flow("nice")
    x = normal(1, 5)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.transform(x, None)[0][0], x)[:, 0]
    assert bool((jacobian != 0).all())


@pytest.mark.parametrize("name", ["nice", "neural_spline"])
def test_couplings_refuse_data_of_one_coordinate(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.shape: a coupling divides .* there are 1; use maf"):
        build(f"flows/{name}", DataSpec("vector", (1,)))


# ---- couplings by a mask


class Constant(torch.nn.Module):
    """Parameters that are a function of what passes: the sum of it times one weight for every output."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        total: Tensor = x.flatten(1).sum(1)
        return total.reshape(-1, *[1] * self.weights.ndim) * self.weights


def test_coupling_by_zeros_equals_coupling_by_split() -> None:
    mask, weights = torch.tensor([True, False, True, False]), normal(4, 3, 3, 2)
    whole = Coupling(mask[:, None, None].expand(4, 3, 3), Affine(), Constant(weights))
    split = SplitCoupling(mask.tolist(), Affine(), Constant(weights[~mask]))
    x = normal(6, 4, 3, 3)
    (z, log_det), (other, other_log_det) = whole(x, None), split(x, None)
    assert torch.allclose(z, other, atol=EXACT) and torch.allclose(log_det, other_log_det, atol=EXACT)
    assert torch.equal(z[:, mask], x[:, mask])
    assert torch.allclose(whole.inverse(z, None), x, atol=EXACT)
    assert torch.allclose(split.inverse(z, None), x, atol=EXACT)


def test_affine_scales_stay_within_their_bound() -> None:
    x, params = normal(100), 1e3 * normal(100, 2)
    z, log_slope = Affine(2.0).forward(x, params)
    assert float(log_slope.abs().max()) <= 2.0
    assert torch.allclose(Affine(2.0).inverse(z, params), x, atol=1e-9)  # shifts of 1000 leave 13 of 16 digits


# ---- masks


@pytest.mark.parametrize("context_dim", [0, 3])
def test_masked_network_reads_what_comes_before_and_all_of_it(context_dim: int) -> None:
    network = moved(MaskedNetwork(5, 2, Mlp(16, 2, "tanh"), context_dim))
    context = normal(1, context_dim, seed=1) if context_dim else None
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, context)[0], normal(1, 5))[:, :, 0]
    before = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    for parameter in range(2):
        assert torch.equal(jacobian[:, parameter] != 0, before)


def test_masked_network_conditions_the_first_coordinate_too() -> None:
    network = moved(MaskedNetwork(5, 2, Mlp(16, 2, "tanh"), 3))
    x = normal(1, 5)
    jacobian = torch.autograd.functional.jacobian(lambda c: network(x, c)[0], normal(1, 3, seed=1))[:, :, 0]
    assert bool((jacobian != 0).all())


@pytest.mark.parametrize("context_dim", [0, 3])
def test_masked_inverse_with_kept_sums_equals_whole_passes(context_dim: int) -> None:
    layer = MaskedAutoregressive(Affine(), moved(MaskedNetwork(5, 2, Mlp(16, 2, "tanh"), context_dim)))
    z, context = normal(4, 5), normal(4, context_dim, seed=1) if context_dim else None
    x = torch.zeros_like(z)
    for d in range(5):
        x[:, d] = layer.bijection.inverse(z, layer.network(x, context))[:, d]
    assert torch.allclose(layer.inverse(z, context), x, atol=EXACT)


@pytest.mark.parametrize("name", ["maf", "iaf"])
def test_masked_flows_refuse_networks_without_masks(name: str) -> None:
    with pytest.raises(ConfigError, match=r"network\.name: conv; .*use mlp"):
        build(f"flows/{name}", FIVE, network={"name": "conv"})


# ---- MAF and IAF


def test_maf_of_one_layer_is_any_gaussian() -> None:
    """z_1 = (x_1 - m_1) / s_1, z_2 = (x_2 - m_2 - b (x_1 - m_1)) / s: the conditionals of N(m, C), so NLL = entropy."""
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    covariance = torch.tensor([[2.0, 0.9], [0.9, 0.7]], dtype=torch.float64)
    slope = float(covariance[1, 0] / covariance[0, 0])
    scales = torch.stack([covariance[0, 0], covariance[1, 1] - slope * covariance[1, 0]]).sqrt()
    network = {"name": "mlp", "width": 2, "depth": 1, "activation": "relu"}
    model = build("flows/maf", PLANE, network=network, layers=1).model.double()
    assert isinstance(model, Flow)
    masked = model.transform.inner.parts[0].network
    with torch.no_grad():
        masked.layers[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # x = relu(x) - relu(-x)
        masked.layers[0].bias.zero_()
        offsets = torch.stack([mean[0], mean[1] - slope * mean[0]])
        raw = Affine().bound * torch.atanh(-scales.log() / Affine().bound)
        masked.last.bias.copy_(torch.stack([-offsets / scales, raw], 1).flatten())
        masked.last.weight[2] = torch.tensor([-1.0, 1.0]) * slope / scales[1]
    x = torch.distributions.MultivariateNormal(mean, covariance)
    drawn = mean + normal(64, 2) @ torch.linalg.cholesky(covariance).T
    assert torch.allclose(model.log_prob(drawn), x.log_prob(drawn), atol=EXACT)
    nodes, weights = gauss_hermite(20)  # exact for the quadratic log p
    points = mean + nodes @ torch.linalg.cholesky(covariance).T
    nll = -float((weights * model.log_prob(points)).sum().detach())
    assert nll == pytest.approx(float(x.entropy()), abs=EXACT)


def test_maf_of_one_mixture_layer_has_mixtures_as_conditionals() -> None:
    model = flow("maf", layers=1, components=3)
    network, x = model.transform.inner.parts[0].network, 2 * normal(16, 5)
    logits, means, raw = network(x, None).unflatten(-1, (3, 3)).unbind(-2)
    means, scales = means + torch.tensor([-2.0, 0.0, 2.0]), (5 * torch.tanh(raw / 5) - 1).exp()
    u = (x[..., None] - means) / scales
    logistic = torch.sigmoid(u) * torch.sigmoid(-u) / scales
    assert torch.allclose(model.log_prob(x), (logits.softmax(-1) * logistic).sum(-1).log().sum(1), atol=EXACT)


def test_mixture_inverse_and_slope_are_right_far_out_and_in_float32() -> None:
    mixture, params = MixtureCdf(4), normal(1000, 12)
    z = 30 * normal(1000, seed=1)  # where F is 1 to all digits
    x = mixture.inverse(z, params).requires_grad_()
    back, log_slope = mixture.forward(x, params)
    assert torch.allclose(back, z, atol=1e-9)
    (slope,) = torch.autograd.grad(back.sum(), x)
    assert torch.allclose(slope.log(), log_slope, atol=1e-9)
    single = mixture.inverse(z.float(), params.float())
    assert torch.allclose(single.double(), x, rtol=1e-5, atol=1e-5)  # 1e-7 of z, over slopes of at least 0.01
    again, other = mixture.forward(single, params.float())
    assert bool(other.isfinite().all()) and torch.allclose(again.double(), z, rtol=1e-3)


def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes [n^2, 2] and weights [n^2] of the expectation under N(0, I)."""
    node, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(n))
    weight = weight / math.sqrt(2 * math.pi)
    return torch.cartesian_prod(node, node), (weight[:, None] * weight).flatten()


def test_iaf_is_the_inverse_of_maf_with_the_same_weights() -> None:
    maf, iaf = flow("maf", layers=3), flow("iaf", layers=3)
    masked = [part for part in maf.transform.modules() if isinstance(part, MaskedNetwork)]
    inverted = [part for part in iaf.transform.modules() if isinstance(part, MaskedNetwork)]
    for mine, theirs in zip(inverted, reversed(masked), strict=True):
        mine.load_state_dict(theirs.state_dict())
    x = normal(6, 5)
    z, log_det = maf.transform(x, None)
    assert float((z - x).detach().abs().max()) > 0.1
    assert torch.allclose(iaf.decode(x), z, atol=EXACT)
    back, other_log_det = iaf.transform(z, None)
    assert torch.allclose(back, x, atol=1e-8) and torch.allclose(other_log_det, -log_det, atol=1e-8)


def test_permutation_follows_its_order() -> None:
    transform, x = Permutation(torch.tensor([2, 0, 1])), normal(4, 3)
    z, log_det = transform(x, None)
    assert torch.equal(z, x[:, [2, 0, 1]]) and torch.equal(log_det, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(transform.inverse(z, None), x)


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("nice", {"layers": 4}, 4),
        ("maf", {"layers": 3}, 15),  # every layer, coordinate after coordinate
        ("iaf", {"layers": 3}, 3),
        ("neural_spline", {"layers": 3}, 3),
        ("neural_spline", {"layers": 3, "form": "autoregressive"}, 15),
    ],
)
def test_flow_evaluations_are_the_passes_of_its_networks(name: str, params: dict[str, Any], expected: int) -> None:
    model = flow(name, **params)
    model.sample(2, torch.Generator().manual_seed(0))
    model.encode(normal(3, 5))  # a density asked for between two samples is no part of the count
    model.sample(2, torch.Generator().manual_seed(0))
    assert model.evaluations == expected


@pytest.mark.parametrize("name", ["maf", "iaf", "neural_spline", "nice"])
def test_flow_begins_as_the_identity(name: str) -> None:
    model = build(f"flows/{name}", FIVE, network=NETWORK).model.double()
    assert isinstance(model, Flow)
    x = normal(6, 5)
    z, log_det = model.transform(x, None)
    assert torch.allclose(z, x, atol=EXACT) and float(log_det.abs().max()) < EXACT


@pytest.mark.parametrize("cond", [None, {"name": "label"}])
def test_autoregressive_splines_are_invertible_and_triangular(cond: dict[str, str] | None) -> None:
    model = flow("neural_spline", form="autoregressive", layers=1, bins=5, bound=3.0, cond=cond)
    asked = torch.tensor([0, 1, 2, 0]) if cond else None
    x = normal(4, 5)
    z = model.encode(x, asked)
    assert torch.allclose(model.decode(z, asked), x, atol=1e-8)
    context = model.context(asked)
    own = None if context is None else context[:1]
    jacobian = torch.autograd.functional.jacobian(lambda x: model.transform(x, own)[0][0], x[:1])[:, 0]
    assert torch.equal(jacobian, jacobian.tril())
    log_det = model.transform(x, context)[1][0]
    assert float(log_det) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=EXACT)


# ---- splines

BINS, BOUND = 6, 3.0
SPLINE = RationalQuadratic(BINS, BOUND)


def by_the_paper(x: float, params: Tensor) -> tuple[float, float]:
    """(z, slope) of one number: Durkan et al. 2019, eq. 4 and 5, in a loop over the bins."""
    raw_w, raw_h, raw_d = params.split([BINS, BINS, BINS - 1])
    share = [LEAST + (1 - LEAST * BINS) * raw.softmax(0) for raw in (raw_w, raw_h)]
    inner = (raw_d + math.log(math.expm1(1 - LEAST))).exp().log1p() + LEAST
    d = [1.0, *inner.tolist(), 1.0]
    left = bottom = -BOUND
    for k in range(BINS):
        w, h = (float(s[k]) * 2 * BOUND for s in share)
        if x < left + w or k == BINS - 1:
            s, xi = h / w, (x - left) / w
            below = s + (d[k + 1] + d[k] - 2 * s) * xi * (1 - xi)
            z = bottom + h * (s * xi**2 + d[k] * xi * (1 - xi)) / below
            slope = s**2 * (d[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + d[k] * (1 - xi) ** 2) / below**2
            return z, slope
        left, bottom = left + w, bottom + h
    raise AssertionError


def test_spline_is_the_papers_formula() -> None:
    x = torch.linspace(-2.99, 2.99, 40, dtype=torch.float64)
    params = 1.5 * normal(40, SPLINE.size)
    z, log_slope = SPLINE.forward(x, params)
    for i in range(40):
        value, slope = by_the_paper(float(x[i]), params[i])
        assert float(z[i]) == pytest.approx(value, abs=EXACT)
        assert float(log_slope[i]) == pytest.approx(math.log(slope), abs=EXACT)


def test_spline_of_zeros_is_the_identity() -> None:
    x = 4 * normal(100)
    z, log_slope = SPLINE.forward(x, torch.zeros(100, SPLINE.size, dtype=torch.float64))
    assert torch.allclose(z, x, atol=1e-14) and float(log_slope.abs().max()) < 1e-14


def test_spline_slope_is_its_derivative_in_both_directions() -> None:
    x, params = (2 * normal(500)).requires_grad_(), normal(500, SPLINE.size)
    z, log_slope = SPLINE.forward(x, params)
    (slope,) = torch.autograd.grad(z.sum(), x)
    assert torch.allclose(slope.log(), log_slope, atol=1e-9)
    given = z.detach().requires_grad_()
    back = SPLINE.inverse(given, params)
    assert torch.allclose(back, x, atol=1e-9)
    (other,) = torch.autograd.grad(back.sum(), given)
    assert torch.allclose(other.log(), -log_slope, atol=1e-7)  # the root's derivative divides by a small difference


def test_spline_passes_its_knots_with_their_slopes_and_is_smooth_there() -> None:
    params = normal(SPLINE.size)
    places, values, slopes = SPLINE.knots(params)
    for side in (-1e-9, 0.0, 1e-9):  # one bin, the knot, the next bin; beyond the outer knots the straight tails
        z, log_slope = SPLINE.forward(places + side, params.expand(BINS + 1, -1))
        assert torch.allclose(z, values, atol=1e-7) and torch.allclose(log_slope.exp(), slopes, atol=1e-6)
    assert float(places[0]) == -BOUND and float(places[-1]) == BOUND
    assert float(slopes[0]) == float(slopes[-1]) == 1.0


def test_spline_leaves_what_lies_outside() -> None:
    x = torch.tensor([-1e6, -3.5, -3.0, 3.0, 3.5, 1e6], dtype=torch.float64)
    params = normal(6, SPLINE.size).requires_grad_()
    z, log_slope = SPLINE.forward(x, params)
    assert torch.equal(z, x) and torch.equal(log_slope, torch.zeros_like(x))
    assert torch.equal(SPLINE.inverse(x, params), x)
    (log_slope.sum() + z.sum()).backward()
    assert params.grad is not None and bool(params.grad.isfinite().all())


def test_spline_in_float32_stays_near_its_float64_twin() -> None:
    x, params = 2 * normal(5000), normal(5000, SPLINE.size)
    z, log_slope = SPLINE.forward(x, params)
    other, other_log_slope = SPLINE.forward(x.float(), params.float())
    # knots near 3 are right to 2e-7 in float32, and slopes here reach about 30
    assert float((z - other).abs().max()) < 1e-4 and float((log_slope - other_log_slope).abs().max()) < 1e-3
    back = SPLINE.inverse(other, params.float())
    assert bool(back.isfinite().all())
    assert float((back - x).abs().median()) < 1e-6 and float((back - x).abs().max()) < 1e-2  # slopes down to 1 / 1000


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_spline_of_extreme_parameters_is_finite_and_monotone(size: float) -> None:
    x = torch.linspace(-3.2, 3.2, 4001, dtype=torch.float32)
    params = (size * normal(SPLINE.size)).float().expand(4001, -1)
    z, log_slope = SPLINE.forward(x, params)
    assert bool(z.isfinite().all()) and bool(log_slope.isfinite().all())
    assert bool((z.diff() > -1e-5).all())  # rounding of numbers near 3
    assert bool(SPLINE.inverse(z, params).isfinite().all())


def test_spline_of_too_many_bins_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bins: 1000; .*at most 999"):
        build("flows/neural_spline", PLANE, network=NETWORK, bins=1000)
