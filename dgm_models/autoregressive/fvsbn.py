"""The fully visible sigmoid belief network: one logistic regression a dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import Discrete
from dgm_models.conditions import Condition
from dgm_models.construct import NonNegative
from dgm_models.nn.autoregression import Autoregressive
from dgm_models.nn.conditioner import check
from dgm_models.nn.masked import MaskedLinear
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.nn.values import Entry, Order, in_order, label_conditioner
from dgm_models.ops.likelihoods import likelihood
from dgm_models.protocols import DataSpec


class Fvsbn(Autoregressive):
    """p(x_i | x_<i) = sigmoid(b_i + W_i,<i x_<i), x in {0, 1}; more levels are a softmax of one-hot inputs.

    Source: Frey, Hinton, Dayan 1996; Gan et al. 2015, section 2. Differs: the label, where there is one, moves b.
    """

    mask: Tensor

    def __init__(self, data: DataSpec, order: Order, order_seed: int, condition: Condition | None) -> None:
        super().__init__(data, Discrete(data), likelihood("auto", data), in_order(data, order, order_seed), condition)
        self.entry, self.conditioner = Entry(data, signed=False), label_conditioner(condition, data)
        inputs, outputs = self.entry.size, self.likelihood.num_params
        self.linear = MaskedLinear(data.dims * inputs, data.dims * outputs, strict=True)
        place = torch.arange(data.dims)
        mask = self.linear.mask(place.repeat_interleave(inputs), place.repeat_interleave(outputs))
        self.register_buffer("mask", mask, persistent=False)
        classes = self.conditioner.vector_dim
        self.asked = nn.Linear(classes, data.dims * outputs, bias=False) if classes else None

    def _bias(self, n: int, cond: Tensor | None) -> Tensor:
        """[n, P * K]: what the outputs are while nothing is known."""
        check(self.condition, cond)
        bias = self.linear.bias.expand(n, -1)
        if self.asked is None:
            return bias
        moved: Tensor = bias + self.asked(self.conditioner.vector(cond).to(bias.dtype))
        return moved

    def conditionals(self, x: Tensor, cond: Tensor | None) -> Tensor:
        entered = self.entry(x.flatten(1)[:, self.places[:, 0]], self.linear.weight.dtype)
        logits = F.linear(entered.flatten(1), self.linear.weight * self.mask) + self._bias(len(x), cond)
        return logits.reshape(len(x), self.data.dims, -1)

    def start(self, n: int, cond: Tensor | None) -> Tensor:
        """The logits [n, P * K], to which `admit` adds."""
        return self._bias(n, cond).clone()

    def step(self, state: Tensor, place: int) -> Tensor:
        return state.reshape(len(state), self.data.dims, -1)[:, place]

    def admit(self, state: Tensor, place: int, values: Tensor) -> None:
        size, after = self.entry.size, (place + 1) * self.likelihood.num_params
        columns = self.linear.weight[after:, place * size : (place + 1) * size]
        state[:, after:] += self.entry(values, state.dtype).flatten(1) @ columns.T


def fvsbn(
    data: DataSpec, order: Order = "raster", order_seed: NonNegative = 0, cond: Condition | None = None
) -> tuple[Fvsbn, MaximumLikelihood]:
    """A logistic regression of every dimension on those before it. Weight decay is the optimizer's.

    Args:
        data: what is modelled.
        order: of the dimensions: as stored, or drawn once.
        order_seed: of a random order.
        cond: `{name: label}` for p(x | label).
    """
    return Fvsbn(data, order, order_seed, cond), MaximumLikelihood()
