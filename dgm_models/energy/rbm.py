"""Restricted Boltzmann machines: data and hidden units of two values, each independent given the other side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import discrete
from dgm_models.construct import Fraction, Positive
from dgm_models.nn.conditioner import check
from dgm_models.nn.contrastive_divergence import ContrastiveDivergence, Replay
from dgm_models.ops import annealing
from dgm_models.ops.annealing import Bracket, Bridge
from dgm_models.ops.mcmc import Draws, Rng
from dgm_models.protocols import Batch, DataSpec, Model

MOST = 2**20  # states of the smaller side, for the exact log Z
CHUNK = 2**12  # of them at a time


@dataclass(frozen=True)
class Gibbs:
    """Settings of the sampler.

    Args:
        steps: moves of a chain; one draws the hidden units given the data, and the data given them.
    """

    steps: Positive = 1000


class Rbm(Model):
    """E(x, h) = -b u(x) - c h - u(x) W h with h in {0, 1}; u(x) is one unit for each value above 0 of every place.

    Two levels are the usual binary units; more are softmax units. `energy` is the free energy -log sum_h exp(-E(x, h)).

    Source: Smolensky 1986; Hinton 2002; Salakhutdinov, Mnih, Hinton 2007 (softmax units).

    Args:
        data: of whole levels.
        hidden: units.
        sampler: how many moves a sample takes.
    Attributes:
        base: the biases of a model without hidden units, of the first batch's frequencies: chains and annealing start
            there.
    """

    base: Tensor

    def __init__(self, data: DataSpec, hidden: int, sampler: Gibbs) -> None:
        super().__init__(data, discrete(data))
        assert data.levels is not None
        self.levels = data.levels
        self.sampling = sampler
        units = data.dims * (data.levels - 1)
        self.weight = nn.Parameter(0.01 * torch.randn(units, hidden))
        self.visible = nn.Parameter(torch.zeros(units))
        self.hidden = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("base", torch.zeros(units))

    def units(self, x: Tensor) -> Tensor:
        """Levels x [B, *event] -> u(x) [B, D (levels - 1)]."""
        return F.one_hot(x.long(), self.levels)[..., 1:].flatten(1).to(self.weight.dtype)

    def energy(self, x: Tensor) -> Tensor:
        """[B] nats: the free energy of x."""
        return self.annealed(x, 1.0)

    def annealed(self, x: Tensor, beta: float) -> Tensor:
        """[B] nats: the free energy of E_beta(x, h) = beta E(x, h) - (1 - beta) base u(x)."""
        u = self.units(x)
        biases = torch.lerp(self.base, self.visible, beta)
        return -u @ biases - F.softplus(beta * (u @ self.weight + self.hidden)).sum(1)

    def _every(self, odds: Tensor) -> Tensor:
        """[N, D (levels - 1)] log-odds against level 0 -> [N, D, levels]: those of level 0 are 0."""
        return F.pad(odds.reshape(len(odds), self.data.dims, -1), (1, 0))

    def _levels(self, logits: Tensor, draws: Draws) -> Tensor:
        """Draws levels [B, *event] by the units' log-odds against level 0, [B, D (levels - 1)]."""
        logits = self._every(logits)  # [B, D, levels]
        below = logits.softmax(2).cumsum(2)[..., :-1]
        u = draws.uniform((len(logits), self.data.dims, 1), logits.dtype)
        return (u > below).sum(2).reshape(len(logits), *self.data.shape)

    def _move(self, x: Tensor, beta: float, draws: Draws) -> Tensor:
        """One move of block Gibbs sampling."""
        wide = beta * (self.units(x) @ self.weight + self.hidden)
        h = (draws.uniform(wide.shape, wide.dtype) < wide.sigmoid()).to(wide.dtype)
        return self._levels(torch.lerp(self.base, self.visible, beta) + beta * (h @ self.weight.T), draws)

    def start(self, n: int, rng: Rng) -> Tensor:
        """[n, *event] from the model without hidden units."""
        return self._levels(self.base.expand(n, -1), Draws(rng))

    @torch.no_grad()
    def walk(self, x: Tensor, rng: Rng, steps: int) -> tuple[Tensor, Tensor]:
        """Chains after `steps` moves from x [B, *event], all of which count as accepted [B]."""
        draws = Draws(rng)
        for _ in range(steps):
            x = self._move(x, 1.0, draws)
        return x, self.weight.new_full((len(x),), steps)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        self.evaluations = self.sampling.steps
        return self.walk(self.start(n, rng), rng, self.sampling.steps)[0]

    @torch.no_grad()
    def bracket_log_z(self, chains: int, temperatures: int, rng: torch.Generator) -> Bracket:
        """Bounds of log Z by annealing between the model without hidden units and this one.

        The chains from above start at fresh samples.
        Source: Salakhutdinov and Murray 2008, On the quantitative analysis of deep belief networks; Burda, Grosse,
        Salakhutdinov 2015, arXiv:1412.8566 (reverse annealing).
        """

        def move(x: Tensor, beta: float, rng: torch.Generator) -> Tensor:
            return self._move(x, beta, Draws(rng))

        log_z = float(self._every(self.base.double()[None]).logsumexp(2).sum()) + len(self.hidden) * math.log(2)
        bridge = Bridge(self.start, log_z, self.annealed, move)
        return annealing.bracket(bridge, self.sample(chains, rng), temperatures, rng)

    @torch.no_grad()
    def exact_log_z(self) -> Tensor:
        """log Z in nats, float64, by the sum over all states of the side that has fewer.

        Raises: ValueError where both sides have more than `MOST`.
        """
        hidden, dims = len(self.hidden), self.data.dims
        count = min(2**hidden, self.levels**dims)
        if count > MOST:
            raise ValueError(
                f"log Z: {hidden} hidden units and {dims} places of {self.levels} levels are too many to enumerate"
            )
        device, parts = self.weight.device, []
        weight, visible, bias = (p.double() for p in (self.weight, self.visible, self.hidden))
        for start in range(0, count, CHUNK):
            numbers = torch.arange(start, min(start + CHUNK, count), device=device)
            if count == 2**hidden:
                h = _digits(numbers, 2, hidden).double()
                log_p = h @ bias + self._every(visible + h @ weight.T).logsumexp(2).sum(1)
            else:
                u = self.units(_digits(numbers, self.levels, dims)).double()
                log_p = u @ visible + F.softplus(u @ weight + bias).sum(1)
            parts.append(log_p.logsumexp(0))
        return torch.stack(parts).logsumexp(0)


