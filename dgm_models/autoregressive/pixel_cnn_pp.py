"""PixelCNN++: shifted convolutions, and a discretised mixture of logistics over a pixel's channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.construct import Fraction, Positive
from dgm_models.nn.masked_convolution import Asked, CausalConv2d, Raster, Reach, View
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.ops.likelihoods import LogisticMixture
from dgm_models.protocols import DataSpec

DOWN = Reach(up=1, left=1, right=1)  # of a stream whose features at row i know the rows above i
DOWN_RIGHT = Reach(up=1, left=1)  # of a stream whose features at (i, j) know the pixels before


def both_signs(x: Tensor) -> Tensor:
    """elu of x and of -x: [B, D, ...] -> [B, 2 D, ...]."""
    return F.elu(torch.cat([x, -x], 1))


class Block(nn.Module):
    """x + a sigmoid(b), where a and b come of two convolutions with dropout between them.

    Args:
        width: features.
        beside: features of a second input, 0 for none.
        reach: of both convolutions.
        planes: of the condition.
        dropout: share of features set to 0 in training.
    """

    def __init__(self, width: int, beside: int, reach: Reach, planes: int, dropout: float) -> None:
        super().__init__()
        self.first = CausalConv2d(2 * width, width, reach)
        self.second = CausalConv2d(2 * width, 2 * width, reach)
        self.beside = CausalConv2d(2 * beside, width) if beside else None
        self.asked = Asked(planes, 2 * width)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.second.weight.mul_(0.1)  # a block begins near the identity

    def forward(self, x: Tensor, beside: Tensor | None, planes: Tensor | None, view: View) -> Tensor:
        h = self.first(both_signs(x), view)
        if self.beside is not None and beside is not None:
            h = h + self.beside(both_signs(beside), view)
        value, opening = self.asked(self.second(self.dropout(both_signs(h)), view), planes, view).chunk(2, 1)
        out: Tensor = x + value * opening.sigmoid()
        return out


class PixelCnnPp(Raster):
    """Two streams of blocks, `down` (rows above) and `right` (pixels before), the second half joined to the first.

    Args:
        data, condition: as `Raster`.
        width: features of either stream.
        blocks: of either half of either stream.
        components: of the mixture.
        dropout: share of features set to 0 in training.
    """

    def __init__(
        self, data: DataSpec, condition: Condition | None, width: int, blocks: int, components: int, dropout: float
    ) -> None:
        assert data.levels is not None
        values = data.shape[0] if len(data.shape) == 3 else 1
        super().__init__(data, condition, LogisticMixture(data.levels, components, values))
        before = len(self.entries)

        def half(beside: int, reach: Reach) -> nn.ModuleList:
            return nn.ModuleList(Block(width, beside, reach, self.planes, dropout) for _ in range(blocks))

        self.down_first = CausalConv2d(before, width, Reach(up=2, low=1, left=1, right=1))
        self.down = half(0, DOWN)
        self.down_back = half(width, DOWN)
        self.right_above = CausalConv2d(before, width, Reach(up=1, low=1, left=1, right=1))
        self.right_left = CausalConv2d(before, width, Reach(up=1, left=1, right=-1))
        self.right = half(width, DOWN_RIGHT)
        self.right_back = half(2 * width, DOWN_RIGHT)
        self.last = CausalConv2d(width, self.num_outputs)

    def readers(self) -> Iterable[CausalConv2d]:
        return (self.down_first, self.right_above, self.right_left)

    def above(self, x: Tensor, planes: Tensor | None, view: View) -> Sequence[Tensor]:
        """The down stream after every block; its last block's features, and those that the right stream takes."""
        h = self.down_first(x, view)
        met, found = [h], []
        for block in self.down:
            h = block(h, None, planes, view)
            met.append(h)
            found.append(h)
        met.pop()
        for block in self.down_back:
            h = block(h, met.pop(), planes, view)
            found.append(h)
        return found

    def outputs(self, x: Tensor, above: Sequence[Tensor], planes: Tensor | None, view: View) -> Tensor:
        h = self.right_above(x, view) + self.right_left(x, view)
        met, from_down = [h], iter(above)
        for block in self.right:
            h = block(h, next(from_down), planes, view)
            met.append(h)
        met.pop()
        for block in self.right_back:
            h = block(h, torch.cat([next(from_down), met.pop()], 1), planes, view)
        found: Tensor = self.last(F.elu(h), view)
        return found


def pixel_cnn_pp(
    data: DataSpec,
    width: Positive = 64,
    blocks: Positive = 5,
    components: Positive = 10,
    dropout: Fraction = 0.5,
    cond: Condition | None = None,
) -> tuple[PixelCnnPp, MaximumLikelihood]:
    """PixelCNN++ over images and grids of codes: a pixel's channels are drawn together.

    Source: Salimans et al. 2017, arXiv:1701.05517. Differs: one resolution, without the paper's two halvings and their
    strided convolutions; plain weights in place of normalised ones with an initialisation from data; samples take
    the drawn level of a channel, not its value before rounding, into the means of the next, as the density does.

    Args:
        data: what is modelled.
        width: features of either stream.
        blocks: of either half of either stream.
        components: of the mixture.
        dropout: share of features set to 0 in training, drawn by torch's generator.
        cond: what a sample is asked for: a bias in every block.
    """
    return PixelCnnPp(data, cond, width, blocks, components, dropout), MaximumLikelihood()
