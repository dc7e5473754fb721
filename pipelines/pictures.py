"""Samples as a picture."""

from __future__ import annotations

import io
import math

import numpy as np
from torch import Tensor

from dgm_models.protocols import DataSpec

SIDE = 320  # pixels, at least, of a grid


def grid(x: Tensor, data: DataSpec) -> bytes:
    """A PNG of stored samples [N, *event]: images in a square grid, two-dimensional vectors as points.

    Raises: ValueError for data that has no picture.
    """
    if tile(data) is not None:
        return table(x, data, math.ceil(math.sqrt(len(x))))
    if data.kind == "vector" and data.dims == 2:
        return _points(x)
    raise ValueError(f"samples of kind {data.kind} and shape {data.shape} have no picture")


def tile(data: DataSpec) -> tuple[int, int, int] | None:
    """(channels, height, width) of one example as a picture; None for data that is none."""
    if data.kind == "image":
        channels, height, width = data.shape
        return channels, height, width
    side = math.isqrt(data.dims)
    return (1, side, side) if data.levels is not None and side**2 == data.dims else None


def table(x: Tensor, data: DataSpec, columns: int) -> bytes:
    """A PNG of stored examples [N, *event], row by row.

    Raises: ValueError for data whose examples are no pictures.
    """
    from PIL import Image

    shape = tile(data)
    if shape is None:
        raise ValueError(f"an example of kind {data.kind} and shape {data.shape} is no picture")
    highest = (data.levels or 256) - 1
    pixels = (x.reshape(len(x), *shape).double().numpy() * (255.0 / highest)).round().clip(0, 255).astype(np.uint8)
    channels, height, width = shape
    canvas = np.full((math.ceil(len(pixels) / columns) * (height + 1) + 1, columns * (width + 1) + 1, 3), 128, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = (
            picture.transpose(1, 2, 0) if channels == 3 else picture[:1].transpose(1, 2, 0)
        )
    image = Image.fromarray(canvas)
    zoom = max(1, math.ceil(SIDE / canvas.shape[1]))
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _points(x: Tensor) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2, 3.2), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.08, 0.87, 0.89))
    axes.scatter(x[:, 0], x[:, 1], s=3, alpha=0.5)
    axes.set_aspect("equal")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
