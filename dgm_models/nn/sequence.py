"""The shell of models that read a sequence from its beginning: p(x|c) is a product over t of p(x_t | x before t, c)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import Discrete
from dgm_models.nn.autoregression import Autoregressive
from dgm_models.nn.conditioner import Conditioner
from dgm_models.ops.likelihoods import Categorical
from dgm_models.protocols import DataSpec


class Causal(nn.Module):
    """A network whose output at a place is a function of the inputs up to that place, and of a context.

    `forward` takes all inputs at once; `start` and then `step`, input after input, give the same outputs.

    Attributes:
        width: the size of an input and of an output.
    """

    width: int

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, T, width] from inputs [B, T, width] and a context [B, context_dim], or None."""
        raise NotImplementedError

    def start(self, n: int, context: Tensor | None = None) -> Any:
        """The cache of n sequences of which nothing was read yet; `step` changes it in place."""
        raise NotImplementedError

    def step(self, inputs: Tensor, cache: Any) -> Tensor:
        """[n, width]: the outputs for the next inputs [n, width] of n sequences."""
        raise NotImplementedError


@dataclass
class Reading:
    """Sequences that are being drawn: the network's cache, and its output [n, width] for the next place."""

    cache: Any
    output: Tensor


class SequenceModel(Autoregressive):
    """Every value of x, in raster order, is a symbol; a causal network reads them and gives the next one's logits.

    The network's first input is a symbol of its own, which stands for the beginning. The channels of a pixel follow
    one another, and the same level is another symbol in another channel.

    Args:
        data: whole levels.
        network: reads embedded symbols.
        conditioner: reads the condition, whose vector is the network's context.
    """

    def __init__(self, data: DataSpec, network: Causal, conditioner: Conditioner) -> None:
        assert data.levels is not None
        channels = data.shape[0] if data.kind in ("image", "audio") else 1
        raster = torch.arange(data.dims).reshape(channels, -1).T.reshape(-1, 1)  # a pixel's channels side by side
        super().__init__(data, Discrete(data), Categorical(data.levels), raster, conditioner.condition)
        self.channels, self.levels = channels, data.levels
        self.conditioner = conditioner
        self.embedding = nn.Embedding(channels * data.levels + 1, network.width)  # the last one is the beginning
        self.network = network
        self.head = nn.Linear(network.width, data.levels)

    def conditionals(self, x: Tensor, cond: Tensor | None) -> Tensor:
        values = x.flatten(1)[:, self.places[:, 0]]
        channel = torch.arange(len(self.places), device=x.device) % self.channels
        symbols = values + channel * self.levels
        inputs = self.embedding(F.pad(symbols[:, :-1], (1, 0), value=self.channels * self.levels))
        logits: Tensor = self.head(self.network(inputs, self._context(cond)))
        return logits

    def start(self, n: int, cond: Tensor | None) -> Reading:
        cache = self.network.start(n, self._context(cond))
        return Reading(cache, self.network.step(self.embedding.weight[-1].expand(n, -1), cache))

    def step(self, state: Reading, place: int) -> Tensor:
        logits: Tensor = self.head(state.output)
        return logits

    def admit(self, state: Reading, place: int, values: Tensor) -> None:
        if place + 1 < len(self.places):
            symbols = values[:, 0] + place % self.channels * self.levels
            state.output = self.network.step(self.embedding(symbols), state.cache)

    def _context(self, cond: Tensor | None) -> Tensor | None:
        return None if cond is None else self.conditioner.vector(cond).to(self.embedding.weight.dtype)
