"""White sprites on black with five known factors: shape, scale, rotation, x, y; rendered here, needs no download."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dgm_models import noise
from pipelines.data.raw import Array, Factor, Raw, Source

SCALES = (0.5, 1.0)
RADIUS = 0.4  # of a sprite's circle at scale 1, where the picture is the square [-1, 1]^2
SUB = 8  # points a side of a grey pixel
CHUNK = 1 << 22  # points at a time


def _square(u: Array, v: Array) -> Array:
    inside: Array = np.maximum(np.abs(u), np.abs(v)) <= math.sqrt(0.5)
    return inside


def _ellipse(u: Array, v: Array) -> Array:
    return u**2 + (2 * v) ** 2 <= 1


def _heart(u: Array, v: Array) -> Array:
    u, v = 1.17 * u, 1.17 * v + 0.365  # the curve's own coordinates: it fits the circle about (0, 0.365) of radius 1.17
    inside: Array = u**2 + (1.25 * v - np.sqrt(np.abs(u))) ** 2 <= 1
    return inside


# the words of captions, each for an equal part of its factor's values, in their order
SIZES, COLUMNS, ROWS = ("small", "large"), ("left", "centre", "right"), ("top", "middle", "bottom")

# (u to the right, v up) -> which points are inside; each fits the unit circle
SPRITES: dict[str, Callable[[Array, Array], Array]] = {"square": _square, "ellipse": _ellipse, "heart": _heart}


@dataclass(frozen=True)
class Shapes:
    """Rows are a function of (settings, seed, row number): more rows begin with the same rows.

    The factors span a grid: shape, scale, rotation, x, y, the last running fastest. A row's id is its number in this
    grid, so ids tell the factors; no point of the grid comes twice. Scales are evenly spaced in [0.5, 1], rotations in
    [0, 360) degrees counter-clockwise, x (from the left) and y (from the top) where no sprite is cut; scale, x or y of
    one value stands in the middle. The label is the shape, or with `captions` the caption, such as "small heart left
    top", which says size, shape, column and row; nothing of a scale, x or y of one value, and nothing of the rotation.

    A square turned by 90 degrees and an ellipse turned by 180 are themselves: their rotation is known only up to this
    symmetry (with 40 rotations, 10 and 20 of them differ), and with few pixels neighbouring rotations may look alike.

    Args:
        rows: how many points of the grid, drawn without repetition; null for all of them in their order.
        size: pixels a side: 16, 32 or 64.
        levels: 2: a pixel is 1 where its centre lies inside; 256: the inside share of 8 x 8 points, times 255.
        scales, rotations, xs, ys: how many values each factor has.
        captions: the label is the caption; its words stand in its class's name.

    Source: Matthey, Higgins, Hassabis, Lerchner 2017, dSprites, for the factors and their numbers. Differs: own
    renderer, sizes and heart; 40 rotations are 9 degrees apart (there the first and the last are the same).
    """

    rows: int | None = 20_000
    size: int = 64
    levels: int = 2
    scales: int = 6
    rotations: int = 40
    xs: int = 32
    ys: int = 32
    captions: bool = False

    def __post_init__(self) -> None:
        for name, allowed, words in (("size", (16, 32, 64), "16, 32 or 64"), ("levels", (2, 256), "2 or 256")):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)}; expected {words}")
        for name in ("scales", "rotations", "xs", "ys"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected at least 1")
        if self.rows is not None and not 1 <= self.rows <= self.grid:
            raise ValueError(
                f"rows: {self.rows}; expected 1 to {self.grid}, the size of the grid, or null for all of it"
            )

    @property
    def factors(self) -> tuple[Factor, ...]:
        sizes = {"shape": len(SPRITES), "scale": self.scales, "rotation": self.rotations, "x": self.xs, "y": self.ys}
        return tuple(Factor(name, size) for name, size in sizes.items())

    @property
    def grid(self) -> int:
        """How many points the grid has."""
        return math.prod(factor.size for factor in self.factors)

    @property
    def said(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """What a caption says, in its order: a factor's name, and a word for each equal part of its values."""
        words = {"scale": SIZES, "shape": tuple(SPRITES), "x": COLUMNS, "y": ROWS}
        sizes = {factor.name: factor.size for factor in self.factors}
        return tuple((name, these) for name, these in words.items() if sizes[name] > 1)

    def labels(self, ids: Array) -> Array:
        """Numbers in the grid [N] -> labels [N]: the shape, or the caption's number among `class_names`."""
        sizes = {factor.name: factor.size for factor in self.factors}
        if not self.captions:
            return ids // (self.grid // len(SPRITES))
        values = dict(zip(sizes, np.unravel_index(ids, list(sizes.values())), strict=True))
        parts = [(2 * values[name] + 1) * len(words) // (2 * sizes[name]) for name, words in self.said]
        found: Array = np.ravel_multi_index(parts, [len(words) for _, words in self.said])
        return found

    @property
    def class_names(self) -> tuple[str, ...]:
        if not self.captions:
            return tuple(SPRITES)
        return tuple(" ".join(words) for words in itertools.product(*(words for _, words in self.said)))

    def read(self, seed: int) -> Raw:
        ids = np.arange(self.grid)
        if self.rows is not None:
            order = np.argsort(noise.fold(torch.arange(self.grid), "shapes", seed).numpy(), kind="stable")
            ids = order[: self.rows]
        return Raw(
            x=self.render(ids),
            ids=ids,
            factors=self.factors,
            labels=self.labels(ids),
            kind="image",
            levels=self.levels,
            classes=len(self.class_names),
            class_names=self.class_names,
            licence="generated; no rights reserved",
            source=Source(f"generated: {self}, seed {seed}"),
        )

    def render(self, ids: Array) -> Array:
        """Numbers in the grid [N] -> pictures [N, 1, size, size] uint8, values 0..levels-1."""
        points = SUB if self.levels == 256 else 1
        width = math.ceil(RADIUS * self.size) + 1  # pixels a side of the window that holds a sprite of any scale
        out = np.zeros((len(ids), 1, self.size, self.size), np.uint8)
        step = max(1, CHUNK // (width * points) ** 2)
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            top, left, share = self._windows(part, width, points)
            rows, columns = top[:, None] + np.arange(width), left[:, None] + np.arange(width)
            which = np.arange(start, start + len(part))[:, None, None]
            out[which, 0, rows[:, :, None], columns[:, None, :]] = np.rint(share * (self.levels - 1))
        return out

    def _windows(self, ids: Array, width: int, points: int) -> tuple[Array, Array, Array]:
        """First row [N] and column [N] of every sprite's window, the inside share of its pixels [N, width, width]."""
        shape, scale, rotation, x, y = np.unravel_index(ids, [factor.size for factor in self.factors])
        half = self.size / 2
        radius = RADIUS * half * _spaced(*SCALES, self.scales)[scale]
        left, top = (
            half + (1 - RADIUS) * half * _spaced(-1.0, 1.0, count)[place]  # the sprite's centre in pixels
            for place, count in ((x, self.xs), (y, self.ys))
        )
        angle = 2 * math.pi / self.rotations * rotation
        first_row, first_column = (
            np.clip(np.floor(centre - width / 2 + 0.5), 0, self.size - width).astype(int) for centre in (top, left)
        )
        at = (np.arange(width * points) + 0.5) / points
        right = ((first_column - left)[:, None] + at)[:, None, :] / radius[:, None, None]
        up = -((first_row - top)[:, None] + at)[:, :, None] / radius[:, None, None]
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        u, v = cos * right + sin * up, cos * up - sin * right
        inside = np.empty(u.shape, bool)
        for number, sprite in enumerate(SPRITES.values()):
            mine = shape == number
            inside[mine] = sprite(u[mine], v[mine])
        return first_row, first_column, inside.reshape(len(ids), width, points, width, points).mean((2, 4))


def _spaced(low: float, high: float, count: int) -> Array:
    """[count] evenly spaced numbers, both ends among them; a single one is the middle."""
    return np.linspace(low, high, count) if count > 1 else np.array([(low + high) / 2])
