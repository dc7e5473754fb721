"""A recurrent network that reads a sequence value by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.construct import Positive
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.nn.sequence import Causal, SequenceModel
from dgm_models.nn.values import label_conditioner
from dgm_models.protocols import DataSpec

Cell = Literal["lstm", "gru"]
Hidden = Tensor | tuple[Tensor, Tensor]  # each [layers, n, width]: of a GRU; output and memory of an LSTM


@dataclass
class Memory:
    hidden: Hidden


class Recurrent(Causal):
    """Layers of LSTM or GRU cells. A context gives the initial state by a linear map; without one it is 0.

    Args:
        cell: what a layer is made of.
        width: units a layer.
        layers: one above the other.
        context_dim: of the context; 0 for none.

    Source: Hochreiter and Schmidhuber 1997; Cho et al. 2014, arXiv:1406.1078. The LSTM's forget gates begin with a bias
    of 1 (Jozefowicz, Zaremba, Sutskever 2015).
    """

    def __init__(self, cell: Cell, width: int, layers: int, context_dim: int) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.cells = (nn.LSTM if cell == "lstm" else nn.GRU)(width, width, layers, batch_first=True)
        self.parts = 2 if cell == "lstm" else 1
        self.initial = nn.Linear(context_dim, self.parts * layers * width) if context_dim else None
        if cell == "lstm":  # gates in torch's order: input, forget, cell, output; a gate's bias is a sum of two
            with torch.no_grad():
                for name, parameter in self.cells.named_parameters():
                    if name.startswith("bias"):
                        parameter[width : 2 * width] = 1.0 if name.startswith("bias_ih") else 0.0

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        outputs: Tensor = self.cells(inputs, self._first(len(inputs), context))[0]
        return outputs

    def start(self, n: int, context: Tensor | None = None) -> Memory:
        return Memory(self._first(n, context))

    def step(self, inputs: Tensor, cache: Memory) -> Tensor:
        outputs, cache.hidden = self.cells(inputs[:, None], cache.hidden)
        last: Tensor = outputs[:, 0]
        return last

    def _first(self, n: int, context: Tensor | None) -> Hidden:
        if context is None or self.initial is None:
            state = next(self.cells.parameters()).new_zeros(self.parts, self.layers, n, self.width)
        else:
            state = self.initial(context).unflatten(1, (self.parts, self.layers, -1)).permute(1, 2, 0, 3).contiguous()
        return (state[0], state[1]) if self.parts == 2 else state[0]


def rnn(
    data: DataSpec, cell: Cell = "lstm", width: Positive = 128, layers: Positive = 1, cond: Condition | None = None
) -> tuple[SequenceModel, MaximumLikelihood]:
    """p(x) = product over t of p(x_t | h_t), h_t = cell(x_(t-1), h_(t-1)), over values in raster order.

    Args:
        data: what is modelled.
        cell: lstm or gru.
        width: units a layer, and coordinates of an embedded value.
        layers: one above the other.
        cond: a label, which gives the initial state.

    Source: Graves 2013, sections 2 and 4, arXiv:1308.0850. Differs: layers are joined only to their neighbours, an LSTM
    has no peepholes, and the beginning is a symbol of its own.
    """
    conditioner = label_conditioner(cond, data)
    network = Recurrent(cell, width, layers, conditioner.vector_dim)
    return SequenceModel(data, network, conditioner), MaximumLikelihood()
