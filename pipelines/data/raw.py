"""What a dataset's `read` returns, and the one door through which it must pass before it is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from dgm_models.protocols import KINDS, Kind

Array = npt.NDArray[Any]

SPLITS = ("train", "valid", "test")
AXES = {"image": 3, "vector": 1, "tokens": 1, "audio": 2}  # "codes" may have any number of axes


@dataclass(frozen=True)
class Source:
    """Where the raw bytes come from.

    Attributes:
        origin: the public home or a description; never a path of this machine.
        files: raw file name -> sha256.
    """

    origin: str
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Factor:
    """What a row was made from, with values 0..size-1."""

    name: str
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"factor {self.name!r} of {self.size} values; expected at least 1")


@dataclass(frozen=True, eq=False)
class Raw:
    """A whole dataset in memory.

    Attributes:
        x: [N, *shape]; integers 0..levels-1, or floats when `levels` is None.
        kind, levels, classes: as in `DataSpec`.
        labels: [N] integers 0..classes-1, or None.
        class_names: one name a class, or empty.
        splits: rows [start, stop) that the source itself gives to a split. Without "valid" it is cut from "train";
            None when the source fixes nothing.
        entropy_nats: of one example's density, where it is known.
        ids: [N] different integers, the rows' numbers in the source; None for 0..N-1.
        groups: [N] integers: rows of one number go to one split; None when each row goes for itself. Not with `splits`.
        factors: what a row was made from: `ids` are then numbers in the factors' grid, the last running fastest.
        columns: the names of a vector's values where they are columns of a table: real ones are then standardised each
            by its own mean and standard deviation.
    """

    x: Array
    kind: Kind
    licence: str
    source: Source
    levels: int | None = None
    labels: Array | None = None
    classes: int = 0
    class_names: tuple[str, ...] = ()
    splits: Mapping[str, tuple[int, int]] | None = None
    entropy_nats: float | None = None
    ids: Array | None = None
    groups: Array | None = None
    factors: tuple[Factor, ...] = ()
    columns: tuple[str, ...] = ()


class Dataset(Protocol):
    """One frozen dataclass a dataset: its constructor's signature is the schema of its params section."""

    def read(self, seed: int) -> Raw:
        """The whole dataset; `seed` matters only to what is generated."""
        ...


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some rows in memory: x and labels as in `Raw`, and (name, sha256) of every raw file that they came from."""

    x: Array
    labels: Array | None
    sums: tuple[tuple[str, str], ...]


class Block(Protocol):
    """Consecutive rows of a dataset, not read yet: plain values that travel to whoever reads them.

    Attributes:
        rows: how many; None when only reading can tell.
    """

    @property
    def rows(self) -> int | None: ...

    def count(self) -> int:
        """How many rows; may read."""
        ...

    def read(self) -> Chunk: ...


@dataclass(frozen=True)
class Index:
    """A dataset as blocks, in the order of its rows.

    Attributes:
        blocks: of at least a row each.
        about: (the sums of all blocks in order, the largest label or None) -> everything but the rows: `x` is empty.
    """

    blocks: Sequence[Block]
    about: Callable[[Sequence[tuple[str, str]], int | None], Raw]

    def read(self, name: str) -> Raw:
        """The whole dataset in memory. Raises: ValueError when the blocks' rows have more than one shape."""
        chunks = [block.read() for block in self.blocks]
        one_shape(name, [chunk.x.shape[1:] for chunk in chunks])
        found = [chunk.labels for chunk in chunks if chunk.labels is not None]
        labels = np.concatenate(found) if found else None
        raw = self.about([each for chunk in chunks for each in chunk.sums], top_label(labels))
        return replace(raw, x=np.concatenate([chunk.x for chunk in chunks]), labels=labels)


class Indexed(Dataset, Protocol):
    """A dataset that need not be read at once."""

    def index(self) -> Index:
        """Lists the dataset; reads no more than it must."""
        ...


