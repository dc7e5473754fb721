"""The order of a streamed dataset, a function of (seed, position).

In epoch e the shards are permuted by (seed, e) and laid end to end. Of these N rows lane l of L owns the rows
l*n .. (l+1)*n - 1, n = floor(N / L); inside a lane, windows of buffer / L rows are permuted by (seed, e, l, window).
Slot j of a global batch of B belongs to lane j*L // B, so a worker that takes a contiguous share of every batch reads
its own lanes alone: about 1 / world of the shards. An epoch is L*n rows; the N mod L rows that it leaves out are others
in every epoch, because the shards stand in another order.

Nothing but the position is needed to go on anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dgm_models import noise
from pipelines.data.raw import Array

Window = tuple[int, int]  # (epoch, number in the lane)


class Order:
    """Which row stands at which position: arithmetic alone, nothing is read.

    Args:
        sizes: rows of every shard.
        seed: of the order.
        batch_size: B, the global one.
        buffer: rows that are shuffled together, over all lanes.
        lanes: L.
    Raises: ValueError for numbers that do not fit each other.
    """

    def __init__(self, sizes: tuple[int, ...], seed: int, batch_size: int, buffer: int, lanes: int) -> None:
        check_stream(buffer, lanes, batch_size)
        self.sizes, self.seed, self.lanes = np.asarray(sizes, np.int64), seed, lanes
        self.rows = int(self.sizes.sum()) // lanes  # of a lane, in an epoch
        if not self.rows:
            raise ValueError(f"stream.lanes: {lanes} of {self.sizes.sum()} rows; a lane needs at least a row")
        self.window = buffer // lanes
        self.batch_size, self.share = batch_size, batch_size // lanes  # share: slots of a lane in a batch
        self._epochs: dict[int, tuple[Array, Array]] = {}

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Stream positions start..stop-1 as (lane, first, last): numbers first..last-1 of the lane's own stream."""
        while start < stop:
            step, slot = divmod(start, self.batch_size)
            lane, at = divmod(slot, self.share)
            count = min(stop - start, self.share - at)
            first = step * self.share + at
            yield lane, first, first + count
            start += count

    def place(self, number: int) -> tuple[Window, int]:
        """A number of a lane's own stream as its window and the offset in it."""
        epoch, at = divmod(number, self.rows)
        return (epoch, at // self.window), at % self.window

    def size(self, window: Window) -> int:
        """Rows of a window: the last one of an epoch may be shorter."""
        return min(self.window, self.rows - window[1] * self.window)

    def after(self, window: Window) -> Window:
        """The window that a lane reads next."""
        epoch, number = window
        return (epoch, number + 1) if (number + 1) * self.window < self.rows else (epoch + 1, 0)

    def spans(self, lane: int, window: Window) -> Iterator[tuple[int, int, int]]:
        """The consecutive rows of a window as (shard, first row, end)."""
        shards, ends = self._epoch(window[0])
        at = lane * self.rows + window[1] * self.window
        stop = at + self.size(window)
        index = int(np.searchsorted(ends, at, side="right"))
        while at < stop:
            end, size = int(ends[index]), int(self.sizes[shards[index]])
            last = min(stop, end)
            yield int(shards[index]), at - (end - size), last - (end - size)
            at, index = last, index + 1

    def places(self, lane: int, window: Window) -> Array:
        """[rows of the window]: where each of its consecutive rows goes."""
        return _permutation(self.size(window), "window", self.seed, window[0], lane, window[1])

    def _epoch(self, epoch: int) -> tuple[Array, Array]:
        """(the shards in their order, the ends of their rows laid end to end)."""
        known = self._epochs.get(epoch)
        if known is None:
            shards = _permutation(len(self.sizes), "shards", self.seed, epoch)
            known = shards, np.cumsum(self.sizes[shards])
            self._epochs = {epoch: known, **dict(list(self._epochs.items())[:1])}  # lanes may be at two at a time
        return known


def check_stream(buffer: int, lanes: int, batch_size: int) -> None:
    """Raises: ValueError for a stream that cannot feed batches of this size; it names the key and the way out."""
    if batch_size % lanes:
        near = max(n for n in range(1, min(lanes, batch_size) + 1) if batch_size % n == 0)
        raise ValueError(f"stream.lanes: {lanes} does not divide train.batch_size: {batch_size}; give lanes: {near}")
    if buffer < batch_size:
        raise ValueError(
            f"stream.buffer: {buffer} rows are shuffled together, fewer than train.batch_size: {batch_size}; "
            f"give buffer: {batch_size} or more"
        )


def _permutation(rows: int, *path: int | str) -> Array:
    """The order of hashes: the same with every version of numpy and torch."""
    keys: Array = noise.fold(torch.arange(rows), "stream", *path).numpy()
    return np.argsort(keys, kind="stable")
