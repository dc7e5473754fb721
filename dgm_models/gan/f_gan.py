"""The f-GAN: any f-divergence as the value of a game."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dgm_models.conditions import Condition
from dgm_models.construct import Positive
from dgm_models.nn.adversarial import GeneratorCritic, Tricks
from dgm_models.nn.game import Game
from dgm_models.nn.networks import Mlp, Network
from dgm_models.ops.divergences import DIVERGENCES, DivergenceName
from dgm_models.ops.games import Watch
from dgm_models.protocols import DataSpec


class FGan(Game):
    """Critic: maximises E g(D(x)) - E f*(g(D(G(z)))), a lower bound of D_f(data || samples). Generator: see `descent`.

    `value` is the bound, and `from_optimum` the bound less f(1): 0 where samples are distributed as data.
    Source: Nowozin et al. 2016, eq. 6 and 7, section 3.2 (the other generator loss), arXiv:1606.00709.

    Args:
        divergence: D_f.
        descent: "bound" minimises -E f*(g(D(G(z)))), the bound itself; "alternative" minimises -E g(D(G(z))).
        model, critic_steps, tricks, watch: as for every game.
    """

    def __init__(
        self,
        model: GeneratorCritic,
        critic_steps: int,
        tricks: Tricks,
        watch: Watch,
        divergence: DivergenceName,
        descent: Literal["bound", "alternative"],
    ) -> None:
        super().__init__(model, critic_steps, tricks, watch)
        self.divergence = DIVERGENCES[divergence]
        self.descent = descent
        self.optimum = self.divergence.least

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return self.divergence.conjugate_at(fake) - self.divergence.activation(real)

    def generator_loss(self, fake: Tensor) -> Tensor:
        if self.descent == "bound":
            return -self.divergence.conjugate_at(fake)
        return -self.divergence.activation(fake)

    def right(self, real: Tensor, fake: Tensor) -> Tensor:
        g, threshold = self.divergence.activation, self.divergence.threshold
        return ((g(real) > threshold).float() + (g(fake) < threshold).float()) / 2


def f_gan(
    data: DataSpec,
    network: Network = Mlp(),
    latent_dim: Positive = 32,
    divergence: DivergenceName = "jensen_shannon",
    descent: Literal["bound", "alternative"] = "alternative",
    critic_steps: Positive = 1,
    cond: Condition | None = None,
    projection: bool = False,
    tricks: Tricks = Tricks(),
    watch: Watch = Watch(),
) -> tuple[GeneratorCritic, FGan]:
    """An f-GAN.

    Args:
        data: what is modelled.
        network: gives generator and critic.
        latent_dim: the dimension of z.
        divergence: of the data's distribution from the samples'.
        descent: the generator minimises the bound that the critic maximises, or the alternative that does not
            saturate.
        critic_steps: critic updates for one generator update, each on a batch of its own when above 1.
        cond: what a sample is asked for.
        projection: the critic reads the condition by an inner product with its features.
        tricks: parts that go with any adversarial method.
        watch: what is measured of the game at reports.
    """
    model = GeneratorCritic(data, network, latent_dim, cond, projection, tricks)
    return model, FGan(model, critic_steps, tricks, watch, divergence, descent)
