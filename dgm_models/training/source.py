"""Where batches come from: a function of a global position, so that a resume needs one number."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dgm_models.protocols import Batch, DataSpec


class Source(Protocol):
    """An endless, seeded stream of examples; position p holds the same example for every number of workers."""

    spec: DataSpec

    def __len__(self) -> int:
        """Examples in an epoch."""
        ...

    def batch(self, start: int, stop: int) -> Batch:
        """The examples at stream positions start..stop-1, as stored; `key` is the position."""
        ...


class ArraySource:
    """A dataset in memory, shuffled anew each epoch: every example once an epoch.

    Args:
        x: [N, *event] as stored.
        spec: what `x` is.
        cond: [N, ...] conditions such as class labels, or None.
        ids: [N] int64 row numbers, 0..N-1 when None.
        seed: of the shuffling; None keeps the stored order.
    Raises: ValueError when x does not fit the spec.
    """

    def __init__(
        self, x: Tensor, spec: DataSpec, cond: Tensor | None = None, ids: Tensor | None = None, seed: int | None = 0
    ) -> None:
        if tuple(x.shape[1:]) != spec.shape:
            raise ValueError(f"x: events of shape {tuple(x.shape[1:])}, the data spec says {spec.shape}")
        if not len(x):
            raise ValueError("x: no examples")
        self.x, self.spec, self.cond = x, spec, cond
        self.ids = torch.arange(len(x)) if ids is None else ids
        self.seed = seed
        self._epoch, self._order = -1, torch.arange(len(x))

    def __len__(self) -> int:
        return len(self.x)

    def _rows(self, epoch: int) -> Tensor:
        if self.seed is not None and epoch != self._epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch, self._order = epoch, torch.from_numpy(rng.permutation(len(self.x)))
        return self._order

    def batch(self, start: int, stop: int) -> Batch:
        parts, at = [], start
        while at < stop:  # a batch may span epochs
            epoch, first = divmod(at, len(self.x))
            last = min(first + stop - at, len(self.x))
            parts.append(self._rows(epoch)[first:last])
            at += last - first
        rows = torch.cat(parts)
        return Batch(
            x=self.x.index_select(0, rows),  # copies whole rows; indexing goes value by value
            key=torch.arange(start, stop),
            id=self.ids[rows],
            cond=None if self.cond is None else self.cond[rows],
        )
