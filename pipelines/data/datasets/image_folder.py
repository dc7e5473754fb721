"""A folder of image files; its subfolders, if there are any, are the classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.data import images
from pipelines.data.inputs import files_in, origin, subfolders
from pipelines.data.raw import Array, Chunk, Index, Raw, Source
from pipelines.storage import place

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
BLOCK = 256  # images that are read together


@dataclass(frozen=True)
class ImageFolder:
    """8-bit images, all of one size; other files than images are passed over.

    Args:
        path: the folder, file:// or s3://. Images in its subfolders are labelled by the subfolder, in alphabetical
            order.
        size: crop to the central square and resize to size x size (bicubic, antialiased); None takes the images as
            they are, which must then be of one size.
        channels: 1 (grey) or 3 (RGB).
        licence: of the data, for the manifest.
    """

    path: str
    size: int | None = None
    channels: Literal[1, 3] = 3
    licence: str = "not stated"

    def __post_init__(self) -> None:
        images.check_settings(self.size, self.channels)

    def read(self, seed: int) -> Raw:
        return self.index().read("image-folder")

    def index(self) -> Index:
        names = files_in("image-folder", self.path, SUFFIXES, "image")
        classes, labels = subfolders("image-folder", self.path, names)
        shape = _Images(self, tuple(names[:1]), None, None).read().x.shape[1:]

        def about(sums: Sequence[tuple[str, str]], top: int | None) -> Raw:
            listing = "".join(f"{sha256}  {name}\n" for name, sha256 in sums)
            return Raw(
                x=np.empty(0, np.uint8),
                kind="image",
                levels=256,
                classes=len(classes),
                class_names=classes,
                licence=self.licence,
                source=Source(
                    origin(self.path, "folder of images"),
                    {f"sha256sum of {len(names)} files": hashlib.sha256(listing.encode()).hexdigest()},
                ),
            )

        blocks = []
        for start in range(0, len(names), BLOCK):
            here = slice(start, start + BLOCK)
            blocks.append(_Images(self, tuple(names[here]), None if labels is None else labels[here], shape))
        return Index(blocks, about)


@dataclass(frozen=True, eq=False)
class _Images:
    """Some files of the folder, of one shape where it is known."""

    folder: ImageFolder
    names: tuple[str, ...]
    labels: Array | None
    shape: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        return len(self.names)

    def count(self) -> int:
        return self.rows

    def read(self) -> Chunk:
        where = place(self.folder.path)
        files = [(name, where.read(name)) for name in self.names]
        labelled = [(f"image-folder: {self.folder.path.rstrip('/')}/{name}", content) for name, content in files]
        x = images.stack(labelled, self.folder.size, self.folder.channels, self.shape)
        return Chunk(x, self.labels, tuple((name, hashlib.sha256(content).hexdigest()) for name, content in files))
