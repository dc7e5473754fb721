"""Divergences, in nats: the f-divergences with what a critic needs to bound them, and one in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]
DivergenceName = Literal["kl", "reverse_kl", "pearson", "hellinger", "jensen_shannon", "gan", "total_variation"]
LOG_2 = math.log(2.0)


@dataclass(frozen=True)
class Divergence:
    """D_f(P || Q) = E_q f(p / q) >= E_p T(x) - E_q f*(T(x)) for every critic T; equal at T = f'(p / q).

    A network's output v on the whole line becomes T = g(v) in the domain of f*.

    Attributes:
        f: convex on u > 0.
        slope: f', so that slope(p / q) is the best critic T.
        activation: g, increasing.
        conjugate: f*(t) = sup_u (t u - f(u)), on the range of f'.
        conjugate_at: v -> f*(g(v)) without the exponentials that cancel.
        threshold: f'(1): a critic above it finds data likelier than samples.
        least: f(1), the divergence of equal distributions.

    Source: Nowozin et al. 2016, tables 1, 2 and 6, arXiv:1606.00709. Differs: the squared Hellinger distance is the
    integral of (sqrt p - sqrt q)^2, Pearson's divides by q as its f does, and Jensen-Shannon's is twice the usual
    mean of two KL divergences, as its f gives.
    """

    f: Function
    slope: Function
    activation: Function
    conjugate: Function
    conjugate_at: Function
    threshold: float
    least: float = 0.0


def _x_log_x(u: Tensor) -> Tensor:
    return torch.xlogy(u, u)


DIVERGENCES: dict[DivergenceName, Divergence] = {
    "kl": Divergence(
        f=_x_log_x,
        slope=lambda u: 1 + u.log(),
        activation=lambda v: v,
        conjugate=lambda t: (t - 1).exp(),
        conjugate_at=lambda v: (v - 1).exp(),
        threshold=1.0,
    ),
    "reverse_kl": Divergence(
        f=lambda u: -u.log(),
        slope=lambda u: -1 / u,
        activation=lambda v: -(-v).exp(),
        conjugate=lambda t: -1 - (-t).log(),
        conjugate_at=lambda v: v - 1,
        threshold=-1.0,
    ),
    "pearson": Divergence(
        f=lambda u: (u - 1).square(),
        slope=lambda u: 2 * (u - 1),
        activation=lambda v: v,
        conjugate=lambda t: t.square() / 4 + t,
        conjugate_at=lambda v: v.square() / 4 + v,
        threshold=0.0,
    ),
    "hellinger": Divergence(
        f=lambda u: (u.sqrt() - 1).square(),
        slope=lambda u: 1 - u.rsqrt(),
        activation=lambda v: -torch.expm1(-v),
        conjugate=lambda t: t / (1 - t),
        conjugate_at=torch.expm1,
        threshold=0.0,
    ),
    "jensen_shannon": Divergence(
        f=lambda u: _x_log_x(u) - (u + 1) * ((u + 1) / 2).log(),
        slope=lambda u: LOG_2 + (u / (u + 1)).log(),
        activation=lambda v: LOG_2 + F.logsigmoid(v),
        conjugate=lambda t: -(2 - t.exp()).log(),
        conjugate_at=lambda v: F.softplus(v) - LOG_2,
        threshold=0.0,
    ),
    "gan": Divergence(
        f=lambda u: _x_log_x(u) - _x_log_x(u + 1),
        slope=lambda u: (u / (u + 1)).log(),
        activation=F.logsigmoid,
        conjugate=lambda t: -(1 - t.exp()).log(),
        conjugate_at=F.softplus,
        threshold=-LOG_2,
        least=-2 * LOG_2,
    ),
    "total_variation": Divergence(
        f=lambda u: (u - 1).abs() / 2,
        slope=lambda u: (u - 1).sign() / 2,
        activation=lambda v: v.tanh() / 2,
        conjugate=lambda t: t,
        conjugate_at=lambda v: v.tanh() / 2,
        threshold=0.0,
    ),
}


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag exp(log_variance)) || N(0, I)) of [B, D], summed over D: [B] nats, >= 0."""
    return 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).sum(1)
