"""The objective of every model with a density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch


class MaximumLikelihood(Objective):
    """-log p(x|c) in model space, in nats."""

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def loss(self, model: Any, batch: Batch) -> Loss:
        return Loss(-model.log_prob(batch.x, model.given(batch)).sum())
