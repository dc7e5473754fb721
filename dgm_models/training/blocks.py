"""The parts that a model is sharded and recomputed by: one rule for all networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils.checkpoint import checkpoint

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The model's blocks by name: disjoint modules with a forward pass and parameters of their own.

    What a Sequential, ModuleList or ModuleDict holds is a block when it has parts itself (a residual block, a
    transformer layer); a Sequential of single layers is one block, and so is a module around a list of single layers.
    """
    return {name: block for name, block in _within(model, "") if any(True for _ in block.parameters())}


def _within(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if not any(True for _ in child.children()):
            continue  # a single layer
        if isinstance(module, CONTAINERS) and not isinstance(child, CONTAINERS) and _runs(child):
            found.append((path, child))
        else:
            found += _within(child, path) or ([(path, child)] if _runs(child) else [])
    return found


def _runs(module: nn.Module) -> bool:
    """Whether the module has a forward pass: lists have none, and models are called by their methods' names."""
    return type(module).forward is not nn.Module.forward


def recompute(model: nn.Module) -> None:
    """Makes every block compute its forward pass again in the backward pass, and keep its inputs alone until then.

    The gradients are the same bits: noise is a function of keys, and dropout's generator is put back. Names, and so
    state dicts, stay as they are. A block that writes buffers when it runs (running statistics, power iterations)
    would write them twice, and is left as it is.
    """
    for block in blocks(model).values():
        if not any(isinstance(part, (_NormBase, _SpectralNorm)) for part in block.modules()):
            forward: Callable[..., Any] = partial(checkpoint, block.forward, use_reentrant=False)
            block.forward = forward
