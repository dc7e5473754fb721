"""The log-likelihood of stored examples under a trained method, and what kind of number it is."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.method import Method
from dgm_models.protocols import Bound, Density
from dgm_models.sampling import conditions

CHUNK = 256  # rows at a time: floats differ between batch sizes
Kind = Literal["exact", "bound", "estimate"]


@torch.no_grad()
def log_prob(
    method: Method, x: Tensor, labels: Tensor | None = None, importance: int = 1, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Kind]:
    """log p(x) of stored examples, or of what the model can say: a lower bound.

    Args:
        method: a trained method with a density or a bound; one with a condition is given each example's own.
        x: [N, *event] as stored.
        labels: [N] int64, for conditions.
        importance: draws of the importance-weighted bound, for a model with a bound: 1 is the ELBO.
        seed: of dequantisation and of the draws.
        device: where the model runs.
    Returns: ([N] float64 nats of stored data, "exact", "bound" or "estimate").
    Raises: ValueError when the model has neither, or x does not fit it.
    """
    if tuple(x.shape[1:]) != method.data.shape:
        raise ValueError(f"x: {tuple(x.shape)}; {method.name} was built for [N, *{method.data.shape}]")
    if importance < 1:
        raise ValueError(f"importance: {importance} draws; at least 1")
    model = method.model.to(device).eval()
    if not isinstance(model, Density | Bound):
        raise ValueError(f"{method.name} has neither a density nor a bound of one")
    cond = conditions(method, x, labels, seed)
    found = []
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK]
        keys = noise.fold(torch.arange(start, start + len(part)), "likelihood", seed).to(device)
        asked = None if cond is None else cond[start : start + CHUNK].to(device)
        y, log_det = model.codec.encode(part.to(device), keys)
        if isinstance(model, Density):
            nats = model.log_prob(y, asked)
        else:
            rng = torch.Generator(device).manual_seed(noise.digest("likelihood", seed, start))
            nats = model.elbo(y, rng, asked, importance)
        found.append((nats + log_det).double().cpu())
    if isinstance(model, Density) and model.estimated:
        return torch.cat(found), "estimate"
    return torch.cat(found), "exact" if isinstance(model, Density) and model.codec.exact else "bound"
