"""The shell of energy-based models: p(x) = exp(-E(x)) / Z with an unknown Z, sampled by a Markov chain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from dgm_models.codecs import Codec, continuous
from dgm_models.nn.conditioner import check
from dgm_models.nn.networks import Network
from dgm_models.ops import annealing
from dgm_models.ops.annealing import Bracket, Bridge
from dgm_models.ops.mcmc import Chain, Draws, Energy, Rng
from dgm_models.ops.restoration import Observation
from dgm_models.protocols import DataSpec, Model


class Unnormalised(Model):
    """What follows from an energy: samples of a chain that starts at a Gaussian, and a bracket of log Z.

    Args:
        data, codec: what is modelled.
        sampler: the chain by which samples are drawn; `resampled` gives the model another one.
        spread: the Gaussian's standard deviation in model space.
    Attributes:
        accepted: the share of proposed moves that the chains of the last call of `sample` took.
    """

    sampling: Chain

    def __init__(self, data: DataSpec, codec: Codec, sampler: Chain, spread: float) -> None:
        super().__init__(data, codec)
        self.sampling = sampler
        self.spread = spread
        self.accepted = 0.0

    def energy(self, x: Tensor) -> Tensor:
        """[B] nats: -log p(x) up to a constant, x [B, *event] in model space."""
        raise NotImplementedError(f"{type(self).__name__} gives no energy")

    def around(self, x: Tensor) -> Tensor:
        """[B] nats: |x|^2 / (2 spread^2), the Gaussian's energy."""
        return 0.5 * (x / self.spread).square().flatten(1).sum(1)

    def start(self, n: int, rng: Rng) -> Tensor:
        """[n, *event] from the Gaussian."""
        dtype = next(self.parameters()).dtype
        return self.spread * Draws(rng).normal((n, *self.data.shape), dtype)

    def walk(self, x: Tensor, rng: Rng, steps: int) -> tuple[Tensor, Tensor]:
        """Chains after `steps` moves of the sampler from x [B, *event], and how many were accepted [B]."""
        with frozen(self):
            state = replace(self.sampling, steps=steps).walk(self.energy, x, rng)
        return state.x, state.accepted

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """The states of n fresh chains; `evaluations` counts those of the energy and its gradient."""
        check(self.condition, cond)
        return self._fresh(self.energy, self.start(n, rng), rng)

    @torch.no_grad()
    def restore(self, seen: Observation, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """The states of chains that start at what is seen; what is seen without noise does not move."""
        check(self.condition, cond)
        start = seen.start(self.start(len(seen), rng))
        return seen.place(self._fresh(seen.energy(self.energy), start, rng))

    def _fresh(self, energy: Energy, x: Tensor, rng: torch.Generator) -> Tensor:
        """The sampler's chains from x [B, *event], counted."""
        self.evaluations = 0

        def counted(x: Tensor) -> Tensor:
            self.evaluations += 1
            return energy(x)

        with frozen(self):
            state = self.sampling.walk(counted, x, rng)
        self.accepted = float(state.accepted.mean()) / max(self.sampling.steps, 1)
        return state.x

    @torch.no_grad()
    def bracket_log_z(self, chains: int, temperatures: int, rng: torch.Generator) -> Bracket:
        """Bounds of log Z by annealing between the Gaussian and the model: E(x, b) = (1 - b) |x|^2 / 2s^2 + b E(x).

        Every chain is corrected (`Chain.corrected`). Those from above start at fresh chains of the sampler's length.
        """
        chain = self.sampling.corrected()

        def energy(x: Tensor, beta: float) -> Tensor:
            return torch.lerp(self.around(x), self.energy(x), beta)

        def move(x: Tensor, beta: float, rng: torch.Generator) -> Tensor:
            return replace(chain, steps=1)(lambda y: energy(y, beta), x, rng)

        log_z = 0.5 * self.data.dims * math.log(2 * math.pi * self.spread**2)
        with frozen(self):
            reached = chain(self.energy, self.start(chains, rng), rng)
            return annealing.bracket(Bridge(self.start, log_z, energy, move), reached, temperatures, rng)


class EnergyBased(Unnormalised):
    """E(x) = network(x) + |x|^2 / (2 spread^2): a network in front of a Gaussian, so that Z is finite.

    Args:
        data: what is modelled.
        network: gives the number.
        sampler: the chain by which samples are drawn, from the Gaussian; `resampled` gives the model another one.
        spread: the Gaussian's standard deviation in model space.
    """

    def __init__(self, data: DataSpec, network: Network, sampler: Chain, spread: float) -> None:
        super().__init__(data, continuous(data), sampler, spread)
        self.network = network.down(data.shape, 1)

    def energy(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x)[:, 0] + self.around(x)
        return found


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module asks for a gradient: a chain keeps nothing for their backward pass."""
    asking = [p for p in module.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)
