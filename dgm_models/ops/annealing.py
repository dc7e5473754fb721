"""Annealed importance sampling from either end: a normaliser between two stochastic bounds, never as one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

GROUPS = 20  # of chains: each gives one bound, and their spread is the bounds' error


@dataclass(frozen=True)
class Bridge:
    """Densities exp(-energy(x, beta)) / Z(beta) from one whose Z is known, at beta = 0, to a model's, at beta = 1.

    Attributes:
        start: n draws of beta = 0.
        log_z: log Z(0), nats.
        energy: [B, *event] and beta -> [B] nats.
        move: leaves the density of beta as it is: x [B, *event] -> [B, *event].
    """

    start: Callable[[int, torch.Generator], Tensor]
    log_z: float
    energy: Callable[[Tensor, float], Tensor]
    move: Callable[[Tensor, float, torch.Generator], Tensor]


class Bracket(NamedTuple):
    """Stochastic bounds of log Z: E[lower] <= log Z <= E[upper], each [GROUPS] nats, one of every group of chains.

    By Markov's inequality a lower bound is above log Z by t nats with a probability of at most exp(-t), an upper one
    below it likewise.
    """

    lower: Tensor
    upper: Tensor


def betas(temperatures: int) -> list[float]:
    """`temperatures` + 1 numbers from 0 to 1, closer together at both ends: a sigmoid from -4 to 4, stretched.

    Source: Grosse et al. 2015, arXiv:1511.02543.
    """
    raw = torch.linspace(-4, 4, temperatures + 1, dtype=torch.float64).sigmoid()
    found: list[float] = ((raw - raw[0]) / (raw[-1] - raw[0])).tolist()
    return found


@torch.no_grad()
def anneal(bridge: Bridge, x: Tensor, betas: Sequence[float], rng: torch.Generator) -> Tensor:
    """log w [B] nats, float64, of chains from x through the densities of `betas`: E[w] = Z(last) / Z(first).

    Args:
        bridge: the densities.
        x: [B, *event] drawn from the density of the first beta.
        betas: rising or falling.
        rng: of the moves.
    Source: Neal 2001, Annealed importance sampling, arXiv:physics/9803008.
    """
    log_w = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for number, (beta, after) in enumerate(pairwise(betas)):
        if number:
            x = bridge.move(x, beta, rng)
        log_w += (bridge.energy(x, beta) - bridge.energy(x, after)).double()
    return log_w


def bracket(bridge: Bridge, x: Tensor, temperatures: int, rng: torch.Generator) -> Bracket:
    """log Z(1) from below, by chains from beta = 0, and from above, by as many chains from the model's samples x.

    A bound is the log of the mean weight of a group of chains: by Jensen's inequality it is too low on average for
    Z(1) / Z(0), and for Z(0) / Z(1), whose negative is the upper bound, as well. The lower bound holds without
    conditions. The upper one rests on x: drawn from another distribution r than the model p it may be too low, by
    KL(r || p) at most.

    Args:
        bridge: from a known density to the model's.
        x: [B, *event] drawn from the model, B a multiple of `GROUPS`.
        temperatures: steps from one end to the other; with more of them the bounds come closer.
        rng: of all draws.
    Raises: ValueError for another number of chains.
    Source: Neal 2001, arXiv:physics/9803008; Grosse et al. 2015, arXiv:1511.02543.
    """
    if len(x) % GROUPS or not len(x):
        raise ValueError(f"chains: {len(x)} do not make {GROUPS} groups of one size; take a multiple of {GROUPS}")
    rising = betas(temperatures)
    up = _log_mean(anneal(bridge, bridge.start(len(x), rng), rising, rng))
    down = _log_mean(anneal(bridge, x, rising[::-1], rng))
    return Bracket(bridge.log_z + up, bridge.log_z - down)


def _log_mean(log_w: Tensor) -> Tensor:
    """[GROUPS] the log of each group's mean weight."""
    groups = log_w.reshape(GROUPS, -1)
    found: Tensor = groups.logsumexp(1) - math.log(groups.shape[1])
    return found
