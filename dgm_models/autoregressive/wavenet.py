"""Dilated causal convolutions over a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.construct import Positive, Range
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.nn.sequence import Causal, SequenceModel
from dgm_models.nn.values import label_conditioner
from dgm_models.protocols import DataSpec


class Unit(nn.Module):
    """z = tanh(W_f * x + V_f c) sigmoid(W_g * x + V_g c), with the outputs x + R z and S z; * is a dilated convolution.

    Args:
        width: of x and z.
        skip_width: of S z.
        kernel: taps of the convolution.
        dilation: places between two taps.
        context_dim: of c; 0 for none.
        last: nothing reads x + R z, so that there is no R.
    """

    def __init__(self, width: int, skip_width: int, kernel: int, dilation: int, context_dim: int, last: bool) -> None:
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.taps = nn.Linear(kernel * width, 2 * width)
        self.context = nn.Linear(context_dim, 2 * width, bias=False) if context_dim else None
        self.residual = None if last else nn.Linear(width, width)
        self.skip = nn.Linear(width, skip_width)

    @property
    def reach(self) -> int:
        """How many places back the first tap lies."""
        return (self.kernel - 1) * self.dilation

    def seen(self, x: Tensor) -> Tensor:
        """[B, T, kernel * width]: for every place of x [B, T, width] what the taps see, zeros before the beginning."""
        padded, length = F.pad(x, (0, 0, self.reach, 0)), x.shape[1]
        starts = [tap * self.dilation for tap in range(self.kernel)]
        return torch.cat([padded[:, start : start + length] for start in starts], -1)

    def forward(self, seen: Tensor, x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + R z, S z) from what the taps see, x, and V c; axes before the last are free."""
        found = self.taps(seen)
        first, second = (found if shift is None else found + shift).chunk(2, -1)
        z = first.tanh() * second.sigmoid()
        return x if self.residual is None else x + self.residual(z), self.skip(z)

    def shift(self, context: Tensor | None) -> Tensor | None:
        """V c: [B, 2 width]."""
        return None if context is None or self.context is None else self.context(context)


@dataclass
class Queues:
    """What each unit has yet to see again.

    Attributes:
        past: [n, reach, width] a unit: its inputs at the last `reach` places, place p at p modulo reach.
        shifts: [n, 2 width] a unit, or None.
        length: places that were read.
    """

    past: list[Tensor]
    shifts: list[Tensor | None]
    length: int = 0


class DilatedConvolutions(Causal):
    """Units with dilations 1, 2, 4, .. 2^(layers - 1), repeated in blocks; the output is relu(O relu(sum of skips)).

    Args:
        width: of inputs, units and outputs.
        skip_width: of the skip connections.
        layers: units a block.
        blocks: how often the dilations are repeated.
        kernel: taps of each convolution.
        context_dim: of the context; 0 for none.

    Source: van den Oord et al. 2016, eqs. 2 and 3, figure 4, arXiv:1609.03499. Differs: the first convolution over the
    one-hot symbols has one tap, so that a block of 10 layers sees 1024 symbols.
    """

    def __init__(self, width: int, skip_width: int, layers: int, blocks: int, kernel: int, context_dim: int) -> None:
        super().__init__()
        self.width = width
        dilations = [2**layer for layer in range(layers)] * blocks
        self.units = nn.ModuleList(
            Unit(width, skip_width, kernel, dilation, context_dim, last=number == len(dilations) - 1)
            for number, dilation in enumerate(dilations)
        )
        self.out = nn.Linear(skip_width, width)

    @property
    def receptive_field(self) -> int:
        """How many inputs an output is a function of: its own and those before it, 1 + sum of the units' reaches."""
        return 1 + sum(unit.reach for unit in self._units())

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        x, total = inputs, None
        for unit in self._units():
            shift = unit.shift(context)
            x, skip = unit(unit.seen(x), x, None if shift is None else shift[:, None])
            total = skip if total is None else total + skip
        return self._output(total)

    def start(self, n: int, context: Tensor | None = None) -> Queues:
        units, empty = self._units(), self.out.weight
        past = [empty.new_zeros(n, unit.reach, self.width) for unit in units]
        return Queues(past, [unit.shift(context) for unit in units])

    def step(self, inputs: Tensor, cache: Queues) -> Tensor:
        """One place, at a cost that does not depend on how many there were.

        Source: Le Paine et al. 2016, arXiv:1611.09482. Differs: a ring in place of a queue.
        """
        x, total = inputs, None
        for unit, past, shift in zip(self._units(), cache.past, cache.shifts, strict=True):
            back = [(cache.length - tap * unit.dilation) % unit.reach for tap in range(unit.kernel - 1, 0, -1)]
            seen = torch.cat([*(past[:, place] for place in back), x], -1)
            past[:, cache.length % unit.reach] = x  # in the place of the oldest, which was just seen
            x, skip = unit(seen, x, shift)
            total = skip if total is None else total + skip
        cache.length += 1
        return self._output(total)

    def _output(self, total: Tensor | None) -> Tensor:
        assert total is not None
        return F.relu(self.out(F.relu(total)))

    def _units(self) -> list[Unit]:
        return [unit for unit in self.units if isinstance(unit, Unit)]


def wavenet(
    data: DataSpec,
    width: Positive = 32,
    skip_width: Positive = 64,
    layers: Positive = 10,
    blocks: Positive = 1,
    kernel: Annotated[int, Range(2)] = 2,
    cond: Condition | None = None,
) -> tuple[SequenceModel, MaximumLikelihood]:
    """p(x) = product over t of p(x_t | the `receptive_field` values before t), a free probability of every level.

    Args:
        data: what is modelled; audio in mu-law levels (`dgm_models/ops/mulaw.py`).
        width: of the residual path, and coordinates of an embedded value.
        skip_width: of the skip connections.
        layers: a block has dilations 1, 2, 4, .. 2^(layers - 1).
        blocks: how often they are repeated.
        kernel: taps of each convolution.
        cond: a label, which shifts the gates of every layer.

    Source: van den Oord et al. 2016, arXiv:1609.03499.
    """
    conditioner = label_conditioner(cond, data)
    network = DilatedConvolutions(width, skip_width, layers, blocks, kernel, conditioner.vector_dim)
    return SequenceModel(data, network, conditioner), MaximumLikelihood()
