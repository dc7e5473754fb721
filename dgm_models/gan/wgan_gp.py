"""The Wasserstein GAN with gradient penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm_models.conditions import Condition
from dgm_models.construct import NonNegativeFloat, Positive
from dgm_models.nn.adversarial import GeneratorCritic, Tricks
from dgm_models.nn.game import Wasserstein, gradient, refuse_batch_norm
from dgm_models.nn.networks import Mlp, Network
from dgm_models.objective import Loss
from dgm_models.ops.games import Watch
from dgm_models.protocols import Batch, DataSpec


class WganGp(Wasserstein):
    """Critic: minimises D(G(z)) - D(x) + penalty (|grad D(x^)| - 1)^2, x^ = eps x + (1 - eps) G(z), one eps an example.

    Generator: minimises -D(G(z)). The critic's gap D(x) - D(G(z)) estimates the Wasserstein-1 distance.
    Source: Gulrajani et al. 2017, algorithm 1, arXiv:1704.00028.
    """

    def __init__(self, model: GeneratorCritic, critic_steps: int, tricks: Tricks, watch: Watch, weight: float) -> None:
        super().__init__(model, critic_steps, tricks, watch)
        refuse_batch_norm(model.critic, "penalty")
        self.weight = weight
        self.double_backward = True

    def penalty(self, model: GeneratorCritic, batch: Batch, fake: Tensor) -> Loss:
        cond = model.given(batch)
        mix = batch.uniform("interpolate", (1,) * len(batch.x.shape[1:]))
        between = fake + mix * (batch.x - fake)
        slopes = torch.linalg.vector_norm(gradient(lambda x: model.critic(x, cond), between), dim=1)
        return Loss(self.weight * (slopes - 1).square().sum(), {"slope": slopes.sum()})


def wgan_gp(
    data: DataSpec,
    network: Network = Mlp(),
    latent_dim: Positive = 32,
    penalty: NonNegativeFloat = 10.0,
    critic_steps: Positive = 5,
    cond: Condition | None = None,
    projection: bool = False,
    tricks: Tricks = Tricks(),
    watch: Watch = Watch(),
) -> tuple[GeneratorCritic, WganGp]:
    """A Wasserstein GAN with gradient penalty.

    Args:
        data: what is modelled.
        network: gives generator and critic.
        latent_dim: the dimension of z.
        penalty: weight of the gradient penalty.
        critic_steps: critic updates for one generator update, each on a batch of its own when above 1.
        cond: what a sample is asked for.
        projection: the critic reads the condition by an inner product with its features.
        tricks: parts that go with any adversarial method.
        watch: what is measured of the game at reports.
    """
    model = GeneratorCritic(data, network, latent_dim, cond, projection, tricks)
    return model, WganGp(model, critic_steps, tricks, watch, penalty)
