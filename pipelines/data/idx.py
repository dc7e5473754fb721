"""The IDX format of MNIST and its relatives, and datasets made of four IDX files.

Source: LeCun's description of the MNIST files. Magic number 0x00 0x00 type axes, then one big-endian uint32 an axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pipelines.data.fetch import Fetched, RawFile, fetch
from pipelines.data.raw import Array, Raw, Source

_UBYTE = 0x08


def parse_idx(content: bytes, label: str, axes: int) -> Array:
    """The uint8 array of an unpacked IDX file.

    Args:
        content: the file, unpacked.
        label: the file's name in messages.
        axes: the expected number of axes: 1 for labels, 3 for images.
    Raises: ValueError for another magic number or a length that differs from what the header says.
    """
    head = 4 + 4 * axes
    magic, expected = content[:4], bytes((0, 0, _UBYTE, axes))
    if magic != expected:
        raise ValueError(f"{label}: magic number 0x{magic.hex()}; expected 0x{expected.hex()}")
    if len(content) < head:
        raise ValueError(f"{label}: a header of {len(content)} bytes; expected {head}")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", axes, 4))
    if len(content) - head != math.prod(shape):
        raise ValueError(
            f"{label}: {len(content) - head} values; the header's {' x '.join(map(str, shape))} expects "
            f"{math.prod(shape)}"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def read_idx_dataset(
    files: Mapping[str, RawFile], mirror: str | None, *, licence: str, class_names: tuple[str, ...]
) -> Raw:
    """Train and t10k images with labels: [N, 1, H, W] uint8, t10k as the source's test.

    Args:
        files: "train-images", "train-labels", "t10k-images", "t10k-labels".
        mirror: where to look before the public home, or None.
        licence, class_names: as in `Raw`.
    """
    got = {key: fetch(file, mirror) for key, file in files.items()}
    train_x, train_y = _pair(got["train-images"], got["train-labels"])
    test_x, test_y = _pair(got["t10k-images"], got["t10k-labels"])
    if train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(f"{got['t10k-images'].label}: images of {test_x.shape[1:]}; train has {train_x.shape[1:]}")
    return Raw(
        x=np.concatenate([train_x, test_x])[:, None],  # [N, 1, H, W]
        labels=np.concatenate([train_y, test_y]).astype(np.int32),
        kind="image",
        levels=256,
        classes=len(class_names),
        class_names=class_names,
        splits={"train": (0, len(train_x)), "test": (len(train_x), len(train_x) + len(test_x))},
        licence=licence,
        source=Source(files["train-images"].home, {files[key].names[0]: each.sha256 for key, each in got.items()}),
    )


def _pair(images: Fetched, labels: Fetched) -> tuple[Array, Array]:
    x, y = parse_idx(images.content, images.label, 3), parse_idx(labels.content, labels.label, 1)
    if len(x) != len(y):
        raise ValueError(f"{labels.label}: {len(y)} labels; expected {len(x)}, one an image of {images.label}")
    return x, y
