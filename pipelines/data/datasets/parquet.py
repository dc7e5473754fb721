"""Rows from parquet files: one column of lists, bytes or images, or several columns of numbers."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.compute as pc  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

from dgm_models.protocols import KINDS, Kind
from pipelines.data import images
from pipelines.data.inputs import file_of, origin
from pipelines.data.raw import Array, Chunk, Index, Raw, Source
from pipelines.storage import place


@dataclass(frozen=True)
class Parquet:
    """Rows in the order of the files' names; a file is read whole, so it must fit in memory.

    Args:
        path: a file or a folder of *.parquet, also file:// or s3://.
        column: the column that holds a row: lists of one length, fixed-size binary (uint8 values), numbers, or image
            files as bytes (also as the field `bytes` of a struct), which are kind "image" with 256 levels.
        columns: in place of `column`, several columns of numbers: the values of a vector; real ones are standardised
            column by column.
        label: a column of integers from 0; None without labels.
        kind: what one row is.
        levels: the values are the integers 0..levels-1; None for real numbers, stored as float32.
        shape: of one row, where a list or binary stands for more than one axis; None for one axis.
        size, channels: of images, as in `image-folder`.
        licence: of the data, for the manifest.
    """

    path: str
    column: str | None = None
    columns: tuple[str, ...] = ()
    label: str | None = None
    kind: Kind = "vector"
    levels: int | None = None
    shape: tuple[int, ...] | None = None
    size: int | None = None
    channels: Literal[1, 3] = 3
    licence: str = "not stated"

    def __post_init__(self) -> None:
        if (self.column is None) == (not self.columns):
            raise ValueError(f"column: {self.column!r} and columns: {list(self.columns)}; expected one of the two")
        if self.columns and self.kind != "vector":
            raise ValueError(f"kind: {self.kind!r} of several columns; expected 'vector'")
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels: {self.levels}; expected 2 or more, or None for real numbers")
        images.check_settings(self.size, self.channels)

    def read(self, seed: int) -> Raw:
        return self.index().read("parquet")

    def index(self) -> Index:
        folder, names = self._files()
        where = place(folder)
        files = [_File(self, folder, name, None) for name in names]
        if where.local:  # a footer is read alone; on S3 a file comes whole, so its rows are counted where it is read
            files = [replace(file, rows=file.footer(where.local / file.name).num_rows) for file in files]
            schema = files[0].footer(where.local / names[0]).schema.to_arrow_schema()
        else:
            schema = files[0].footer(io.BytesIO(where.read(names[0]))).schema.to_arrow_schema()
        levels = 256 if self.column in schema.names and _is_image(schema.field(self.column).type) else self.levels
        if levels != self.levels and self.kind != "image":
            raise ValueError(f"parquet: {self.path}: column {self.column} holds image files; expected kind 'image'")

        def about(sums: Sequence[tuple[str, str]], top: int | None) -> Raw:
            return Raw(
                x=np.empty(0),
                kind=self.kind,
                levels=levels,
                classes=0 if top is None else top + 1,
                licence=self.licence,
                source=Source(origin(self.path, "parquet file"), dict(sums)),
                columns=self.columns,
            )

        return Index(files, about)

    def _files(self) -> tuple[str, list[str]]:
        """(the folder, the names of its files)."""
        if self.path.endswith(".parquet"):
            where, name = file_of(self.path)
            return where.uri, [name]
        where = place(self.path)
        names = [entry.name for entry in where.list() if entry.name.endswith(".parquet")]
        if not names:
            raise ValueError(f"parquet: {self.path}: no such file or folder, or no *.parquet in it")
        return where.uri, names


@dataclass(frozen=True)
class _File:
    settings: Parquet
    folder: str
    name: str
    rows: int | None

    @property
    def label(self) -> str:
        return f"parquet: {self.folder}/{self.name}"

    def footer(self, source: Any) -> Any:
        try:
            return pq.read_metadata(source)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.label}: {error}; expected a parquet file") from error

    def count(self) -> int:
        return int(self.footer(io.BytesIO(place(self.folder).read(self.name))).num_rows)

    def read(self) -> Chunk:
        content, settings = place(self.folder).read(self.name), self.settings
        names = self.footer(io.BytesIO(content)).schema.to_arrow_schema().names
        wanted = [*(settings.columns or [settings.column]), *([settings.label] if settings.label else [])]
        for name in wanted:
            if name not in names:
                raise ValueError(f"{self.label}: no column {name!r}; it has {', '.join(names)}")
        try:
            table = pq.read_table(pa.BufferReader(content), columns=wanted)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.label}: {error}; expected a whole parquet file") from error
        if not table.num_rows:
            raise ValueError(f"{self.label}: no rows; expected at least one, or no such file")
        if settings.columns:
            x = np.stack([self._numbers(table, name) for name in settings.columns], axis=1)  # [N, D]
        else:
            x = self._rows(table)
        labels = self._numbers(table, settings.label) if settings.label else None
        return Chunk(x, labels, ((self.name, hashlib.sha256(content).hexdigest()),))

    def _column(self, table: Any, name: str) -> Any:
        column = table[name]
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise ValueError(f"{self.label}: column {name}: row {row} is null; expected a value")
        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        return array.storage if isinstance(array, pa.ExtensionArray) else array

    def _numbers(self, table: Any, name: str) -> Array:
        """[N]"""
        return self._plain(self._column(table, name), name)

    def _plain(self, array: Any, name: str) -> Array:
        if array.null_count or not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
            found = f"{array.null_count} nulls" if array.null_count else str(array.type)
            raise ValueError(f"{self.label}: column {name}: {found}; expected numbers")
        values: Array = array.to_numpy(zero_copy_only=False)
        return values

    def _rows(self, table: Any) -> Array:
        """[N, *shape]"""
        name = self.settings.column
        assert name is not None
        array = self._column(table, name)
        kind = array.type
        if _is_image(kind):
            array = array.field("bytes") if pa.types.is_struct(kind) else array
            files = [(f"{self.label}: column {name}: row {row}", each) for row, each in enumerate(array.to_pylist())]
            return images.stack(files, self.settings.size, self.settings.channels, None)
        if pa.types.is_fixed_size_binary(kind):
            width = kind.byte_width
            x = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
            x = x.reshape(len(array), width)
        elif pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
            values = self._plain(array.flatten(), name)
            width, rest = divmod(len(values), len(array))
            if rest or (pc.list_value_length(array).to_numpy(zero_copy_only=False) != width).any():
                raise ValueError(f"{self.label}: column {name}: lists of several lengths; expected one length")
            x = values.reshape(len(array), width)
        else:
            x = self._plain(array, name)[:, None]
        shape = self.settings.shape or x.shape[1:]
        if int(np.prod(shape)) != x.shape[1]:
            raise ValueError(f"{self.label}: column {name}: {x.shape[1]} values a row; shape: {list(shape)} has others")
        return x.reshape(len(x), *shape)


def _is_image(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
