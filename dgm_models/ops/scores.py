"""The score s(x) = grad log p(x) and its derivatives, by automatic differentiation; all of them can be differentiated.

They are to be called where gradients are enabled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]  # [B, *event] -> [B] nats, up to a constant


def score(log_p: LogDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """s(x) [B, *event] at x [B, *event], and the leaf x that it is a function of."""
    x = x.detach().requires_grad_(True)
    (s,) = torch.autograd.grad(log_p(x).sum(), x, create_graph=True)
    return s, x


def along(s: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """v^T (ds/dx) v [B] for directions v [B, *event]: one backward pass."""
    (slope,) = torch.autograd.grad((s * v).sum(), x, create_graph=True)
    return (slope * v).flatten(1).sum(1)


def trace(s: Tensor, x: Tensor) -> Tensor:
    """tr ds/dx [B], exact: a backward pass for every dimension."""
    total = s.new_zeros(len(s))
    for i, row in enumerate(s.flatten(1).unbind(1)):
        (slope,) = torch.autograd.grad(row.sum(), x, create_graph=True)
        total = total + slope.flatten(1)[:, i]
    return total
