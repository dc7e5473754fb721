"""Inverses by iteration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype) -> float:
    """What an iteration is stopped at, relative to 1 + |x|: eps^(3/4), 6e-6 in float32 and 2e-12 in float64."""
    return float(torch.finfo(dtype).eps ** 0.75)


def fixed_point(step: Callable[[Tensor, int], Tensor], start: Tensor, limit: int) -> tuple[Tensor, int]:
    """x <- step(x, iteration) until no coordinate of an example moves by more than `tolerance` (1 + |x|).

    An example that has come to rest stays as it is while others move: what it becomes does not depend on them.

    Args:
        step: from x [B, *event] and the iteration's number, counted from 0.
        start: [B, *event].
        limit: iterations at most; an example that still moves is left where it then is.
    Returns: (x [B, *event], the number of iterations).
    """
    x, close = start, tolerance(start.dtype)
    moving = torch.ones(len(x), *[1] * (x.ndim - 1), dtype=torch.bool, device=x.device)
    for iteration in range(limit):
        new = step(x, iteration)
        far = ((new - x).abs() > close * (1 + new.abs())).flatten(1).any(1)
        x = torch.where(moving, new, x)
        moving = moving & far.reshape(moving.shape)
        if not bool(moving.any()):
            return x, iteration + 1
    return x, limit
