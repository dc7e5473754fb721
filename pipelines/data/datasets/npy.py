"""An array in a .npy file: rows first."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np

from dgm_models.protocols import KINDS, Kind
from pipelines.data.inputs import file_of, origin
from pipelines.data.raw import Array, Raw, Source, top_label


@dataclass(frozen=True)
class Npy:
    """Rows from a .npy file, with labels from a second one if wanted.

    Args:
        path: a file, file:// or s3://, of [N, *shape]: image [N, C, H, W], vector [N, D], tokens [N, T],
            audio [N, C, T], codes [N, ...].
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
            classes=0 if (top := top_label(labels)) is None else top + 1,
            licence=self.licence,
            source=Source(origin(self.path, ".npy file"), sums),
        )


def _load(path: str) -> tuple[Array, dict[str, str]]:
    """The array and {file name: sha256}. Raises: ValueError that names the file."""
    where, name = file_of(path)
    try:
        content = where.read(name)
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"npy: {path}: {error}; expected a .npy file of numbers") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"npy: {path}: an archive of several arrays; expected one .npy array")
    return array, {name: hashlib.sha256(content).hexdigest()}
