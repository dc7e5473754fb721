"""Parts of flows over images [C, H, W]: squeezing, several scales, masks, a coupling's network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.nn.coupling import zero_last
from dgm_models.nn.flow import Transform

Shape = tuple[int, int, int]
LEAST_SIDE = 4  # a side of the last scale, unless halvings are asked for


def image_shape(shape: tuple[int, ...]) -> Shape | None:
    """An event's shape if it is [C, H, W] with more than one place; None for what is taken for a vector."""
    if len(shape) != 3 or shape[1] * shape[2] == 1:
        return None
    return shape[0], shape[1], shape[2]


def squeezings(shape: Shape, wanted: int | None) -> int:
    """How often both sides are halved: `wanted`, or by default until the smaller would be below 4.

    Raises: ValueError when they cannot be halved so often.
    """
    (height, width), most, default = shape[1:], 0, 0
    while height % 2 == 0 and width % 2 == 0:
        height, width, most = height // 2, width // 2, most + 1
        default += min(height, width) >= LEAST_SIDE
    if wanted is not None and wanted > most:
        raise ValueError(f"halvings: {wanted}; {shape[1]} x {shape[2]} can be halved {most} times")
    return default if wanted is None else wanted


def squeezed(shape: Shape) -> Shape:
    return 4 * shape[0], shape[1] // 2, shape[2] // 2


class Squeeze(Transform):
    """[C, H, W] -> [4 C, H/2, W/2]: the four places of every 2 x 2 square become channels; log|det| = 0.

    Source: Dinh et al. 2017, section 3.6, arXiv:1605.08803.
    """

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return F.pixel_shuffle(z, 2)


class Reshape(Transform):
    """Events of one shape as events of another; log|det| = 0.

    Args:
        before, after: the two shapes; `inverse` takes events of any shape of that size.
    """

    def __init__(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.reshape(len(x), *self.after), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return z.reshape(len(z), *self.before)


class MultiScale(Transform):
    """Scales one after another; after each but the last the second half of the channels are latents.

    The latents are vectors [D]: those of the first scale first.
    Source: Dinh et al. 2017, section 3.6, arXiv:1605.08803.

    Args:
        scales: transforms of images.
        shapes: what each of them gives: [C, H, W], C even but for the last.
    """

    def __init__(self, scales: Sequence[Transform], shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(scales)
        self.shapes = [(c // 2, h, w) for c, h, w in shapes[:-1]] + [shapes[-1]]

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        total, latents = x.new_zeros(len(x)), []
        for i, scale in enumerate(self.scales):
            x, log_det = scale(x, context)
            total = total + log_det
            if i + 1 < len(self.scales):
                x, done = x.chunk(2, 1)
                latents.append(done.flatten(1))
        return torch.cat([*latents, x.flatten(1)], 1), total

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        parts = torch.split(z.flatten(1), [math.prod(shape) for shape in self.shapes], 1)
        images = [part.reshape(len(z), *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        x = images[-1]
        for i, scale in reversed(list(enumerate(self.scales))):
            assert isinstance(scale, Transform)
            x = scale.inverse(x if i + 1 == len(images) else torch.cat([x, images[i]], 1), context)
        return x


def checkerboard(shape: Shape, odd: bool) -> Tensor:
    """[C, H, W] bool: True where row + column is odd, or where it is even."""
    channels, height, width = shape
    place = torch.arange(height)[:, None] + torch.arange(width)
    return (place % 2 == int(odd)).expand(channels, -1, -1).contiguous()


def channel_halves(channels: int, second: bool) -> list[bool]:
    """For every channel, whether it is of the second half, or of the first."""
    return [(channel >= channels // 2) == second for channel in range(channels)]


def with_planes(x: Tensor, context: Tensor | None) -> Tensor:
    """x [B, C, H, W] with a context as further channels: [B, K, H, W], or [B, K], which is the same at all places."""
    if context is None:
        return x
    if context.ndim == 2:
        context = context[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat([x, context.to(x.dtype)], 1)


def as_params(h: Tensor, size: int) -> Tensor:
    """[B, outputs * size, H, W] -> a bijection's parameters [B, outputs, H, W, size]."""
    return h.reshape(len(h), -1, size, *h.shape[2:]).movedim(2, -1)


class ResidualNetwork(nn.Module):
    """A coupling's network over images, 0 at initialisation: 3x3, residual blocks, relu, 3x3.

    [B, inputs, H, W] and the context ([B, K] or [B, K, H, W]) -> [B, outputs, H, W, size].
    Source: Dinh et al. 2017, section 4.1, arXiv:1605.08803. Differs: a block is relu, 3x3, relu, 3x3 without
    normalisation, which couples the examples of a batch there; no skip connections to the end.

    Args:
        inputs, outputs: channels that pass as they are, and that are mapped.
        size: parameters of one mapped value.
        width, blocks: channels and number of the residual blocks.
        context_dim: K, 0 without a context.
    """

    def __init__(self, inputs: int, outputs: int, size: int, width: int, blocks: int, context_dim: int) -> None:
        super().__init__()
        self.size = size
        self.first = nn.Conv2d(inputs + context_dim, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
            )
            for _ in range(blocks)
        )
        self.last = zero_last(nn.Sequential(nn.ReLU(), nn.Conv2d(width, outputs * size, 3, padding=1)))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = self.first(with_planes(x, context))
        for block in self.blocks:
            h = h + block(h)
        return as_params(self.last(h), self.size)
