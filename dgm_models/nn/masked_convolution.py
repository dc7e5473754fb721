"""Convolutions that see only pixels drawn before, and the shell of models that draw an image pixel after pixel.

A network is written once, as a function of a `View`: the whole map in training; a row or one pixel while sampling.
Layers that act on one pixel do not notice. Those that look at other pixels keep the map of what they read in `Kept`: a
view writes its part of the map and reads the window that it needs. So a pixel costs a window at every layer, not an
image.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import Discrete, centred
from dgm_models.conditions import Condition
from dgm_models.nn.autoregression import Autoregressive
from dgm_models.nn.conditioner import Conditioner, check
from dgm_models.ops.likelihoods import Bernoulli, Categorical, Likelihood
from dgm_models.protocols import DataSpec

CODE_DIM = 32  # numbers by which a code enters at most; a level of an image enters as one number


class Reach(NamedTuple):
    """What an output at (i, j) sees: rows i - up to i - low and columns j - left to j + right."""

    up: int = 0
    low: int = 0
    left: int = 0
    right: int = 0

    @property
    def kernel(self) -> tuple[int, int]:
        return self.up - self.low + 1, self.left + self.right + 1


HERE, ABOVE = Reach(), Reach(up=1, low=1)


@dataclass
class Kept:
    """What a drawing keeps between its steps.

    Args:
        height, width: of the image.
    Attributes:
        maps: what layers read, padded with zeros by their reach.
        fixed: what stays the same through a drawing: masked weights, biases by the condition.
        num_above: how many maps `Raster.above` gives.
    """

    height: int
    width: int
    maps: dict[Hashable, Tensor] = field(default_factory=dict)
    fixed: dict[Hashable, Tensor] = field(default_factory=dict)
    num_above: int = 0


@dataclass(frozen=True)
class View:
    """The part of the image that a pass computes: all of it, one row, or one pixel.

    Args:
        kept: None where nothing is kept: training, and the densities of known images. The view is then all of it.
        row, column: None for all rows, for all columns.
    """

    kept: Kept | None = None
    row: int | None = None
    column: int | None = None

    @property
    def whole(self) -> bool:
        return self.row is None

    @property
    def pixel(self) -> bool:
        return self.column is not None

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, or what it gave in an earlier step of the drawing."""
        if self.kept is None:
            return compute()
        if key not in self.kept.fixed:
            self.kept.fixed[key] = compute()
        return self.kept.fixed[key]

    def part(self, x: Tensor) -> Tensor:
        """The view's part of a whole map; one value that stands for a whole map stays as it is."""
        if self.whole or x.shape[2:] == (1, 1):
            return x
        assert self.kept is not None
        return x[:, :, _span(self.row, self.kept.height), _span(self.column, self.kept.width)]

    def keep(self, key: Hashable, x: Tensor, reach: Reach = HERE) -> None:
        """Writes the view's part x of a map that is read with this reach; nothing where nothing is kept."""
        if self.kept is None:
            return
        kept, (up, _, left, right) = self.kept, reach
        if key not in kept.maps:
            kept.maps[key] = x.new_zeros(*x.shape[:2], up + kept.height, left + kept.width + max(right, 0))
        rows, columns = _span(self.row, kept.height, up), _span(self.column, kept.width, left)
        kept.maps[key][:, :, rows, columns] = x

    def window(self, key: Hashable, reach: Reach = HERE) -> Tensor:
        """What the view's outputs see of a kept map."""
        assert self.kept is not None
        height, width = reach.kernel
        rows, columns = _span(self.row, self.kept.height), _span(self.column, self.kept.width)
        return self.kept.maps[key][:, :, rows.start : rows.stop + height - 1, columns.start : columns.stop + width - 1]


def _span(at: int | None, size: int, before: int = 0) -> slice:
    return slice(before, before + size) if at is None else slice(before + at, before + at + 1)


