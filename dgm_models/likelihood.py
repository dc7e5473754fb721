"""The log-likelihood of stored examples under a trained method, and what kind of number it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.method import Method
from dgm_models.nn import probability_flow
from dgm_models.nn.conditioner import check
from dgm_models.nn.diffusion import Diffusion
from dgm_models.protocols import Bound, Density, Energy
from dgm_models.sampling import conditions

CHUNK = 256  # rows at a time: floats differ between batch sizes
Kind = Literal["exact", "bound", "estimate"]
Nats = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]  # (model-space x, keys, conditions, first row) -> [B]


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
    if importance < 1:
        raise ValueError(f"importance: {importance} draws; at least 1")
    model = method.model
    if not isinstance(model, Density | Bound):
        raise ValueError(f"{method.name} has neither a density nor a bound of one")

    def nats(y: Tensor, keys: Tensor, cond: Tensor | None, start: int) -> Tensor:
        if isinstance(model, Density):
            return model.log_prob(y, cond)
        rng = torch.Generator(device).manual_seed(noise.digest("likelihood", seed, start))
        return model.elbo(y, rng, cond, importance)

    found = _in_chunks(method, x, labels, seed, device, nats)
    if isinstance(model, Density) and model.estimated:
        return found, "estimate"
    return found, "exact" if isinstance(model, Density) and model.codec.exact else "bound"


@torch.no_grad()
def ode_log_prob(
    method: Method, x: Tensor, labels: Tensor | None = None, probes: int = 1, tolerance: float = 1e-3, seed: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, Kind]:  # fmt: skip
    """log p(x) of stored examples by the probability-flow ODE of a diffusion model.

    An estimate: the solver and, above `probability_flow.EXACT_DIMS` values an example, the divergence are approximate.
    Levels are dequantised, by the same draws as in `log_prob`.

    Args:
        method: a trained method with a score; one with a condition is given each example's own.
        x, labels, seed, device: as in `log_prob`.
        probes: random signs for every example, over which the divergence is a mean.
        tolerance: of a step of the solver.
    Returns: ([N] float64 nats of stored data, "estimate").
    Raises: ValueError when the model has no score at every noise, or x does not fit it.

    Source: Song et al. 2021, section 4.3, arXiv:2011.13456; Hutchinson 1989.
    """
    if probes < 1:
        raise ValueError(f"probes: {probes} draws; at least 1")
    model = method.model
    if not isinstance(model, Diffusion):
        raise ValueError(f"{method.name} has no probability-flow ODE: that needs the score of data with any noise")

    def nats(y: Tensor, keys: Tensor, cond: Tensor | None, start: int) -> Tensor:
        check(model.condition, cond)
        signs = None
        if method.data.dims > probability_flow.EXACT_DIMS:
            signs = torch.stack([_signs(noise.fold(keys, "probe", number), y) for number in range(probes)])

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return model.denoise(x.to(y.dtype), t.to(x.device).expand(len(x)), cond).to(x.dtype)

        return probability_flow.log_prob(denoise, model.path, y, signs, tolerance).y

    return _in_chunks(method, x, labels, seed, device, nats), "estimate"


@torch.no_grad()
def unnormalised_log_prob(method: Method, x: Tensor, seed: int = 0, device: str = "cpu") -> Tensor:
    """log p(x) + log Z of stored examples, by a model's energy: what a bracket of log Z is taken from.

    Args:
        method: a trained method with an energy.
        x, seed, device: as in `log_prob`.
    Returns: [N] float64 nats of stored data.
    Raises: ValueError when the model has no energy, or x does not fit it.
    """
    model = method.model
    if not isinstance(model, Energy):
        raise ValueError(f"{method.name} has no energy")
    return _in_chunks(method, x, None, seed, device, lambda y, keys, cond, start: -model.energy(y))


def _signs(keys: Tensor, like: Tensor) -> Tensor:
    """[B, *event] of -1 and 1 in equal shares, by keys [B]."""
    return (noise.uniform(keys, "sign", tuple(like.shape[1:])) < 0.5).double().mul(2).sub(1)


def _in_chunks(method: Method, x: Tensor, labels: Tensor | None, seed: int, device: str, nats: Nats) -> Tensor:
    """[N] float64 nats of stored x, with the codec's log-determinant."""
    if tuple(x.shape[1:]) != method.data.shape:
        raise ValueError(f"x: {tuple(x.shape)}; {method.name} was built for [N, *{method.data.shape}]")
    model = method.model.to(device).eval()
    cond = conditions(method, x, labels, seed)
    found = []
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK]
        keys = noise.fold(torch.arange(start, start + len(part)), "likelihood", seed).to(device)
        asked = None if cond is None else cond[start : start + CHUNK].to(device)
        y, log_det = model.codec.encode(part.to(device), keys)
        found.append((nats(y, keys, asked, start) + log_det).double().cpu())
    return torch.cat(found)
