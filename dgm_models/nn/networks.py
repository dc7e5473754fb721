"""Networks by name. Each gives two directions: data -> vector (`down`) and vector -> data (`up`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import nn

from dgm_models.construct import Choice, NonNegative, Positive, PositiveFloat
from dgm_models.nn import stylegan2
from dgm_models.nn.grid import grid_down, grid_up, halved
from dgm_models.nn.layers import Activation, Norm, activation, halvings, normalisation
from dgm_models.nn.residual import DownBlock, MeanPool, UpBlock, glorot


class Network(Choice):
    """The contract of a network's params section."""

    @classmethod
    def choices(cls) -> Mapping[str, type]:
        return {network.name: network for network in (Mlp, Conv, Dcgan, Residual, StyleGan2, Grid)}

    def places(self, shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
        """The shape that a vector of `dim` numbers about [*shape] has: where neighbours in it are neighbours in x."""
        return (dim,)

    def down(self, shape: tuple[int, ...], out_dim: int) -> nn.Module:
        """[B, *shape] -> [B, out_dim]."""
        raise NotImplementedError

    def up(self, in_dim: int, shape: tuple[int, ...]) -> nn.Module:
        """[B, in_dim] -> [B, *shape]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mlp(Network):
    """`depth` hidden layers of `width` units over the flattened event."""

    name: ClassVar[str] = "mlp"
    width: Positive = 256
    depth: Positive = 2
    activation: Activation = "leaky_relu"

    def _layers(self, in_dim: int, out_dim: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for i in range(self.depth):
            layers += [nn.Linear(in_dim if i == 0 else self.width, self.width), activation(self.activation)]
        return [*layers, nn.Linear(self.width, out_dim)]

    def down(self, shape: tuple[int, ...], out_dim: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), *self._layers(math.prod(shape), out_dim))

    def up(self, in_dim: int, shape: tuple[int, ...]) -> nn.Module:
        return nn.Sequential(*self._layers(in_dim, math.prod(shape)), nn.Unflatten(1, shape))


@dataclass(frozen=True)
class Conv(Network):
    """Convolutions of kernel 4 and stride 2 while both sides are even, channels doubling; no normalisation."""

    name: ClassVar[str] = "conv"
    channels: Positive = 32
    stages: Positive = 2
    activation: Activation = "leaky_relu"

    def _sizes(self, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        if len(shape) != 3:
            raise ValueError(f"network.name: conv takes images [C, H, W], not {shape}; use mlp")
        channels, height, width = shape
        sizes = [(channels, height, width)]
        for stage in range(self.stages):
            if height % 2 or width % 2:
                raise ValueError(
                    f"network.stages: {self.stages} halvings do not divide {shape[1]} x {shape[2]}; use at most {stage}"
                )
            height, width = height // 2, width // 2
            sizes.append((self.channels * 2**stage, height, width))
        return sizes

    def down(self, shape: tuple[int, ...], out_dim: int) -> nn.Module:
        sizes = self._sizes(shape)
        layers: list[nn.Module] = []
        for (before, *_), (after, *_) in pairwise(sizes):
            layers += [nn.Conv2d(before, after, 4, 2, 1), activation(self.activation)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(math.prod(sizes[-1]), out_dim))

    def up(self, in_dim: int, shape: tuple[int, ...]) -> nn.Module:
        sizes = self._sizes(shape)[::-1]
        layers: list[nn.Module] = [nn.Linear(in_dim, math.prod(sizes[0])), nn.Unflatten(1, sizes[0])]
        for (before, *_), (after, *_) in pairwise(sizes):
            layers += [activation(self.activation), nn.ConvTranspose2d(before, after, 4, 2, 1)]
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class Dcgan(Network):
    """Strided and transposed convolutions of kernel 4 with normalisation, for images of any size from 2 x 2.

    `up`: linear, normalisation, ReLU, then transposed convolutions, with normalisation and ReLU after all but the last.
    `down`: convolutions with normalisation after all but the first, leaky ReLU of slope 0.2, linear. Weights start as
    N(0, 0.02^2), scales of batch normalisation as N(1, 0.02^2), biases as 0.
    Source: Radford et al. 2016, section 3, arXiv:1511.06434. Differs: one `channels` for both directions, where the
    paper's generator has twice the critic's; no tanh, which belongs to the model.

    Args:
        channels: of the first halving; every further one doubles them.
        stages: halvings; null: until the smaller side is below 8 (64 -> 4, 32 -> 4, 28 -> 7, 8 -> 4).
        norm_up, norm_down: the normalisation of either direction; "batch" couples the examples of a batch, so a
            critic with a gradient penalty takes `norm_down: none` or layer.
    """

    name: ClassVar[str] = "dcgan"
    channels: Positive = 64
    stages: Positive | None = None
    norm_up: Norm = "batch"
    norm_down: Norm = "batch"

    def down(self, shape: tuple[int, ...], out_dim: int) -> nn.Module:
        sizes = halvings(shape, self.stages, self.name)
        widths = [shape[0], *(self.channels * 2**stage for stage in range(len(sizes) - 1))]
        layers: list[nn.Module] = []
        for stage, (before, after) in enumerate(pairwise(widths)):
            norm = self.norm_down if stage else "none"  # the layer that sees the data has none
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=norm == "none"), normalisation(norm, after)]
            layers += [nn.LeakyReLU(0.2)]
        layers += [nn.Flatten(), nn.Linear(widths[-1] * math.prod(sizes[-1]), out_dim)]
        return nn.Sequential(*layers).apply(_dcgan_weights)

    def up(self, in_dim: int, shape: tuple[int, ...]) -> nn.Module:
        sizes = halvings(shape, self.stages, self.name)[::-1]
        widths = [shape[0], *(self.channels * 2**stage for stage in range(len(sizes) - 1))][::-1]
        plain = self.norm_up == "none"
        layers: list[nn.Module] = [
            nn.Linear(in_dim, widths[0] * math.prod(sizes[0]), bias=plain),
            nn.Unflatten(1, (widths[0], *sizes[0])),
        ]
        for (before, after), (height, width) in zip(pairwise(widths), sizes[1:], strict=True):
            last = (height, width) == sizes[-1]
            odd = (height % 2, width % 2)
            layers += [normalisation(self.norm_up, before), nn.ReLU()]
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, output_padding=odd, bias=plain or last)]
        return nn.Sequential(*layers).apply(_dcgan_weights)


@dataclass(frozen=True)
class Grid(Network):
    """Convolutions between an image and a smaller grid, whose [channels, h, w] are the vector: it keeps its places.

    Args:
        width, blocks: channels and residual blocks.
        halvings: of both sides.
    """

    name: ClassVar[str] = "grid"
    width: Positive = 64
    blocks: NonNegative = 1
    halvings: Positive = 1

    def places(self, shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
        if len(shape) != 3:
            raise ValueError(f"network.name: grid takes images [C, H, W], not {shape}; use mlp")
        height, width = halved(shape, self.halvings)
        if dim % (height * width):
            raise ValueError(
                f"network: {dim} numbers are no grid of {height} x {width}; use {height * width} or a multiple"
            )
        return dim // (height * width), height, width

    def down(self, shape: tuple[int, ...], out_dim: int) -> nn.Module:
        channels = self.places(shape, out_dim)[0]
        return nn.Sequential(grid_down(shape[0], self.width, self.halvings, self.blocks, channels), nn.Flatten())

    def up(self, in_dim: int, shape: tuple[int, ...]) -> nn.Module:
        places = self.places(shape, in_dim)
        return nn.Sequential(
            nn.Unflatten(1, places), grid_up(places[0], self.width, self.halvings, self.blocks, shape[0])
        )


def _dcgan_weights(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0.0, 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


@dataclass(frozen=True)
class Residual(Network):
    """Residual blocks with nearest upsampling and mean pooling, for images of any size from 2 x 2.

    `up`: linear, a block for every doubling, normalisation, ReLU, 3x3. `down`: a block for every halving, blocks that
    keep the size, ReLU, the mean over all places, linear. The channels are the same at every size.
    Source: Gulrajani et al. 2017, appendix C, arXiv:1704.00028; Miyato et al. 2018, appendix B.4, arXiv:1802.05957,
    whose order in the blocks and initial weights these are. Differs: SNGAN sums over the places and has 256 channels in
    its generator; neither normalises the last block's input in the critic. The critic of both at 32 x 32 is
    `{down_stages: 2, blocks: 2}`.

    Args:
        channels: of every block.
        stages: doublings, and halvings; null: until the smaller side is below 8 (32 -> 4, 28 -> 7, 8 -> 4).
        down_stages: halvings where they are not as many.
        blocks: blocks of `down` after the last halving.
        norm_up, norm_down: the normalisation of either direction; "batch" couples the examples of a batch.
    """

    name: ClassVar[str] = "residual"
    channels: Positive = 128
    stages: Positive | None = None
    down_stages: Positive | None = None
    blocks: NonNegative = 2
    norm_up: Norm = "batch"
    norm_down: Norm = "none"

    def down(self, shape: tuple[int, ...], out_dim: int) -> nn.Module:
        sizes = halvings(shape, self.down_stages or self.stages, self.name)
        width, norm = self.channels, self.norm_down
        layers: list[nn.Module] = [DownBlock(shape[0], width, sizes[1], norm, first=True)]
        layers += [DownBlock(width, width, size, norm) for size in sizes[2:]]
        layers += [DownBlock(width, width, None, norm) for _ in range(self.blocks)]
        return nn.Sequential(*layers, nn.ReLU(), MeanPool(), glorot(nn.Linear(width, out_dim), 1.0))

    def up(self, in_dim: int, shape: tuple[int, ...]) -> nn.Module:
        sizes = halvings(shape, self.stages, self.name)[::-1]
        width, norm = self.channels, self.norm_up
        layers: list[nn.Module] = [
            glorot(nn.Linear(in_dim, width * math.prod(sizes[0])), 1.0),
            nn.Unflatten(1, (width, *sizes[0])),
        ]
        layers += [UpBlock(width, width, size, norm) for size in sizes[1:]]
        layers += [normalisation(norm, width), nn.ReLU(), glorot(nn.Conv2d(width, shape[0], 3, padding=1), 1.0)]
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class StyleGan2(Network):
    """StyleGAN2's generator and critic, for images of any size from 2 x 2: see `dgm_models.nn.stylegan2`.

    The noise of `up` is random in training and fixed in eval mode, where a sample is a function of z. `down` holds the
    standard deviation of minibatches, which couples the examples of a batch.
    Source: Karras et al. 2020, arXiv:1912.04958.

    Args:
        channels: at the full size; every halving doubles them.
        most: channels at any size, at most.
        stages: halvings; null: until the smaller side is below 8 (64 -> 4, 32 -> 4, 28 -> 7, 8 -> 4).
        style_dim: of w.
        mapping: layers of z -> w.
        mapping_rate: what the learning rate is multiplied by in them.
        group: examples of a minibatch whose standard deviation the critic sees; 0 for none.
    """

    name: ClassVar[str] = "stylegan2"
    channels: Positive = 64
    most: Positive = 512
    stages: Positive | None = None
    style_dim: Positive = 512
    mapping: Positive = 8
    mapping_rate: PositiveFloat = 0.01
    group: NonNegative = 4

    def _stages(self, shape: tuple[int, ...]) -> tuple[list[tuple[int, int]], list[int]]:
        sizes = halvings(shape, self.stages, self.name)
        return sizes, [min(self.channels * 2**stage, self.most) for stage in range(len(sizes))]

    def down(self, shape: tuple[int, ...], out_dim: int) -> nn.Module:
        sizes, widths = self._stages(shape)
        return stylegan2.Critic(shape[0], sizes, widths, self.group, out_dim)

    def up(self, in_dim: int, shape: tuple[int, ...]) -> nn.Module:
        sizes, widths = self._stages(shape)
        mapping = stylegan2.Mapping(in_dim, self.style_dim, self.mapping, self.mapping_rate)
        return stylegan2.Generator(mapping, self.style_dim, sizes[::-1], widths[::-1], shape[0])
