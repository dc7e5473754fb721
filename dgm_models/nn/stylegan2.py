"""The networks of StyleGAN2: equalised layers, modulated convolutions, mapping, synthesis, critic.

Source: Karras et al. 2020, arXiv:1912.04958. Differs: filters [1, 3, 3, 1] repeat the border where the paper's see
zeros; the filter comes before a convolution that doubles an image and after one that halves it, which commute but
for the border; no style mixing, no path length regularisation, no truncation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.nn.tricks import MinibatchStd

Size = tuple[int, int]


def leaky(x: Tensor) -> Tensor:
    """sqrt 2 times the leaky ReLU of slope 0.2."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2.0)


class EqualLinear(nn.Module):
    """A linear layer whose weight is divided by its initial standard deviation in the parameter, not in the function.

    y = rate (W / sqrt(in_dim) x + b), W ~ N(0, 1) / rate: Adam moves all layers at one relative speed, which `rate`
    multiplies.

    Args:
        in_dim, out_dim: sizes.
        rate: multiplies the learning rate.
        bias: the initial value of rate b.
    """

    def __init__(self, in_dim: int, out_dim: int, rate: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.gain, self.rate = rate / math.sqrt(in_dim), rate
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / rate)
        self.bias = nn.Parameter(torch.full((out_dim,), bias / rate))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_dim] -> [B, out_dim]."""
        return F.linear(x, self.weight * self.gain, self.bias * self.rate)


class EqualConv(nn.Module):
    """A convolution of stride 1 that keeps the size, with W / sqrt(in channels k^2), W ~ N(0, 1)."""

    def __init__(self, before: int, after: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.gain = 1 / math.sqrt(before * kernel**2)
        self.weight = nn.Parameter(torch.randn(after, before, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(after)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, after, h, w]."""
        return F.conv2d(x, self.weight * self.gain, self.bias, padding=self.weight.shape[2] // 2)


class ModulatedConv(nn.Module):
    """A convolution whose weight is scaled by the style of each example, w'_oik = s_i w_oik, and demodulated.

    Demodulation divides output channel o by sqrt(sum_ik w'_oik^2 + 1e-8): inputs of variance 1 give outputs of
    variance 1. Scaling the inputs by s and the outputs by the demodulation is the same function as one weight an
    example, without a convolution in B groups.
    Source: Karras et al. 2020, equations 1 and 3.

    Args:
        before, after: channels.
        kernel: size.
        style_dim: of w.
        demodulate: whether to divide.
    """

    def __init__(self, before: int, after: int, kernel: int, style_dim: int, demodulate: bool = True) -> None:
        super().__init__()
        self.style = EqualLinear(style_dim, before, bias=1.0)
        self.conv = EqualConv(before, after, kernel, bias=False)
        self.demodulate = demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [B, before, h, w], w [B, style_dim] -> [B, after, h, w]."""
        scale = self.style(w)  # [B, before]
        out: Tensor = self.conv(x * scale[:, :, None, None])
        if self.demodulate:
            squares = (self.conv.weight * self.conv.gain).square().sum((2, 3))  # [after, before]
            out = out * (scale.square() @ squares.T + 1e-8).rsqrt()[:, :, None, None]
        return out


class Layer(nn.Module):
    """Doubles the image where its size grows, then: modulated 3x3 convolution, noise, bias, leaky ReLU.

    In training the noise is drawn from torch's global generator, which the trainer seeds; in eval mode it is a buffer,
    so that a sample is a function of z.
    """

    noise: Tensor

    def __init__(self, before: int, after: int, size: Size, style_dim: int) -> None:
        super().__init__()
        self.size = size
        self.conv = ModulatedConv(before, after, 3, style_dim)
        self.bias = nn.Parameter(torch.zeros(after))
        self.strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(*size))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [B, before, h, w], w [B, style_dim] -> [B, after, *size]."""
        x = self.conv(resized(x, self.size), w)
        noise = torch.randn(len(x), 1, *self.size, device=x.device, dtype=x.dtype) if self.training else self.noise
        return leaky(x + self.strength * noise + self.bias[:, None, None])


def resized(x: Tensor, size: Size) -> Tensor:
    """[B, C, h, w] -> [B, C, *size]: bilinear, which is the filter [1, 3, 3, 1] where the size doubles."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


class Mapping(nn.Module):
    """z of mean square 1 -> w, by `depth` equalised layers with leaky ReLU, at `rate` times the learning rate."""

    def __init__(self, in_dim: int, style_dim: int, depth: int, rate: float) -> None:
        super().__init__()
        sizes = [in_dim] + [style_dim] * depth
        self.layers = nn.ModuleList(EqualLinear(sizes[i], sizes[i + 1], rate) for i in range(depth))

    def forward(self, z: Tensor) -> Tensor:
        """[B, in_dim] -> [B, style_dim]."""
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.layers:
            w = leaky(layer(w))
        return w


class Generator(nn.Module):
    """Mapping, then synthesis from a learned constant; the image is the sum of what each size adds (skip).

    Args:
        mapping: z -> w.
        style_dim: of w.
        sizes: height and width of each stage, the smallest first.
        widths: channels of each stage.
        channels: of the image.
    """

    def __init__(
        self, mapping: nn.Module, style_dim: int, sizes: Sequence[Size], widths: Sequence[int], channels: int
    ) -> None:
        super().__init__()
        self.mapping = mapping
        self.constant = nn.Parameter(torch.randn(widths[0], *sizes[0]))
        self.layers, self.images = nn.ModuleList(), nn.ModuleList()
        self.biases = nn.ParameterList()
        for stage, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            layers = [Layer(width, width, size, style_dim)]
            if stage:
                layers.insert(0, Layer(widths[stage - 1], width, size, style_dim))
            self.layers.append(nn.ModuleList(layers))
            self.images.append(ModulatedConv(width, channels, 1, style_dim, demodulate=False))
            self.biases.append(nn.Parameter(torch.zeros(channels)))

    def forward(self, z: Tensor) -> Tensor:
        """[B, in_dim] -> [B, channels, H, W], not bounded."""
        w = self.mapping(z)
        x = self.constant.expand(len(z), -1, -1, -1)
        image: Tensor | None = None
        for layers, to_image, bias in zip(self.layers, self.images, self.biases, strict=True):
            assert isinstance(layers, nn.ModuleList)
            for layer in layers:
                x = layer(x, w)
            added = to_image(x, w) + bias[:, None, None]
            image = added if image is None else resized(image, (x.shape[2], x.shape[3])) + added
        assert image is not None
        return image


class Halving(nn.Module):
    """(3x3, leaky, 3x3, half, leaky + 1x1 of the half) / sqrt 2."""

    kernel: Tensor

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = EqualConv(before, before, 3)
        self.second = EqualConv(before, after, 3)
        self.shortcut = EqualConv(before, after, 1, bias=False)
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(line, line)[None, None], persistent=False)

    def _half(self, x: Tensor) -> Tensor:
        planes = F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")  # [B C, 1, h + 2, w + 2]
        half = F.conv2d(planes, self.kernel.to(x.dtype), stride=2)
        return half.reshape(*x.shape[:2], *half.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, after, h // 2, w // 2]."""
        out = leaky(self._half(self.second(leaky(self.first(x)))))
        skip: Tensor = self.shortcut(self._half(x))
        return (out + skip) * math.sqrt(0.5)


class Critic(nn.Module):
    """1x1 convolution, halvings, minibatch standard deviation, 3x3 convolution, two linear layers.

    Args:
        channels: of the image.
        sizes: height and width of each stage, the largest first.
        widths: channels of each stage.
        group: of the minibatch standard deviation; 0 leaves it out.
        out_dim: of the output.
    """

    def __init__(self, channels: int, sizes: Sequence[Size], widths: Sequence[int], group: int, out_dim: int) -> None:
        super().__init__()
        self.start = EqualConv(channels, widths[0], 1)
        self.halvings = nn.Sequential(*(Halving(widths[i], widths[i + 1]) for i in range(len(widths) - 1)))
        self.statistics = MinibatchStd(group) if group else nn.Identity()
        last = widths[-1]
        self.end = EqualConv(last + 1 if group else last, last, 3)
        self.hidden = EqualLinear(last * math.prod(sizes[-1]), last)
        self.output = EqualLinear(last, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, out_dim]."""
        h = self.statistics(self.halvings(leaky(self.start(x))))
        out: Tensor = self.output(leaky(self.hidden(leaky(self.end(h)).flatten(1))))
        return out
