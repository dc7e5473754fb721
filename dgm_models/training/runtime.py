"""Where a training runs: device, rank, reduction, precision. The trainer knows torch.distributed through this alone."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Runtime:
    """One worker's view of the run.

    Attributes:
        device: where model and batches live.
        rank, world: this worker's number among all.
        precision: of the forward pass (autocast); parameters and optimizers stay float32.
        shard: parameters, gradients and optimizer state are spread over the ranks; one-player models alone.
        checkpoint_activations: blocks are computed again in the backward pass; less memory, the same bits.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    precision: Precision = "float32"
    shard: bool = False
    checkpoint_activations: bool = False

    @classmethod
    def of_process_group(
        cls,
        device: torch.device,
        precision: Precision = "float32",
        shard: bool = False,
        checkpoint_activations: bool = False,
    ) -> Runtime:
        """The runtime of an initialised torch.distributed group."""
        return cls(device, dist.get_rank(), dist.get_world_size(), precision, shard, checkpoint_activations)

    @property
    def chief(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread: alone, a rank holds all of them anyway."""
        return self.shard and self.world > 1

    def seed(self, value: int) -> None:
        """Seeds torch's generators that layers on this device use; without a GPU that is one, at a cost of 1 us."""
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(value)  # manual_seed also formats the stack for every absent device
        else:
            torch.manual_seed(value)

    def autocast(self) -> Any:
        if self.precision == "float32":
            return nullcontext()
        # a cache would hold every gathered parameter in bfloat16 until the loss is done
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=not self.sharded)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sums every tensor over the ranks, in place: one all-reduce for each type."""
        if self.world == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            group = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, torch.split(flat, [tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' rows, concatenated in rank order; ranks may differ in their number of rows."""
        if self.world == 1:
            return tensor
        sizes = [torch.zeros((), dtype=torch.int64, device=tensor.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor(len(tensor), device=tensor.device))
        most = max(int(size) for size in sizes)
        padded = tensor.new_zeros(most, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])

    def share(self, rows: int) -> tuple[int, int]:
        """The half-open interval of a global batch's rows that this rank takes; shares differ by at most one row."""
        return rows * self.rank // self.world, rows * (self.rank + 1) // self.world

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


_current: list[Runtime] = [Runtime()]


def current() -> Runtime:
    """The runtime of the trainer that is stepping: for objectives that gather or reduce."""
    return _current[-1]


@contextmanager
def use(runtime: Runtime) -> Iterator[Runtime]:
    _current.append(runtime)
    try:
        yield runtime
    finally:
        _current.pop()


def keep_freed_memory() -> bool:
    """Asks the C library to keep this process's freed memory for its next tensors: `True` where it is glibc.

    By default glibc gives large blocks back to the system and takes them again a moment later, zeroed page by page:
    a sixth of the time of a convolutional VAE's step on a CPU. Values do not change.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # <malloc.h>; 32 MiB is the largest mmap threshold
    wanted = {mmap_threshold: 32 * 2**20, trim_threshold: 2**31 - 1, top_pad: 64 * 2**20}
    accepted = [mallopt(name, value) for name, value in wanted.items()]
    return all(accepted)
