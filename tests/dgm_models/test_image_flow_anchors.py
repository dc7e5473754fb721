"""RealNVP, Glow, i-ResNet, MintNet and dequantisation against their papers' formulas, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm_models.flows import i_resnet
from dgm_models.flows.glow import InvertibleConvolution
from dgm_models.flows.i_resnet import Lipschitz, LipSwish, ResidualBlock, ResidualFlow, Series
from dgm_models.flows.mint_net import MintLayer
from dgm_models.method import Method, build, encoded, fit, load, resampled, save
from dgm_models.nn.dequantize import VariationallyDequantized
from dgm_models.nn.fixed_point import fixed_point
from dgm_models.nn.flow import Flow
from dgm_models.nn.image_flow import MultiScale, Squeeze, checkerboard
from dgm_models.nn.normalisation import ActNorm
from dgm_models.protocols import DataSpec, DiagonalPosterior, Latents
from dgm_models.training.runtime import Runtime
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train
from tests.laws import cases

IMAGE, PIXELS, FIVE = DataSpec("image", (2, 4, 4), 8), DataSpec("image", (1, 2, 2), 2), DataSpec("vector", (5,))
METHODS: dict[str, dict[str, Any]] = {
    "real_nvp": {"channels": 4, "blocks": 1},
    "glow": {"channels": 4, "steps": 2},
    "i_resnet": {"width": 4, "layers": 1, "blocks": 1},
    "mint_net": {"groups": 2, "layers": 2},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(module: nn.Module, size: float = 0.2) -> Any:
    """The module in float64, its weights moved away from those that make it begin as the identity."""
    module.double().eval()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p += size * normal(*p.shape, seed=i)
    return module


def made(name: str, data: DataSpec = IMAGE, **params: Any) -> Method:
    params = {**METHODS[name], **({"halvings": 1} if data.kind == "image" else {}), **params}
    return build(f"flows/{name}", data, **params)


def slogdet(function: Any, x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda flat: function(flat.reshape(x.shape)).flatten(), x.flatten())
    return float(torch.linalg.slogdet(jacobian)[1])


@pytest.mark.parametrize("name", METHODS)
def test_image_flow_log_det_is_that_of_the_jacobian_and_the_inverse_undoes_it(name: str) -> None:
    model = moved(made(name).model)
    x = normal(3, *IMAGE.shape)
    z, log_det = model.transform(x, None)
    expected = slogdet(lambda x: model.transform(x, None)[0], x[:1])
    assert float(log_det[0].detach()) == pytest.approx(expected, abs=1e-9)
    assert abs(expected) > 0.1
    # couplings leave rounding; what iterates stops at 2e-12
    assert float((model.decode(z.flatten(1)) - x).detach().abs().max()) < 1e-9


# ---- scales and masks


def test_squeeze_makes_channels_of_each_square() -> None:
    z, log_det = Squeeze()(torch.arange(16.0).reshape(1, 1, 4, 4), None)
    assert z[0, :, 0, 0].tolist() == [0, 1, 4, 5] and z[0, :, 1, 1].tolist() == [10, 11, 14, 15]
    assert log_det.tolist() == [0]


def test_scales_let_half_of_the_channels_go() -> None:
    scales = MultiScale([Squeeze(), Squeeze()], [(4, 2, 2), (8, 1, 1)])
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    z = scales(x, None)[0]
    assert z.shape == (1, 16)
    first = Squeeze()(x, None)[0]
    assert torch.equal(z[0, :8], first[0, 2:].flatten())
    assert torch.equal(scales.inverse(z, None), x)


def test_checkerboards_divide_the_places() -> None:
    odd, even = (checkerboard((2, 3, 3), value) for value in (True, False))
    assert torch.equal(odd, ~even) and torch.equal(odd[0], odd[1])
    assert even[0].tolist() == [[True, False, True], [False, True, False], [True, False, True]]


# ---- ActNorm


def test_actnorm_begins_with_mean_0_and_variance_1() -> None:
    norm = ActNorm(3).double()
    x = 5 + 3 * normal(7, 3, 4, 2)
    norm.fill(x)
    z, log_det = norm(x, None)
    assert float(z.detach().mean((0, 2, 3)).abs().max()) < 1e-12
    assert float((z.detach().var((0, 2, 3), correction=0) - 1).abs().max()) < 1e-5  # 1e-6 is added to the deviation
    before = norm.log_scale.detach().clone()
    assert float(log_det[0].detach()) == pytest.approx(8 * float(before.sum()), abs=1e-12)  # 4 x 2 places
    norm.fill(normal(5, 3, 1, 1))
    assert torch.equal(norm.log_scale, before)


def trainer(runtime: Runtime | None = None) -> Any:
    method = made("glow")
    return cases.trainer(method, Train(steps=2, batch_size=8), {"lr": 1e-3}, runtime)


class Second(Runtime):
    """Takes the second half of the rows, as the last of two ranks does."""

    def share(self, rows: int) -> tuple[int, int]:
        return rows // 2, rows


def test_actnorms_of_a_model_see_the_whole_global_batch_on_every_rank() -> None:
    one, other = trainer(), trainer(Second())
    for each in (one, other):
        each._initialize()
    assert cases.differences(dict(one.model.state_dict()), dict(other.model.state_dict())) == []
    norms = [part for part in one.model.modules() if isinstance(part, ActNorm)]
    assert len(norms) == 6 and all(bool(norm.initialised) and not norm.filling for norm in norms)
    batch = one._fetch(one.source, 0, 8, "initialize")
    inputs: list[Tensor] = []
    norms[-1].register_forward_hook(lambda module, given, output: inputs.append(output[0]))
    one.model.log_prob(batch.x)
    assert float(inputs[0].mean((0, 2, 3)).abs().max()) < 1e-5  # float32
    assert float((inputs[0].var((0, 2, 3), correction=0) - 1).abs().max()) < 1e-4


def test_actnorms_that_were_loaded_stay_as_they_are(tmp_path: Path) -> None:
    method = fit(made("glow"), cases.source(IMAGE), steps=1, batch_size=8)
    again = load(save(method, tmp_path / "artifact"))
    before = cases.parameters(again)
    again.objective.initialize(again.model, encoded(again.model, cases.rows(IMAGE, 8, seed=5)))
    assert cases.differences(before, cases.parameters(again)) == []


# ---- the 1x1 convolution


def test_invertible_convolution_begins_as_a_rotation() -> None:
    layer = InvertibleConvolution(6)
    weight = layer.weight()
    assert float((weight @ weight.T - torch.eye(6)).abs().max()) < 1e-5  # float32
    assert sorted(layer.order.tolist()) == list(range(6)) and layer.order.tolist() != list(range(6))


def test_invertible_convolution_has_the_determinant_of_its_factors() -> None:
    layer = moved(InvertibleConvolution(6))
    weight = layer.weight().detach()
    log_det = layer(normal(2, 6, 3, 2), None)[1]
    assert float(log_det[0]) == pytest.approx(6 * float(torch.linalg.slogdet(weight)[1]), abs=1e-10)  # 3 x 2 places
    assert float((layer.inverse_weight() @ weight - torch.eye(6)).abs().max()) < 1e-10


# ---- i-ResNet


def operator(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The layer as a matrix [outputs, inputs] of whole events."""
    eye = torch.eye(math.prod(shape), dtype=weight.dtype).reshape(-1, *shape)
    return i_resnet.apply(weight.detach(), eye).flatten(1).T


