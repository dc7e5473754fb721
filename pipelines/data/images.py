"""An image file -> [C, H, W] uint8."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from pipelines.data.raw import Array

MODES = ("1", "L", "P", "RGB", "LA", "RGBA", "CMYK", "YCbCr")  # eight bits a channel; deeper ones would be clipped


def decode(content: bytes, label: str, size: int | None, channels: int) -> Array:
    """[C, H, W] uint8, upright.

    Args:
        content: the bytes of a file.
        label: the file's name in messages.
        size: crop to the central square and resize to size x size (bicubic, antialiased); None: as it is.
        channels: 1 (grey) or 3 (RGB).
    Raises: ValueError that names the file for what cannot be taken as it is.
    """
    image = _open(content, label).convert("L" if channels == 1 else "RGB")
    if size is not None:
        image = _central_square(image).resize((size, size), Image.Resampling.BICUBIC)
    x = np.asarray(image)
    return x[None] if channels == 1 else x.transpose(2, 0, 1)  # [C, H, W]


def stack(images: list[tuple[str, bytes]], size: int | None, channels: int, like: tuple[int, ...] | None) -> Array:
    """[N, C, H, W] uint8 of (label, content) pairs. Raises: ValueError for one of another shape than `like`."""
    rows: list[Array] = []
    for label, content in images:
        rows.append(decode(content, label, size, channels))
        expected, x = like or rows[0].shape, rows[-1]
        if x.shape != expected:
            raise ValueError(
                f"{label}: {x.shape[2]} x {x.shape[1]} pixels; the images before it have "
                f"{expected[2]} x {expected[1]}; give size to crop and resize all of them"
            )
    return np.stack(rows)


def check_settings(size: int | None, channels: int) -> None:
    """Raises: ValueError for settings that no image can meet."""
    if size is not None and size < 1:
        raise ValueError(f"size: {size}; expected at least 1, or None")
    if channels not in (1, 3):
        raise ValueError(f"channels: {channels}; expected 1 or 3")


def _central_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _open(content: bytes, label: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{label}: unreadable image ({error})") from error
    if image.mode not in MODES:
        raise ValueError(f"{label}: mode {image.mode}; expected 8 bits a channel")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ValueError(f"{label}: transparent pixels; expected an opaque image")
    return image
