"""Accelerators as their vendors describe them, and what else a plan has to assume. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dgm_models.construct import (
    ConfigError,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    construct,
    did_you_mean,
)

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator and the links of a node of them.

    Args:
        fp32, bf16: peak FLOP/s of dense matrix products; fp32 without TF32, which torch leaves off for products.
        memory: bytes.
        bandwidth: of that memory, bytes/s.
        intra: bytes/s of one accelerator to the others of its node, one direction.
        inter: bytes/s of one accelerator to other nodes, one direction.
        per_node: accelerators of a node.
        source: where the numbers stand.
    """

    fp32: PositiveFloat
    bf16: PositiveFloat
    memory: PositiveFloat
    bandwidth: PositiveFloat
    intra: PositiveFloat
    inter: PositiveFloat
    per_node: Positive
    source: str


# NVLink is sold by the sum of both directions: half of it is one direction. Tensor-core peaks without sparsity.
DEVICES = {
    "a100": Device(
        19.5e12, 312e12, 80e9, 2039e9, 300e9, 25e9, 8,
        "NVIDIA A100 80GB SXM data sheet; DGX A100: eight ConnectX-6 of 200 Gb/s for eight GPUs",
    ),
    "h100": Device(
        67e12, 989e12, 80e9, 3350e9, 450e9, 50e9, 8,
        "NVIDIA H100 SXM data sheet; DGX H100: eight ConnectX-7 of 400 Gb/s for eight GPUs",
    ),
    "h200": Device(
        67e12, 989e12, 141e9, 4800e9, 450e9, 50e9, 8,
        "NVIDIA H200 SXM data sheet; DGX H200: eight ConnectX-7 of 400 Gb/s for eight GPUs",
    ),
}  # fmt: skip


def device(name: str) -> Device:
    """A row of the table, or the keys of `Device` in a YAML file. Raises ConfigError with the nearest name."""
    if name in DEVICES:
        return DEVICES[name]
    if name.endswith((".yaml", ".yml")):
        from pipelines.params import read_yaml

        return construct(Device, read_yaml(Path(name)), name)
    raise ConfigError(f"--device: {name!r} is not known{did_you_mean(name, DEVICES)}, or a YAML file of its numbers")


@dataclass(frozen=True)
class Assumptions:
    """What a data sheet does not say; every plan lists these.

    Args:
        utilisation: share of the peak FLOP/s that matrix products reach.
        memory_utilisation: share of the memory bandwidth that other operations reach.
        launch: seconds that an operation takes at least.
        link_utilisation: share of the links' bandwidth that collectives reach.
        latency: seconds of one message within a node.
        inter_latency: seconds of one message between nodes.
        overlap: share of the communication that can run while the backward pass computes.
        context: bytes of a GPU's memory that are taken before the first tensor: CUDA context, cuBLAS and cuDNN.
        fragmentation: share of the tensors' peak that the caching allocator holds in addition.
    """

    utilisation: Fraction = 0.4
    memory_utilisation: Fraction = 0.7
    launch: NonNegativeFloat = 5e-6
    link_utilisation: Fraction = 0.7
    latency: NonNegativeFloat = 5e-6
    inter_latency: NonNegativeFloat = 15e-6
    overlap: Fraction = 0.5
    context: NonNegativeFloat = 1.5 * GIB
    fragmentation: Fraction = 0.1

    def __post_init__(self) -> None:
        for name in ("utilisation", "memory_utilisation", "link_utilisation"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: 0 would never end")