def norm_of(weight: Tensor, shape: tuple[int, ...]) -> float:
    return float(torch.linalg.matrix_norm(operator(weight, shape), 2))


def test_lipschitz_layer_has_the_norm_of_its_operator() -> None:
    torch.manual_seed(0)
    shape = (2, 5, 4)
    layer = Lipschitz(nn.Conv2d(2, 3, 3, padding=1), shape, 0.8).double().eval()
    with torch.no_grad():
        layer.weight *= 7
    assert norm_of(layer.kept(), shape) == pytest.approx(0.8, rel=1e-6)
    # the norm of the kernel as a matrix is another number, and no bound
    kernel = float(torch.linalg.matrix_norm(layer.kept().detach().flatten(1), 2))
    assert kernel < 0.7
    x, y = normal(1, *shape), normal(1, 3, 5, 4)
    forward, back = (i_resnet.apply(layer.weight, x) * y).sum(), (i_resnet.adjoint(layer.weight, y) * x).sum()
    assert float(forward) == pytest.approx(float(back), abs=1e-10)
    with torch.no_grad():
        layer.weight /= 100
    assert torch.equal(layer.kept(), layer.weight)  # a smaller norm is left alone


@pytest.mark.parametrize("data", [DataSpec("image", (1, 4, 4), 5), DataSpec("vector", (2,))], ids=["image", "vector"])
def test_residual_branch_stays_below_its_bound_in_training(data: DataSpec) -> None:
    method = made("i_resnet", data, lipschitz=0.7)
    trainer = cases.trainer(method, Train(steps=12, batch_size=8), {"lr": 0.05})
    trainer.run()
    trainer.objective.prepare(method.model.train(), trainer._fetch(trainer.source, 0, 8))
    for training in (True, False):
        method.model.train(training)
        blocks = [part for part in method.model.modules() if isinstance(part, ResidualBlock)]
        reached = 0.0
        for block in blocks:
            product = 1.0
            for layer in block.layers:
                product *= norm_of(layer.kept(), layer.right.shape[1:])
            reached = max(reached, product)
        # power iteration comes from below: to a relative 1e-3 an iteration in training, to 6e-6 in evaluation
        assert reached < 0.7 * (1.02 if training else 1.001)
        assert reached > 0.5  # the bound was met


