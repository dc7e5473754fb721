"""A dispatch mode that follows the life of every storage and counts operations and collectives."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

KINDS = (
    "parameters", "gradients", "optimizer", "averages", "buffers", "activations", "batch", "communication", "temporary",
)  # fmt: skip
COMMUNICATION = ("c10d", "_c10d_functional", "fsdp")
COLLECTIVES = {
    "all_reduce": ("allreduce", "all_reduce"),
    "reduce_scatter": ("reduce_scatter",),
    "all_gather": ("allgather", "all_gather"),
    "broadcast": ("broadcast",),
}


@dataclass
class Counts:
    """What was executed: operations as (FLOPs, bytes read and written, bfloat16) and collectives as (name, bytes)."""

    operations: Counter[tuple[int, int, bool]] = field(default_factory=Counter)
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        return sum(flops * times for (flops, _, _), times in self.operations.items())


class Ledger(TorchDispatchMode):
    """Enter it above a FakeTensorMode. Kinds are given to storages while they live or at once; unknown is temporary.

    A question about a value has no answer on fake tensors. It gets that of a healthy step: yes, a number is finite;
    no, none of the ranks disagrees; 1 for a number, 0 for a whole number, which may be an index.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.events: list[tuple[int, int]] = []  # (storage, change of its bytes), in order
        self.losses: list[tuple[int, int]] = []  # the events of every forward pass: from, to
        self.bytes: list[int] = []  # of every storage, now
        self.kinds: list[str] = []
        self._index: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._watched: list[weakref.ref[Any]] = []
        self._none: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._paused = False

    # ---- storages

    def _storages(self, values: Any) -> Iterator[int]:
        for tensor in tree_leaves(values):
            if isinstance(tensor, DTensor):
                tensor = tensor.to_local() if tensor.grad_fn is None else tensor._local_tensor
            if isinstance(tensor, Tensor):
                yield self._numbered(tensor.untyped_storage())

    def _numbered(self, storage: Any) -> int:
        found = self._index.get(storage)
        if found is None:
            found = len(self.bytes)
            self._index[storage] = found
            self.bytes.append(0)
            self.kinds.append("")
            self._resized(found, storage.nbytes())
            self._watched.append(weakref.ref(storage, lambda _, number=found: self._resized(number, 0)))
        return int(found)

    def _resized(self, number: int, size: int) -> None:
        if size != self.bytes[number]:
            self.events.append((number, size - self.bytes[number]))
            self.bytes[number] = size

    def name(self, kind: str, values: Any, over: bool = True) -> None:
        """Gives the storages of the tensors in `values` a kind; `over` an earlier one, or where there is none."""
        for number in self._storages(values):
            if over or not self.kinds[number]:
                self.kinds[number] = kind

    @contextmanager
    def forward(self) -> Iterator[None]:
        """What is born here and outlives it is an activation: the backward pass needs it."""
        start = len(self.events)
        yield
        self.losses.append((start, len(self.events)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens here is not written down."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """FSDP2 frees a gathered parameter by resizing its storage to nothing; no operation shows that."""
        before = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            number = self._numbered(storage)
            found = before(storage, size)
            self._resized(number, storage.nbytes())
            return found

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = before  # type: ignore[method-assign]

    def peak(self, start: int = 0, stop: int | None = None) -> dict[str, int]:
        """Bytes of every kind at the moment, among the events start..stop-1, when their sum is largest."""
        total = most = at = 0
        for place, (_, change) in enumerate(self.events[:stop]):
            total += change
            if place >= start and total > most:
                most, at = total, place
        alive = [0] * len(self.bytes)
        for number, change in self.events[: at + 1]:
            alive[number] += change
        activations = self._activations()
        found = dict.fromkeys(KINDS, 0)
        for number, size in enumerate(alive):
            kind = self.kinds[number] or ("activations" if number in activations else "temporary")
            found[kind] += size
        return found

    def _activations(self) -> set[int]:
        kept: set[int] = set()
        for start, stop in self.losses:
            live: Counter[int] = Counter()
            for number, change in self.events[start:stop]:
                live[number] += change
            kept |= {number for number, size in live.items() if size > 0}
        return kept

    # ---- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # they come back as operations on local tensors
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._answer(args[0])
        out = func(*args, **kwargs)
        if func in (aten.any.default, aten.isnan.default, aten.isinf.default):
            self._none[out] = True
        for _ in self._storages((args, kwargs, out)):
            pass
        if func.namespace in COMMUNICATION:
            self.name("communication", (args, kwargs, out), over=False)
            self._collective(func, args, out)
        elif not func.is_view:
            self._operation(func, args, kwargs, out)
        return out

    def _answer(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            return tensor not in self._none
        return 1.0 if tensor.dtype.is_floating_point else 0

    def _operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        tensors = [tensor for tensor in tree_leaves((args, kwargs, out)) if isinstance(tensor, Tensor)]
        count = flop_registry.get(func._overloadpacket)
        flops = int(count(*args, **kwargs, out_val=out)) if count else 0
        low = any(tensor.dtype == torch.bfloat16 for tensor in tensors)
        self.counts.operations[flops, sum(map(_bytes, tensors)), low] += 1

    def _collective(self, func: Any, args: Any, out: Any) -> None:
        packet = func._overloadpacket.__name__
        if func.namespace == "fsdp":
            self._operation(func, args, {}, out)
            return
        for name, words in COLLECTIVES.items():
            if any(word in packet for word in words):
                sizes = [_whole(part) for part in (*args, out)]
                self.counts.collectives[name, max(sizes)] += 1
                return


def _bytes(tensor: Tensor) -> int:
    """Bytes that an operation touches of a tensor: of an expanded one only those that are there."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _whole(values: Any) -> int:
    tensors: Iterable[Any] = tree_leaves(values)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
