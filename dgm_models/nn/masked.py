"""Linear layers whose connections follow degrees: the autoregressive masks of MADE."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedLinear(nn.Linear):
    """A linear layer that keeps weight [i, j] where the degree of output i admits the degree of input j.

    Hidden layers admit degrees <= their own; output layers (`strict`) only those below.
    """

    def __init__(self, in_dim: int, out_dim: int, strict: bool = False, bias: bool = True) -> None:
        super().__init__(in_dim, out_dim, bias)
        self.strict = strict

    def forward(self, x: Tensor, degrees_in: Tensor, degrees_out: Tensor) -> Tensor:  # type: ignore[override]
        above = degrees_out[:, None] > degrees_in if self.strict else degrees_out[:, None] >= degrees_in
        return F.linear(x, self.weight * above, self.bias)


class MaskedMlp(nn.Module):
    """logits[b, d, :] depend on the inputs of dimensions that come before d in the order, for each of several masks.

    Args:
        dims: number of dimensions D of the event.
        inputs: network inputs a dimension.
        outputs: network outputs a dimension.
        width, depth: hidden layers.
        masks: number of mask sets; set i has its own hidden degrees.
        random_order: set i has its own random order of the dimensions; otherwise all follow the stored order.
        direct: connections from inputs to outputs as well.
        seed: of degrees and orders.
    """

    order: Tensor
    hidden: Tensor

    def __init__(
        self,
        dims: int,
        inputs: int,
        outputs: int,
        width: int,
        depth: int,
        masks: int,
        random_order: bool,
        direct: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.dims, self.inputs, self.outputs = dims, inputs, outputs
        rng = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(dims, generator=rng) if random_order else torch.arange(dims) for _ in range(masks)]
        degrees = torch.zeros(masks, depth, width, dtype=torch.int64)
        for mask in range(masks):
            lowest = 0
            for layer in range(depth):
                degrees[mask, layer] = torch.randint(lowest, max(dims - 1, lowest + 1), (width,), generator=rng)
                lowest = int(degrees[mask, layer].min())
        self.register_buffer("order", torch.stack(orders))  # [masks, D]: the place of each dimension
        self.register_buffer("hidden", degrees)
        sizes = [dims * inputs] + [width] * depth
        self.layers = nn.ModuleList(MaskedLinear(a, b) for a, b in pairwise(sizes))
        self.last = MaskedLinear(width, dims * outputs, strict=True)
        self.direct = MaskedLinear(dims * inputs, dims * outputs, strict=True, bias=False) if direct else None

    def start(self, n: int, mask: int) -> Tensor:
        """The first layer's sums [n, width] for inputs that are all 0: what `step` and `admit` keep."""
        first = self.layers[0]
        assert isinstance(first, MaskedLinear)
        return first.bias.expand(n, -1).clone()

    def admit(self, sums: Tensor, x: Tensor, d: int, mask: int) -> None:
        """Adds dimension d's inputs [B, inputs] to the sums, in place: one column of a product, not the whole."""
        first = self.layers[0]
        assert isinstance(first, MaskedLinear)
        columns = first.weight[:, d * self.inputs : (d + 1) * self.inputs]
        above = self.hidden[mask, 0] >= self.order[mask, d]
        sums += x @ (columns * above[:, None]).T

    def step(self, sums: Tensor, d: int, x: Tensor, mask: int) -> Tensor:
        """Dimension d's outputs [B, outputs] from the sums; direct connections read the inputs x [B, D * inputs]."""
        h, before = F.relu(sums), self.hidden[mask, 0]
        for i, layer in enumerate(self.layers[1:], start=1):
            h, before = F.relu(layer(h, before, self.hidden[mask, i])), self.hidden[mask, i]
        rows = slice(d * self.outputs, (d + 1) * self.outputs)
        place = self.order[mask]
        last = self.last.weight[rows] * (place[d] > before)
        logits = F.linear(h, last, self.last.bias[rows])
        if self.direct is not None:
            logits = logits + x @ (self.direct.weight[rows] * (place[d] > place.repeat_interleave(self.inputs))).T
        return logits

    def forward(self, x: Tensor, mask: Tensor | int) -> Tensor:
        """x [B, D * inputs] -> [B, D, outputs]."""
        place = self.order[mask]
        first = place.repeat_interleave(self.inputs)
        final = place.repeat_interleave(self.outputs)
        h, before = x, first
        for i, layer in enumerate(self.layers):
            h = F.relu(layer(h, before, self.hidden[mask, i]))
            before = self.hidden[mask, i]
        logits: Tensor = self.last(h, before, final)
        if self.direct is not None:
            logits = logits + self.direct(x, first, final)
        return logits.reshape(len(x), self.dims, self.outputs)
