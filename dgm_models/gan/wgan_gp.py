"""The Wasserstein GAN with gradient penalty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgm_models.construct import NonNegativeFloat, Positive
from dgm_models.nn.adversarial import GeneratorCritic
from dgm_models.nn.networks import Mlp, Network
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec


def slope(critic: nn.Module, x: Tensor) -> Tensor:
    """The Euclidean norm of the critic's gradient at each example: [B], differentiable.

    The gradient is flattened to one vector an example: a norm along the channel axis would penalise pixels.
    """
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    norm: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return norm


class WganGp(Objective):
    """Critic: minimises D(G(z)) - D(x) + penalty (|grad D(x^)| - 1)^2, x^ = eps x + (1 - eps) G(z), one eps an example.

    Generator: minimises -D(G(z)). The critic's gap D(x) - D(G(z)) estimates the Wasserstein-1 distance.
    Source: Gulrajani et al. 2017, algorithm 1, arXiv:1704.00028.
    """

    double_backward = True

    def __init__(self, penalty: float, critic_steps: int) -> None:
        super().__init__()
        self.penalty = penalty
        self.critic_steps = critic_steps

    def turns(self) -> Sequence[Turn]:
        return (
            Turn("critic", self.critic_turn, updates=self.critic_steps, fresh=True),
            Turn("generator", self.generator_turn),
        )

    def critic_turn(self, model: GeneratorCritic, batch: Batch) -> Loss:
        fake = model.generate(batch).detach()
        mix = batch.uniform("interpolate", (1,) * len(batch.x.shape[1:]))
        slopes = slope(model.critic, mix * batch.x + (1 - mix) * fake)
        gap = model.critic(batch.x) - model.critic(fake)
        total = (self.penalty * (slopes - 1) ** 2 - gap).sum()
        return Loss(total, {"wasserstein": gap.sum(), "slope": slopes.sum()})

    def generator_turn(self, model: GeneratorCritic, batch: Batch) -> Loss:
        return Loss(-model.critic(model.generate(batch)).sum())


def wgan_gp(
    data: DataSpec,
    network: Network = Mlp(),
    latent_dim: Positive = 32,
    penalty: NonNegativeFloat = 10.0,
    critic_steps: Positive = 5,
) -> tuple[GeneratorCritic, WganGp]:
    """A Wasserstein GAN with gradient penalty.

    Args:
        data: what is modelled.
        network: gives generator and critic.
        latent_dim: the dimension of z.
        penalty: weight of the gradient penalty.
        critic_steps: critic updates for one generator update, each on a batch of its own.
    """
    return GeneratorCritic(data, network, latent_dim), WganGp(penalty, critic_steps)
