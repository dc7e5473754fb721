"""PixelRNN: recurrent layers over the rows or over the diagonals of an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.construct import Positive, Range
from dgm_models.nn.masked_convolution import (
    ABOVE,
    Asked,
    CausalConv2d,
    MaskedConv2d,
    Raster,
    Reach,
    View,
    half,
    shares,
)
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.protocols import DataSpec

Form = Literal["row_lstm", "diagonal_bilstm"]
LEFT = Reach(left=1, right=-1)
CORNER = Reach(up=1, left=1)


def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Gates [B, 4 D, ...] (output, forget, input, content) and cells [B, D, ...] -> states and cells."""
    output, forget, taken, content = gates.chunk(4, 1)
    c = forget.sigmoid() * c + taken.sigmoid() * content.tanh()
    return output.sigmoid() * c.tanh(), c


class RowLstm(nn.Module):
    """States of a row come from those of the row above, from k of them each, and from the row's input to the left.

    Args:
        width: D, features of the states; 2 D are read and added to.
        channels: of the image.
        side: how far the kernels reach.
    """

    def __init__(self, width: int, channels: int, side: int) -> None:
        super().__init__()
        wide, narrow = shares(2 * width, channels), shares(width, channels)
        self.input = MaskedConv2d(wide, narrow.repeat(4), "B", Reach(left=side))
        self.state = CausalConv2d(width, 4 * width, Reach(up=1, low=1, left=side, right=side))
        self.out = MaskedConv2d(narrow, wide, "B")

    def forward(self, x: Tensor, entered: Tensor, view: View) -> Tensor:
        gates = self.input(x, view)
        if view.pixel:
            h, c = cell(gates + self.state.look(view), view.window((self, "cells"), ABOVE))
        else:
            h, c = self._rows(gates)
        self.state.keep(h, view)
        view.keep((self, "cells"), c, ABOVE)
        out: Tensor = x + self.out(h, view)
        return out

    def _rows(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """States and cells [B, D, H, W] from the top to the bottom."""
        h = c = gates.new_zeros(len(gates), gates.shape[1] // 4, 1, gates.shape[3])
        states, cells = [], []
        for row in torch.split(gates, 1, 2):
            h, c = cell(row + self.state.across(h), c)
            states.append(h)
            cells.append(c)
        return torch.cat(states, 2), torch.cat(cells, 2)


class Diagonal(nn.Module):
    """A state comes from the one to its left and the one above it: from all pixels above and to the left."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(2 * width, 4 * width)

    def forward(self, gates: Tensor, view: View) -> Tensor:
        """Gates [B, 4 D, h, w] -> states [B, D, h, w] of the whole map or of a pixel."""
        if view.pixel:
            near = view.window((self, "states"), CORNER)
            left, above = near[:, :, 1:, :1], near[:, :, :1, 1:]
            before = self.state(torch.cat([left, above], 1).flatten(1))[..., None, None]
            h, c = cell(gates + before, view.window((self, "cells"), LEFT))
        else:
            h, c = self._diagonals(gates)
        view.keep((self, "states"), h, CORNER)
        view.keep((self, "cells"), c, LEFT)
        return h

    def _diagonals(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """States and cells [B, D, H, W], one diagonal after another, all its rows at once."""
        height, width = gates.shape[2:]
        h = c = gates.new_zeros(len(gates), gates.shape[1] // 4, height)
        row = torch.arange(height, device=gates.device)
        states, cells = [], []
        for d, column in enumerate(skewed(gates).unbind(3)):  # row i is at its pixel d - i
            above = F.pad(h, (1, -1))
            before = self.state(torch.cat([h, above], 1).movedim(1, 2)).movedim(2, 1)  # [B, 4 D, H]
            h, c = cell(column + before, c)
            begun = row <= d  # left of the image everything is 0
            h, c = h * begun, c * begun
            states.append(h)
            cells.append(c)
        return straight(torch.stack(states, 3), width), straight(torch.stack(cells, 3), width)


def skewed(x: Tensor) -> Tensor:
    """[B, D, H, W] -> [B, D, H, H + W - 1]: row i moved i to the right, zeros elsewhere."""
    height, width = x.shape[2:]
    flat = F.pad(x, (0, height)).flatten(2)[..., : height * (height + width - 1)]
    return flat.reshape(*x.shape[:2], height, -1)


def straight(x: Tensor, width: int) -> Tensor:
    """What `skewed` does, undone: [B, D, H, H + W - 1] -> [B, D, H, W]."""
    height = x.shape[2]
    return F.pad(x.flatten(2), (0, height)).reshape(*x.shape[:2], height, -1)[..., :width]


class DiagonalBiLstm(nn.Module):
    """Diagonals from the left, and mirrored ones from the right that have the rows above alone as their input.

    The features of a row's last pixel do not know its value, and no diagonal from the right would ever pass it on: they
    read the pixels themselves too.

    Args:
        entries: features of an entered pixel.
        width: D, features of the states; 2 D are read and added to.
        channels: of the image.
    """

    def __init__(self, entries: int, width: int, channels: int) -> None:
        super().__init__()
        wide, narrow = shares(2 * width, channels), shares(width, channels)
        self.input = MaskedConv2d(wide, narrow.repeat(4), "B")
        self.left = Diagonal(width)
        self.right_input = CausalConv2d(2 * width, 4 * width, ABOVE)
        self.right_pixels = CausalConv2d(entries, 4 * width, ABOVE)
        self.right = Diagonal(width)
        self.out = MaskedConv2d(narrow, wide, "B")

    def forward(self, x: Tensor, entered: Tensor, view: View) -> Tensor:
        h = self.left(self.input(x, view), view)
        if view.pixel:
            assert view.kept is not None and view.column is not None
            self.right_input.keep(x, view)
            mirrored = replace(view, column=view.kept.width - 1 - view.column)
            h = h + mirrored.window((self.right, "states"), CORNER)[:, :, 1:, 1:]
        else:
            gates = self.right_input(x, view) + self.right_pixels(entered, view)
            h = h + self.right(gates.flip(3), view).flip(3)
        out: Tensor = x + self.out(h, view)
        return out

    def begin(self, view: View) -> None:
        """The diagonals from the right of a row, whose pixels are still to be drawn."""
        gates = self.right_input.look(view) + self.right_pixels.look(view)
        for column, gate in enumerate(torch.split(gates.flip(3), 1, 3)):
            self.right(gate, replace(view, column=column))


class PixelRnn(Raster):
    """A convolution of type A, recurrent layers, and two 1x1 of type B.

    Args:
        data, condition: as `Raster`.
        form: of the layers.
        width: features of a layer's states; twice as many between layers.
        blocks: layers.
        first_kernel, kernel: sides of the first convolution and of the row LSTM's, odd.
    Raises: ValueError for fewer features than channels, and an even kernel.
    """

    def __init__(
        self,
        data: DataSpec,
        condition: Condition | None,
        form: Form,
        width: int,
        blocks: int,
        first_kernel: int,
        kernel: int,
    ) -> None:
        super().__init__(data, condition)
        self.check_width(width)
        side, wide = half("first_kernel", first_kernel), shares(2 * width, self.channels)
        self.first = MaskedConv2d(self.entries, wide, "A", Reach(side, 0, side, side))
        self.asked = Asked(self.planes, 2 * width)
        self.layers = nn.ModuleList(
            RowLstm(width, self.channels, half("kernel", kernel))
            if form == "row_lstm"
            else DiagonalBiLstm(len(self.entries), width, self.channels)
            for _ in range(blocks)
        )
        self.head = MaskedConv2d(wide, wide, "B")
        self.last = MaskedConv2d(wide, shares(self.num_outputs, self.channels), "B")

    def readers(self) -> Iterable[CausalConv2d]:
        return (self.first, *(layer.right_pixels for layer in self.bilstms()))

    def bilstms(self) -> Iterable[DiagonalBiLstm]:
        return (layer for layer in self.layers if isinstance(layer, DiagonalBiLstm))

    def above(self, x: Tensor, planes: Tensor | None, view: View) -> Sequence[Tensor]:
        """Nothing is handed over: the layers keep what they need of the rows above."""
        if not view.whole:
            for layer in self.bilstms():
                layer.begin(view)
        return ()

    def outputs(self, x: Tensor, above: Sequence[Tensor], planes: Tensor | None, view: View) -> Tensor:
        h = self.asked(self.first(x, view), planes, view)
        for layer in self.layers:
            h = layer(h, x, view)
        found: Tensor = self.last(F.relu(self.head(F.relu(h), view)), view)
        return found


def pixel_rnn(
    data: DataSpec,
    form: Form = "diagonal_bilstm",
    width: Positive = 16,
    blocks: Positive = 7,
    first_kernel: Annotated[int, Range(3)] = 7,
    kernel: Positive = 3,
    cond: Condition | None = None,
) -> tuple[PixelRnn, MaximumLikelihood]:
    """PixelRNN over images and grids of codes; a value is categorical, or Bernoulli for two levels.

    The diagonal form sees every pixel before; the row form has the triangle above a pixel and its own row.

    Source: van den Oord et al. 2016, sections 3.1 to 3.3 and table 1, arXiv:1601.06759. Differs: a plane of ones enters
    beside the pixels; the diagonals from the right have no mask, since they begin one row above, and read pixels beside
    features; a condition adds to the first convolution's features, which every layer reads.

    Args:
        data: what is modelled.
        form: recurrence over rows, or over diagonals from both sides.
        width: features of a layer's states; twice as many between layers.
        blocks: layers.
        first_kernel, kernel: sides of the first convolution and of the row LSTM's, odd.
        cond: what a sample is asked for.
    """
    return PixelRnn(data, cond, form, width, blocks, first_kernel, kernel), MaximumLikelihood()
