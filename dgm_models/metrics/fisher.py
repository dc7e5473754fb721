"""The Fisher divergence: how far the slopes of two log-densities are apart; it takes no normaliser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dgm_models.metrics.estimate import Estimate
from dgm_models.metrics.likelihood import mean_estimate
from dgm_models.ops.scores import LogDensity, score, trace

CHUNK = 2000  # rows at a time


def fisher_divergence(log_q: LogDensity, x: Tensor, data_score: Callable[[Tensor], Tensor] | None = None) -> Estimate:
    """E_p |grad log p - grad log q|^2 over rows of p, or what of it depends on q, with a 95% t interval.

    Integration by parts turns -2 E_p grad log p . grad log q into 2 E_p tr Hess log q. Without `data_score` the value
    is E_p [|grad log q|^2 + 2 tr Hess log q]: the divergence less E_p |grad log p|^2, which no model changes. It is
    negative for a good model, and differences between models over the same rows are differences of divergences.

    Args:
        log_q: the model's log-density in nats up to a constant, -energy for example; with a continuous slope.
        x: [n, *event] rows of p, real; n >= 2.
        data_score: grad log p [n, *event] at rows, where it is known.
    Returns: nats^2 by the square of x's unit; lower is better, and with `data_score` 0 is best.
    Raises: ValueError when there are fewer than 2 rows or a value is not finite.

    Source: Hyvarinen 2005, Estimation of non-normalized statistical models by score matching, theorem 1.
    """
    found = []
    with torch.enable_grad():
        for rows in torch.split(x, CHUNK):
            s, leaf = score(log_q, rows)
            if data_score is None:
                values = s.square().flatten(1).sum(1) + 2 * trace(s, leaf)
            else:
                values = (data_score(rows) - s).square().flatten(1).sum(1)
            found.append(values.detach())
    return mean_estimate(torch.cat(found))
