"""What a sample can be asked for: a label, or an image computed from the example, such as its edges.

A condition is a function of a stored example, its label and its key: no dataset has to hold it, and training,
evaluation and a user's own rows get it in one way.
"""

from __future__ import annotations

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
        return {condition.name: condition for condition in (Label, Edges, Masked)}

    def spec(self, data: DataSpec) -> DataSpec:
        """What one condition is. Raises ValueError when the data cannot have it."""
        raise NotImplementedError

    def of(self, data: DataSpec, x: Tensor, labels: Tensor | None, key: Tensor) -> Tensor:
        """The conditions of some examples.

        Args:
            data: what x is.
            x: [B, *event] as stored.
            labels: [B] int64, or None.
            key: [B] int64, for conditions that are drawn.
        Returns: [B] int64 where the spec is tokens, otherwise [B, *spec.shape] float32 in about [-1, 1].
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
