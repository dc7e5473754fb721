"""The generative adversarial network with the non-saturating generator loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dgm_models.conditions import Condition
from dgm_models.construct import Positive
from dgm_models.nn.adversarial import GeneratorCritic, Tricks
from dgm_models.nn.game import Classification
from dgm_models.nn.networks import Mlp, Network
from dgm_models.ops.games import Watch
from dgm_models.protocols import DataSpec


class NonSaturating(Classification):
    """Critic: minimises -log s(D(x)) - log(1 - s(D(G(z)))). Generator: minimises -log s(D(G(z))).

    The generator's gradient does not vanish where the critic is sure; it is no gradient of the game's value.
    Source: Goodfellow et al. 2014, section 3, arXiv:1406.2661, in logits.
    """

    def generator_loss(self, fake: Tensor) -> Tensor:
        return F.softplus(-fake)


def non_saturating(
    data: DataSpec,
    network: Network = Mlp(),
    latent_dim: Positive = 32,
    critic_steps: Positive = 1,
    cond: Condition | None = None,
    projection: bool = False,
    tricks: Tricks = Tricks(),
    watch: Watch = Watch(),
) -> tuple[GeneratorCritic, NonSaturating]:
    """A GAN.

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
    return model, NonSaturating(model, critic_steps, tricks, watch)
