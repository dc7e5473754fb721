"""The generative adversarial network with the hinge loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dgm_models.conditions import Condition
from dgm_models.construct import Positive
from dgm_models.nn.adversarial import GeneratorCritic, Tricks
from dgm_models.nn.game import Game
from dgm_models.nn.networks import Mlp, Network
from dgm_models.ops.games import Watch
from dgm_models.protocols import DataSpec


class Hinge(Game):
    """Critic: minimises max(0, 1 - D(x)) + max(0, 1 + D(G(z))). Generator: minimises -D(G(z)).

    At the best critic, sign(p - q), the value is the integral of |p - q| less 2: `from_optimum` estimates twice the
    total variation from below.
    Source: Lim and Ye 2017, section 3, arXiv:1705.02894; Miyato et al. 2018, eq. 16 and 17, arXiv:1802.05957.
    """

    optimum = -2.0

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def generator_loss(self, fake: Tensor) -> Tensor:
        return -fake


def hinge(
    data: DataSpec,
    network: Network = Mlp(),
    latent_dim: Positive = 32,
    critic_steps: Positive = 1,
    cond: Condition | None = None,
    projection: bool = False,
    tricks: Tricks = Tricks(),
    watch: Watch = Watch(),
) -> tuple[GeneratorCritic, Hinge]:
    """A GAN with the hinge loss, most often with `tricks.spectral_norm`.

    Args:
        data: what is modelled.
        network: gives generator and critic.
        latent_dim: the dimension of z.
        critic_steps: critic updates for one generator update, each on a batch of its own when above 1.
        cond: what a sample is asked for.
        projection: the critic reads the condition by an inner product with its features.
        tricks: parts that go with any adversarial method.
        watch: what is measured of the game at reports.
    """
    model = GeneratorCritic(data, network, latent_dim, cond, projection, tricks)
    return model, Hinge(model, critic_steps, tricks, watch)
