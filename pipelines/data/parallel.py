"""`prepare` on Ray Data: what does not fit in one memory, block by block, to the bytes that one process would write.

The split is decided first, from the number of rows alone. Then every block (a file of parquet, some hundred images) is
read once, by whoever has room, and its rows go to their shards by Ray Data's shuffle: the rows of a shard come from all
over the dataset, so reading it shard by shard would read a parquet file once for every shard. A task holds one block,
or one shard; what is between them lies in Ray's object store, which spills to the disks of the nodes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

from pipelines.data.manifest import FILE, Manifest, Part
from pipelines.data.prepare import Section, Settings, Shard, make_shard, manifest_of, output, plan
from pipelines.data.raw import Array, Block, Indexed, Raw, checked_rows, one_shape, stored_dtype, top_label
from pipelines.data.split import split_rows
from pipelines.storage import place

if TYPE_CHECKING:
    from pipelines.params import Cluster

REPORT = -1  # the shard of a block's report: one row beside the block's own
# x is of variable length, so that a report fits in the same column
SCHEMA = pa.schema(
    {"shard": pa.int32(), "slot": pa.int64(), "id": pa.int64(), "x": pa.large_binary(), "label": pa.int32()}
)


@dataclass(frozen=True, eq=False)
class _Task:
    """A block and where its rows go: row first + i to place slot[i] of shard[i]."""

    name: str
    number: int
    block: Block
    about: Raw
    first: int
    shard: Array
    slot: Array


def prepare_on_ray(section: Section, out: Path | str, cluster: Cluster | None = None) -> Manifest:
    """As `prepare`, whatever the number of blocks and workers.

    Ray that runs already is used as it is.
    """
    import ray

    from pipelines.cluster.session import session
    from pipelines.params import Cluster

    with nullcontext() if ray.is_initialized() else session(cluster or Cluster()):
        return _prepare(section.name, cast(Indexed, section.dataset), section.settings, out)


def _prepare(name: str, dataset: Indexed, settings: Settings, out: Path | str) -> Manifest:
    index = dataset.index()
    counts = _counts(index.blocks)
    starts = np.concatenate([[0], np.cumsum(counts)])
    shards = plan(split_rows(name, int(starts[-1]), None, settings.split, settings.seed), settings)
    shard_of, slot_of = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.int64)
    for number, ids in enumerate(shards.values()):
        shard_of[ids], slot_of[ids] = number, np.arange(len(ids))
    about = index.about([], None)
    tasks = [
        _Task(name, number, block, about, int(first), shard_of[first:end], slot_of[first:end])
        for number, (block, first, end) in enumerate(zip(index.blocks, starts[:-1], starts[1:], strict=True))
    ]
    with output(out) as put:
        remote = None if place(out).local else str(out)  # a local folder is the driver's: no worker can see it
        finish = partial(
            _finish, paths=tuple(shards), dtype=stored_dtype(about.levels), out=remote, by_column=bool(about.columns)
        )
        rows = _dataset(tasks).map_batches(_read, batch_size=1, batch_format="numpy")
        rows = rows.groupby("shard", num_partitions=len(shards)).map_groups(finish, batch_format="pyarrow")
        made: dict[str, Shard] = {}
        reports: dict[int, dict[str, Any]] = {}
        for row in rows.iter_rows():
            document = json.loads(row["report"])
            if "block" in document:
                reports[document["block"]] = document
            else:
                made[document["part"]["path"]] = Shard(**document | {"part": Part(**document["part"])})
                if remote is None:
                    put(document["part"]["path"], row["content"])
        found = [reports[number] for number in range(len(tasks))]
        for report in found:
            if report["error"]:
                raise ValueError(report["error"])
        shape = one_shape(name, [tuple(report["shape"]) for report in found])
        tops = [report["top"] for report in found if report["top"] is not None]
        raw = index.about(
            [(file, sha256) for report in found for file, sha256 in report["sums"]], max(tops, default=None)
        )
        manifest = manifest_of(name, raw, shape, settings, [made[path] for path in shards])
        put(FILE, manifest.to_json().encode())
    return manifest


def _dataset(tasks: Sequence[Any]) -> Any:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))


def _counts(blocks: Sequence[Block]) -> list[int]:
    """Rows of every block; what only reading can tell is counted by the workers."""
    unknown = [number for number, block in enumerate(blocks) if block.rows is None]
    counted = {}
    if unknown:
        items = [(number, blocks[number]) for number in unknown]
        rows = _dataset(items).map_batches(_count, batch_size=1, batch_format="numpy").iter_rows()
        counted = {row["number"]: row["rows"] for row in rows}
    return [counted[number] if block.rows is None else block.rows for number, block in enumerate(blocks)]


def _count(batch: dict[str, Any]) -> dict[str, Any]:
    number, block = batch["task"][0]
    return {"number": [number], "rows": [block.count()]}


def _read(batch: dict[str, Any]) -> Any:
    """A block's rows with their shard and place in it, and a last row that reports on the block."""
    task: _Task = batch["task"][0]
    report: dict[str, Any] = {"block": task.number, "error": "", "shape": [], "top": None, "sums": []}
    tables = []
    try:
        chunk = task.block.read()
        top = top_label(chunk.labels)
        classes = task.about.classes or (0 if top is None else top + 1)
        raw = Raw(chunk.x, task.about.kind, "", task.about.source, task.about.levels, chunk.labels, classes)
        raw = checked_rows(task.name, raw, task.first)
        report |= {"shape": raw.x.shape[1:], "top": top, "sums": chunk.sums}
        tables.append(_rows(task, raw.x, raw.labels))
    except ValueError as error:  # reported in the blocks' order: the first is the one that a single process meets
        report["error"] = str(error)
    last = {"shard": [REPORT], "slot": [task.number], "id": [0], "x": [json.dumps(report).encode()], "label": [None]}
    return pa.concat_tables([*tables, pa.table(last, schema=SCHEMA)])


