"""Parquet shards: rows to files and files to tensors, every file held to the sha256 in the manifest.

Columns: `id` int64, the row's number in the whole dataset, or in the grid of its factors where it has factors; `x`
fixed-size binary, the raw little-endian values; `label` int32, absent when the dataset has no labels.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
import torch
from torch import Tensor

from pipelines.data.manifest import Manifest, Part, read_manifest, way_out
from pipelines.data.raw import SPLITS, Array, Factor
from pipelines.storage import place

__all__ = ["Manifest", "Part", "Rows", "factors_of", "load", "read_manifest", "write_part"]

_TORCH = {"uint8": torch.uint8, "int32": torch.int32, "float32": torch.float32}


@dataclass(frozen=True)
class Rows:
    """One split in memory: x [N, *shape] in its stored dtype, cond [N] int64 labels or None, id [N] int64."""

    x: Tensor
    cond: Tensor | None
    id: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> Rows:
        """The same memory, fewer rows."""
        return Rows(self.x[rows], None if self.cond is None else self.cond[rows], self.id[rows])


def write_part(folder: Path, path: str, ids: Array, x: Array, labels: Array | None) -> Part:
    """Writes one shard below `folder`; the same rows give the same bytes.

    Args:
        path: such as "train/part-00000.parquet".
        ids: [N] row numbers.
        x: [N, *shape] uint8, int32 or float32.
        labels: [N] or None.
    """
    content = encode(ids, x, labels)
    target = folder / path
    target.parent.mkdir(exist_ok=True)
    write_synced(target, content)
    return part_of(path, len(x), content)


def part_of(path: str, rows: int, content: bytes) -> Part:
    """What the manifest says of a shard."""
    return Part(path, rows, len(content), hashlib.sha256(content).hexdigest())


def encode(ids: Array, x: Array, labels: Array | None) -> bytes:
    """The bytes of one shard; arguments as `write_part`."""
    little = np.ascontiguousarray(x.astype(x.dtype.newbyteorder("<"), copy=False))
    width = little[0].nbytes
    values = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(x), [None, pa.py_buffer(little)])
    columns = [pa.array(ids, pa.int64()), values]
    schema = [pa.field("id", pa.int64(), nullable=False), pa.field("x", pa.binary(width), nullable=False)]
    if labels is not None:
        columns.append(pa.array(labels, pa.int32()))
        schema.append(pa.field("label", pa.int32()))
    file = io.BytesIO()
    table = pa.Table.from_arrays(columns, schema=pa.schema(schema))
    pq.write_table(table, file, compression="zstd", use_dictionary=False, write_statistics=False)
    return file.getvalue()


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def load(data: Path | str, split: str) -> Rows:
    """One split of a prepared dataset, in memory.

    Args:
        data: a folder or a URI such as s3://bucket/prefix.
        split: "train", "valid" or "test".
    Raises: ValueError that names the file and the way out when a byte differs from the manifest.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
    manifest = read_manifest(data)
    rows = empty(manifest, manifest.rows[split])
    start = 0
    for part in manifest.parts:
        if part.split == split:
            _decode(data, part, verified(data, part), rows[start : start + part.rows])
            start += part.rows
    return rows


def factors_of(data: Path | str, split: str) -> Tensor:
    """What the rows of a split were made from: [N, F] int64 in the order of `load` and of the manifest's factors.

    Raises: ValueError when the dataset has no factors; else as `load`.
    """
    factors = read_manifest(data).factors
    if not factors:
        raise ValueError(f"{data}: its manifest names no factors; `shapes` is a dataset that has them")
    return factors_at(load(data, split).id, factors)


def factors_at(ids: Tensor, factors: tuple[Factor, ...]) -> Tensor:
    """Numbers [N] in the factors' grid, the last running fastest -> [N, F] int64, each 0..size-1."""
    return torch.stack(torch.unravel_index(ids, [factor.size for factor in factors]), 1)


def read_part(data: Path | str, manifest: Manifest, part: Part) -> Rows:
    """One shard, in memory; arguments and errors as `load`."""
    rows = empty(manifest, part.rows)
    _decode(data, part, verified(data, part), rows)
    return rows


def empty(manifest: Manifest, rows: int) -> Rows:
    """Room for so many rows."""
    x = torch.empty((rows, *manifest.shape), dtype=_TORCH[manifest.dtype])
    cond = torch.empty(rows, dtype=torch.int64) if manifest.classes else None
    return Rows(x, cond, torch.empty(rows, dtype=torch.int64))


def verified(data: Path | str, part: Part) -> bytes:
    """The bytes of a shard, after its length and sha256 were compared with the manifest's. Errors as `load`."""
    try:
        content = place(data).read(part.path)
    except FileNotFoundError:
        raise ValueError(f"{data}/{part.path}: no such file, but the manifest names it; {way_out(data)}") from None
    check(data, part, len(content), hashlib.sha256(content).hexdigest())
    return content


def check(data: Path | str, part: Part, size: int, sha256: str) -> None:
    """Raises: ValueError when a shard of `size` bytes with this sum is not what the manifest names."""
    if size != part.bytes or sha256 != part.sha256:
        raise ValueError(
            f"{data}/{part.path}: {size} bytes with sha256 {sha256}; the manifest expects {part.bytes} bytes with "
            f"{part.sha256}; {way_out(data)}"
        )


def _decode(data: Path | str, part: Part, content: bytes, into: Rows) -> None:
    """Fills `into` from a shard's verified bytes."""
    table = pq.read_table(pa.BufferReader(content)).combine_chunks()
    if table.num_rows != part.rows or (into.cond is not None) != ("label" in table.column_names):
        raise ValueError(f"{data}/{part.path}: {table.num_rows} rows of {table.column_names} contradict the manifest")
    values = table["x"].chunk(0)
    width = values.type.byte_width
    if width != into.x[0].nbytes:
        raise ValueError(f"{data}/{part.path}: rows of {width} bytes; the manifest expects {into.x[0].nbytes}")
    stored = np.frombuffer(values.buffers()[1], np.uint8, part.rows * width, values.offset * width)
    little = stored.view(into.x.numpy().dtype.newbyteorder("<"))
    into.x.numpy()[...] = little.reshape(into.x.shape)
    into.id.numpy()[...] = table["id"].to_numpy()
    if into.cond is not None:
        into.cond.numpy()[...] = table["label"].to_numpy()
