"""The Wasserstein GAN with weight clipping."""

from __future__ import annotations

import torch

from dgm_models.conditions import Condition
from dgm_models.construct import Positive, PositiveFloat
from dgm_models.nn.adversarial import GeneratorCritic, Tricks
from dgm_models.nn.game import Wasserstein
from dgm_models.nn.networks import Mlp, Network
from dgm_models.ops.games import Watch
from dgm_models.protocols import DataSpec


class Wgan(Wasserstein):
    """Critic: minimises E D(G(z)) - E D(x) over weights in [-clip, clip]. Generator: minimises -E D(G(z)).

    The gap is a lower bound of K W1, where K is the largest slope that such weights allow.
    Source: Arjovsky et al. 2017, algorithm 1, arXiv:1701.07875. Differs: weights are clipped before each use instead
    of after each update, so that the initial ones are too; critic_steps is the same at every step.
    """

    def __init__(self, model: GeneratorCritic, critic_steps: int, tricks: Tricks, watch: Watch, clip: float) -> None:
        super().__init__(model, critic_steps, tricks, watch)
        self.clip = clip

    @torch.no_grad()
    def constrain(self, model: GeneratorCritic) -> None:
        for parameter in model.critic.parameters():
            parameter.clamp_(-self.clip, self.clip)


def wgan(
    data: DataSpec,
    network: Network = Mlp(),
    latent_dim: Positive = 32,
    clip: PositiveFloat = 0.01,
    critic_steps: Positive = 5,
    cond: Condition | None = None,
    projection: bool = False,
    tricks: Tricks = Tricks(),
    watch: Watch = Watch(),
) -> tuple[GeneratorCritic, Wgan]:
    """A Wasserstein GAN with weight clipping; the paper trains it by RMSprop, without momentum.

    Args:
        data: what is modelled.
        network: gives generator and critic.
        latent_dim: the dimension of z.
        clip: the largest absolute value of the critic's weights.
        critic_steps: critic updates for one generator update, each on a batch of its own when above 1.
        cond: what a sample is asked for.
        projection: the critic reads the condition by an inner product with its features.
        tricks: parts that go with any adversarial method.
        watch: what is measured of the game at reports.
    """
    model = GeneratorCritic(data, network, latent_dim, cond, projection, tricks)
    return model, Wgan(model, critic_steps, tricks, watch, clip)
