"""What the objectives that match scores share: any model with an energy or a density, its constant left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgm_models.nn.energy import EnergyBased
from dgm_models.nn.tricks import couples
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops.scores import LogDensity
from dgm_models.protocols import Batch, Density, Energy


def log_density(model: Any, batch: Batch) -> LogDensity:
    """log p(x|c) in nats up to a constant, c the conditions of the batch.

    Raises: ValueError for a model without energy and density, and for one of whole levels, which have no gradient.
    """
    if not batch.x.is_floating_point():
        raise ValueError(
            f"{type(model).__name__} models whole levels, along which a density has no gradient; take a model of "
            "dequantised or of real data"
        )
    if isinstance(model, Density):
        cond = model.given(batch)  # type: ignore[attr-defined]
        return lambda x: model.log_prob(x, cond)
    if isinstance(model, Energy):
        return lambda x: -model.energy(x)
    raise ValueError(f"{type(model).__name__} has neither an energy nor a density, and so no score")


class MatchesScores(Objective):
    """A loss of the score alone: the model's normaliser is in none of it."""

    double_backward = True

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def each(self, log_p: LogDensity, batch: Batch) -> Tensor:
        """[B]: the loss of every example."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Batch) -> Loss:
        with torch.enable_grad():  # validation runs without
            return Loss(self.each(log_density(model, batch), batch).sum())


def fit_for_scores(model: EnergyBased, curved: bool) -> EnergyBased:
    """The model as `without_constant` leaves it: a score has no gradient for the constant.

    Args:
        model: newly built.
        curved: the loss contains second derivatives of the energy.
    Raises: ValueError for a network that couples the examples of a batch, or has kinks where `curved` is asked.
    """
    if curved and any(isinstance(part, (nn.ReLU, nn.LeakyReLU)) for part in model.network.modules()):
        raise ValueError(
            "network: the loss is made of second derivatives, and relu and leaky_relu have none; take a network whose "
            "activation is silu, gelu or tanh"
        )
    return without_constant(model)


def without_constant(model: EnergyBased) -> EnergyBased:
    """Takes the bias of the network's last layer away, a constant of the energy.

    Raises: ValueError for a network that couples the examples of a batch.
    """
    if couples(model.network):
        raise ValueError(
            "network: an energy is a number of one example, and batch statistics make it depend on the others; set "
            "network.norm_down to none or layer"
        )
    last = [layer for layer in model.network.modules() if isinstance(layer, nn.Linear)][-1]
    last.register_parameter("bias", None)
    return model
