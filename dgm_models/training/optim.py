"""Optimizers and learning-rate schedules as values of the params."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from dgm_models.construct import Fraction, NonNegative, NonNegativeFloat, PositiveFloat


@dataclass(frozen=True)
class Optim:
    """How one player is updated.

    Args:
        name: the algorithm.
        lr: peak learning rate.
        betas: of Adam and AdamW; RMSprop takes the second as its smoothing.
        eps: of the denominator.
        weight_decay: L2 for adam, rmsprop and sgd, decoupled for adamw; on tensors of two and more dimensions only.
        momentum: of sgd and rmsprop.
        warmup: steps of linear growth from 0 to `lr`.
        schedule: after the warm-up; cosine and linear fall to 0 at the last step.
        clip: largest gradient norm, 0 for none.
    """

    name: Literal["adam", "adamw", "rmsprop", "sgd"] = "adam"
    lr: PositiveFloat = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    momentum: Fraction = 0.0
    warmup: NonNegative = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    clip: NonNegativeFloat = 0.0

    def factor(self, step: int, steps: int) -> float:
        """The share of `lr` in use at `step` of `steps`: a function, so that there is no state to save."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(steps - self.warmup, 1)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return 1.0 - min(done, 1.0) if self.schedule == "linear" else 1.0

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over `module`'s parameters: where weights decay, matrices and the rest as two groups."""
        parameters = list(module.parameters())
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if self.weight_decay:
            groups = [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
        if self.name in ("adam", "adamw"):  # fused: one pass over memory
            kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
            return kind(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        if self.name == "rmsprop":
            return torch.optim.RMSprop(groups, lr=self.lr, alpha=self.betas[1], eps=self.eps, momentum=self.momentum)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True)
class Optims:
    """A default for every player, and what single players change.

    Args:
        default: for players that `players` does not name.
        players: player -> its own settings.
    """

    default: Optim = Optim()
    players: dict[str, Optim] = field(default_factory=dict)

    def of(self, player: str) -> Optim:
        return self.players.get(player, self.default)

    def check(self, players: Iterable[str]) -> None:
        """Raises ValueError for settings of a player that the model does not have."""
        for name in self.players:
            if name not in set(players):
                raise ValueError(f"optim.{name}: the model has no such player; it has {', '.join(players)}")
