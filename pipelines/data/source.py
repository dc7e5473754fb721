"""One split of a prepared dataset as a Source: in memory, or streamed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dgm_models.training.source import ArraySource, Source
from pipelines.data import shards
from pipelines.data.fetch import cache_folder
from pipelines.data.stage import fetch_dataset
from pipelines.data.stream import StreamSource

if TYPE_CHECKING:
    from pipelines.params import Stream


def source_of(
    data: Path | str, split: str, seed: int | None, stream: Stream | None = None, batch_size: int = 1
) -> Source:
    """One split of a prepared dataset.

    Args:
        data: a folder, or a URI such as s3://bucket/prefix/data/<digest>.
        split: "train", "valid" or "test".
        seed: of the shuffling; None keeps the stored order, which only a split in memory can.
        stream: read shard by shard, nothing written to disk. None: in memory, and of a URI this split alone is copied
            into `${DGM_CACHE:-~/.cache/dgm}/data` first, once a node.
        batch_size: the global one, which a stream's order depends on.
    Raises: ValueError that names the file and the way out when a byte differs from the manifest.
    """
    if stream is not None:
        if seed is None:
            raise ValueError("stream: a stream is shuffled and needs a seed; give stream: null for the stored order")
        return StreamSource(data, split, seed, batch_size, stream.buffer, stream.lanes)
    folder = fetch_dataset(str(data), cache_folder() / "data", (split,))
    rows = shards.load(folder, split)
    return ArraySource(rows.x, shards.read_manifest(folder).spec(), rows.cond, rows.id, seed)
