"""Real-valued non-volume preserving transformations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.construct import NonNegative, Positive
from dgm_models.nn.coupling import Bijection, Coupling, Flatten, SplitCoupling, alternating, context_dim
from dgm_models.nn.dequantize import Dequantization, Space, codec_of, dequantized
from dgm_models.nn.flow import Chain, Flow, Transform
from dgm_models.nn.image_flow import (
    MultiScale,
    ResidualNetwork,
    Shape,
    Squeeze,
    channel_halves,
    checkerboard,
    image_shape,
    squeezed,
    squeezings,
)
from dgm_models.nn.networks import Mlp
from dgm_models.nn.normalisation import ActNorm
from dgm_models.objective import Objective
from dgm_models.protocols import DataSpec, Model

CHECKERS, CHANNELS, LAST = 3, 3, 4  # couplings of a scale before and after squeezing, and of the last scale


@dataclass(frozen=True)
class Exponential(Bijection):
    """z = x exp(s) + t, for an s that its network has bounded."""

    size: ClassVar[int] = 2

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        s = params[..., 1]
        return torch.addcmul(params[..., 0], x, s.exp()), s

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return (z - params[..., 0]) * (-params[..., 1]).exp()


class Bounded(nn.Module):
    """A network's (t, s) as (t, scale tanh(s)), one learned scale a channel, or a coordinate of a vector.

    Args:
        network: -> [B, n, ..., 2].
        shape: of the scale: [n], or [n, 1, 1] for images.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        t, s = self.network(x, context).unbind(-1)
        return torch.stack([t, self.scale * torch.tanh(s)], -1)


class _Images:
    """The couplings of images, and the scales that they make."""

    def __init__(self, width: int, blocks: int, context_dim: int) -> None:
        self.width, self.blocks, self.context_dim = width, blocks, context_dim

    def network(self, inputs: int, outputs: int, width: int) -> Bounded:
        inner = ResidualNetwork(inputs, outputs, Exponential.size, width, self.blocks, self.context_dim)
        return Bounded(inner, (outputs, 1, 1))

    def checkers(self, shape: Shape, n: int, width: int) -> list[Transform]:
        parts: list[Transform] = []
        for i in range(n):
            network = self.network(shape[0], shape[0], width)
            parts += [Coupling(checkerboard(shape, bool(i % 2)), Exponential(), network), ActNorm(shape[0])]
        return parts

    def channels(self, channels: int, n: int, width: int) -> list[Transform]:
        parts: list[Transform] = []
        for i in range(n):
            mask = channel_halves(channels, bool(i % 2))
            kept = sum(mask)
            network = self.network(kept, channels - kept, width)
            parts += [SplitCoupling(mask, Exponential(), network), ActNorm(channels)]
        return parts

    def transform(self, shape: Shape, halvings: int) -> MultiScale:
        """The scales; the networks' width doubles at every halving."""
        scales: list[Transform] = []
        shapes: list[Shape] = []
        width = self.width
        for _ in range(halvings):
            parts = self.checkers(shape, CHECKERS, width)
            shape, width = squeezed(shape), 2 * width
            scales.append(Chain(*parts, Squeeze(), *self.channels(shape[0], CHANNELS, width)))
            shapes.append(shape)
            shape = (shape[0] // 2, *shape[1:])
        if shape[1] * shape[2] > 1:
            scales.append(Chain(*self.checkers(shape, LAST, width)))
        else:  # a checkerboard of one place has no second colour
            scales.append(Chain(*self.channels(shape[0], LAST, width)))
        return MultiScale(scales, [*shapes, shape])


def real_nvp(
    data: DataSpec,
    channels: Positive = 64,
    blocks: NonNegative = 2,
    halvings: NonNegative | None = None,
    layers: Positive = 6,
    space: Space = "logit",
    dequantization: Dequantization = "uniform",
    cond: Condition | None = None,
) -> tuple[Model, Objective]:
    """RealNVP: affine couplings with checkerboard and channel masks over several scales.

    A scale has three couplings with a checkerboard, is squeezed, has three couplings of channel halves, and lets half
    of the channels go as latents; the last scale has four with a checkerboard. Vectors have couplings whose masks are
    the even and the odd coordinates.

    Source: Dinh et al. 2017, arXiv:1605.08803. Differs: after every coupling an ActNorm (Kingma and Dhariwal 2018) in
    place of batch normalisation, which couples the examples of a batch; no weight normalisation; the width doubles at
    every halving.

    Args:
        data: what is modelled.
        channels, blocks: of a coupling's network at the full size: channels, and residual blocks; for vectors units,
            and hidden layers.
        halvings: of an image's sides, one a scale; null: until the smaller would be below 4.
        layers: couplings of a vector.
        space: where stored levels are modelled; real data are standardised.
        dequantization: of stored levels; "variational" gives a bound in place of a density.
        cond: what samples are asked for; every coupling reads it.
    """
    extra, image = context_dim(cond, data), image_shape(data.shape)
    transform: Transform
    if image:
        transform = _Images(channels, blocks, extra).transform(image, squeezings(image, halvings))
    else:
        network = Mlp(width=channels, depth=max(blocks, 1), activation="silu")
        parts: list[Transform] = []
        for coupling in alternating(data.dims, layers, Exponential(), network, extra):
            coupling.network = Bounded(coupling.network, (len(coupling.moved),))
            parts += [coupling, ActNorm(data.dims)]
        transform = Flatten(Chain(*parts))
    flow = Flow(data, codec_of(data, space), transform, condition=cond)
    return dequantized(flow, dequantization, channels)