def test_lipswish_has_slopes_of_at_most_one() -> None:
    x = torch.linspace(-100, 100, 4001, dtype=torch.float64, requires_grad=True)
    for raw in (-3.0, 0.5, 4.0):
        activation = LipSwish().double()
        nn.init.constant_(activation.raw, raw)
        (slope,) = torch.autograd.grad(activation(x).sum(), x)
        assert 0.95 < float(slope.abs().max()) <= 1.0


HADAMARD = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)


def branch(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """g(x) [n, 4], x, and a matrix that g depends on; Lip(g) = 0.5. All rows are one x."""
    weight = normal(4, 4)
    weight = (0.5 * weight / torch.linalg.matrix_norm(weight, 2)).requires_grad_()
    x = normal(1, 4, seed=1).expand(n, -1).clone().requires_grad_()
    return torch.tanh(x @ weight.T), x, weight


def probes(n: int) -> list[Tensor]:
    """Four whose outer products have the mean I, so that v^T A v has the mean tr(A) exactly."""
    return [row.expand(n, -1) for row in HADAMARD]


def test_series_converges_to_the_exact_log_det_and_its_gradient() -> None:
    g, x, weight = branch(1)
    exact = i_resnet.exact_log_det(g, x, True)
    errors = []
    for terms in (1, 5, 40):
        found = i_resnet.series_log_det(g, x, Series(probes(1), g.new_ones(1, terms)), True)
        errors.append(abs(float(found - exact)))
    assert errors[0] > errors[1] > 1e-6
    assert errors[2] < 1e-12  # 0.5^41 / 41
    one, two = (torch.autograd.grad(value.sum(), (weight, x), retain_graph=True) for value in (exact, found))
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    with torch.no_grad():
        assert float(exact) == pytest.approx(slogdet(lambda x: x + torch.tanh(x @ weight.T), x[:1].detach()), abs=1e-12)


def test_roulette_makes_the_series_unbiased() -> None:
    n = 20_000
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = i_resnet.roulette(uniform)
    assert bool((weights[:, :2] == 1).all())
    error = weights[:, :6].std(0) / math.sqrt(n)
    assert bool(((weights[:, :6].mean(0) - 1).abs() <= 5 * error).all())  # five standard errors
    g, x, _ = branch(n)
    exact = float(i_resnet.exact_log_det(g, x, False)[0])
    found = i_resnet.series_log_det(g, x, Series(probes(n), weights), False)
    assert float(found.mean()) == pytest.approx(exact, abs=5 * float(found.std()) / math.sqrt(n))
    cut = i_resnet.series_log_det(g, x, Series(probes(n), weights[:, :2]), False)[0]
    assert abs(float(cut) - exact) > 20 * float(found.std()) / math.sqrt(n)  # two terms alone are biased


def test_draws_of_training_follow_the_keys_alone() -> None:
    method = made("i_resnet", DataSpec("vector", (6,)))
    batch = encoded(method.model, cases.rows(method.data, 8))
    model = method.model.train()
    assert isinstance(model, ResidualFlow)
    whole = model.drawn_log_prob(batch)
    parts = torch.cat([model.drawn_log_prob(part) for part in batch.split(3)])
    assert float((whole - parts).abs().max()) < 1e-5  # float32
    assert float((model.drawn_log_prob(batch.fold("other")) - whole).abs().max()) > 1e-4
    assert torch.equal(model.log_prob(batch.x), model.log_prob(batch.x))


def test_estimated_density_is_close_to_the_density() -> None:
    method = made("i_resnet", DataSpec("vector", (70,)))
    model = method.model.double().eval()
    assert isinstance(model, ResidualFlow) and model.estimated
    x = normal(4, 70)
    exact = model._measured(x, None, None)
    apart = (model.log_prob(x) - exact).abs()
    assert float(apart.max()) < 1.0 and float(apart.max()) > 0  # Hutchinson's deviation over 4 probes is below 0.3


def test_fixed_point_of_an_example_depends_on_no_neighbour() -> None:
    z = normal(6, 3)
    weight = 0.9 * normal(3, 3) / torch.linalg.matrix_norm(normal(3, 3), 2)
    z[3:] *= 100

    def solve(z: Tensor) -> tuple[Tensor, int]:
        return fixed_point(lambda x, _: z - (x[:, :, None] * weight.T).sum(1).tanh(), z, 2000)

    whole, most = solve(z)
    assert torch.equal(whole[:3], solve(z[:3])[0])
    assert most > 5
    left = whole + (whole[:, :, None] * weight.T).sum(1).tanh() - z
    assert float((left / (1 + z.abs())).abs().max()) < 1e-10


# ---- MintNet


@pytest.mark.parametrize(("shape", "kernel"), [((2, 3, 3), 3), ((5, 1, 1), 1)])
def test_mint_layer_has_a_triangular_jacobian_of_positive_diagonal(shape: tuple[int, int, int], kernel: int) -> None:
    layer = moved(MintLayer(shape, 3, kernel, 1.0, 0), 1.0)
    x = normal(1, *shape)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x, None)[0][0], x)[:, :, :, 0]
    dims = math.prod(shape)
    # raster order of the places, and the channels of a place in order
    matrix = jacobian.permute(1, 2, 0, 4, 5, 3).reshape(dims, dims)
    assert torch.equal(matrix.triu(1), torch.zeros(dims, dims, dtype=matrix.dtype))
    assert float(matrix.diagonal().min()) > 0
    below = matrix.tril(-1)
    assert float((below != 0).double().sum()) > 0.5 * dims * (dims - 1) / 2  # and what is before is read
    slope = layer._mapped(x, None)[1][0].permute(1, 2, 0).flatten()
    assert torch.allclose(slope, matrix.diagonal(), atol=1e-12)


