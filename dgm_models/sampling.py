"""Samples and completions in the stored form, the same for the same seed, however many are asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.method import Method
from dgm_models.nn.conditioner import check
from dgm_models.protocols import Completes, Model, Samples

BLOCK = 128  # a block is always drawn whole: floats differ between batch sizes


@torch.no_grad()
def sample(method: Method, n: int, seed: int = 0, device: str = "cpu", cond: Tensor | None = None) -> Tensor:
    """The first `n` of an endless list of samples.

    Args:
        method: a trained method whose model has the capability "samples".
        n: how many.
        seed: of the list.
        device: where the model runs.
        cond: [n, ...] what each sample is asked for, for a model with a condition (`conditions`).
    Returns: [n, *event] in the stored type.
    Raises: ValueError when the model cannot sample, n is below 1, or cond does not fit the model or n.
    """
    if n < 1:
        raise ValueError(f"n: {n} samples were asked for; at least 1")
    if not isinstance(method.model, Samples):
        raise ValueError(f"{method.name} has no sampler")
    model = method.model.to(device).eval()
    _check(model, cond, n)

    def draw(block: int, rng: torch.Generator) -> Tensor:
        return model.sample(BLOCK, rng, None if cond is None else _block(cond, block).to(device))

    return _in_blocks(method, n, "sample", seed, device, draw)


@torch.no_grad()
def complete(
    method: Method, x: Tensor, known: Tensor, seed: int = 0, cond: Tensor | None = None, device: str = "cpu"
) -> Tensor:
    """What is not known of stored examples, drawn from its distribution given the rest.

    Args:
        method: a trained method whose model has the capability "completes".
        x: [n, *event] as stored; only its known values are read.
        known: [n, *event] bool, or [*event] for all examples.
        seed: of the draws.
        cond: [n, ...] what each example is asked for, for a model with a condition.
        device: where the model runs.
    Returns: [n, *event] in the stored type: x where it is known.
    Raises: ValueError when the model cannot complete, when a shape does not fit, or when the model does not draw its
        values in an order that begins with the known ones.
    """
    if not isinstance(method.model, Completes):
        raise ValueError(f"{method.name} cannot complete examples; `dgm models` lists those that can: completes")
    if not len(x) or tuple(x.shape[1:]) != method.data.shape:
        raise ValueError(f"x: {tuple(x.shape)}; {method.name} was built for [N, *{method.data.shape}]")
    if known.dtype != torch.bool or known.shape not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"known: {known.dtype} {tuple(known.shape)}; expected bool {method.data.shape}, or {tuple(x.shape)}"
        )
    known = known.expand(x.shape)
    given = torch.where(known, x, torch.zeros_like(x))
    keys = noise.fold(torch.arange(len(x)), "complete", seed)
    model = method.model.to(device).eval()
    _check(model, cond, len(x))

    def draw(block: int, rng: torch.Generator) -> Tensor:
        y, _ = model.codec.encode(_block(given, block).to(device), _block(keys, block).to(device))
        asked = None if cond is None else _block(cond, block).to(device)
        return model.complete(y, _block(known, block).to(device), rng, asked)

    return torch.where(known, x, _in_blocks(method, len(x), "complete", seed, device, draw).to(x.dtype))


def _check(model: Model, cond: Tensor | None, n: int) -> None:
    check(model.condition, cond)
    if cond is not None and len(cond) != n:
        raise ValueError(f"cond: {len(cond)} conditions for {n} samples; give one for each")


def _in_blocks(
    method: Method, n: int, name: str, seed: int, device: str, draw: Callable[[int, torch.Generator], Tensor]
) -> Tensor:
    """The first n rows, in the stored type, of blocks that `draw(number, rng)` gives in model space."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes the last bits
    try:
        blocks = []
        for block in range(-(-n // BLOCK)):
            rng = torch.Generator(device).manual_seed(noise.digest(name, seed, block))
            blocks.append(method.model.codec.decode(draw(block, rng)).cpu())
    finally:
        torch.set_num_threads(threads)
    return torch.cat(blocks)[:n]


def conditions(method: Method, x: Tensor, labels: Tensor | None, seed: int = 0) -> Tensor | None:
    """What samples have to be asked for to be compared with stored x [N, *event]; None for a model without condition.

    Args:
        method: a trained method.
        x, labels: rows of a dataset, labels [N] or None.
        seed: of conditions that are drawn.
    """
    return method.model.conditions(x, labels, noise.fold(torch.arange(len(x)), "condition", seed))


def labelled(method: Method, n: int, label: int | None = None) -> Tensor | None:
    """[n] int64: one label for all samples, or every label in turn; None for a model without a condition.

    Raises: ValueError when the model has no such label, or is asked for images.
    """
    condition = method.model.condition
    if condition is None:
        if label is not None:
            raise ValueError(f"label: {label}; {method.name} was built without a condition")
        return None
    classes = condition.spec(method.data).levels
    if classes is None:
        raise ValueError(f"cond: {method.name} is asked by {condition.name}, which needs images: give them as cond")
    if label is not None and not 0 <= label < classes:
        raise ValueError(f"label: {label} is none of 0 to {classes - 1}")
    return torch.arange(n) % classes if label is None else torch.full((n,), label)


def _block(rows: Tensor, block: int) -> Tensor:
    """The rows of one block, filled up with its last one."""
    part = rows[block * BLOCK : (block + 1) * BLOCK]
    return torch.cat([part, part[-1:].expand(BLOCK - len(part), *part.shape[1:])])
