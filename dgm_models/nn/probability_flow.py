"""The density of a diffusion model by its probability-flow ODE."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dgm_models.ops.ode import Solution, rk45
from dgm_models.ops.paths import Path

EXACT_DIMS = 8  # up to here the trace is computed: it takes as many backward passes


def log_prob(
    denoise: Callable[[Tensor, Tensor], Tensor],
    path: Path,
    x: Tensor,
    probes: Tensor | None = None,
    tolerance: float = 1e-5,
) -> Solution:
    """log p(x) = log N(w_1; 0, r_1^2) + the integral of div dw/dr over r, dw/dr = (w - D) / r, and the number of calls.

    w = x_t / (alpha + sigma) and r = sigma / (alpha + sigma) are the coordinates of the straight path, in which the
    ODE is smooth at both ends. x is taken as x_t / alpha at the path's smallest time: the density is that of data with
    noise of standard deviation sigma / alpha of that time.

    Args:
        denoise: (x_t [B, *event], t scalar float64) -> E[x_0 | x_t], differentiable, without any clamp.
        path: of the model.
        x: [B, *event] in model space.
        probes: [K, B, *event] of mean 0 and covariance 1, such as signs: the divergence is the mean of v^T J v over
            them, the same ones all along. None for the trace itself, which takes a backward pass for every value.
        tolerance: of a step, relative and absolute, in log p as in w.
    Returns: ([B] float64 nats, calls of `denoise`).

    Source: Chen et al. 2018, eq. 8, arXiv:1806.07366; Grathwohl et al. 2019, eq. 7, arXiv:1810.01367; Song et al. 2021,
    section 4.3, arXiv:2011.13456. Differs: in the coordinates of the straight path.
    """
    shape, dims = x.shape, math.prod(x.shape[1:])
    smallest = torch.tensor(path.first, dtype=torch.float64)
    start, stop = path.ratio(torch.stack([smallest, torch.ones_like(smallest)])).tolist()

    def slope(r: float, state: Tensor) -> Tensor:
        t = path.when(r)
        scale = path.alpha(t) + path.sigma(t)
        with torch.enable_grad():
            w = state[:, :dims].reshape(shape).detach().requires_grad_()
            found = denoise(scale * w, t)
            trace = _trace(found, w, probes)
        return torch.cat([(w - found).detach().flatten(1), dims - trace[:, None]], 1) / r

    w = x.double().flatten(1) * (1 - start)
    solved = rk45(slope, torch.cat([w, torch.zeros_like(w[:, :1])], 1), start, stop, tolerance)
    w, change = solved.y[:, :dims], solved.y[:, dims]
    prior = -0.5 * ((w / stop).square().sum(1) + dims * math.log(2 * math.pi * stop**2))
    return Solution(prior + change + dims * math.log(1 - start), solved.evaluations)


def _trace(y: Tensor, x: Tensor, probes: Tensor | None) -> Tensor:
    """[B] the trace of dy/dx, or the mean of v^T dy/dx v over the probes v."""
    if probes is None:
        units = torch.eye(y[0].numel(), dtype=y.dtype, device=y.device)
        probes = units.reshape(-1, 1, *y.shape[1:]).expand(-1, *y.shape)
        return _forms(y, x, probes).sum(0)
    return _forms(y, x, probes).mean(0)


def _forms(y: Tensor, x: Tensor, probes: Tensor) -> Tensor:
    """[K, B] v^T dy/dx v of every probe v."""
    found = []
    for number, v in enumerate(probes):
        (product,) = torch.autograd.grad(y, x, v.to(y.dtype), retain_graph=number + 1 < len(probes))
        found.append((product * v).flatten(1).sum(1))
    return torch.stack(found)
