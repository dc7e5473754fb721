"""PixelCNN: residual blocks of masked convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.construct import Positive, Range
from dgm_models.nn.masked_convolution import Asked, CausalConv2d, MaskedConv2d, Raster, Reach, View, half, shares
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.protocols import DataSpec


class Block(nn.Module):
    """relu, 1x1 to half the features, relu, k x k, relu, 1x1 back, added to the input; all of type B."""

    def __init__(self, width: int, channels: int, side: int, planes: int) -> None:
        super().__init__()
        wide, narrow = shares(2 * width, channels), shares(width, channels)
        self.down = MaskedConv2d(wide, narrow, "B")
        self.look = MaskedConv2d(narrow, narrow, "B", Reach(side, 0, side, side))
        self.up = MaskedConv2d(narrow, wide, "B")
        self.asked = Asked(planes, width)

    def forward(self, x: Tensor, planes: Tensor | None, view: View) -> Tensor:
        seen = self.look(F.relu(self.down(F.relu(x), view)), view)
        out: Tensor = x + self.up(F.relu(self.asked(seen, planes, view)), view)
        return out


class PixelCnn(Raster):
    """A convolution of type A, which no residual connection passes by, blocks of type B, and two 1x1 of type B.

    Args:
        data, condition: as `Raster`.
        width: features within a block; twice as many between blocks.
        blocks: how many.
        first_kernel, kernel: sides of the first convolution and of those in blocks, odd.
    Raises: ValueError for fewer features than channels, and an even kernel.
    """

    def __init__(
        self, data: DataSpec, condition: Condition | None, width: int, blocks: int, first_kernel: int, kernel: int
    ) -> None:
        super().__init__(data, condition)
        self.check_width(width)
        side, wide = half("first_kernel", first_kernel), shares(2 * width, self.channels)
        self.first = MaskedConv2d(self.entries, wide, "A", Reach(side, 0, side, side))
        self.blocks = nn.ModuleList(
            Block(width, self.channels, half("kernel", kernel), self.planes) for _ in range(blocks)
        )
        self.head = MaskedConv2d(wide, wide, "B")
        self.last = MaskedConv2d(wide, shares(self.num_outputs, self.channels), "B")

    def readers(self) -> Iterable[CausalConv2d]:
        return (self.first,)

    def outputs(self, x: Tensor, above: Sequence[Tensor], planes: Tensor | None, view: View) -> Tensor:
        h = self.first(x, view)
        for block in self.blocks:
            h = block(h, planes, view)
        found: Tensor = self.last(F.relu(self.head(F.relu(h), view)), view)
        return found


def pixel_cnn(
    data: DataSpec,
    width: Positive = 64,
    blocks: Positive = 15,
    first_kernel: Annotated[int, Range(3)] = 7,
    kernel: Positive = 3,
    cond: Condition | None = None,
) -> tuple[PixelCnn, MaximumLikelihood]:
    """PixelCNN over images and grids of codes; a value is categorical, or Bernoulli for two levels.

    Its receptive field has a blind spot: of the rows above it sees, to the right, no further than it sees upwards.

    Source: van den Oord et al. 2016, section 3.4 and table 1, arXiv:1601.06759. Differs: a plane of ones enters beside
    the pixels; a condition adds a bias in every block.

    Args:
        data: what is modelled.
        width: features within a block; twice as many between blocks.
        blocks: residual blocks.
        first_kernel, kernel: sides of the first convolution and of those in blocks, odd.
        cond: what a sample is asked for.
    """
    return PixelCnn(data, cond, width, blocks, first_kernel, kernel), MaximumLikelihood()
