"""A dataset larger than memory and than a disk, read shard by shard in the order of `pipelines.data.order`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from dgm_models.protocols import Batch
from pipelines.data.manifest import read_manifest
from pipelines.data.order import Order, Window
from pipelines.data.raw import SPLITS, Array
from pipelines.data.shards import Rows, empty, read_part

THREADS = 4  # windows that are read at once: a shard on S3 costs latency more than work


class _Lane:
    """One lane's rows: the window in use, the next one being read by a thread, and the shard it is cut from."""

    def __init__(self, order: Order, lane: int, read: Callable[[int], Rows], room: Callable[[int], Rows],
                 threads: ThreadPoolExecutor) -> None:  # fmt: skip
        self.order, self.lane, self.step = order, lane, 0
        self._read_shard, self._room, self._threads = read, room, threads
        self._now: tuple[Window, Rows] | None = None
        self._next: tuple[Window, Future[Rows]] | None = None
        self._shard: tuple[int, Rows] | None = None  # touched by one thread at a time: a lane has one task in flight

    def take(self, first: int, last: int) -> Iterator[Rows]:
        """Numbers first..last-1 of the lane's own stream."""
        while first < last:
            window, at = self.order.place(first)
            self.expect(first)
            rows = self._rows(window)[at : at + last - first]
            yield rows
            first += len(rows)

    def expect(self, number: int) -> None:
        """Begins to read the window of a number of the lane's own stream, unless it is there or on its way."""
        window, _ = self.order.place(number)
        if not any(known and known[0] == window for known in (self._now, self._next)):
            self.close()  # the position was moved
            self._now = None
            self._ahead(window)

    def close(self) -> None:
        """Waits for the task in flight; what it raises belongs to rows that nobody asked for."""
        if self._next and not self._next[1].cancel():
            self._next[1].exception()
        self._next = None

    def held(self) -> int:
        """Rows in memory."""
        ahead = self._next[1].result() if self._next else ()
        return len(ahead) + sum(len(held[1]) for held in (self._now, self._shard) if held)

    def _rows(self, window: Window) -> Rows:
        if not self._now or self._now[0] != window:
            self._now = None  # released before the next is waited for
            assert self._next
            task, self._next = self._next[1], None
            self._now = window, task.result()
            self._ahead(self.order.after(window))
        return self._now[1]

    def _ahead(self, window: Window) -> None:
        self._next = window, self._threads.submit(self._read, window)

    def _read(self, window: Window) -> Rows:
        places, rows, done = self.order.places(self.lane, window), self._room(self.order.size(window)), 0
        for shard, first, end in self.order.spans(self.lane, window):
            if not self._shard or self._shard[0] != shard:
                self._shard = None  # released before the next is read
                self._shard = shard, self._read_shard(shard)
            _put(rows, places[done : done + end - first], self._shard[1][first:end])
            done += end - first
            if end == self.order.sizes[shard]:
                self._shard = None
        return rows


def _put(rows: Rows, places: Array | slice, part: Rows) -> None:
    """rows[places] = part."""
    rows.x.numpy()[places], rows.id.numpy()[places] = part.x.numpy(), part.id.numpy()
    if rows.cond is not None and part.cond is not None:
        rows.cond.numpy()[places] = part.cond.numpy()


class StreamSource:
    """One split of a prepared dataset as an endless stream in the order of `Order`.

    In memory are at most two windows and one shard for every lane that this worker's share touches: for all lanes
    2 * buffer + lanes * (rows of the largest shard) rows. Shards are read ahead by threads and held to their sha256;
    what a thread raises is raised by `batch`. Nothing is written to disk.

    Args:
        data: a folder or a URI such as s3://bucket/prefix.
        split: "train", "valid" or "test".
        seed: of the order.
        batch_size: the global one; lanes divide it.
        buffer: rows that are shuffled together.
        lanes: independent readers.
    Raises: ValueError for numbers that do not fit each other, and for a missing or damaged manifest.
    """

    def __init__(
        self, data: Path | str, split: str, seed: int, batch_size: int, buffer: int = 8192, lanes: int = 8
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
        manifest = read_manifest(data)
        parts = [part for part in manifest.parts if part.split == split]
        self.spec = manifest.spec()
        self.order = Order(tuple(part.rows for part in parts), seed, batch_size, buffer, lanes)
        threads = ThreadPoolExecutor(min(lanes, THREADS), "stream")
        self._room = partial(empty, manifest)
        self._lane = partial(
            _Lane,
            self.order,
            read=lambda shard: read_part(data, manifest, parts[shard]),
            room=self._room,
            threads=threads,
        )
        self._lanes: dict[int, _Lane] = {}

    def __len__(self) -> int:
        return self.order.rows * self.order.lanes

    def held(self) -> int:
        """Rows in memory, once the threads are at rest."""
        return sum(lane.held() for lane in self._lanes.values())

    def batch(self, start: int, stop: int) -> Batch:
        """The examples at stream positions start..stop-1, as stored; `key` is the position.

        Raises: ValueError that names the file when a byte differs from the manifest; OSError when it cannot be read.
        """
        runs, step = list(self.order.runs(start, stop)), start // self.order.batch_size
        for number, first in {number: first for number, first, _ in reversed(runs)}.items():
            if number not in self._lanes:
                self._lanes[number] = self._lane(number)
            self._lanes[number].step = step
            self._lanes[number].expect(first)  # all lanes read at once
        batch, at = self._room(stop - start), 0
        for number, first, last in runs:
            for rows in self._lanes[number].take(first, last):
                _put(batch, slice(at, at + len(rows)), rows)
                at += len(rows)
        for number, lane in list(self._lanes.items()):
            if abs(step - lane.step) > 1:  # another worker's: the first batch of a training is read whole by everybody
                self._lanes.pop(number).close()
        return Batch(batch.x, torch.arange(start, stop), batch.id, batch.cond)
