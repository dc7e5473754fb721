"""Markov chains of an energy: x moves so that its distribution becomes exp(-E(x)) / Z."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.construct import Choice, NonNegative, NonNegativeFloat, PositiveFloat

Energy = Callable[[Tensor], Tensor]  # [B, *event] -> [B] nats
Rng = torch.Generator | Tensor  # of all chains; or [B] int64, a key for each chain (`dgm_models.noise`)


class Draws:
    """What chains draw, a row for each.

    Args:
        rng: with keys, a chain's draws depend on its key alone: neither on its place among the chains nor on the rank.
    """

    def __init__(self, rng: Rng) -> None:
        self.rng, self.count = rng, 0

    def _next(self, keys: Tensor) -> Tensor:
        self.count += 1
        return noise.fold(keys, "draw", self.count)

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Standard normal [B, ...]."""
        if isinstance(self.rng, torch.Generator):
            return torch.randn(*shape, generator=self.rng, device=self.rng.device, dtype=dtype)
        return noise.normal(self._next(self.rng), "normal", tuple(shape[1:]), dtype)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """[B, ...] between 0 and 1."""
        if isinstance(self.rng, torch.Generator):
            return torch.rand(*shape, generator=self.rng, device=self.rng.device, dtype=dtype)
        return noise.uniform(self._next(self.rng), "uniform", tuple(shape[1:]), dtype)


def gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """E(x) [B] and dE/dx [B, *event] at x [B, *event], both without a graph; parameters get no gradient."""
    with torch.enable_grad():
        given = x.detach().requires_grad_(True)
        value = energy(given)
        (slope,) = torch.autograd.grad(value.sum(), given)
    return value.detach(), slope


def along(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..], as many axes as x has."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


class State(NamedTuple):
    """Where chains stand.

    Attributes:
        x: [B, *event].
        accepted: [B], how many of the moves were taken; all of them by a chain that rejects none.
        energy, slope: E(x) [B] and dE/dx [B, *event], of chains that keep them for their next move.
    """

    x: Tensor
    accepted: Tensor
    energy: Tensor | None = None
    slope: Tensor | None = None


@dataclass(frozen=True)
class Chain(Choice):
    """The contract of a params section such as `chain: {name: langevin, steps: 60}`.

    Args:
        steps: moves of a chain.
        temperature: T of the distribution exp(-E / T) that the chain samples: 1 for the model's own.
    """

    steps: NonNegative = 60
    temperature: PositiveFloat = 1.0

    @classmethod
    def choices(cls) -> Mapping[str, type]:
        return {chain.name: chain for chain in (Langevin, Mala, Metropolis)}

    def begin(self, energy: Energy, x: Tensor) -> State:
        """The state of chains that have not moved, with what their first move needs."""
        raise NotImplementedError

    def move(self, energy: Energy, state: State, draws: Draws) -> State:
        """One move of every chain."""
        raise NotImplementedError

    def corrected(self) -> Chain:
        """The chain of as many steps of this size that leaves exp(-E) itself as it is."""
        return replace(self, temperature=1.0)

    @torch.no_grad()
    def walk(self, energy: Energy, x: Tensor, rng: Rng) -> State:
        """`steps` moves from x [B, *event]; every row is a chain of its own."""
        draws, state = Draws(rng), self.begin(energy, x)
        for _ in range(self.steps):
            state = self.move(energy, state, draws)
        return state

    def __call__(self, energy: Energy, x: Tensor, rng: Rng) -> Tensor:
        """The chains' places [B, *event] after `steps` moves from x [B, *event]; every row is a chain of its own."""
        return self.walk(energy, x, rng).x


