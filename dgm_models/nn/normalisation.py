"""ActNorm: one scale and shift a channel, which begin where the first batch has mean 0 and variance 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dgm_models.nn.flow import Transform
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.objective import Objective
from dgm_models.protocols import Batch

LEAST = 1e-6  # added to a channel's standard deviation: one that is constant in the first batch


class ActNorm(Transform):
    """z = s x + b, s and b [C] constant over the remaining axes; log|det| = (places of a channel) sum log|s|.

    The identity until `fill` has seen a batch; that it has is a buffer, and a second call changes nothing.
    Source: Kingma and Dhariwal 2018, section 3.1, arXiv:1807.03039.

    Args:
        channels: C, the first axis of an event.
    """

    initialised: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self.filling = False

    @torch.no_grad()
    def fill(self, x: Tensor) -> None:
        """Takes s and b from x [N, C, ...]: s x + b has mean 0 and variance 1 in every channel."""
        if bool(self.initialised):
            return
        rows = x.transpose(0, 1).flatten(1).double()
        scale = 1 / (rows.std(1, correction=0) + LEAST)
        self.log_scale.copy_(scale.log())
        self.bias.copy_(-rows.mean(1) * scale)
        self.initialised.fill_(True)

    def _along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s and b as x [B, C, ...] is multiplied by them."""
        shape = (-1, *[1] * (x.ndim - 2))
        return self.log_scale.exp().reshape(shape), self.bias.reshape(shape)

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.filling:
            self.fill(x)
        scale, bias = self._along(x)
        places = x[0, 0].numel()
        return x * scale + bias, (places * self.log_scale.sum()).expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        scale, bias = self._along(z)
        return (z - bias) / scale


def fill_norms(objective: Objective, model: Any, batch: Batch) -> None:
    """One pass of the objective's first loss over the batch, in which every `ActNorm` takes its input's moments.

    For `Objective.initialize`, which has the whole global batch on every rank: nothing is left to be summed.
    """
    norms = [part for part in model.modules() if isinstance(part, ActNorm)]
    for norm in norms:
        norm.filling = True
    try:
        objective.turns()[0].loss(model, batch)
    finally:
        for norm in norms:
            norm.filling = False


class NormalisedLikelihood(MaximumLikelihood):
    """-log p(x|c) in model space, in nats, of a model with `ActNorm`."""

    def initialize(self, model: Any, batch: Batch) -> None:
        fill_norms(self, model, batch)