def _digits(numbers: Tensor, base: int, count: int) -> Tensor:
    """[N] -> [N, count]: the numbers' digits, the lowest first."""
    return numbers[:, None] // base ** torch.arange(count, device=numbers.device) % base


class ContrastiveRbm(ContrastiveDivergence):
    """Contrastive divergence of an RBM whose biases of the data begin at its frequencies.

    Source: Hinton 2010, A practical guide to training restricted Boltzmann machines (the initial biases).
    """

    def initialize(self, model: Rbm, batch: Batch) -> None:
        counts = F.one_hot(batch.x.long(), model.levels).flatten(1, -2).sum(0) + 1.0  # [D, levels]
        odds = counts[:, 1:].log() - counts[:, :1].log()
        for biases in (model.visible, model.base):
            biases.copy_(odds.flatten())


def rbm(
    data: DataSpec,
    hidden: Positive = 64,
    moves: Positive = 1,
    start: Literal["data", "chains"] = "chains",
    buffer: Positive = 100,
    fresh: Fraction = 0.0,
    steps: Positive = 1000,
) -> tuple[Rbm, ContrastiveRbm]:
    """A restricted Boltzmann machine, trained by contrastive divergence: from the data, or by chains that go on.

    Args:
        data: what is modelled.
        hidden: units.
        moves: of block Gibbs sampling between two updates: k of CD-k and PCD-k.
        start: where they start: "data" is CD, "chains" is PCD.
        buffer: how many chains PCD has.
        fresh: the share of these that begin anew when it is their turn.
        steps: moves of a fresh chain, whose end is a sample.
    """
    replay = Replay(data.shape, torch.int64, buffer, fresh) if start == "chains" else None
    return Rbm(data, hidden, Gibbs(steps)), ContrastiveRbm(moves, replay=replay)
