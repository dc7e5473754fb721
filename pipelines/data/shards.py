"""Parquet shards: rows to files and files to tensors, every file held to the sha256 in the manifest.

Columns: `id` int64, the row's number in the whole dataset; `x` fixed-size binary, the raw little-endian values;
`label` int32, absent when the dataset has no labels.
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
from pipelines.data.raw import SPLITS, Array

__all__ = ["Manifest", "Part", "Rows", "load", "read_manifest", "write_part"]

_TORCH = {"uint8": torch.uint8, "int32": torch.int32, "float32": torch.float32}


@dataclass(frozen=True)
class Rows:
    """One split in memory: x [N, *shape] in its stored dtype, cond [N] int64 labels or None, id [N] int64."""

    x: Tensor
    cond: Tensor | None
    id: Tensor

    def __len__(self) -> int:
        return len(self.x)


def write_part(folder: Path, path: str, ids: Array, x: Array, labels: Array | None) -> Part:
    """Writes one shard below `folder`; the same rows give the same bytes.

    Args:
        path: such as "train/part-00000.parquet".
        ids: [N] row numbers.
        x: [N, *shape] uint8, int32 or float32.
        labels: [N] or None.
    """
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
    return _write(folder, path, len(x), file.getvalue())


def _write(folder: Path, path: str, rows: int, content: bytes) -> Part:
    target = folder / path
    target.parent.mkdir(exist_ok=True)
    write_synced(target, content)
    return Part(path, rows, len(content), hashlib.sha256(content).hexdigest())


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path | str, split: str) -> Rows:
    """One split of a prepared dataset, in memory.

    Raises: ValueError that names the file and the way out when a byte differs from the manifest.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
    manifest = read_manifest(folder)
    rows = manifest.rows[split]
    x = torch.empty((rows, *manifest.shape), dtype=_TORCH[manifest.dtype])
    ids = torch.empty(rows, dtype=torch.int64)
    cond = torch.empty(rows, dtype=torch.int64) if manifest.classes else None
    start = 0
    for part in manifest.parts:
        if part.split == split:
            here = slice(start, start + part.rows)
            _read_part(Path(folder), part, x[here], ids[here], None if cond is None else cond[here])
            start += part.rows
    return Rows(x, cond, ids)


def _read_part(folder: Path, part: Part, x: Tensor, ids: Tensor, cond: Tensor | None) -> None:
    """Fills the three tensors from one file, after its sha256 was checked."""
    table = pq.read_table(pa.BufferReader(_verified(folder, part))).combine_chunks()
    if table.num_rows != part.rows or (cond is not None) != ("label" in table.column_names):
        raise ValueError(f"{folder / part.path}: {table.num_rows} rows of {table.column_names} contradict the manifest")
    values = table["x"].chunk(0)
    width = values.type.byte_width
    if width != x[0].nbytes:
        raise ValueError(f"{folder / part.path}: rows of {width} bytes; the manifest expects {x[0].nbytes}")
    stored = np.frombuffer(values.buffers()[1], np.uint8, part.rows * width, values.offset * width)
    little = stored.view(x.numpy().dtype.newbyteorder("<"))
    x.numpy()[...] = little.reshape(x.shape)
    ids.numpy()[...] = table["id"].to_numpy()
    if cond is not None:
        cond.numpy()[...] = table["label"].to_numpy()


def _verified(folder: Path, part: Part) -> bytes:
    path = folder / part.path
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, but the manifest names it; {way_out(folder)}") from None
    found = hashlib.sha256(content).hexdigest()
    if len(content) != part.bytes or found != part.sha256:
        raise ValueError(
            f"{path}: {len(content)} bytes with sha256 {found}; the manifest expects {part.bytes} bytes with "
            f"{part.sha256}; {way_out(folder)}"
        )
    return content