# ---- dequantisation


def bound_model(size: float) -> VariationallyDequantized:
    model = made("real_nvp", PIXELS, dequantization="variational").model
    assert isinstance(model, VariationallyDequantized)
    return moved(model, size)


def weights(model: VariationallyDequantized, k: int) -> Tensor:
    """[16, k] nats of all 16 images of four pixels."""
    x = cases.every_state(PIXELS)
    uniform = torch.rand(16, k, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.log_weights(x, uniform.clamp(1e-9, 1 - 1e-9))


def test_dequantisation_posterior_begins_uniform() -> None:
    method = made("real_nvp", PIXELS, dequantization="variational")
    model = method.model.double()
    uniform = torch.rand(16, 1, 2, 2, dtype=torch.float64)
    u, log_q = model.noise(cases.every_state(PIXELS), uniform)
    assert torch.allclose(u, uniform) and float(log_q.abs().max()) < 1e-12


def test_dequantisation_posterior_has_the_density_of_its_draws() -> None:
    model, x = bound_model(0.1), cases.every_state(PIXELS)[5:6]
    uniform = torch.rand(1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_q = model.noise(x, uniform)[1]
    # u is a function of a uniform draw, whose density is 1: log q = -log|du / d draw|
    assert float(log_q) == pytest.approx(-slogdet(lambda v: model.noise(x, v)[0], uniform), abs=1e-9)
    assert abs(float(log_q)) > 0.01
    other = model.noise(cases.every_state(PIXELS)[6:7], uniform)[1]
    assert float((other - log_q).abs()) > 1e-3  # it reads x


def test_dequantisation_bound_is_below_a_distribution_that_sums_to_one() -> None:
    found = weights(bound_model(0.1), 500)
    mass = found.exp().sum(0)  # [500], each an unbiased estimate of the probability of all images
    inside = float(mass.mean())
    assert inside < 1 + 5 * float(mass.std()) / math.sqrt(500)  # below 1 by what the flow gives to no image
    single = float(found.mean(1).exp().sum())
    fifty = float((found.reshape(16, 10, 50).logsumexp(2) - math.log(50)).mean(1).exp().sum())
    whole = float((found.logsumexp(1) - math.log(500)).exp().sum())
    assert single < fifty < whole == pytest.approx(inside)
    assert inside > 0.2


def test_uniform_dequantisation_is_a_bound_of_the_same_probability() -> None:
    """With q uniform the weights are log p(x + u), whose mean the uniformly dequantised flow has for its bound."""
    model = bound_model(0.1)
    for p in model.noise.parameters():
        nn.init.zeros_(p)
    found = weights(model, 100)
    uniform = torch.rand(16, 100, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = (cases.every_state(PIXELS)[:, None] + uniform.clamp(1e-9, 1 - 1e-9)).flatten(0, 1)
    y, log_det = model.space.place(v)
    assert isinstance(model.flow, Flow)
    with torch.no_grad():
        density = (model.flow.log_prob(y) + log_det).reshape(16, 100)
    assert torch.allclose(found, density, atol=1e-9)
    assert bool((density.mean(1) < density.logsumexp(1) - math.log(100)).all())


def test_variational_dequantisation_of_real_data_is_refused() -> None:
    with pytest.raises(ValueError, match="'variational' is of whole levels"):
        made("real_nvp", FIVE, dequantization="variational")


@pytest.mark.parametrize("name", ["real_nvp", "glow"])
def test_variational_dequantisation_trains_samples_and_loads(name: str, tmp_path: Path) -> None:
    method = made(name, dequantization="variational")
    data = ArraySource(cases.rows(IMAGE, 24), IMAGE, seed=0)
    fit(method, data, steps=2, batch_size=8, accumulate=2)
    again = load(save(method, tmp_path / "artifact"))
    assert isinstance(again.model, VariationallyDequantized)
    x = cases.rows(IMAGE, 4).long()
    one, two = (m.model.elbo(x, torch.Generator().manual_seed(0), k=3) for m in (method, again))
    assert torch.equal(one, two)
    assert again.model.decode(again.model.encode(x)).equal(x)
    drawn = again.model.sample(5, torch.Generator().manual_seed(0))
    assert drawn.shape == (5, *IMAGE.shape) and drawn.dtype == torch.int64


def test_variational_dequantisation_has_latents_without_a_posterior_and_the_sampler_of_its_flow() -> None:
    """The pictures of an evaluation ask a model with a posterior of latents for it; the noise's posterior is none."""
    method = build("flows/real_nvp", PIXELS, channels=2, dequantization="variational")
    assert isinstance(method.model, Latents) and not isinstance(method.model, DiagonalPosterior)
    cooler = resampled(method, {"temperature": 0.5}).model
    assert cooler.flow.sampling.temperature == cooler.sampling.temperature == 0.5
    assert method.model.flow.sampling.temperature == 1.0
