"""The generative adversarial network with the non-saturating generator loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dgm_models.construct import Positive
from dgm_models.nn.adversarial import GeneratorCritic
from dgm_models.nn.networks import Mlp, Network
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(D(x)) - log(1 - sigmoid(D(G(z)))) from logits [B]: [B] nats; log 4 at the game's optimum."""
    return F.softplus(-real) + F.softplus(fake)


def generator_loss(fake: Tensor) -> Tensor:
    """-log sigmoid(D(G(z))) from logits [B]: [B] nats."""
    return F.softplus(-fake)


class NonSaturating(Objective):
    """Critic: minimises -log D(x) - log(1 - D(G(z))). Generator: minimises -log D(G(z)).

    Source: Goodfellow et al. 2014, section 3, arXiv:1406.2661, in logits.
    """

    def __init__(self, critic_steps: int) -> None:
        super().__init__()
        self.critic_steps = critic_steps

    def turns(self) -> Sequence[Turn]:
        return (
            Turn("critic", self.critic_turn, updates=self.critic_steps, fresh=self.critic_steps > 1),
            Turn("generator", self.generator_turn),
        )

    def critic_turn(self, model: GeneratorCritic, batch: Batch) -> Loss:
        real, fake = model.critic(batch.x), model.critic(model.generate(batch).detach())
        right = ((real > 0).sum() + (fake < 0).sum()) / 2
        return Loss(critic_loss(real, fake).sum(), {"accuracy": right})

    def generator_turn(self, model: GeneratorCritic, batch: Batch) -> Loss:
        return Loss(generator_loss(model.critic(model.generate(batch))).sum())


def non_saturating(
    data: DataSpec, network: Network = Mlp(), latent_dim: Positive = 32, critic_steps: Positive = 1
) -> tuple[GeneratorCritic, NonSaturating]:
    """A GAN.

    Args:
        data: what is modelled.
        network: gives generator and critic.
        latent_dim: the dimension of z.
        critic_steps: critic updates for one generator update, each on a batch of its own when above 1.
    """
    return GeneratorCritic(data, network, latent_dim), NonSaturating(critic_steps)
