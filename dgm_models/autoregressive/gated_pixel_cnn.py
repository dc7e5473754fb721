"""Gated PixelCNN: a vertical and a horizontal stack, without a blind spot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.construct import NonNegative, Positive, Range
from dgm_models.nn.masked_convolution import Asked, CausalConv2d, MaskedConv2d, Raster, Reach, View, half, shares
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.protocols import DataSpec


def gate(x: Tensor) -> Tensor:
    """[B, 2 D, ...] -> [B, D, ...]: tanh of the first half times the sigmoid of the second."""
    value, opening = x.chunk(2, 1)
    return value.tanh() * opening.sigmoid()


class Vertical(nn.Module):
    """A layer of the stack that sees whole rows: those above, not its own.

    Args:
        before, width: features of its input and output.
        reach: in the first layer the rows above alone, whose features later layers may see in their own row.
        planes: of the condition.
    """

    def __init__(self, before: int, width: int, reach: Reach, planes: int) -> None:
        super().__init__()
        self.look = CausalConv2d(before, 2 * width, reach)
        self.asked = Asked(planes, 2 * width)
        self.across = CausalConv2d(2 * width, 2 * width)

    def forward(self, v: Tensor, planes: Tensor | None, view: View) -> tuple[Tensor, Tensor]:
        """Its output [B, width, h, w], and what the horizontal stack adds [B, 2 width, h, w]."""
        seen = self.asked(self.look(v, view), planes, view)
        return gate(seen), self.across(seen, view)


class Horizontal(nn.Module):
    """A layer of the stack that sees its own row to the left, and what the vertical stack hands over.

    The first layer (type A) has no residual connection: its input is the pixel that is to be drawn.
    """

    def __init__(self, before: Tensor, width: int, channels: int, side: int, planes: int, first: bool) -> None:
        super().__init__()
        features = shares(width, channels)
        both = torch.cat([features, features])  # the gate's halves
        self.look = MaskedConv2d(before, both, "A" if first else "B", Reach(left=side))
        self.asked = Asked(planes, 2 * width)
        self.out = MaskedConv2d(features, features, "B")
        self.first = first

    def forward(self, h: Tensor, above: Tensor, planes: Tensor | None, view: View) -> Tensor:
        out: Tensor = self.out(gate(self.asked(self.look(h, view) + above, planes, view)), view)
        return out if self.first else h + out


class GatedPixelCnn(Raster):
    """The stacks, and two 1x1 of type B.

    Args:
        data, condition: as `Raster`.
        width: features of either stack.
        blocks: layers after the first.
        first_kernel, kernel: sides of the first layer's convolutions and of the others', odd.
    Raises: ValueError for fewer features than channels, and an even kernel.
    """

    def __init__(
        self, data: DataSpec, condition: Condition | None, width: int, blocks: int, first_kernel: int, kernel: int
    ) -> None:
        super().__init__(data, condition)
        self.check_width(width)
        wide, side, features = half("first_kernel", first_kernel), half("kernel", kernel), shares(width, self.channels)
        self.vertical = nn.ModuleList([Vertical(len(self.entries), width, Reach(wide, 1, wide, wide), self.planes)])
        self.horizontal = nn.ModuleList([Horizontal(self.entries, width, self.channels, wide, self.planes, True)])
        for _ in range(blocks):
            self.vertical.append(Vertical(width, width, Reach(side, 0, side, side), self.planes))
            self.horizontal.append(Horizontal(features, width, self.channels, side, self.planes, False))
        self.head = MaskedConv2d(features, features, "B")
        self.last = MaskedConv2d(features, shares(self.num_outputs, self.channels), "B")

    def readers(self) -> Iterable[CausalConv2d]:
        for layer in (self.vertical[0], self.horizontal[0]):
            assert isinstance(layer, Vertical | Horizontal)
            yield layer.look

    def above(self, x: Tensor, planes: Tensor | None, view: View) -> Sequence[Tensor]:
        found, v = [], x
        for layer in self.vertical:
            v, across = layer(v, planes, view)
            found.append(across)
        return found

    def outputs(self, x: Tensor, above: Sequence[Tensor], planes: Tensor | None, view: View) -> Tensor:
        h = x
        for layer, across in zip(self.horizontal, above, strict=True):
            h = layer(h, across, planes, view)
        found: Tensor = self.last(F.relu(self.head(F.relu(h), view)), view)
        return found


def gated_pixel_cnn(
    data: DataSpec,
    width: Positive = 64,
    blocks: NonNegative = 10,
    first_kernel: Annotated[int, Range(3)] = 7,
    kernel: Positive = 3,
    cond: Condition | None = None,
) -> tuple[GatedPixelCnn, MaximumLikelihood]:
    """Gated PixelCNN over images and grids of codes; a value is categorical, or Bernoulli for two levels.

    It sees every pixel before, as far as its kernels reach. In every layer a label is a bias, and an image is seen
    through a 1x1 convolution.

    Source: van den Oord et al. 2016, sections 2.2 to 2.4, arXiv:1606.05328. Differs: a plane of ones enters beside the
    pixels.

    Args:
        data: what is modelled.
        width: features of either stack.
        blocks: layers after the first.
        first_kernel, kernel: sides of the first layer's convolutions and of the others', odd.
        cond: what a sample is asked for.
    """
    return GatedPixelCnn(data, cond, width, blocks, first_kernel, kernel), MaximumLikelihood()
