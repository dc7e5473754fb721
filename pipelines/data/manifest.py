"""`manifest.json`: what a prepared dataset is, and the sha256 of every file in it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dgm_models.protocols import DataSpec, Kind
from pipelines.data.raw import SPLITS, Factor, Source
from pipelines.storage import place

SCHEMA = 1
FILE = "manifest.json"
DTYPES = ("uint8", "int32", "float32")
PART = re.compile(rf"({'|'.join(SPLITS)})/part-\d{{5}}\.parquet")


@dataclass(frozen=True)
class Part:
    """One parquet file: its path below the dataset's folder, rows, length in bytes and sha256."""

    path: str
    rows: int
    bytes: int
    sha256: str

    @property
    def split(self) -> str:
        return self.path.split("/")[0]


@dataclass(frozen=True)
class Manifest:
    """What one prepared dataset is.

    Attributes:
        schema: the version of this file's layout.
        name: the dataset's name in the table of datasets.
        kind, shape, levels, classes, location, scale: as in `DataSpec`; location and scale are the mean and the
            standard deviation of all values of train for real data, of every column by itself where there are
            `columns`; 0 and 1 otherwise.
        dtype: "uint8", "int32" or "float32", little-endian.
        class_names: one name a class, or empty.
        rows: split -> number of rows.
        parts: every file, in the order of its rows.
        split, split_seed: the fractions and the seed that made the splits.
        entropy_nats: of one example's density, where it is known.
        factors: what a row was made from; its `id` is its number in their grid, the last running fastest.
        columns: the names of a vector's values where they are columns of a table. Without factors, or columns, the file
            has no such key.
    """

    schema: int
    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    levels: int | None
    classes: int
    class_names: tuple[str, ...]
    location: float | tuple[float, ...]
    scale: float | tuple[float, ...]
    rows: Mapping[str, int]
    parts: tuple[Part, ...]
    split: tuple[float, ...]
    split_seed: int
    licence: str
    source: Source
    entropy_nats: float | None
    factors: tuple[Factor, ...] = ()
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema!r}; expected {SCHEMA}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        for part in self.parts:
            if not PART.fullmatch(part.path):
                raise ValueError(f"part {part.path!r}; expected a path such as 'train/part-00000.parquet'")
        found = {split: sum(part.rows for part in self.parts if part.split == split) for split in SPLITS}
        if dict(self.rows) != found:
            raise ValueError(f"rows {dict(self.rows)}; expected the sums over the parts, {found}")
        self.spec()

    def spec(self) -> DataSpec:
        """What one example is, as the library wants to know it."""
        return DataSpec(self.kind, self.shape, self.levels, self.classes, self.location, self.scale, self.class_names)

    @property
    def digest(self) -> str:
        """sha256 of the canonical manifest: with the parts' sums in it, it stands for every byte of the dataset."""
        text = json.dumps(self._document(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(self._document(), indent=1, allow_nan=False) + "\n"

    def _document(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value or key not in ("factors", "columns")}

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises: ValueError for a missing or unknown key, another schema, or values that contradict each other."""
        found = json.loads(text)
        entries = _entries(cls, {"factors": [], "columns": [], **found} if isinstance(found, dict) else found)
        return cls(
            **entries
            | {
                "shape": tuple(entries["shape"]),
                "location": _numbers(entries["location"]),
                "scale": _numbers(entries["scale"]),
                "columns": tuple(entries["columns"]),
                "class_names": tuple(entries["class_names"]),
                "split": tuple(entries["split"]),
                "parts": tuple(Part(**_entries(Part, part)) for part in entries["parts"]),
                "source": Source(**_entries(Source, entries["source"])),
                "factors": tuple(Factor(**_entries(Factor, factor)) for factor in entries["factors"]),
            }
        )


def _numbers(found: Any) -> Any:
    """A list as a tuple, a number as it is."""
    return tuple(found) if isinstance(found, list) else found


def _entries(cls: type, found: Any) -> dict[str, Any]:
    """`found` as keyword arguments of the dataclass `cls`, no key missing and none too many."""
    expected = [field.name for field in fields(cls)]
    if not isinstance(found, dict) or sorted(found) != sorted(expected):
        keys = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{cls.__name__.lower()} has the keys {keys}; expected {sorted(expected)}")
    return dict(found)


def read_manifest(data: Path | str) -> Manifest:
    """The manifest of a prepared dataset: a folder or a URI such as s3://bucket/prefix.

    Raises: ValueError that names the file and the way out when it is missing or damaged.
    """
    try:
        return Manifest.from_json(place(data).read(FILE).decode())
    except FileNotFoundError:
        raise ValueError(f"{data}/{FILE}: no such file; {way_out(data)}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{data}/{FILE}: {error}; {way_out(data)}") from error


def way_out(data: Path | str) -> str:
    """How to get a sound copy again: a folder's name is the key of its stage, on S3 it is a copy of a folder."""
    folder = place(data).local
    if folder is None:
        return f"delete {data} and repeat the command: it is copied there again"
    return f"make it again with `dvc repro -f prepare@{folder.name}`"
