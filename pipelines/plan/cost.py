"""What counts cost in seconds and bytes: a roofline for operations, alpha-beta for collectives. Formulas only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.plan.devices import Assumptions, Device
from pipelines.plan.ledger import Counts


@dataclass(frozen=True)
class Link:
    """The slowest link of a ring: `alpha` seconds a message, `beta` seconds a byte."""

    alpha: float
    beta: float


def link(device: Device, world: int, assumed: Assumptions) -> Link:
    """A ring over several nodes is as slow as its link between two of them."""
    inside = world <= device.per_node
    bandwidth = (device.intra if inside else device.inter) * assumed.link_utilisation
    return Link(assumed.latency if inside else assumed.inter_latency, 1 / bandwidth)


def wire_bytes(collective: str, size: int, world: int) -> float:
    """Bytes that one worker sends for a collective on `size` bytes, the whole tensor's, by a ring.

    all-reduce 2 (N-1)/N, all-gather and reduce-scatter (N-1)/N of the whole; broadcast passes it on once.
    """
    if world == 1:
        return 0.0
    share = (world - 1) / world
    return size * {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "broadcast": 1.0}[collective]


def messages(collective: str, world: int) -> int:
    """Messages one after another: 2 (N-1) in an all-reduce's ring, N-1 in the others'."""
    return (world - 1) * (2 if collective == "all_reduce" else 1)


def collective_seconds(collective: str, size: int, world: int, link: Link) -> float:
    """alpha-beta of a ring; for an all-reduce or a broadcast a tree of depth log2 N, where it is faster.

    Source: Thakur, Rabenseifner, Gropp 2005 for the rings; NCCL takes trees for small messages.
    """
    ring = messages(collective, world) * link.alpha + wire_bytes(collective, size, world) * link.beta
    if collective not in ("all_reduce", "broadcast") or world == 1:
        return ring
    passes = 2 if collective == "all_reduce" else 1
    return min(ring, passes * (math.ceil(math.log2(world)) * link.alpha + size * link.beta))


def traffic(counts: Counts, world: int) -> float:
    """Bytes that one worker sends in a step."""
    return sum(wire_bytes(name, size, world) * times for (name, size), times in counts.collectives.items())


def communication_seconds(counts: Counts, world: int, link: Link) -> float:
    return sum(collective_seconds(name, size, world, link) * n for (name, size), n in counts.collectives.items())


def compute_seconds(counts: Counts, device: Device, assumed: Assumptions) -> float:
    """Every operation is bound by its FLOPs, by the bytes that it moves, or by its launch."""
    total = 0.0
    for (flops, size, low), times in counts.operations.items():
        peak = (device.bf16 if low else device.fp32) * assumed.utilisation
        total += times * max(flops / peak, size / (device.bandwidth * assumed.memory_utilisation), assumed.launch)
    return total


def step_seconds(compute: float, communication: float, overlap: float) -> float:
    """Communication hides behind computation as far as `overlap` of it may and computation lasts."""
    return compute + communication - min(overlap * communication, compute)
