"""StyleGAN2's layers: equalised rates, modulation and demodulation, filters, noise, skips."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.nn.networks import StyleGan2
from dgm_models.nn.stylegan2 import EqualConv, EqualLinear, Generator, Halving, Layer, Mapping, ModulatedConv, resized


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- equalised learning rate


@pytest.mark.parametrize("rate", [1.0, 0.01])
def test_equal_linear_is_a_linear_layer_of_the_scaled_weight(rate: float) -> None:
    layer = EqualLinear(9, 4, rate, bias=0.7).double()
    plain = nn.Linear(9, 4).double()
    with torch.no_grad():
        plain.weight.copy_(layer.weight * rate / 3)
        plain.bias.copy_(layer.bias * rate)
    x = drawn(5, 9)
    assert torch.allclose(layer(x), plain(x), rtol=1e-12)  # float64
    assert torch.allclose(plain.bias, torch.full((4,), 0.7, dtype=torch.float64))


@pytest.mark.parametrize("rate", [1.0, 0.01])
def test_equal_linear_starts_with_outputs_of_variance_one_whatever_the_rate(rate: float) -> None:
    torch.manual_seed(0)
    layer = EqualLinear(400, 300, rate)
    effective = layer.weight.detach() * layer.gain * math.sqrt(400)
    assert float(effective.std()) == pytest.approx(1.0, abs=0.01)  # 120000 draws: 5 errors of 0.002


@pytest.mark.parametrize(("in_dim", "rate"), [(4, 1.0), (64, 1.0), (64, 0.01)])
def test_equal_linear_moves_by_one_share_of_its_size_under_adam(in_dim: int, rate: float) -> None:
    layer = EqualLinear(in_dim, 3, rate).double()
    before = layer.weight.detach() * layer.gain
    layer(drawn(6, in_dim)).square().sum().backward()
    torch.optim.Adam([layer.weight], lr=1e-3, eps=1e-30).step()
    moved = (layer.weight.detach() * layer.gain - before).abs()
    initial_std = 1 / math.sqrt(in_dim)
    # the learning rate relative to the initial deviation, times the layer's own; differences of float64
    assert torch.allclose(moved, torch.full_like(moved, 1e-3 * rate * initial_std), rtol=1e-6)


def test_equal_conv_is_a_convolution_of_the_scaled_weight() -> None:
    layer = EqualConv(4, 3, 3).double()
    nn.init.normal_(layer.bias)
    x = drawn(2, 4, 5, 6)
    assert torch.allclose(layer(x), F.conv2d(x, layer.weight / 6, layer.bias, padding=1), rtol=1e-12)


# ---- modulation


def modulated(demodulate: bool) -> tuple[ModulatedConv, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = ModulatedConv(4, 5, 3, 6, demodulate).double()
    nn.init.normal_(layer.style.bias, 1.0, 0.5)
    return layer, drawn(3, 4, 7, 7), drawn(3, 6, seed=2)


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_conv_is_one_weight_an_example(demodulate: bool) -> None:
    layer, x, w = modulated(demodulate)
    style = layer.style(w)
    out = layer(x, w)
    for i in range(3):
        weight = layer.conv.weight / math.sqrt(4 * 9) * style[i][None, :, None, None]
        if demodulate:
            weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        assert torch.allclose(out[i], F.conv2d(x[i : i + 1], weight, padding=1)[0], rtol=1e-10)


def test_demodulation_gives_outputs_of_variance_one() -> None:
    layer, x, w = modulated(True)
    x.requires_grad_()
    out = layer(x, w)
    for i in range(3):
        for channel in range(5):
            (weights,) = torch.autograd.grad(out[i, channel, 3, 3], x, retain_graph=True)
            # the variance of a sum of independent inputs of variance 1; 1e-8 in the root
            assert float(weights.square().sum()) == pytest.approx(1.0, rel=1e-6)
    raw, _, _ = modulated(False)
    (weights,) = torch.autograd.grad(raw(x, w)[0, 0, 3, 3], x)
    assert abs(float(weights.square().sum()) - 1) > 0.05  # without it, the style's size stays


def test_styles_begin_at_one() -> None:
    layer = ModulatedConv(4, 5, 3, 6)
    assert torch.equal(layer.style(torch.zeros(2, 6)), torch.ones(2, 4))


# ---- filters


def test_doubling_is_the_filter_1331_inside() -> None:
    x = drawn(1, 1, 6, 6)
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 4  # of gain 2 a side
    spread = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
    spread[:, :, ::2, ::2] = x
    expected = F.conv2d(F.pad(spread, (2, 1, 2, 1)), torch.outer(line, line)[None, None])
    assert torch.allclose(resized(x, (12, 12))[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=1e-10)


def test_halving_filters_with_1331() -> None:
    half = Halving(1, 1)._half
    x = drawn(2, 3, 8, 6)
    out = half(x)
    assert out.shape == (2, 3, 4, 3)
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    expected = torch.outer(line, line) * x[1, 2, 3:7, 1:5]  # of the output at (2, 1)
    assert float(out[1, 2, 2, 1]) == pytest.approx(float(expected.sum()), rel=1e-12)
    assert torch.allclose(half(torch.ones(1, 1, 7, 9)), torch.ones(1, 1, 3, 4))


def test_halving_block_keeps_the_variance_of_its_two_branches() -> None:
    block = Halving(2, 3).double()
    x = drawn(2, 2, 6, 6)
    leaky = nn.LeakyReLU(0.2)
    branch = leaky(block._half(block.second(leaky(block.first(x)) * 2**0.5))) * 2**0.5
    assert torch.allclose(block(x), (branch + block.shortcut(block._half(x))) / 2**0.5, rtol=1e-10)


# ---- mapping, noise, skips


def test_mapping_sees_the_direction_of_z_alone() -> None:
    mapping = Mapping(5, 4, 2, 0.01).double()
    z = drawn(3, 5)
    assert torch.allclose(mapping(z), mapping(7 * z), rtol=1e-6)  # 1e-8 beside a mean square of one


def test_noise_is_drawn_in_training_and_fixed_in_eval_mode() -> None:
    layer = Layer(2, 2, (4, 4), 3)
    x, w = torch.randn(3, 2, 4, 4), torch.randn(3, 3)
    assert torch.equal(layer(x, w), layer(x, w))  # its weight starts at 0
    nn.init.constant_(layer.strength, 1.0)
    torch.manual_seed(0)
    one, two = layer(x, w), layer(x, w)
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    assert torch.equal(layer(x, w), one)  # the trainer seeds the global generator
    layer.eval()
    before = torch.get_rng_state()
    fixed = layer(x, w)
    assert torch.equal(layer(x, w), fixed) and torch.equal(torch.get_rng_state(), before)
    assert "noise" in layer.state_dict()
    with torch.no_grad():
        layer.noise += 1
    assert not torch.equal(layer(x, w), fixed)


def test_noise_differs_between_examples_and_not_between_channels() -> None:
    layer = Layer(1, 2, (4, 4), 3)
    nn.init.zeros_(layer.conv.conv.weight)
    nn.init.constant_(layer.strength, 1.0)
    out = layer(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3))
    assert torch.equal(out[:, 0], out[:, 1]) and not torch.equal(out[0], out[1])


def test_image_is_the_sum_of_every_size() -> None:
    torch.manual_seed(0)
    generator = StyleGan2(channels=2, stages=2, style_dim=4, mapping=1).up(3, (1, 8, 8)).double().eval()
    assert isinstance(generator, Generator)
    z = drawn(2, 3)
    added: list[Tensor] = []
    for to_image in generator.images:
        to_image.register_forward_hook(lambda module, given, out: added.append(out))
    for bias in generator.biases:
        nn.init.normal_(bias)
    image = generator(z)
    biased = [out + bias[:, None, None] for out, bias in zip(added, generator.biases, strict=True)]
    assert [tuple(out.shape[1:]) for out in biased] == [(1, 2, 2), (1, 4, 4), (1, 8, 8)]
    expected = resized(resized(biased[0], (4, 4)) + biased[1], (8, 8)) + biased[2]
    assert torch.allclose(image, expected, rtol=1e-10)
    assert image.shape == (2, 1, 8, 8)


def test_channels_double_with_every_halving_up_to_the_most() -> None:
    sizes, widths = StyleGan2(channels=16, most=50, stages=3)._stages((3, 32, 32))
    assert sizes == [(32, 32), (16, 16), (8, 8), (4, 4)]
    assert widths == [16, 32, 50, 50]


def test_critic_s_minibatch_statistics_can_be_left_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    for group, alone in ((4, False), (0, True)):
        critic = StyleGan2(channels=2, group=group).down((1, 8, 8), 1)
        assert torch.allclose(critic(x)[:1], critic(x[:1]), atol=1e-5) is alone
