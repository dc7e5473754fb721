"""What a sample can be asked for: a label, the words of its name, or an image computed from the example.

A condition is a function of a stored example, its label and its key: no dataset has to hold it, and training,
evaluation and a user's own rows get it in one way.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_models import noise
from dgm_models.codecs import centred, discrete
from dgm_models.construct import Choice, Range
from dgm_models.protocols import DataSpec


class Condition(Choice):
    """The contract of a params section such as `cond: {name: label}`."""

    @classmethod
    def choices(cls) -> Mapping[str, type]:
        return {condition.name: condition for condition in (Label, Caption, Edges, Masked)}

    def spec(self, data: DataSpec) -> DataSpec:
        """What one condition is. Raises ValueError when the data cannot have it."""
        raise NotImplementedError

    def of(self, data: DataSpec, x: Tensor, labels: Tensor | None, key: Tensor) -> Tensor:
        """The conditions of some examples.

        Args:
            data: what x is.
            x: [B, *event] as stored; conditions that are tokens do not look at it.
            labels: [B] int64, or None.
            key: [B] int64, for conditions that are drawn.
        Returns: int64 [B] of a label and [B, T] of T tokens, otherwise [B, *spec.shape] float32 in about [-1, 1].
        Raises: ValueError when labels are needed and not there.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Label(Condition):
    """The class."""

    name: ClassVar[str] = "label"

    def spec(self, data: DataSpec) -> DataSpec:
        if data.classes < 2:
            raise ValueError(f"cond: label needs data with classes; this data has {data.classes}")
        return DataSpec("tokens", (1,), data.classes)

    def of(self, data: DataSpec, x: Tensor, labels: Tensor | None, key: Tensor) -> Tensor:
        if labels is None:
            raise ValueError("cond: label: these examples have no labels")
        return labels.long()


@dataclass(frozen=True)
class Caption(Condition):
    """The words of the class's name, such as "small heart left top": a token each, and 0 after the last one."""

    name: ClassVar[str] = "caption"

    def spec(self, data: DataSpec) -> DataSpec:
        if data.classes < 2 or not data.class_names:
            raise ValueError(
                "cond: caption needs data whose classes have names, such as {name: shapes, captions: true}"
            )
        words, rows = _vocabulary(data.class_names)
        return DataSpec("tokens", (len(rows[0]),), len(words) + 1)

    def of(self, data: DataSpec, x: Tensor, labels: Tensor | None, key: Tensor) -> Tensor:
        if labels is None:
            raise ValueError("cond: caption: these examples have no labels, whose names the captions are")
        _, rows = _vocabulary(data.class_names)
        return torch.tensor(rows, device=labels.device)[labels.long()]

    def read(self, data: DataSpec, text: str) -> Tensor:
        """[T] int64: a user's words. Raises ValueError for a word that no name has, and for too many of them."""
        words, rows = _vocabulary(data.class_names)
        said, length = text.lower().split(), len(rows[0])
        known = {word: number for number, word in enumerate(words, 1)}
        if unknown := [word for word in said if word not in known]:
            raise ValueError(f"caption: {unknown[0]!r} is none of the words {', '.join(words)}")
        if not 1 <= len(said) <= length:
            raise ValueError(f"caption: {len(said)} words; 1 to {length}, such as {data.class_names[0]!r}")
        return torch.tensor([known[word] for word in said] + [0] * (length - len(said)))


@functools.cache
def _vocabulary(names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The words of all names, sorted, and every name as tokens: a word's number from 1, and 0 up to one length."""
    captions = [name.lower().split() for name in names]
    words = sorted({word for caption in captions for word in caption})
    known, length = {word: number for number, word in enumerate(words, 1)}, max(map(len, captions))
    rows = tuple(tuple(known[word] for word in caption) + (0,) * (length - len(caption)) for caption in captions)
    return tuple(words), rows


@dataclass(frozen=True)
class Edges(Condition):
    """Where the image changes: the length of its Sobel gradient, 1 at a step of the whole range, mapped to [-1, 1]."""

    name: ClassVar[str] = "edges"

    def spec(self, data: DataSpec) -> DataSpec:
        return DataSpec("image", (1, *_image(data, self.name)[1:]))

    def of(self, data: DataSpec, x: Tensor, labels: Tensor | None, key: Tensor) -> Tensor:
        grey = _unit(data, x).mean(1, keepdim=True)
        smooth, slope = torch.tensor([1.0, 2.0, 1.0]) / 4, torch.tensor([-1.0, 0.0, 1.0]) / 2
        across = torch.outer(smooth, slope)
        kernels = torch.stack([across, across.T])[:, None].to(grey)
        gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)  # [B, 2, H, W]
        length: Tensor = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        return length.clamp(max=1.0) * 2 - 1


@dataclass(frozen=True)
class Masked(Condition):
    """The image with a rectangle hidden, and which pixels are shown: what is left is to be completed.

    Args:
        share: of either side that the rectangle takes; its place is drawn by the example's key.
    """

    name: ClassVar[str] = "masked"
    share: Annotated[float, Range(0, 1, "both")] = 0.5

    def spec(self, data: DataSpec) -> DataSpec:
        channels, height, width = _image(data, self.name)
        return DataSpec("image", (channels + 1, height, width))

    def of(self, data: DataSpec, x: Tensor, labels: Tensor | None, key: Tensor) -> Tensor:
        _, height, width = _image(data, self.name)
        corner = noise.uniform(key, "masked", (2,))
        hidden_rows = _span(corner[:, 0], height, self.share)
        hidden_columns = _span(corner[:, 1], width, self.share)
        shown = ~(hidden_rows[:, None, :, None] & hidden_columns[:, None, None, :])  # [B, 1, H, W]
        return torch.cat([_unit(data, x) * shown, shown.float() * 2 - 1], 1)


def _span(u: Tensor, size: int, share: float) -> Tensor:
    """[B, size] bool: `share` of `size` places, at least one, from a start drawn by u [B]."""
    length = max(1, round(share * size))
    start = (u * (size - length + 1)).floor()[:, None]
    place = torch.arange(size, device=u.device)
    return (place >= start) & (place < start + length)


def _image(data: DataSpec, name: str) -> tuple[int, ...]:
    if data.kind != "image":
        raise ValueError(f"cond: {name} is of images; this data is {data.kind}")
    return data.shape


def _unit(data: DataSpec, x: Tensor) -> Tensor:
    """Stored x as float32: levels in [-1, 1], real data standardised."""
    return centred(discrete(data).encode(x, torch.zeros(len(x)))[0], data)
