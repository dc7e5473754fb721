"""The sum of one player's gradients over the ranks, under way while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dgm_models.training.runtime import Runtime

# where PyTorch's DDP found reduction and backward to overlap (arXiv:2006.15704); gloo's threads share the processor
# with the backward pass, and take longer for many small sums than for a large one
BUCKET_BYTES = 25 * 2**20


def buckets(parameters: Sequence[nn.Parameter]) -> list[list[int]]:
    """The parameters' numbers in portions of one type and about `BUCKET_BYTES`, last parameter first.

    A backward pass reaches the last parameters first. The portions depend on the parameters alone, so that every rank
    has the same ones. A parameter larger than that ends its portion.
    """
    closed: list[list[int]] = []
    filling: dict[torch.dtype, list[int]] = {}
    sizes: dict[torch.dtype, int] = {}
    for number in reversed(range(len(parameters))):
        parameter = parameters[number]
        dtype = parameter.dtype
        filling.setdefault(dtype, []).append(number)
        sizes[dtype] = sizes.get(dtype, 0) + parameter.nbytes
        if sizes[dtype] >= BUCKET_BYTES:
            closed.append(filling.pop(dtype))
            sizes[dtype] = 0
    return closed + list(filling.values())


class Reduction:
    """A player's gradients, update by update: `begin`, every micro-batch's `backward`, then `finish`.

    During the last backward pass a bucket's all-reduce starts as soon as its gradients are there, in the order of
    the buckets on every rank. What a loss did not reach is sent as zeros at the end, so that ranks whose losses reach
    different parameters meet in the same collectives and can be told; they do not wait for each other for ever.

    Args:
        runtime: the ranks.
        player: whose gradients they are.
        parameters: the player's, by name.
    """

    def __init__(self, runtime: Runtime, player: str, parameters: Mapping[str, nn.Parameter]) -> None:
        self.runtime, self.player = runtime, player
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.buckets = buckets(self.parameters) if runtime.world > 1 else []
        self._flat: list[Tensor] = []  # of the buckets, kept: fresh memory costs a page fault every 4 KiB
        self.begin()

    def begin(self) -> None:
        """Forgets the update before, also one that was interrupted."""
        self._waiting = [set(bucket) for bucket in self.buckets]
        self._started: list[dist.Work] = []  # the first buckets' sums, in their order

    def backward(self, total: Tensor, last: bool) -> None:
        """Adds a micro-batch's gradients; `last` starts the reduction."""
        hooks = [
            self.parameters[i].register_post_accumulate_grad_hook(partial(self._ready, number, i))  # type: ignore[no-untyped-call]
            for number, bucket in enumerate(self.buckets if last else [])
            for i in bucket
        ]
        try:
            total.backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()

    def _ready(self, number: int, i: int, parameter: Tensor) -> None:
        self._waiting[number].discard(i)
        while len(self._started) < len(self.buckets) and not self._waiting[len(self._started)]:
            self._start()

    def _start(self) -> None:
        number = len(self._started)
        bucket = [self.parameters[i] for i in self.buckets[number]]
        if number == len(self._flat):
            self._flat.append(torch.cat([p.detach().reshape(-1) for p in bucket]))
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket]
        # a copy, also of one: autograd may let two gradients share their memory
        work = dist.all_reduce(torch.cat(parts, out=self._flat[number]), async_op=True)
        assert work is not None
        self._started.append(work)

    def finish(self, scalars: Sequence[Tensor]) -> list[nn.Parameter]:
        """Waits for all sums, the scalars' included, and puts them in place.

        Returns: the parameters that have gradients.
        Raises: RuntimeError on every rank when the ranks' gradients are of different parameters.
        """
        while len(self._started) < len(self.buckets):
            self._start()
        here = [p.grad is not None for p in self.parameters]
        if not self.buckets:
            _separate(self.parameters)
        self._agree(here, scalars)
        for bucket, flat, work in zip(self.buckets, self._flat, self._started, strict=True):
            work.wait()
            parts = torch.split(flat, [self.parameters[i].numel() for i in bucket])
            for i, part in zip(bucket, parts, strict=True):
                if here[i]:
                    self.parameters[i].grad = part.view_as(self.parameters[i])
        return [p for p, present in zip(self.parameters, here, strict=True) if present]

    def _agree(self, here: Sequence[bool], scalars: Sequence[Tensor]) -> None:
        """Sums the scalars over the ranks, and with them who has which gradient: one small all-reduce."""
        if self.runtime.world == 1:
            return
        present = torch.tensor(here, dtype=torch.float32, device=self.runtime.device)
        self.runtime.sum([present, *scalars])
        apart = (present > 0) & (present < self.runtime.world)
        if bool(apart.any()):
            found = ", ".join(name for name, differs in zip(self.names, apart.tolist(), strict=True) if differs)
            raise RuntimeError(f"the ranks disagree which parameters of {self.player!r} have gradients: {found}")


def _separate(parameters: Sequence[nn.Parameter]) -> None:
    """Gives every gradient memory of its own: those of p and q in p.view(-1) + q.view(-1) are views of one tensor."""
    seen: set[int] = set()
    for p in parameters:
        if p.grad is not None:
            memory = p.grad.untyped_storage().data_ptr()
            p.grad = p.grad.clone() if memory in seen else p.grad
            seen.add(memory)
