"""Samples in the stored form, the same for the same seed, however many are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.method import Method
from dgm_models.nn.conditioner import check
from dgm_models.protocols import Samples

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
    check(model.condition, cond)
    if cond is not None and len(cond) != n:
        raise ValueError(f"cond: {len(cond)} conditions for {n} samples; give one for each")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes the last bits
    try:
        blocks = []
        for block in range(-(-n // BLOCK)):
            rng = torch.Generator(device).manual_seed(noise.digest("sample", seed, block))
            asked = None if cond is None else _block(cond, block).to(device)
            blocks.append(method.model.codec.decode(model.sample(BLOCK, rng, asked)).cpu())
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


def _block(cond: Tensor, block: int) -> Tensor:
    """The conditions of one block, filled up with its last one."""
    part = cond[block * BLOCK : (block + 1) * BLOCK]
    return torch.cat([part, part[-1:].expand(BLOCK - len(part), *part.shape[1:])])