def one_shape(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that all have. Raises: ValueError."""
    for shape in shapes:
        if shape != shapes[0]:
            raise ValueError(f"{name}: rows of shape {shape} after rows of {shapes[0]}; expected one shape")
    return shapes[0]


def top_label(labels: Array | None) -> int | None:
    """The largest label, where there are any."""
    return int(labels.max()) if labels is not None and labels.size and labels.dtype.kind in "iu" else None


def stored_dtype(levels: int | None) -> str:
    """The dtype in which values are stored."""
    if levels is None:
        return "float32"
    return "uint8" if levels <= 256 else "int32"


def checked(name: str, raw: Raw) -> Raw:
    """The same rows in their stored dtype: uint8 (levels <= 256), int32, or float32 for real numbers.

    Raises: ValueError for an empty set, a wrong shape or dtype, NaN, values outside the levels, constant data
    and labels that do not fit; it names the dataset, what was found and what is expected.
    """
    raw = checked_rows(name, raw)
    if raw.x.min() == raw.x.max():
        raise ValueError(f"{name}: every value is {raw.x.min()}; expected data that vary")
    return raw


def checked_rows(name: str, raw: Raw, first: int = 0) -> Raw:
    """As `checked`, for rows of which the first has the number `first`; they may be constant."""
    _check_shape(name, raw)
    x = _reals(name, raw.x, first) if raw.levels is None else _integers(name, raw.x, raw.levels, first)
    return replace(raw, x=x, labels=_labels(name, raw), ids=_ids(name, raw))


def _check_shape(name: str, raw: Raw) -> None:
    if raw.kind not in KINDS:
        raise ValueError(f"{name}: kind {raw.kind!r}; expected one of {', '.join(KINDS)}")
    if raw.x.ndim == 0 or len(raw.x) == 0:
        raise ValueError(f"{name}: an array of shape {raw.x.shape} without rows; expected at least one row")
    axes = AXES.get(raw.kind, max(raw.x.ndim - 1, 1))
    if raw.x.ndim != axes + 1:
        raise ValueError(
            f"{name}: an array of shape {raw.x.shape}; expected {axes + 1} axes, rows first, for kind {raw.kind!r}"
        )
    if 0 in raw.x.shape:
        raise ValueError(f"{name}: an array of shape {raw.x.shape}; expected no axis of length 0")


def _reals(name: str, x: Array, first: int) -> Array:
    if x.dtype.kind != "f":
        raise ValueError(f"{name}: dtype {x.dtype} without levels; expected floats, or give levels for integers")
    with np.errstate(over="ignore"):
        single = x.astype(np.float32)
    if not np.isfinite(single).all():
        _name_value(name, x, ~np.isfinite(single), "finite float32 numbers", first)
    return single


def _integers(name: str, x: Array, levels: int, first: int) -> Array:
    if not 2 <= levels <= 2**31 - 1:
        raise ValueError(f"{name}: {levels} levels; expected 2 to 2^31 - 1")
    if x.dtype.kind not in "iub":
        raise ValueError(f"{name}: dtype {x.dtype} with {levels} levels; expected integers 0..{levels - 1}")
    if x.min() < 0 or x.max() >= levels:
        _name_value(name, x, (x < 0) | (x >= levels), f"integers 0..{levels - 1}", first)
    return x.astype(stored_dtype(levels))


def _name_value(name: str, x: Array, wrong: Array, expected: str, first: int) -> NoReturn:
    where = tuple(int(i) for i in np.argwhere(wrong)[0])
    raise ValueError(f"{name}: row {first + where[0]} holds {x[where]} at {where[1:]}; expected {expected}")


def _labels(name: str, raw: Raw) -> Array | None:
    if raw.labels is None:
        return None
    if raw.labels.shape != (len(raw.x),):
        raise ValueError(f"{name}: labels of shape {raw.labels.shape}; expected ({len(raw.x)},), one a row")
    if raw.labels.dtype.kind not in "iu":
        raise ValueError(f"{name}: labels of dtype {raw.labels.dtype}; expected integers")
    low, high = int(raw.labels.min()), int(raw.labels.max())
    if low < 0 or high >= raw.classes:
        raise ValueError(f"{name}: labels {low}..{high}; expected 0..{raw.classes - 1}")
    return raw.labels.astype(np.int32)


def _ids(name: str, raw: Raw) -> Array | None:
    if raw.ids is None:
        return None
    if raw.ids.shape != (len(raw.x),) or raw.ids.dtype.kind not in "iu" or len(np.unique(raw.ids)) < len(raw.ids):
        raise ValueError(f"{name}: ids of shape {raw.ids.shape} and dtype {raw.ids.dtype}; expected as many different "
                         f"integers as rows, {len(raw.x)}")  # fmt: skip
    end = math.prod(factor.size for factor in raw.factors) if raw.factors else 2**63
    if raw.ids.min() < 0 or raw.ids.max() >= end:
        raise ValueError(f"{name}: ids {raw.ids.min()}..{raw.ids.max()}; expected 0..{end - 1}")
    return raw.ids.astype(np.int64)
