"""Samples as a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dgm_models.protocols import DataSpec

SIDE = 320  # pixels, at least, of a grid
CURVES = 8  # samples that are shown as curves, at most
PAIRED = 4  # columns of a table whose pairs are shown, at most
HIDDEN = (70, 110, 160)  # the colour of what an example does not show


def grid(x: Tensor, data: DataSpec) -> bytes:
    """A PNG of stored samples [N, *event]: images in a square grid, real vectors as points, their columns in pairs.

    Of any other data the first samples are curves over the places, a panel each: audio is a waveform.
    """
    if tile(data) is not None:
        return table(x, data, math.ceil(math.sqrt(len(x))))
    if not plotted(data):
        return _curves(x, data)
    return _pairs(x) if data.dims != 2 else _panels([x], [""])


def series(sets: Sequence[Tensor], titles: Sequence[str], data: DataSpec) -> bytes:
    """A PNG of several sets of stored samples [n, *event]: a row of images each, or a panel of points with its title.

    Points are those of the first two columns; all panels have the axes of all sets.
    Raises: ValueError for data that has no picture.
    """
    if tile(data) is not None:
        return table(torch.cat(list(sets)), data, len(sets[0]))
    if not plotted(data):
        raise ValueError(f"samples of kind {data.kind} and shape {data.shape} have no picture")
    return _panels(sets, titles)


def plotted(data: DataSpec) -> bool:
    """Whether an example is a point in a plot."""
    return data.kind == "vector" and data.levels is None


def tile(data: DataSpec) -> tuple[int, int, int] | None:
    """(channels, height, width) of one example as a picture; None for data that is none.

    Whole levels are a picture where they fill a square, and those of a vector the rectangle that comes closest to one,
    no wider than high. Sound and text are none.
    """
    if data.kind == "image":
        channels, height, width = data.shape
        return channels, height, width
    if data.levels is None or data.kind in ("audio", "tokens"):
        return None
    width = max(side for side in range(1, math.isqrt(data.dims) + 1) if data.dims % side == 0)
    return (1, data.dims // width, width) if data.kind == "vector" or width**2 == data.dims else None


def table(x: Tensor, data: DataSpec, columns: int, hidden: Tensor | None = None) -> bytes:
    """A PNG of stored examples [N, *event], row by row; what is `hidden` [N, *event] bool has a colour of its own.

    Raises: ValueError for data whose examples are no pictures.
    """
    from PIL import Image

    shape = tile(data)
    if shape is None:
        raise ValueError(f"an example of kind {data.kind} and shape {data.shape} is no picture")
    pixels = _pixels(x, data, shape)
    channels, height, width = shape
    canvas = np.full((math.ceil(len(pixels) / columns) * (height + 1) + 1, columns * (width + 1) + 1, 3), 128, np.uint8)
    covered = None if hidden is None else hidden.reshape(len(x), *shape).any(1).numpy()
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = (
            picture.transpose(1, 2, 0) if channels == 3 else picture[:1].transpose(1, 2, 0)
        )
        if covered is not None:
            canvas[top : top + height, left : left + width][covered[i]] = HIDDEN
    image = Image.fromarray(canvas)
    zoom = max(1, math.ceil(SIDE / canvas.shape[1]))
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def single(x: Tensor, data: DataSpec) -> bytes:
    """A PNG of one stored image [C, H, W], a pixel for a pixel."""
    from PIL import Image

    (pixels,) = _pixels(x[None], data, (x.shape[0], x.shape[1], x.shape[2]))
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]).save(stream, "PNG")
    return stream.getvalue()


def _pixels(x: Tensor, data: DataSpec, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """[N, C, H, W] of stored examples [N, *event]: the highest level is 255."""
    highest = (data.levels or 256) - 1
    values = x.reshape(len(x), *shape).double().numpy() * (255.0 / highest)
    return values.round().clip(0, 255).astype(np.uint8)


def _panels(sets: Sequence[Tensor], titles: Sequence[str]) -> bytes:
    """The first two columns of every set as points, one panel a set."""
    columns = math.ceil(math.sqrt(len(sets)))
    figure = _figure(*[max(3.2, 2.1 * columns)] * 2)
    panels = figure.subplots(math.ceil(len(sets) / columns), columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, x, title in zip(panels, sets, titles, strict=False):
        _draw(axes, x, 0, min(1, x.shape[1] - 1))
        if x.shape[1] > 1:
            axes.set_aspect("equal" if x.shape[1] == 2 else "auto")
        axes.set_title(title)
    return _png(figure)


def _pairs(x: Tensor) -> bytes:
    """Every pair of the first columns as points, every column by itself as a histogram."""
    count = min(PAIRED, x.shape[1])
    figure = _figure(1.6 * max(count, 2), 1.6 * max(count, 2))
    panels = figure.subplots(count, count, sharex="col", squeeze=False)
    for down in range(count):
        for across in range(count):
            _draw(panels[down, across], x, across, down)
    return _png(figure)


def _curves(x: Tensor, data: DataSpec) -> bytes:
    """The first samples over their places, a panel each, all with the range of the levels or of the samples."""
    shown = x[:CURVES].flatten(1)
    figure = _figure(6.4, 0.3 + 0.75 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, values in zip(panels, shown, strict=True):
        axes.plot(values.numpy(), linewidth=0.7)
        axes.tick_params(labelsize=6)
    if data.levels is not None:
        panels[0].set_ylim(0, data.levels - 1)
    return _png(figure)


def _draw(axes: Any, x: Tensor, across: int, down: int) -> None:
    if across == down:
        axes.hist(x[:, across].numpy(), bins=30)
    else:
        axes.scatter(x[:, across], x[:, down], s=3, alpha=0.5)
    axes.tick_params(labelsize=6)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="tight")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
