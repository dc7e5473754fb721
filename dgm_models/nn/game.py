"""The game between a critic and a generator; a method states its losses and what else is its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dgm_models.nn.adversarial import GeneratorCritic, Tricks
from dgm_models.nn.tricks import couples
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops import games
from dgm_models.protocols import Batch
from dgm_models.training.average import Average
from dgm_models.training.runtime import current


def gradient(critic: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The critic's gradient at each example [B, *event] as one vector [B, D], itself differentiable.

    Flattened: a norm along the channels would be one number a pixel.
    """
    x = x.detach().requires_grad_(True)
    (found,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return found.flatten(1)


class Game(Objective):
    """Critic: minimises E critic_loss(D(x), D(G(z))). Generator: minimises E generator_loss(D(G(z))).

    Data and samples go through the critic apart, so that neither is normalised with the other's statistics.
    Reported of the critic's turn, as means: `accuracy`; `real` and `fake`, its outputs; `value`, what the game pays to
    it; `from_optimum`, the value less what an unbeatable generator leaves to the best critic.

    Args:
        model: what plays.
        critic_steps: critic updates for one generator update, each on a batch of its own when above 1.
        tricks: those that change the losses are applied here.
        watch: what is measured of the game at reports.
    Attributes:
        classifies: the critic's outputs are log-odds of data against samples.
        optimum: the value at the game's solution, where samples are distributed as data.
    """

    classifies: bool = False
    optimum: float = 0.0

    def __init__(self, model: GeneratorCritic, critic_steps: int, tricks: Tricks, watch: games.Watch) -> None:
        super().__init__()
        if tricks.smooth and not self.classifies:
            raise ValueError(
                f"tricks.smooth_real, tricks.smooth_fake: {tricks.smooth_real:g}, {tricks.smooth_fake:g}: the critic "
                f"of {type(self).__name__} gives no log-odds to smooth; leave them at 1 and 0"
            )
        self.critic_steps = critic_steps
        self.tricks = tricks
        self.watching = watch
        self.additive = not (tricks.feature_matching or couples(model))
        self.double_backward = tricks.r1 > 0
        if tricks.r1:
            refuse_batch_norm(model.critic, "tricks.r1")
        players = model.players() if tricks.historical_averaging else {}
        self.means = nn.ModuleDict({name: Average(player, lambda t: 1 - 1 / t) for name, player in players.items()})

    # ---- what a method states

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """[B] nats of the critic's outputs at data and samples [B]."""
        raise NotImplementedError

    def generator_loss(self, fake: Tensor) -> Tensor:
        """[B] nats of the critic's outputs at samples [B]."""
        raise NotImplementedError

    def value(self, real: Tensor, fake: Tensor) -> Tensor:
        """[B] nats that the game pays to the critic; the critic's loss without smoothing."""
        return -self.critic_loss(real, fake)

    def right(self, real: Tensor, fake: Tensor) -> Tensor:
        """[B]: the share of the two examples that the critic takes for what they are."""
        return ((real > 0).float() + (fake < 0).float()) / 2

    def penalty(self, model: GeneratorCritic, batch: Batch, fake: Tensor) -> Loss | None:
        """What is added to the critic's loss: sums over the batch."""
        return None

    def constrain(self, model: GeneratorCritic) -> None:
        """Runs before every loss: brings the critic's parameters back to where they may be."""

    # ---- the game

    def turns(self) -> Sequence[Turn]:
        critic = Turn("critic", self.critic_turn, updates=self.critic_steps, fresh=self.critic_steps > 1)
        r1 = Turn("critic", self.r1_turn, every=self.tricks.r1_every, name="r1")
        generator = Turn("generator", self.generator_turn)
        return (critic, r1, generator) if self.tricks.r1 and self.tricks.r1_every > 1 else (critic, generator)

    def critic_turn(self, model: GeneratorCritic, batch: Batch) -> Loss:
        self.constrain(model)
        cond = model.given(batch)
        with torch.no_grad():
            sample = model.generate(batch)
        real, fake = model.critic(batch.x, cond), model.critic(sample, cond)
        total = self.critic_loss(real, fake).sum() + self._inertia(model, "critic", batch)
        value = self.value(real, fake)
        metrics = {
            "accuracy": self.right(real, fake).sum(),
            "value": value.sum(),
            "from_optimum": (value - self.optimum).sum(),
            "real": real.sum(),
            "fake": fake.sum(),
        }
        eager = self.r1_turn(model, batch) if self.tricks.r1 and self.tricks.r1_every == 1 else None
        for loss in filter(None, (self.penalty(model, batch, sample), eager)):
            total, metrics = total + loss.total, metrics | dict(loss.metrics)
        return Loss(total, metrics)

    def r1_turn(self, model: GeneratorCritic, batch: Batch) -> Loss:
        """r1_every times r1 / 2 |grad D(x)|^2: what would be added to every step's loss, once in r1_every steps."""
        self.constrain(model)
        cond = model.given(batch)
        square = gradient(lambda x: model.critic(x, cond), batch.x).square().sum(1)
        return Loss(self.tricks.r1_every * self.tricks.r1 / 2 * square.sum(), {"r1": square.sum()})

    def generator_turn(self, model: GeneratorCritic, batch: Batch) -> Loss:
        self.constrain(model)
        cond = model.given(batch)
        features = model.critic.features(model.generate(batch), cond)
        total = self._inertia(model, "generator", batch)
        metrics: dict[str, Tensor] = {}
        if self.tricks.adversarial:
            total = total + self.tricks.adversarial * self.generator_loss(model.critic.judge(features, cond)).sum()
        if self.tricks.feature_matching:
            with torch.no_grad():
                wanted = model.critic.features(batch.x, cond)
            metrics["feature_distance"] = between_means(features, wanted)
            total = total + self.tricks.feature_matching * metrics["feature_distance"]
        return Loss(total, metrics)

    def _inertia(self, model: GeneratorCritic, player: str, batch: Batch) -> Tensor:
        """Historical averaging: weight |theta - mean of its past|^2, for every example of the batch."""
        if not self.means:
            return batch.x.new_zeros(())
        mean = self.means[player]
        assert isinstance(mean, Average)
        pairs = zip(model.players()[player].parameters(), mean.module.parameters(), strict=True)
        square = torch.stack([(now - past).square().sum() for now, past in pairs]).sum()
        return len(batch) * self.tricks.historical_averaging * square

    def advance(self, model: GeneratorCritic, step: int) -> None:
        for name, mean in self.means.items():
            assert isinstance(mean, Average)
            mean.update(model.players()[name])

    def watch(self, model: GeneratorCritic, batch: Batch, last: bool) -> Mapping[str, Tensor]:
        return games.watch(model, self, batch, last, self.watching)

    def initialize(self, model: GeneratorCritic, batch: Batch) -> None:
        """Gives virtual batch normalisation its reference batches."""
        if self.tricks.virtual_batch_norm:
            model.refer(batch)


class Classification(Game):
    """A game whose critic tells data from samples: D(x) are log-odds, the loss is their cross-entropy.

    At the best critic, log p(x) / q(x), the value is 2 JSD(p, q) - log 4: `from_optimum` estimates 2 JSD from below.
    Source: Goodfellow et al. 2014, theorem 1, arXiv:1406.2661, in logits; label smoothing: Salimans et al. 2016,
    section 3.4, arXiv:1606.03498.
    """

    classifies = True
    optimum = -math.log(4.0)

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """-a log s(D(x)) - (1 - a) log(1 - s(D(x))) and the same of samples with b; a = 1 and b = 0 if not smoothed."""
        return cross_entropy(real, self.tricks.smooth_real) + cross_entropy(fake, self.tricks.smooth_fake)

    def value(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.logsigmoid(real) + F.logsigmoid(-fake)


class Wasserstein(Game):
    """A game whose critic is to be a potential of slope at most 1: its gap D(x) - D(G(z)) estimates the distance W1.

    `accuracy` is the share of pairs in which data are above samples: a potential has no zero.
    Source: Arjovsky et al. 2017, eq. 2 and 3, arXiv:1701.07875.
    """

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake - real

    def generator_loss(self, fake: Tensor) -> Tensor:
        return -fake

    def right(self, real: Tensor, fake: Tensor) -> Tensor:
        return (real > fake).float()


def cross_entropy(logits: Tensor, target: float) -> Tensor:
    """-target log s(v) - (1 - target) log(1 - s(v)) of logits v [B]: [B] nats."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target), reduction="none")


def between_means(fake: Tensor, real: Tensor) -> Tensor:
    """This rank's rows times |mean fake - mean real|^2 of features [B, D], the means over all ranks' rows.

    The value is a sum over examples as every loss is, and its gradient, added over the ranks, that of all rows' mean.
    """
    sums = torch.stack([fake.detach().sum(0), real.sum(0)])
    rows = torch.full((), float(len(fake)), device=fake.device)
    current().sum([sums, rows])
    others = sums[0] - fake.detach().sum(0)  # of the other ranks; constant here
    distance = ((fake.sum(0) + others - sums[1]) / rows).square().sum()
    everywhere = rows * distance
    return everywhere - ((rows - len(fake)) * distance).detach()


def refuse_batch_norm(critic: nn.Module, what: str) -> None:
    """Raises ValueError when the critic's slope at an example would depend on the rest of the batch."""
    if any(isinstance(part, _BatchNorm) for part in critic.modules()):
        raise ValueError(
            f"{what}: penalises the critic's slope at each example, and batch normalisation makes it depend on the "
            "batch; set network.norm_down to none or layer, or tricks.virtual_batch_norm"
        )