@dataclass(frozen=True)
class Langevin(Chain):
    """x <- x - (step / 2) dE/dx + sqrt(step T) noise: exp(-E / T), with an error of order `step`.

    Source: Roberts and Tweedie 1996; Du and Mordatch 2019, arXiv:1903.08689, whose settings have a step and a noise
    that do not belong together, which is a temperature (docs/errata.md).

    Args:
        step: of the gradient.
        clip: the largest size of each of the gradient's values, 0 for no limit. With a limit the chain samples another
            distribution; `mala` corrects this as well.
    """

    name: ClassVar[str] = "langevin"
    step: PositiveFloat = 0.01
    clip: NonNegativeFloat = 0.0

    def begin(self, energy: Energy, x: Tensor) -> State:
        return State(x.detach(), torch.zeros(len(x), device=x.device))

    def move(self, energy: Energy, state: State, draws: Draws) -> State:
        _, slope = gradient(energy, state.x)
        return State(self._propose(self._ahead(state.x, slope), draws), state.accepted + 1)

    def corrected(self) -> Chain:
        # exp(-E / T) with this step is exp(-E) of the energy E / T with the step T times as long
        return Mala(self.steps, 1.0, self.step * self.temperature, self.clip)

    def _ahead(self, x: Tensor, slope: Tensor) -> Tensor:
        """The mean of the next place."""
        return x.sub(slope.clamp(-self.clip, self.clip) if self.clip else slope, alpha=0.5 * self.step)

    def _propose(self, ahead: Tensor, draws: Draws) -> Tensor:
        return ahead.add(draws.normal(ahead.shape, ahead.dtype), alpha=(self.step * self.temperature) ** 0.5)


@dataclass(frozen=True)
class Mala(Langevin):
    """Langevin's move as a proposal y, taken with probability min(1, exp(-E(y)/T) q(x|y) / (exp(-E(x)/T) q(y|x))).

    It samples exp(-E / T) whatever the step. One evaluation a move, and one at the beginning.
    Source: Besag 1994; Roberts and Tweedie 1996, Metropolis-adjusted Langevin.
    """

    name: ClassVar[str] = "mala"

    def begin(self, energy: Energy, x: Tensor) -> State:
        value, slope = gradient(energy, x)
        return State(x.detach(), torch.zeros_like(value), value, slope)

    def move(self, energy: Energy, state: State, draws: Draws) -> State:
        assert state.slope is not None
        ahead = self._ahead(state.x, state.slope)
        y = self._propose(ahead, draws)
        value, slope = gradient(energy, y)
        there, back = ((a - b).square().flatten(1).sum(1) for a, b in ((y, ahead), (state.x, self._ahead(y, slope))))
        log_odds = (there - back) / (2 * self.step * self.temperature)  # log q(x|y) - log q(y|x)
        return accept(state, State(y, state.accepted, value, slope), log_odds, self.temperature, draws)


@dataclass(frozen=True)
class Metropolis(Chain):
    """y = x + scale noise, taken with probability min(1, exp((E(x) - E(y)) / T)): exp(-E / T), without a gradient.

    One evaluation a move, and one at the beginning.
    Source: Metropolis et al. 1953.

    Args:
        scale: standard deviation of a proposed move.
    """

    name: ClassVar[str] = "metropolis"
    scale: PositiveFloat = 0.1

    def begin(self, energy: Energy, x: Tensor) -> State:
        value = energy(x)
        return State(x.detach(), torch.zeros_like(value), value)

    def move(self, energy: Energy, state: State, draws: Draws) -> State:
        y = state.x.add(draws.normal(state.x.shape, state.x.dtype), alpha=self.scale)
        return accept(state, State(y, state.accepted, energy(y)), 0.0, self.temperature, draws)


def accept(old: State, new: State, log_odds: Tensor | float, temperature: float, draws: Draws) -> State:
    """The new state with probability min(1, exp((E(old) - E(new)) / T + log_odds)), chain by chain, else the old one.

    Args:
        log_odds: [B] log q(old|new) - log q(new|old) of the proposals; 0 of symmetric ones.
    """
    assert old.energy is not None and new.energy is not None
    log_ratio = (old.energy - new.energy) / temperature + log_odds
    taken = draws.uniform(log_ratio.shape, log_ratio.dtype).log() < log_ratio  # never where the energy is not a number

    def chosen(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.where(along(taken, a), a, b)

    x = torch.where(along(taken, new.x), new.x, old.x)
    return State(x, old.accepted + taken, chosen(new.energy, old.energy), chosen(new.slope, old.slope))
