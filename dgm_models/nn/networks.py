"""Networks by name. Each gives two directions: data -> vector (`down`) and vector -> data (`up`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from torch import nn

from dgm_models.construct import Choice, Positive

Activation = Literal["relu", "leaky_relu", "silu", "gelu", "tanh"]


def activation(name: Activation) -> nn.Module:
    if name == "leaky_relu":
        return nn.LeakyReLU(0.2)
    table: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}
    return table[name]()


class Network(Choice):
    """The contract of a network's params section."""

    @classmethod
    def choices(cls) -> Mapping[str, type]:
        return {network.name: network for network in (Mlp, Conv)}

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
        return nn.Sequential(nn.Flatten(), *self._layers(_size(shape), out_dim))

    def up(self, in_dim: int, shape: tuple[int, ...]) -> nn.Module:
        return nn.Sequential(*self._layers(in_dim, _size(shape)), nn.Unflatten(1, shape))


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
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(_size(sizes[-1]), out_dim))

    def up(self, in_dim: int, shape: tuple[int, ...]) -> nn.Module:
        sizes = self._sizes(shape)[::-1]
        layers: list[nn.Module] = [nn.Linear(in_dim, _size(sizes[0])), nn.Unflatten(1, sizes[0])]
        for (before, *_), (after, *_) in pairwise(sizes):
            layers += [activation(self.activation), nn.ConvTranspose2d(before, after, 4, 2, 1)]
        return nn.Sequential(*layers)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
