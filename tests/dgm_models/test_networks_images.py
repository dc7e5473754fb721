"""Networks of images: shapes of both directions, parameters counted by hand, initial weights, what is refused."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.construct import ConfigError, construct
from dgm_models.method import build, fit, load, save
from dgm_models.nn.layers import halvings, normalisation
from dgm_models.nn.networks import Dcgan, Network, Residual, StyleGan2
from dgm_models.nn.residual import DownBlock, UpBlock
from dgm_models.nn.tricks import couples
from dgm_models.protocols import DataSpec
from dgm_models.sampling import sample
from tests.laws import cases

SMALL: dict[str, Network] = {
    "dcgan": Dcgan(channels=2),
    "residual": Residual(channels=2, blocks=1),
    "stylegan2": StyleGan2(channels=2, most=3, style_dim=4, mapping=2),
}
SHAPES = [(1, 2, 3), (1, 4, 4), (2, 7, 9), (1, 8, 8), (3, 28, 28), (1, 33, 16)]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_network_goes_both_ways_for_every_shape(name: str, shape: tuple[int, ...]) -> None:
    network = SMALL[name]
    assert network.up(5, shape)(torch.randn(3, 5)).shape == (3, *shape)
    assert network.down(shape, 4)(torch.randn(3, *shape)).shape == (3, 4)


@pytest.mark.parametrize("shape", [(2, 7, 9), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_network_gives_every_parameter_and_every_input_a_gradient(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for module, x in (
        (SMALL[name].up(5, shape), torch.randn(4, 5)),
        (SMALL[name].down(shape, 4), torch.randn(4, *shape)),
    ):
        x.requires_grad_()
        module(x).tanh().square().sum().backward()
        assert [key for key, p in module.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
        assert x.grad is not None and bool((x.grad != 0).any(0).all())  # each pixel is seen


@pytest.mark.parametrize("name", SMALL)
def test_network_s_slope_is_differentiable(name: str) -> None:
    torch.manual_seed(0)
    critic, x = SMALL[name].down((1, 7, 7), 1), torch.randn(4, 1, 7, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    reached = [p for p in critic.parameters() if p.ndim >= 2 and p.grad is not None and bool(p.grad.any())]
    assert len(reached) == sum(p.ndim >= 2 for p in critic.parameters())


@pytest.mark.parametrize(
    ("network", "up", "down"),
    [
        # up 3 -> 4x2x2: 3*16; 2*4; 4*2*16; 2*2; 2*16+1. down: 16*2+2; 2*4*16; 2*4; 16*3+3
        (Dcgan(channels=2, stages=2), 48 + 8 + 128 + 4 + 33, 34 + 128 + 8 + 51),
        # a normalisation's scale and shift less, the biases of what it followed more
        (Dcgan(channels=2, stages=2, norm_up="none", norm_down="none"), 48 + 16 + 128 + 2 + 33, 34 + 128 + 4 + 51),
        # up 3 -> 2x4x4: 3*32+32; norm 4, 3x3 38, norm 4, 3x3 38, 1x1 6; norm 4; 3x3 19
        # down: 1->2 3x3 20, 2->2 3x3 38, 1x1 4; the second block 38 + 38; 2*3+3
        (Residual(channels=2, blocks=1), 128 + 90 + 4 + 19, 62 + 76 + 9),
        # up: mapping 16 + 20; constant 3x4x4; 3->3: style 15, 81, bias 3, noise 1; image 15 + 3 + 1;
        #   3->2: 15, 54, 2, 1; 2->2: 10, 36, 2, 1; image 10 + 2 + 1
        # down: 1->2 4; 2->2 38, 2->3 57, skip 6; (3+1)->3 111; 3x4x4->3 147; 3->3 12
        (
            StyleGan2(channels=2, most=3, style_dim=4, mapping=2),
            36 + 48 + 100 + 19 + 72 + 49 + 13,
            4 + 101 + 111 + 147 + 12,
        ),
    ],
    ids=["dcgan", "dcgan without norm", "residual", "stylegan2"],
)
def test_network_has_the_parameters_counted_by_hand(network: Network, up: int, down: int) -> None:
    assert parameters(network.up(3, (1, 8, 8))) == up
    assert parameters(network.down((1, 8, 8), 3)) == down


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((3, 64, 64), [64, 32, 16, 8, 4]),
        ((3, 32, 32), [32, 16, 8, 4]),
        ((1, 28, 28), [28, 14, 7]),
        ((1, 8, 8), [8, 4]),
        ((1, 7, 7), [7, 3]),
        ((1, 2, 2), [2, 1]),
    ],
)
def test_halvings_end_below_eight(shape: tuple[int, ...], sizes: list[int]) -> None:
    assert halvings(shape, None, "dcgan") == [(n, n) for n in sizes]


@pytest.mark.parametrize("name", SMALL)
def test_network_of_images_refuses_other_data(name: str) -> None:
    for call in (lambda shape: SMALL[name].down(shape, 1), lambda shape: SMALL[name].up(2, shape)):
        with pytest.raises(ValueError, match=rf"network\.name: {name} takes images \[C, H, W\], not \(2,\); use mlp"):
            call((2,))
        with pytest.raises(ValueError, match=rf"network\.name: {name} halves .* 1 x 9 cannot be; use mlp"):
            call((3, 1, 9))


@pytest.mark.parametrize("name", ["dcgan", "residual", "stylegan2"])
def test_network_refuses_more_stages_than_halvings(name: str) -> None:
    network = construct(Network.choices()[name], {"stages": 4}, "runs.x.network")
    with pytest.raises(ValueError, match=r"network\.stages: 8 x 9 cannot be halved 4 times; use at most 3"):
        network.down((1, 8, 9), 1)
    message = r"runs\.x\.method: network\.stages: 8 x 8 cannot be halved 4 times; use at most 3"
    with pytest.raises(ConfigError, match=message):
        build(
            "gan/semi_supervised", DataSpec("image", (1, 8, 8), 17, classes=3), where="runs.x.method",
            network={"name": name, "stages": 4},
        )  # fmt: skip


def test_networks_say_whether_they_couple_the_examples() -> None:
    shape = (1, 16, 16)
    found = {name: (couples(n.up(2, shape)), couples(n.down(shape, 1))) for name, n in SMALL.items()}
    assert found == {"dcgan": (True, True), "residual": (True, False), "stylegan2": (False, True)}
    assert not couples(Dcgan(channels=2, norm_down="none").down(shape, 1))
    assert not couples(Dcgan(channels=2, stages=1).down(shape, 1))  # the layer that sees the data has none
    assert not couples(StyleGan2(channels=2, group=0).down(shape, 1))


@pytest.mark.parametrize("name", SMALL)
def test_network_in_eval_mode_maps_each_example_alone(name: str) -> None:
    torch.manual_seed(0)
    up = SMALL[name].up(5, (1, 8, 8)).double()
    for p in up.parameters():
        if p.ndim == 0:  # StyleGAN2's noise starts with the weight 0
            nn.init.constant_(p, 0.5)
    z = torch.randn(6, 5, dtype=torch.float64)
    up(z)  # batch normalisation keeps statistics in training
    up.eval()
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(up(z), up(z))
    assert torch.allclose(up(z[order]), up(z)[order], rtol=1e-9)  # products of another order
    assert torch.allclose(up(z[:2]), up(z)[:2], rtol=1e-9)


# ---- DCGAN


def test_dcgan_normalises_all_but_the_generator_s_output_and_the_critic_s_input() -> None:
    network = Dcgan(channels=2, stages=3)
    up = [type(part).__name__ for part in network.up(3, (1, 8, 8))]
    middle = ["BatchNorm2d", "ReLU", "ConvTranspose2d"]
    assert up == ["Linear", "Unflatten", *middle, *middle, *middle]
    down = [type(part).__name__ for part in network.down((1, 8, 8), 1)]
    inner = ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert down == ["Conv2d", "Identity", "LeakyReLU", *inner, *inner, "Flatten", "Linear"]
    assert {part.negative_slope for part in network.down((1, 8, 8), 1) if isinstance(part, nn.LeakyReLU)} == {0.2}


def test_dcgan_starts_from_the_paper_s_weights() -> None:
    torch.manual_seed(0)
    network = Dcgan(channels=16)
    for module in (network.up(10, (3, 32, 32)), network.down((3, 32, 32), 10)):
        module.requires_grad_(False)
        weights = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]
        for layer in weights:
            error = 0.02 / math.sqrt(layer.weight.numel())  # of the mean; of the deviation, less
            assert abs(float(layer.weight.mean())) < 5 * error
            assert abs(float(layer.weight.std()) - 0.02) < 5 * error
            assert layer.bias is None or not bool(layer.bias.any())
        norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
        scales = torch.cat([layer.weight for layer in norms])
        error = 0.02 / math.sqrt(len(scales))
        assert abs(float(scales.mean()) - 1) < 5 * error and abs(float(scales.std()) - 0.02) < 5 * error
        assert not any(bool(layer.bias.any()) for layer in norms)


def test_dcgan_sizes_come_back_by_the_way_they_went() -> None:
    sizes, shape = [], (1, 13, 30)
    network = Dcgan(channels=2, stages=3)
    for module, x in ((network.up(2, shape), torch.randn(2, 2)), (network.down(shape, 1), torch.randn(2, *shape))):
        found = []
        for part in module:
            x = part(x)
            if isinstance(part, (nn.ConvTranspose2d, nn.Conv2d, nn.Unflatten)):
                found.append(tuple(x.shape[2:]))
        sizes.append(found)
    assert sizes[0] == [(1, 3), (3, 7), (6, 15), (13, 30)]
    assert sizes[1] == [(6, 15), (3, 7), (1, 3)]


# ---- residual


@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_up_block_is_that_of_the_paper(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = UpBlock(3, 4, size, "none").double()
    x = torch.randn(2, 3, size[0] // 2, size[1] // 2, dtype=torch.float64)
    first, second = (layer for layer in block.second if isinstance(layer, nn.Conv2d))
    raised = F.interpolate(x, size, mode="nearest")
    expected = second(first(raised.relu()).relu()) + block.shortcut(raised)
    assert torch.allclose(block(x), expected, rtol=1e-10)


def test_down_block_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    block = DownBlock(3, 4, (4, 3), "none").double()
    first, second = (layer for layer in block.residual if isinstance(layer, nn.Conv2d))
    expected = F.avg_pool2d(second(first(x.relu()).relu()) + block.shortcut(x), 2)
    assert torch.allclose(block(x), expected, rtol=1e-10)
    head = DownBlock(3, 4, (4, 3), "layer", first=True).double()
    first, second = (layer for layer in head.residual if isinstance(layer, nn.Conv2d))
    assert torch.allclose(head(x), F.avg_pool2d(second(first(x).relu()) + head.shortcut(x), 2), rtol=1e-10)


def test_residual_starts_from_glorot_weights() -> None:
    torch.manual_seed(0)
    network = Residual(channels=32)
    both = nn.ModuleDict({"up": network.up(16, (3, 32, 32)), "down": network.down((3, 32, 32), 16)})
    for name, layer in both.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            gain = 2.0 if "residual" in name or "second" in name else 1.0
            fan = sum(nn.init._calculate_fan_in_and_fan_out(layer.weight))
            # the square of a uniform variable has the relative deviation sqrt(4 / 5)
            error = 5 * math.sqrt(0.8 / layer.weight.numel())
            assert float(layer.weight.detach().var()) == pytest.approx(2 * gain / fan, rel=error)
            assert layer.bias is not None and not bool(layer.bias.any())


def test_residual_critic_of_the_papers_halves_twice_and_keeps_the_size_twice() -> None:
    critic = Residual(channels=4, down_stages=2, blocks=2).down((3, 32, 32), 1)
    blocks = [part for part in critic if isinstance(part, DownBlock)]
    assert [block.size for block in blocks] == [(16, 16), (8, 8), None, None]
    assert parameters(Residual(channels=4).up(5, (3, 32, 32))[0]) == 5 * 4 * 16 + 4 * 16  # from 4 x 4


# ---- normalisation


@pytest.mark.parametrize("name", ["none", "layer", "group"])
def test_normalisation_that_does_not_couple_treats_each_example_alone(name: str) -> None:
    torch.manual_seed(0)
    norm = normalisation(name, 64)
    x = 3 + 2 * torch.randn(4, 64, 3, 3)
    assert torch.allclose(norm(x)[1:2], norm(x[1:2]))
    parts = {"none": None, "layer": (1, 64), "group": (32, 2)}[name]
    if parts is None:
        assert torch.equal(norm(x), x)
    else:
        grouped = norm(x).reshape(4, parts[0], -1)
        assert torch.allclose(grouped.mean(2), torch.zeros(4, parts[0]), atol=1e-5)  # float32
        assert torch.allclose(grouped.var(2, correction=0), torch.ones(4, parts[0]), atol=1e-3)


def test_normalisation_in_groups_takes_channels_that_are_no_multiple_of_32() -> None:
    assert [normalisation("group", n).num_groups for n in (2, 48, 64, 7)] == [2, 16, 32, 1]


# ---- the road


@pytest.mark.parametrize("name", SMALL)
def test_network_trains_samples_and_is_saved(name: str, tmp_path: Path) -> None:
    data = DataSpec("image", (1, 7, 7), 256, classes=3)
    section = {"name": name, "channels": 2} | ({"group": 0, "style_dim": 4} if name == "stylegan2" else {})
    method = build("gan/semi_supervised", data, network=section, latent_dim=3, feature_dim=4)
    before = cases.parameters(method)
    fit(method, cases.source(data), steps=3, batch_size=8, average=0.5, optim={"lr": 0.01})
    assert len(cases.differences(before, cases.parameters(method))) > len(before) / 2
    first: Tensor = sample(method, 9)
    assert torch.equal(sample(method, 9), first) and len(first.unique()) > 1
    again = load(save(method, tmp_path / "artifact"))
    assert torch.equal(sample(again, 9), first)
    assert all(a != b for a, b in pairwise(map(str, first[:2])))
