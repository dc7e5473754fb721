"""The shell of adversarial models: a generator and a critic, two players with disjoint parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgm_models.codecs import continuous
from dgm_models.nn.networks import Network
from dgm_models.protocols import Batch, DataSpec, Model


class GeneratorCritic(Model):
    """x = generator(z), z ~ N(0, I); critic: x -> a number (a logit or a Wasserstein potential).

    The critic sees no batch statistics: a penalty on its slope is per example only then.
    """

    def __init__(self, data: DataSpec, network: Network, latent_dim: int) -> None:
        super().__init__(data, continuous(data))
        self.latent_dim = latent_dim
        # model space is (-1, 1) for whole levels, unbounded for real data
        bound = nn.Identity() if data.levels is None else nn.Tanh()
        self.generator = nn.Sequential(network.up(latent_dim, data.shape), bound)
        self.critic = nn.Sequential(network.down(data.shape, 1), nn.Flatten(0))

    def players(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "generator": self.generator}

    def generate(self, batch: Batch) -> Tensor:
        """As many samples as the batch has rows [B, *event], by the rows' keys, with gradient."""
        fake: Tensor = self.generator(batch.normal("latent", (self.latent_dim,)))
        return fake

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        if cond is not None:
            raise ValueError("cond: this model was built without a condition")
        fake: Tensor = self.generator(torch.randn(n, self.latent_dim, generator=rng, device=rng.device))
        return fake
