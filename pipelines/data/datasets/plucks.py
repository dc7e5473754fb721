"""Plucked strings of several pitches; rendered here, needs no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dgm_models import noise
from dgm_models.ops import mulaw
from pipelines.data.raw import Array, Raw, Source, stored_dtype

GUITAR = (82.41, 110.0, 146.83, 196.0, 246.94, 329.63)  # Hz: the open strings, E2 to E4


@dataclass(frozen=True)
class Plucks:
    """y_t = (y_(t-p) + y_(t-p-1)) / 2 from p + 1 values of noise, uniform in (-1, 1), in mu-law levels.

    The period is p + 1/2 samples, p the nearest whole number to rate / pitch - 1/2. The label is the pitch. Rows are a
    function of (settings, seed, row number): more rows begin with the same rows.

    Args:
        rows: how many.
        length: samples of a row, which begins with the pluck.
        rate: samples a second.
        pitches: Hz; the strings of a guitar unless given.
        levels: mu + 1 (`dgm_models/ops/mulaw.py`).

    Source: Karplus and Strong 1983, Digital Synthesis of Plucked-String and Drum Timbres. Differs: noise is uniform and
    not of two values.
    """

    rows: int = 2_000
    length: int = 1024
    rate: int = 8000
    pitches: tuple[float, ...] = GUITAR
    levels: int = 256

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("rate", 1), ("levels", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}; expected at least {least}")
        if not self.pitches or not all(0 < pitch <= self.rate / 2.5 for pitch in self.pitches):
            raise ValueError(f"pitches: {list(self.pitches)}; expected Hz above 0 and at most {self.rate / 2.5:g}, "
                             f"2/5 of rate: {self.rate}")  # fmt: skip
        if len(set(self.delays)) < len(self.pitches):
            raise ValueError(f"pitches: {list(self.pitches)} have the delays {list(self.delays)} at rate: {self.rate}; "
                             "expected different ones")  # fmt: skip
        if self.length <= max(self.delays) + 1:
            raise ValueError(f"length: {self.length}; expected more than {max(self.delays) + 1}, the noise that the "
                             "lowest pitch begins with")  # fmt: skip

    @property
    def delays(self) -> tuple[int, ...]:
        """p of every pitch, in samples."""
        return tuple(round(self.rate / pitch - 0.5) for pitch in self.pitches)

    def read(self, seed: int) -> Raw:
        keys = noise.fold(torch.arange(self.rows), "plucks", seed)
        labels = (noise.uniform(keys, "pitch", (), torch.float64) * len(self.pitches)).long()
        x = np.empty((self.rows, 1, self.length), stored_dtype(self.levels))
        for label in range(len(self.pitches)):
            mine = labels == label
            q = mulaw.compress(torch.from_numpy(self.render(keys[mine], label)), self.levels)
            x[mine.numpy(), 0] = q.numpy()
        return Raw(
            x=x,
            labels=labels.numpy(),
            kind="audio",
            levels=self.levels,
            classes=len(self.pitches),
            class_names=tuple(f"{pitch:g} Hz" for pitch in self.pitches),
            licence="generated; no rights reserved",
            source=Source(f"generated: {self}, seed {seed}; {self.rate} Hz, {self.levels} mu-law levels"),
        )

    def render(self, keys: torch.Tensor, label: int) -> Array:
        """Amplitudes [N, length] float64 of one pitch, from keys [N]."""
        delay = self.delays[label]
        y = np.empty((len(keys), self.length))
        y[:, : delay + 1] = noise.uniform(keys, "pluck", (delay + 1,), torch.float64).numpy() * 2 - 1
        for start in range(delay + 1, self.length, delay):  # a period at a time: it reads the one before
            stop = min(start + delay, self.length)
            y[:, start:stop] = (y[:, start - delay : stop - delay] + y[:, start - delay - 1 : stop - delay - 1]) / 2
        return y