class CausalConv2d(nn.Conv2d):
    """A convolution with a reach, zeros around the image. Weights of rows that it may not see do not exist.

    Args:
        before, after: channels.
        reach: what an output sees.
        mask: [after, before, *kernel] bool: the weights in use, or None for all of them.
    """

    mask: Tensor | None

    def __init__(self, before: int, after: int, reach: Reach = HERE, mask: Tensor | None = None) -> None:
        super().__init__(before, after, reach.kernel)
        self.reach = reach
        self.register_buffer("mask", mask, persistent=False)

    def used(self) -> Tensor:
        """The weights with those zero that the mask forbids."""
        return self.weight if self.mask is None else self.weight * self.mask

    def keep(self, x: Tensor, view: View) -> None:
        view.keep(self, x, self.reach)

    def look(self, view: View) -> Tensor:
        """The view's outputs from what is kept."""
        return self._slide(view.window(self, self.reach), view)

    def across(self, rows: Tensor) -> Tensor:
        """One row of outputs from the rows [B, before, up - low + 1, W] that it sees."""
        return F.conv2d(F.pad(rows, (self.reach.left, self.reach.right)), self.used(), self.bias)

    def forward(self, x: Tensor, view: View) -> Tensor:  # type: ignore[override]
        """The view's part of the input -> the view's part of the output [B, after, h, w]."""
        if self.reach == HERE:
            return self._slide(x, view)
        if view.kept is None:
            up, low, left, right = self.reach
            return self._slide(F.pad(x, (left, right, up, -low)), view)
        self.keep(x, view)
        return self.look(view)

    def _slide(self, window: Tensor, view: View) -> Tensor:
        weight = view.once(self, self.used)
        if view.pixel:  # one output: a product, without the cost of setting up a convolution
            return F.linear(window.flatten(1), weight.flatten(1), self.bias)[..., None, None]
        return F.conv2d(window, weight, self.bias)


class MaskedConv2d(CausalConv2d):
    """A convolution that sees no pixel to the right in its own row, and of its own pixel the channels that come before.

    Args:
        before, after: [features] int64: the colour channel to which each input and output feature belongs.
        kind: "A": an output sees the inputs of its own pixel that belong to earlier channels; "B": also of its own.
        reach: of a kernel whose last row is the output's own.

    Source: van den Oord et al. 2016, section 3.4, arXiv:1601.06759. Differs: rows below do not exist.
    """

    def __init__(self, before: Tensor, after: Tensor, kind: Literal["A", "B"], reach: Reach = HERE) -> None:
        mask = torch.ones(len(after), len(before), *reach.kernel, dtype=torch.bool)
        mask[:, :, -1, reach.left + 1 :] = False
        mask[:, :, -1, reach.left] = after[:, None] > before if kind == "A" else after[:, None] >= before
        super().__init__(len(before), len(after), reach, None if bool(mask.all()) else mask)


def shares(features: int, channels: int) -> Tensor:
    """[features] int64: features dealt out to channels in order, as evenly as can be."""
    return torch.arange(features) * channels // features


def half(name: str, kernel: int) -> int:
    """How far a kernel reaches to each side. Raises ValueError for an even one."""
    if kernel % 2 == 0:
        raise ValueError(f"{name}: {kernel} is even, and a kernel has a pixel in its middle; use {kernel + 1}")
    return kernel // 2


class Asked(nn.Module):
    """Adds what a condition's planes say, by a 1x1 convolution: for a label one bias for the whole map.

    Args:
        planes: of the condition, 0 for none: nothing is added.
        features: to which it is added.
    """

    def __init__(self, planes: int, features: int) -> None:
        super().__init__()
        self.said = nn.Conv2d(planes, features, 1, bias=False) if planes else None

    def forward(self, x: Tensor, planes: Tensor | None, view: View) -> Tensor:
        if self.said is None or planes is None:
            return x
        said, given = self.said, planes
        return x + view.part(view.once(self, lambda: said(given)))


@dataclass
class Drawing:
    """Images in the course of being drawn.

    Attributes:
        x: [n, C, H, W] int64: what is drawn; 0 elsewhere.
        planes: of the condition.
        kept: by the network's layers.
        next: the place whose step may go on from the last one: what is kept is right for all pixels before. -1 when
            nothing is kept yet.
    """

    x: Tensor
    planes: Tensor | None
    kept: Kept
    next: int = -1


