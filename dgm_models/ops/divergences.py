"""Divergences in closed form, in nats."""

from __future__ import annotations

from torch import Tensor


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag exp(log_variance)) || N(0, I)) of [B, D], summed over D: [B] nats, >= 0."""
    return 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).sum(1)
