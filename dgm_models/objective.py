"""Loss, Turn, Objective: the only contract between a family and the trainer.

Every generative model is a game, and most have one player. A family hands the trainer turns; the trainer knows no
family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dgm_models.protocols import Batch


@dataclass(frozen=True)
class Loss:
    """What one loss says of one batch.

    Attributes:
        total: scalar, in nats: the SUM over the batch's elements. The trainer divides by the global count, so
            micro-batches, ranks and ragged batches all give one gradient.
        metrics: name -> scalar sums over the same elements (without gradient), divided like `total`.
    """

    total: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """One player's place in a trainer step.

    Attributes:
        player: the key of `model.players()` whose parameters this turn updates.
        loss: (model, batch) -> Loss.
        updates: optimizer updates in a step.
        every: the turn is taken at steps divisible by this.
        fresh: every update draws a batch of its own; otherwise the turns of a step share one.
        name: in front of its metrics where a model has several players; the player's own by default.
    """

    player: str
    loss: Callable[[Any, Batch], Loss]
    updates: int = 1
    every: int = 1
    fresh: bool = False
    name: str = ""


class Objective(nn.Module):
    """What is minimised. Buffers and modules of an objective (chains, reference models) live in the checkpoint.

    Attributes:
        additive: the total is a sum over examples. False for losses that couple examples (batch statistics,
            transport plans): gradient accumulation then raises, and equality over ranks holds only as the
            registry row declares.
        double_backward: a loss differentiates a gradient; torch.compile cannot take such a loss.
        whole: `prepare` differentiates the model, whose parameters then cannot be divided among workers.
    """

    additive: bool = True
    double_backward: bool = False
    whole: bool = False

    def turns(self) -> Sequence[Turn]:
        raise NotImplementedError(f"{type(self).__name__} names no turns")

    def prepare(self, model: Any, batch: Batch) -> Batch | Sequence[Batch]:
        """Runs once on a rank's share of a drawn batch, without gradient: chains, rollouts, reference log-probs.

        A sequence of batches is walked by `updates`: update i takes item i.
        """
        return batch

    def count(self, batch: Batch) -> Tensor | int:
        """The number of elements that `Loss.total` sums over: examples by default, target tokens for sequences."""
        return len(batch)

    def advance(self, model: Any, step: int) -> None:
        """Runs after every trainer step, without gradient: moves targets, schedules, averages."""

    def initialize(self, model: Any, batch: Batch) -> None:
        """Runs once before the first step on the whole global batch, on every rank, without gradient."""

    def watch(self, model: Any, batch: Batch, last: bool) -> Mapping[str, Tensor]:
        """What a report adds to its metrics: name -> scalar, a mean over the batch. Nothing by default, at no cost.

        Runs at every report, with gradient, outside of autocast. It is called on a copy of the objective with a copy
        of the model, and torch's generator is put back after it: whatever it does is forgotten. Every rank does the
        same work on the same rows, as if it were alone.

        Args:
            model: a copy of the model as it stands.
            batch: [B, *event] encoded, not prepared: the rows of the next two global batches, at most
                `trainer.WATCHED`, with keys of their own.
            last: whether the training ends with this report.
        """
        return {}
