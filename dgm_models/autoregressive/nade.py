"""The neural autoregressive distribution estimator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dgm_models.codecs import Discrete
from dgm_models.conditions import Condition
from dgm_models.construct import NonNegative, Positive
from dgm_models.nn.autoregression import Autoregressive
from dgm_models.nn.conditioner import check
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.nn.values import Entry, Order, in_order, label_conditioner
from dgm_models.ops.likelihoods import likelihood
from dgm_models.protocols import DataSpec


class PrefixNetworks(torch.autograd.Function):
    """logits_i = V_i sigmoid(start + sum_{j<i} W_j x_j) for all places i, [P] networks that share their sums.

    The sums of all places would be B P H numbers, several times over in autograd. Here the places are walked in blocks
    of about sqrt(P): forward keeps the sums at the beginning of every block, backward computes a block's hidden units
    again, so that memory is 2 sqrt(P) B H numbers.

    With g = dL/dlogits and h the hidden units: dL/dV_i = sum_b g_i h_i^T; dL/dsums_i = (V_i^T g_i) h_i (1 - h_i); and
    x_j is in all sums after j: dL/dW_j = sum_b x_j (sum_{i>j} dL/dsums_i)^T.

    Source: Larochelle and Murray 2011, algorithm 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, incoming: Tensor, outgoing: Tensor) -> Tensor:
        """x [P, B, I], start [B, H], incoming W [P, I, H], outgoing V [P, O, H] -> logits [P, B, O]."""
        blocks = _blocks(len(x))
        sums, kept = start.clone(), start.new_empty(len(blocks), *start.shape)
        logits = start.new_empty(len(x), len(start), outgoing.shape[1])
        for index, block in enumerate(blocks):
            kept[index] = sums
            logits[block] = _hidden(sums, x[block], incoming[block]) @ outgoing[block].mT
        ctx.save_for_backward(x, kept, incoming, outgoing)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        x, kept, incoming, outgoing = ctx.saved_tensors
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_incoming, to_outgoing = torch.empty_like(incoming), torch.empty_like(outgoing)
        later = torch.zeros_like(kept[0])  # the gradient of all sums after the place
        blocks = _blocks(len(x))
        for index in reversed(range(len(blocks))):
            block = blocks[index]
            hidden = _hidden(kept[index].clone(), x[block], incoming[block])
            torch.bmm(gradient[block].mT, hidden, out=to_outgoing[block])
            to_sums = torch.bmm(gradient[block], outgoing[block])
            to_sums.mul_(hidden.addcmul_(hidden, hidden, value=-1.0))  # sigmoid' = h - h^2
            for place in reversed(range(block.start, block.stop)):
                torch.mm(x[place].T, later, out=to_incoming[place])
                if to_x is not None:
                    torch.mm(later, incoming[place].T, out=to_x[place])
                later += to_sums[place - block.start]
        return to_x, later, to_incoming, to_outgoing


def _blocks(places: int) -> list[slice]:
    size = math.isqrt(places - 1) + 1
    return [slice(start, min(start + size, places)) for start in range(0, places, size)]


def _hidden(sums: Tensor, x: Tensor, incoming: Tensor) -> Tensor:
    """The hidden units [K, B, H] of K places; the sums [B, H] before the first become those after the last."""
    hidden = sums.new_empty(len(x), *sums.shape)
    for place in range(len(x)):
        torch.sigmoid(sums, out=hidden[place])
        sums.addmm_(x[place], incoming[place])
    return hidden


class Nade(Autoregressive):
    """p(x_i | x_<i) by h_i = sigmoid(c + W_<i x_<i), logits b_i + V_i h_i; x in {0, 1}, more levels are one-hot.

    Source: Larochelle and Murray 2011, eq. 2 and 3; Uria et al. 2016, section 2, arXiv:1605.02226. Differs: the label,
    where there is one, moves c; more than two levels.
    """

    def __init__(self, data: DataSpec, width: int, order: Order, order_seed: int, condition: Condition | None) -> None:
        super().__init__(data, Discrete(data), likelihood("auto", data), in_order(data, order, order_seed), condition)
        self.entry, self.conditioner = Entry(data, signed=False), label_conditioner(condition, data)
        inputs, outputs = self.entry.size, self.likelihood.num_params

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(shape) - 1) / math.sqrt(fan_in))

        self.incoming = uniform(data.dims, inputs, width, fan_in=data.dims * inputs)
        self.hidden_bias = nn.Parameter(torch.zeros(width))
        self.outgoing = uniform(data.dims, outputs, width, fan_in=width)
        self.bias = nn.Parameter(torch.zeros(data.dims * outputs))
        classes = self.conditioner.vector_dim
        self.asked = nn.Linear(classes, width, bias=False) if classes else None

    def conditionals(self, x: Tensor, cond: Tensor | None) -> Tensor:
        entered = self._entered(x.flatten(1)[:, self.places[:, 0]])
        with torch.autocast(x.device.type, enabled=False):  # sums of hundreds of terms, in the parameters' precision
            start = self.start(len(x), cond)
            logits: Tensor = PrefixNetworks.apply(
                entered.transpose(0, 1).contiguous(), start, self.incoming, self.outgoing
            )  # type: ignore[no-untyped-call]
        return logits.transpose(0, 1) + self._bias

    def start(self, n: int, cond: Tensor | None) -> Tensor:
        """The sums [n, H], to which `admit` adds."""
        check(self.condition, cond)
        sums = self.hidden_bias.expand(n, -1).clone()
        if self.asked is not None:
            sums = sums + self.asked(self.conditioner.vector(cond).to(sums.dtype))
        return sums

    def step(self, state: Tensor, place: int) -> Tensor:
        return state.sigmoid() @ self.outgoing[place].T + self._bias[place]

    def admit(self, state: Tensor, place: int, values: Tensor) -> None:
        state.addmm_(self._entered(values)[:, 0], self.incoming[place])

    @property
    def _bias(self) -> Tensor:
        """[P, K]."""
        return self.bias.reshape(self.data.dims, -1)

    def _entered(self, x: Tensor) -> Tensor:
        return self.entry(x, self.incoming.dtype)


def nade(
    data: DataSpec,
    width: Positive = 500,
    order: Order = "raster",
    order_seed: NonNegative = 0,
    cond: Condition | None = None,
) -> tuple[Nade, MaximumLikelihood]:
    """NADE over data of whole levels.

    Args:
        data: what is modelled.
        width: hidden units.
        order: of the dimensions: as stored, or drawn once.
        order_seed: of a random order.
        cond: `{name: label}` for p(x | label).
    """
    return Nade(data, width, order, order_seed, cond), MaximumLikelihood()
