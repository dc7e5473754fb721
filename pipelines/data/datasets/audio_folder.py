"""A folder of .wav files, cut into windows; its subfolders, if there are any, are the classes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from dgm_models.ops import mulaw
from pipelines.data import wav
from pipelines.data.inputs import files_in, origin, subfolders
from pipelines.data.raw import Array, Raw, Source, stored_dtype
from pipelines.storage import place


@dataclass(frozen=True)
class AudioFolder:
    """Windows of recordings of one sample rate, in mu-law levels. All windows of a file go to one split.

    Args:
        path: the folder, file:// or s3://. Files in its subfolders are labelled by the subfolder, in alphabetical
            order; other files than .wav are passed over. Channels are averaged.
        length: samples of a window. Windows follow one another; what is left at a file's end is dropped.
        rate: the sample rate in Hz that every file must have; None for that of the first file.
        levels: mu + 1 (`dgm_models/ops/mulaw.py`).
        licence: of the data, for the manifest.
    """

    path: str
    length: int = 1024
    rate: int | None = None
    levels: int = 256
    licence: str = "not stated"

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("levels", 2), ("rate", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: {value}; expected at least {least}")

    def read(self, seed: int) -> Raw:
        where, names = place(self.path), files_in("audio-folder", self.path, (".wav",), "sound")
        classes, labels = subfolders("audio-folder", self.path, names)
        rate, told = self.rate, f"rate: {self.rate} Hz"
        windows: list[Array] = []
        listing = ""
        for name in names:
            content, label = where.read(name), f"audio-folder: {self.path.rstrip('/')}/{name}"
            x, found = wav.decode(content, label)
            if rate is None:
                rate, told = found, f"{name} has {found} Hz"
            if found != rate:
                raise ValueError(f"{label}: {found} Hz, and {told}; expected one sample rate: resample the file, as "
                                 f"`ffmpeg -i in.wav -ar {rate} out.wav` does, or take it out")  # fmt: skip
            if len(x) < self.length:
                raise ValueError(f"{label}: {len(x)} samples, fewer than length: {self.length}; give a length that "
                                 "every file has, or take the file out")  # fmt: skip
            windows.append(self._windows(x))
            listing += f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        file = np.repeat(np.arange(len(names)), [len(each) for each in windows])  # [N]
        return Raw(
            x=np.concatenate(windows),
            groups=file,
            labels=None if labels is None else labels[file],
            kind="audio",
            levels=self.levels,
            classes=len(classes),
            class_names=classes,
            licence=self.licence,
            source=Source(
                f"{origin(self.path, 'folder of sounds')}: {rate} Hz, {self.levels} mu-law levels",
                {f"sha256sum of {len(names)} files": hashlib.sha256(listing.encode()).hexdigest()},
            ),
        )

    def _windows(self, x: Array) -> Array:
        """[n, 1, length] levels of amplitudes [T]."""
        whole = x[: len(x) // self.length * self.length]
        q = mulaw.compress(torch.from_numpy(whole), self.levels).numpy()
        return q.astype(stored_dtype(self.levels)).reshape(-1, 1, self.length)
