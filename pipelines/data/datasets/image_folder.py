"""A folder of image files; its subfolders, if there are any, are the classes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from pipelines.data.raw import Array, Raw, Source

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MODES = ("1", "L", "P", "RGB", "LA", "RGBA", "CMYK", "YCbCr")  # eight bits a channel; deeper ones would be clipped


@dataclass(frozen=True)
class ImageFolder:
    """8-bit images, all of one size; other files than images are passed over.

    Args:
        path: the folder. Images in its subfolders are labelled by the subfolder, in alphabetical order.
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
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: {self.size}; expected at least 1, or None")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: {self.channels}; expected 1 or 3")

    def read(self, seed: int) -> Raw:
        folder = Path(self.path).expanduser()
        files = _image_files(folder)
        classes, labels = _classes(folder, files)
        listing = hashlib.sha256()
        images: list[Array] = []
        for file in files:
            images.append(self._image(file, images[0].shape if images else None))
            listing.update(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {_below(file, folder)}\n".encode())
        return Raw(
            x=np.stack(images),
            kind="image",
            levels=256,
            labels=labels,
            classes=len(classes),
            class_names=classes,
            licence=self.licence,
            source=Source("a local folder of images", {f"sha256sum of {len(files)} files": listing.hexdigest()}),
        )

    def _image(self, file: Path, expected: tuple[int, ...] | None) -> Array:
        """[C, H, W] uint8."""
        image = _open(file).convert("L" if self.channels == 1 else "RGB")
        if self.size is not None:
            image = _central_square(image).resize((self.size, self.size), Image.Resampling.BICUBIC)
        x = np.asarray(image)
        x = x[None] if self.channels == 1 else x.transpose(2, 0, 1)  # [C, H, W]
        if expected is not None and x.shape != expected:
            raise ValueError(
                f"image-folder: {file}: {x.shape[2]} x {x.shape[1]} pixels; the images before it have "
                f"{expected[2]} x {expected[1]}; give size to crop and resize all of them"
            )
        return x


def _central_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _below(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"image-folder: {folder}: no such folder")
    found = [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    files = sorted((f for f in found if not f.name.startswith(".")), key=lambda f: _below(f, folder))
    if not files:
        raise ValueError(f"image-folder: {folder}: no image in it; expected files ending in {', '.join(SUFFIXES)}")
    return files


def _classes(folder: Path, files: list[Path]) -> tuple[tuple[str, ...], Array | None]:
    """(class names, [N] labels): none when all images lie in the folder itself."""
    tops = [_below(file, folder).split("/")[:-1][:1] for file in files]
    if not any(tops):
        return (), None
    if not all(tops):
        loose = _below(files[tops.index([])], folder)
        raise ValueError(f"image-folder: {folder}: {loose} lies beside the classes' subfolders; expected it in one")
    names = sorted({top[0] for top in tops})
    return tuple(names), np.array([names.index(top[0]) for top in tops], np.int32)


def _open(file: Path) -> Image.Image:
    """The decoded, upright image. Raises: ValueError that names the file for what cannot be taken as it is."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image-folder: {file}: unreadable image ({error})") from error
    if image.mode not in MODES:
        raise ValueError(f"image-folder: {file}: mode {image.mode}; expected 8 bits a channel")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ValueError(f"image-folder: {file}: transparent pixels; expected an opaque image")
    return image
