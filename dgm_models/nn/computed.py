"""Updates that are computed and not descended to, as gradients: EM, closed forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch


class Computed(Objective):
    """Moves parameters theta to a computed theta': the gradient of n |theta - theta'|^2 / 2 is n (theta - theta').

    `optim: {name: sgd, lr: 1.0}` without momentum, decay and clipping makes theta exactly theta'; any other optimizer
    walks towards theta' in its own way. The loss that is reported is -log p(x), for models with a density.
    """

    additive = False  # theta' is computed from the whole batch

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def target(self, model: Any, x: Tensor) -> Mapping[str, Tensor]:
        """theta' by name, the same on every rank, from this rank's x [B, *event]; called in training alone."""
        raise NotImplementedError(f"{type(self).__name__} computes no parameters")

    def prepare(self, model: Any, batch: Batch) -> Batch:
        if not model.training:
            return batch
        found = self.target(model, batch.x)
        return batch.with_extra(**{name: value.expand(len(batch), *value.shape) for name, value in found.items()})

    def loss(self, model: Any, batch: Batch) -> Loss:
        with torch.no_grad():
            nll = -model.log_prob(batch.x).sum()
        if not model.training:
            return Loss(nll)
        squares = [(value - batch.extra[name][0]).square().sum() for name, value in model.named_parameters()]
        pull = 0.5 * len(batch) * torch.stack(squares).sum()
        return Loss(nll + pull - pull.detach())
