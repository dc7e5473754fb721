"""The shell of energy-based models: p(x) = exp(-E(x)) / Z with an unknown Z, sampled by a Markov chain."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm_models.codecs import continuous
from dgm_models.nn.conditioner import check
from dgm_models.nn.networks import Network
from dgm_models.ops.mcmc import Chain
from dgm_models.protocols import DataSpec, Model


class EnergyBased(Model):
    """E(x) = network(x) + |x|^2 / (2 spread^2): a network in front of a Gaussian, so that Z is finite.

    Args:
        data: what is modelled.
        network: gives the number.
        sampler: the chain by which samples are drawn, from the Gaussian; `resampled` gives the model another one.
        spread: the Gaussian's standard deviation in model space.
    """

    def __init__(self, data: DataSpec, network: Network, sampler: Chain, spread: float) -> None:
        super().__init__(data, continuous(data))
        self.spread = spread
        self.sampling = sampler
        self.network = network.down(data.shape, 1)

    def energy(self, x: Tensor) -> Tensor:
        """[B] nats: -log p(x) up to a constant, x [B, *event] in model space."""
        found: Tensor = self.network(x)[:, 0] + 0.5 * (x / self.spread).square().flatten(1).sum(1)
        return found

    def start(self, n: int, rng: torch.Generator) -> Tensor:
        """[n, *event] from the Gaussian."""
        dtype = next(self.parameters()).dtype
        return self.spread * torch.randn(n, *self.data.shape, generator=rng, device=rng.device, dtype=dtype)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """The states of n fresh chains; `evaluations` counts those of the energy and its gradient."""
        check(self.condition, cond)
        self.evaluations = 0

        def energy(x: Tensor) -> Tensor:
            self.evaluations += 1
            return self.energy(x)

        x: Tensor = self.sampling(energy, self.start(n, rng), rng)
        return x
