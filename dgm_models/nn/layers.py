"""What the networks are made of: activations and normalisations by name, and the sizes of their stages."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

Activation = Literal["relu", "leaky_relu", "silu", "gelu", "tanh"]
Norm = Literal["none", "batch", "layer", "group"]


def activation(name: Activation) -> nn.Module:
    if name == "leaky_relu":
        return nn.LeakyReLU(0.2)
    table: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}
    return table[name]()


def normalisation(name: Norm, channels: int) -> nn.Module:
    """Of [B, channels, H, W]: batch over B, H, W; layer over C, H, W; group over up to 32 parts of C, H, W; none.

    Batch normalisation couples the examples of a batch: a penalty on the slope at one example needs another one.
    """
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "layer":
        return nn.GroupNorm(1, channels)
    if name == "group":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    return nn.Identity()


def halvings(shape: tuple[int, ...], stages: int | None, name: str) -> list[tuple[int, int]]:
    """Height and width before each stage and after the last: [(28, 28), (14, 14), (7, 7)].

    An odd side loses a row: 7 becomes 3, and 3 becomes 7 on the way back.

    Args:
        shape: of an image [C, H, W].
        stages: how many, or None: until the smaller side is below 8, and at least one.
        name: the network's, for messages.
    Raises: ValueError for what is no image, and for more stages than there are halvings.
    """
    if len(shape) != 3:
        raise ValueError(f"network.name: {name} takes images [C, H, W], not {shape}; use mlp")
    height, width = shape[1:]
    most = min(height, width).bit_length() - 1
    if not most:
        raise ValueError(f"network.name: {name} halves height and width, which {height} x {width} cannot be; use mlp")
    if stages is None:
        stages = max(1, most - 2)
    if stages > most:
        raise ValueError(f"network.stages: {height} x {width} cannot be halved {stages} times; use at most {most}")
    return [(height >> stage, width >> stage) for stage in range(stages + 1)]
