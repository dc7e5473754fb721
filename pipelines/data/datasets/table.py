"""A table: every row an example, every column a number of it."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NoReturn

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.csv as pa_csv  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from dgm_models.construct import did_you_mean
from pipelines.data.datasets.parquet import Parquet
from pipelines.data.inputs import file_of, origin
from pipelines.data.raw import Array, Raw, Source


@dataclass(frozen=True)
class Table:
    """Vectors from one file of numbers.

    Args:
        path: a .csv file with commas between its columns, a .npy array [N, D] or a .parquet file, also file:// or
            s3://.
        columns: the values of a vector, in this order; null for all but the label. Columns without a name, those of a
            .npy and of a .csv without a header, are called by their number, from 0.
        label: a column of integers from 0; null without labels.
        levels: the values are the integers 0..levels-1, 2 for binary data; null for real numbers, which are
            standardised column by column with the mean and the standard deviation of train.
        header: the first line of a .csv names the columns.
        licence: of the data, for the manifest.
    """

    path: str
    columns: tuple[str | int, ...] | None = None
    label: str | int | None = None
    levels: int | None = None
    header: bool = True
    licence: str = "not stated"

    def __post_init__(self) -> None:
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels: {self.levels}; expected 2 or more, or null for real numbers")
        if self.columns is not None and (not self.columns or len(set(map(str, self.columns))) < len(self.columns)):
            raise ValueError(f"columns: {list(self.columns)}; expected at least one, none of them twice")

    def read(self, seed: int) -> Raw:
        found = read_columns(self.path, self.columns, self.label, self.header)
        labels = None if found.labels is None else found.whole(found.labels[:, None], (str(self.label),))[:, 0]
        x = found.x if self.levels is None else found.whole(found.x, found.names, self.levels)
        if self.levels is None:
            self._varying(found)
        return Raw(
            x=x,
            kind="vector",
            levels=self.levels,
            labels=labels,
            classes=0 if labels is None else int(labels.max()) + 1,
            licence=self.licence,
            source=Source(origin(self.path, "table"), {found.file: found.sha256}),
            columns=found.names,
        )

    def _varying(self, found: Columns) -> None:
        stored = found.x.astype(np.float32)  # what is equal there is equal for every model
        for name, low, high in zip(found.names, stored.min(0), stored.max(0), strict=True):
            if low == high:
                raise ValueError(
                    f"{self.path}: column {name!r} is {low:g} in every row; leave it out: name the others in `columns`"
                )


@dataclass(frozen=True, eq=False)
class Columns:
    """Some columns of a file.

    Attributes:
        path: of the file, for messages; file, sha256: its name and sum.
        names: of x's columns.
        x: [N, D] finite float64.
        labels: [N] finite float64, or None.
        row: what the file calls a row in words, such as "line 2", by its number from 0.
    """

    path: str
    file: str
    sha256: str
    names: tuple[str, ...]
    x: Array
    labels: Array | None
    row: Callable[[int], str]

    def whole(self, values: Array, names: Sequence[str], levels: int | None = None) -> Array:
        """[N, K] as int64. Raises: ValueError naming the first value that is none of 0..levels-1."""
        most = 2**31 if levels is None else levels
        wrong = (values != np.floor(values)) | (values < 0) | (values >= most)
        if wrong.any():
            row, column = map(int, np.argwhere(wrong)[0])
            expected = "whole numbers from 0" if levels is None else f"whole numbers 0..{levels - 1}"
            _refuse(self.path, self.row(row), names[column], values[row, column], expected)
        return values.astype(np.int64)


def read_columns(
    path: str, columns: Sequence[str | int] | None = None, label: str | int | None = None, header: bool | None = None
) -> Columns:
    """Columns of numbers out of a .csv, .npy or .parquet file.

    Args:
        path: the file, also file:// or s3://.
        columns: which, in this order; None for all but the label.
        label: a further one, or None.
        header: whether a .csv's first line names its columns; None: it does unless all its cells are numbers.
    Raises: ValueError that names the file and, where there is one, the row and the column.
    """
    where, file = file_of(path)
    suffix = PurePosixPath(file).suffix
    if suffix not in _FORMATS:
        raise ValueError(f"{path}: expected a table in a file ending in {', '.join(_FORMATS)}")
    try:
        content = where.read(file)
    except OSError as error:
        raise ValueError(f"{path}: {error}; expected a table in a {suffix} file") from error
    names, values, row = _FORMATS[suffix](path, content, header)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: two columns are called {twice!r}; give them names of their own")
    taken = [name for name in names if name != str(label)] if columns is None else [str(name) for name in columns]
    wanted = taken if label is None or str(label) in taken else [*taken, str(label)]
    for name in wanted:
        if name not in names:
            raise ValueError(f"{path}: no column {name!r}{did_you_mean(name, names)}")
    found = values(wanted)
    if not len(found):
        raise ValueError(f"{path}: no rows; expected at least one")
    if not np.isfinite(found).all():
        number, column = map(int, np.argwhere(~np.isfinite(found))[0])
        _refuse(path, row(number), wanted[column], found[number, column], "a finite number")
    labels = None if label is None else found[:, wanted.index(str(label))]
    sha256 = hashlib.sha256(content).hexdigest()
    return Columns(path, file, sha256, tuple(taken), found[:, : len(taken)], labels, row)


def _refuse(path: str, row: str, column: str, value: object, expected: str) -> NoReturn:
    raise ValueError(
        f"{path}: {row}, column {column!r} holds {value}; expected {expected}: mend it or drop the row, or leave the "
        "column out of `columns`"
    )


Format = tuple[list[str], Callable[[Sequence[str]], Array], Callable[[int], str]]  # names, values of names, row's name


def _csv(path: str, content: bytes, header: bool | None) -> Format:
    content = content.rstrip() + b"\n"
    first = [cell.strip() for cell in next(_lines(content.partition(b"\n")[0]), [])]
    if header is None:
        header = not all(map(_is_number, first))
    elif header and all(map(_is_number, first)):
        raise ValueError(
            f"{path}: line 1 holds numbers alone; expected the columns' names: name them, or give header: false"
        )
    names = first if header else [str(number) for number in range(len(first))]

    def values(wanted: Sequence[str]) -> Array:
        try:
            table = pa_csv.read_csv(
                io.BytesIO(content),
                read_options=pa_csv.ReadOptions(column_names=names, skip_rows=int(header)),
                parse_options=pa_csv.ParseOptions(ignore_empty_lines=False),
                convert_options=pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()) | dict.fromkeys(wanted, pa.float64()),
                    include_columns=wanted,
                    null_values=[],
                ),
            )
        except pa.ArrowInvalid as error:
            _refuse_line(path, content, names, wanted, header)
            raise ValueError(f"{path}: {error}") from error
        return np.stack([column.to_numpy() for column in table.columns], axis=1)

    return names, values, lambda row: f"line {row + 1 + int(header)}"


def _lines(content: bytes) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(content.decode("utf-8-sig", "replace"), newline=""))


def _refuse_line(path: str, content: bytes, names: Sequence[str], wanted: Sequence[str], header: bool) -> None:
    """Raises ValueError for the first line that has another number of cells, or no number where one is wanted."""
    places = [names.index(name) for name in wanted]
    for number, cells in enumerate(_lines(content), 1):
        if len(cells) != len(names):
            found = f"{path}: line {number} has {len(cells)} cells"
            raise ValueError(f"{found}; expected {len(names)}, as line 1 has: mend it or drop it")
        for place in places if number > 1 or not header else ():
            if not _is_number(cells[place]):
                _refuse(path, f"line {number}", names[place], repr(cells[place]), "a number")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _npy(path: str, content: bytes, header: bool | None) -> Format:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: {error}; expected a .npy array of numbers") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiub":
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise ValueError(f"{path}: holds {what}; expected one array of numbers [N, D]")
    names = [str(number) for number in range(array.shape[1])]
    return names, lambda wanted: array[:, [int(name) for name in wanted]].astype(np.float64), lambda row: f"row {row}"


def _parquet(path: str, content: bytes, header: bool | None) -> Format:
    try:
        names = list(pq.read_schema(pa.BufferReader(content)).names)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: {error}; expected a parquet file") from error
    return (
        names,
        lambda wanted: Parquet(path, columns=tuple(wanted)).read(0).x.astype(np.float64),
        lambda row: f"row {row}",
    )


_FORMATS: dict[str, Callable[[str, bytes, bool | None], Format]] = {".csv": _csv, ".npy": _npy, ".parquet": _parquet}