class Raster(Autoregressive):
    """Draws row after row, pixel after pixel; a pixel's channels one after another, or all in one draw.

    Args:
        data: images [C, H, W], or codes [H, W] or [C, H, W].
        condition: what a sample is asked for, or None.
        likelihood: of a pixel's C values in one draw; None draws each value by itself, Bernoulli or categorical.
    Attributes:
        entries: [features] int64: the colour channel of each feature in which a pixel enters the network.
        channels: the places of a pixel.
        num_outputs: channels of what `outputs` gives.
        planes: of the condition.
    Raises: ValueError for codes without rows and columns, and when the data cannot have the condition.
    """

    def __init__(self, data: DataSpec, condition: Condition | None, likelihood: Likelihood | None = None) -> None:
        assert data.levels is not None
        if len(data.shape) not in (2, 3):
            raise ValueError(f"data.shape: {data.shape}; codes drawn by pixels are a grid [H, W] or [C, H, W]")
        channels, height, width = (1, *data.shape)[-3:]
        pixels = torch.arange(channels * height * width).reshape(channels, -1).T  # [H W, C]
        if likelihood is None:
            pixels = pixels.reshape(-1, 1)
            likelihood = Bernoulli() if data.levels == 2 else Categorical(data.levels)
        super().__init__(data, Discrete(data), likelihood, pixels, condition)
        self.size = (channels, height, width)
        self.channels = channels // pixels.shape[1]
        self.num_outputs = self.channels * likelihood.num_params
        self.conditioner = Conditioner(condition, data)
        self.planes = self.conditioner.planes
        # codes have no order: each has a vector of its own
        codes = data.kind == "codes"
        self.codes = nn.Embedding(data.levels, min(data.levels, CODE_DIM)) if codes else None
        per_value = self.codes.embedding_dim if self.codes else 1
        self.entries = torch.cat([shares(channels * per_value, channels), torch.zeros(1, dtype=torch.int64)])

    def check_width(self, width: int) -> None:
        """Raises ValueError for fewer features than channels to which they are dealt out."""
        if width < self.channels:
            raise ValueError(f"width: {width} features for {self.channels} channels; every channel needs one")

    # ---- what a subclass gives

    def readers(self) -> Iterable[CausalConv2d]:
        """The layers that look at entered pixels themselves."""
        raise NotImplementedError

    def above(self, x: Tensor, planes: Tensor | None, view: View) -> Sequence[Tensor]:
        """What depends on the rows above alone, for whole rows; before any pixel of a row is drawn."""
        return ()

    def outputs(self, x: Tensor, above: Sequence[Tensor], planes: Tensor | None, view: View) -> Tensor:
        """[B, num_outputs, h, w], the params of a pixel's first channel first; of entered x, for all pixels or one."""
        raise NotImplementedError

    # ---- what follows

    def entered(self, x: Tensor) -> Tensor:
        """[B, C, h, w] int64 -> [B, len(entries), h, w]: levels in [-1, 1] or codes' vectors, and a plane of ones.

        The ones tell the image from the zeros around it (Salimans et al. 2017, arXiv:1701.05517).
        """
        values = centred(x, self.data) if self.codes is None else self.codes(x).movedim(-1, 2).flatten(1, 2)
        return F.pad(values.to(next(self.parameters()).dtype), (0, 0, 0, 0, 0, 1), value=1.0)

    def planes_of(self, cond: Tensor | None) -> Tensor | None:
        """[B, planes, 1, 1] of labels, [B, planes, H, W] of images; None without a condition."""
        check(self.condition, cond)
        if cond is None:
            return None
        planes = self.conditioner.vector(cond)[..., None, None] if self.conditioner.vector_dim else cond
        return planes.to(next(self.parameters()).dtype)

    def conditionals(self, x: Tensor, cond: Tensor | None) -> Tensor:
        found = self.run(self.entered(x.reshape(-1, *self.size)), self.planes_of(cond), View())
        split = found.reshape(len(found), self.channels, -1, *self.size[1:])
        return split.permute(0, 3, 4, 1, 2).flatten(1, 3)  # [B, P, K]

    def start(self, n: int, cond: Tensor | None) -> Drawing:
        x = torch.zeros(n, *self.size, dtype=torch.int64, device=self.places.device)
        return Drawing(x, self.planes_of(cond), Kept(*self.size[1:]))

    def step(self, state: Drawing, place: int) -> Tensor:
        pixel, channel = divmod(place, self.channels)
        row, column = divmod(pixel, self.size[2])
        if place != state.next:  # the first step, or values were admitted that no step has seen: one pass keeps all
            self.run(self.entered(state.x), state.planes, View(state.kept))
        elif column == channel == 0:
            view = View(state.kept, row)
            self._above(self.entered(view.part(state.x)), state.planes, view)
        view = View(state.kept, row, column)
        found = self.run(self.entered(view.part(state.x)), state.planes, view)
        state.next = place + 1
        return found.reshape(len(found), self.channels, -1)[:, channel]

    def admit(self, state: Drawing, place: int, values: Tensor) -> None:
        state.x.flatten(1)[:, self.places[place]] = values
        pixel, channel = divmod(place, self.channels)
        if channel == self.channels - 1:  # before that the pixel enters in the next step
            view = View(state.kept, *divmod(pixel, self.size[2]))
            entered = self.entered(view.part(state.x))
            for reader in self.readers():
                reader.keep(entered, view)

    def run(self, entered: Tensor, planes: Tensor | None, view: View) -> Tensor:
        """The outputs of the view, of its entered pixels."""
        return self.outputs(entered, self._above(entered, planes, view), planes, view)

    def _above(self, entered: Tensor, planes: Tensor | None, view: View) -> Sequence[Tensor]:
        """What `above` gives for all rows or one, which is kept; for a pixel what is kept."""
        if view.pixel:
            assert view.kept is not None
            return [view.window(("above", i)) for i in range(view.kept.num_above)]
        found = self.above(entered, planes, view)
        for i, each in enumerate(found):
            view.keep(("above", i), each)
        if view.kept is not None:
            view.kept.num_above = len(found)
        return found
