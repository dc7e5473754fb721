"""Samples in the stored form, the same for the same seed, however many are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.method import Method
from dgm_models.protocols import Samples

BLOCK = 128  # a block is always drawn whole: floats differ between batch sizes


@torch.no_grad()
def sample(method: Method, n: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """The first `n` of an endless list of samples.

    Args:
        method: a trained method whose model has the capability "samples".
        n: how many.
        seed: of the list.
        device: where the model runs.
    Returns: [n, *event] in the stored type.
    Raises: ValueError when the model cannot sample or n is below 1.
    """
    if n < 1:
        raise ValueError(f"n: {n} samples were asked for; at least 1")
    if not isinstance(method.model, Samples):
        raise ValueError(f"{method.name} has no sampler")
    model = method.model.to(device).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes the last bits
    try:
        blocks = []
        for block in range(-(-n // BLOCK)):
            rng = torch.Generator(device).manual_seed(noise.digest("sample", seed, block))
            blocks.append(method.model.codec.decode(model.sample(BLOCK, rng)).cpu())
    finally:
        torch.set_num_threads(threads)
    return torch.cat(blocks)[:n]