def _rows(task: _Task, x: Array, labels: Array | None) -> Any:
    count = len(x)
    little = np.ascontiguousarray(x.astype(x.dtype.newbyteorder("<"), copy=False))
    ends = pa.py_buffer(np.arange(count + 1, dtype=np.int64) * little[0].nbytes)
    values = pa.Array.from_buffers(pa.large_binary(), count, [None, ends, pa.py_buffer(little)])
    columns = {
        "shard": task.shard, "slot": task.slot, "id": np.arange(task.first, task.first + count), "x": values,
        "label": pa.nulls(count, pa.int32()) if labels is None else labels,
    }  # fmt: skip
    return pa.table(columns, schema=SCHEMA)


def _finish(table: Any, paths: tuple[str, ...], dtype: str, out: str | None, by_column: bool) -> Any:
    """Makes a shard of its rows, and writes it when `out` is a place that everybody sees."""
    number = table["shard"][0].as_py()
    if number == REPORT:
        reports = [value.as_py().decode() for value in table["x"]]
        return pa.table({"report": reports, "content": pa.array([b""] * len(reports), pa.large_binary())})
    order = np.argsort(table["slot"].to_numpy())
    values = pa.concat_arrays(table["x"].chunks)
    ends = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
    stored = np.frombuffer(values.buffers()[2], np.uint8)[ends[0] : ends[-1]]
    x = stored.reshape(len(values), -1)[order].view(np.dtype(dtype).newbyteorder("<"))
    labels = None if table["label"].null_count else table["label"].to_numpy()[order]
    ids, x = table["id"].to_numpy()[order], x.astype(dtype, copy=False)
    shard, content = make_shard(paths[number], ids, x, labels, by_column)
    if out is not None:
        place(out).write(paths[number], content)
        content = b""
    return pa.table({"report": [json.dumps(asdict(shard))], "content": pa.array([content], pa.large_binary())})
