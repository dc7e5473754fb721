"""One object for five ideas: EMA weights, frozen reference, target network, historical averaging, Polyak."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """A copy of a module that follows it: average <- decay * average + (1 - decay) * module.

    Args:
        module: what is followed.
        decay: a number, or a function of the update's number t = 1, 2, ...: constant 0.999 is an EMA, 1 a frozen
            reference, 0 a copy, `lambda t: 1 - 1 / t` the mean of the history.

    Buffers are copied, not averaged: batch statistics belong to the weights they were measured with, and counts
    cannot be averaged.
    """

    updates: Tensor

    def __init__(self, module: nn.Module, decay: float | Callable[[int], float]) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes one step towards `module`, whose structure must be that of the constructor's."""
        self.updates += 1
        decay = self.decay(int(self.updates)) if callable(self.decay) else self.decay
        for mine, theirs in zip(self.module.parameters(), module.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), 1.0 - decay)
        for kept, given in zip(self.module.buffers(), module.buffers(), strict=True):
            kept.copy_(given)
