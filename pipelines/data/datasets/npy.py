"""An array in a .npy file: rows first."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgm_models.protocols import KINDS, Kind
from pipelines.data.raw import Array, Raw, Source


@dataclass(frozen=True)
class Npy:
    """Rows from a .npy file, with labels from a second one if wanted.

    Args:
        path: [N, *shape]: image [N, C, H, W], vector [N, D], tokens [N, T], audio [N, C, T], codes [N, ...].
        levels: the values are the integers 0..levels-1; None for real numbers, stored as float32.
        kind: what one row is.
        labels: a .npy file of N integers from 0; None without labels.
        licence: of the data, for the manifest.
    """

    path: str
    levels: int | None = None
    kind: Kind = "vector"
    labels: str | None = None
    licence: str = "not stated"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels: {self.levels}; expected 2 or more, or None for real numbers")
        if self.kind == "tokens" and self.levels is None:
            raise ValueError("levels: None with kind 'tokens'; expected the size of the vocabulary")

    def read(self, seed: int) -> Raw:
        x, sums = _load(self.path)
        labels = None
        if self.labels is not None:
            labels, more = _load(self.labels)
            sums |= more
        return Raw(
            x=x,
            kind=self.kind,
            levels=self.levels,
            labels=labels,
            classes=int(labels.max()) + 1 if labels is not None and labels.size and labels.dtype.kind in "iu" else 0,
            licence=self.licence,
            source=Source("a local .npy file", sums),
        )


def _load(path: str) -> tuple[Array, dict[str, str]]:
    """The array and {file name: sha256}. Raises: ValueError that names the file."""
    file = Path(path).expanduser()
    try:
        array = np.load(file, allow_pickle=False)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"npy: {path}: {error}; expected a .npy file of numbers") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"npy: {path}: an archive of several arrays; expected one .npy array")
    return array, {file.name: sha256}
