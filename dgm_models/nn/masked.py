"""Autoregressive models by masks: one network gives all conditionals, its connections follow degrees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import Codec
from dgm_models.conditions import Condition
from dgm_models.nn.autoregression import Autoregressive
from dgm_models.nn.conditioner import check
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.nn.values import Entry, label_conditioner
from dgm_models.objective import Loss
from dgm_models.ops.likelihoods import Likelihood
from dgm_models.protocols import Batch, DataSpec


class Degrees(NamedTuple):
    """A mask set: order [D], the place of each dimension, and hidden [depth, width], the units' degrees; int64."""

    order: Tensor
    hidden: Tensor

    def mirrored(self) -> Degrees:
        """The set of the opposite order that keeps the connections which this one masks."""
        dims = len(self.order)
        return Degrees(dims - 1 - self.order, dims - 2 - self.hidden)

    @staticmethod
    def drawn(order: Tensor, width: int, depth: int, rng: torch.Generator) -> Degrees:
        """A set of this order, of degrees with which every unit sees an input."""
        hidden, lowest = [], 0
        for _ in range(depth):
            hidden.append(torch.randint(lowest, max(len(order) - 1, lowest + 1), (width,), generator=rng))
            lowest = int(hidden[-1].min())
        return Degrees(order, torch.stack(hidden))


class MaskedLinear(nn.Linear):
    """A linear layer that keeps weight [i, j] where the degree of output i admits the degree of input j.

    Hidden layers admit degrees <= their own; output layers (`strict`) only those below.
    """

    def __init__(self, in_dim: int, out_dim: int, strict: bool = False, bias: bool = True) -> None:
        super().__init__(in_dim, out_dim, bias)
        self.strict = strict

    def mask(self, degrees_in: Tensor, degrees_out: Tensor) -> Tensor:
        """[out, in] of the weight's type: 1 where the degrees admit a connection, 0 elsewhere."""
        above = degrees_out[:, None] > degrees_in if self.strict else degrees_out[:, None] >= degrees_in
        return above.to(self.weight.dtype)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight * mask, self.bias)


@dataclass
class Walk:
    """What is kept while values become known one after another: sums that grow, and weights masked once.

    Attributes:
        sums: [n, width], the first layer's sums over what is known.
        skip: [n, D * outputs], what the outputs get past the hidden layers: bias, context, direct connections.
        first, hidden, last, direct: masked weights.
    """

    sums: Tensor
    skip: Tensor
    first: Tensor
    hidden: list[Tensor]
    last: Tensor
    direct: Tensor | None


def _loaded(network: MaskedMlp, _: object) -> None:
    network.keep_masks()


class MaskedMlp(nn.Module):
    """Outputs [b, d, :] depend on the inputs of dimensions that come before d in the order, for each of several masks.

    Args:
        dims: number of dimensions D of the event.
        inputs: network inputs a dimension.
        outputs: network outputs a dimension.
        width, depth: hidden layers.
        masks: number of mask sets; set i has its own hidden degrees.
        random_order: set i has its own random order of the dimensions; otherwise all follow the stored order.
        direct: connections from inputs to outputs as well.
        seed: of degrees and orders.
        context_dim: of a vector that every output depends on; 0 for none.
        mirrored: sets come in pairs. The second has the opposite order, and a unit that sees the first h dimensions
            under one sees all the others under the other: what one set masks is what the other keeps, so the two share
            no weight but those between hidden units of the same degree.
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
        context_dim: int = 0,
        mirrored: bool = False,
    ) -> None:
        super().__init__()
        self.dims, self.inputs, self.outputs = dims, inputs, outputs
        rng = torch.Generator().manual_seed(seed)
        number = (masks + 1) // 2 if mirrored else masks
        orders = [torch.randperm(dims, generator=rng) if random_order else torch.arange(dims) for _ in range(number)]
        sets = [Degrees.drawn(order, width, depth, rng) for order in orders]
        if mirrored:
            sets = [each for one in sets for each in (one, one.mirrored())][:masks]
        self.register_buffer("order", torch.stack([one.order for one in sets]))  # [masks, D]
        self.register_buffer("hidden", torch.stack([one.hidden for one in sets]))  # [masks, depth, width]
        sizes = [dims * inputs] + [width] * depth
        self.layers = nn.ModuleList(MaskedLinear(a, b) for a, b in pairwise(sizes))
        self.last = MaskedLinear(width, dims * outputs, strict=True)
        self.direct = MaskedLinear(dims * inputs, dims * outputs, strict=True, bias=False) if direct else None
        # the first dimension's outputs see no hidden unit: the context needs a way past them
        self.context = nn.Linear(context_dim, width, bias=False) if context_dim else None
        self.context_last = nn.Linear(context_dim, dims * outputs, bias=False) if context_dim else None
        if masks == 1:  # their computation took a tenth of the step of a network with one hidden layer
            self.keep_masks()
            self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]

    def keep_masks(self) -> None:
        """Computes the masks of the one mask set again."""
        for i, mask in enumerate(self._computed(self.degrees(0))):
            self.register_buffer(f"mask_{i}", mask, persistent=False)

    def _linears(self) -> list[MaskedLinear]:
        """The hidden layers, the last one, and the direct one where there is one."""
        found = [*self.layers, self.last, *([self.direct] if self.direct is not None else [])]
        return [layer for layer in found if isinstance(layer, MaskedLinear)]

    def _computed(self, degrees: Degrees) -> list[Tensor]:
        """The masks of `_linears`."""
        inputs, outputs = degrees.order.repeat_interleave(self.inputs), degrees.order.repeat_interleave(self.outputs)
        steps = [*pairwise([inputs, *degrees.hidden, outputs]), (inputs, outputs)]
        return [layer.mask(*step) for layer, step in zip(self._linears(), steps, strict=False)]

    def masks(self, mask: Tensor | int | Degrees) -> list[Tensor]:
        """The weights' masks [out, in] under one mask set: of the hidden layers, the last, and the direct one."""
        if isinstance(mask, Degrees):
            return self._computed(mask)
        if len(self.order) > 1:
            return self._computed(self.degrees(mask))
        return [self.get_buffer(f"mask_{i}") for i in range(len(self._linears()))]

    def degrees(self, mask: Tensor | int) -> Degrees:
        """The mask set of this number."""
        return Degrees(self.order[mask], self.hidden[mask])

    def forward(self, x: Tensor, mask: Tensor | int | Degrees, context: Tensor | None = None) -> Tensor:
        """x [B, D * inputs] and context [B, context_dim] -> [B, D, outputs]."""
        masks = self.masks(mask)
        h = x
        for i, layer in enumerate(self.layers):
            h = layer(h, masks[i])
            if i == 0 and self.context is not None:
                h = h + self.context(context)
            h = F.relu(h)
        found: Tensor = self.last(h, masks[len(self.layers)])
        if self.direct is not None:
            found = found + self.direct(x, masks[-1])
        if self.context_last is not None:
            found = found + self.context_last(context)
        return found.reshape(len(x), self.dims, self.outputs)

    # ---- one dimension after another

    def start(self, n: int, mask: Tensor | int | Degrees, context: Tensor | None = None) -> Walk:
        """The walk of n examples of which nothing is known: what `step` reads and `admit` adds to."""
        weights = [layer.weight * kept for layer, kept in zip(self._linears(), self.masks(mask), strict=True)]
        first, last = self.layers[0], len(self.layers)
        assert isinstance(first, MaskedLinear)
        sums, skip = first.bias.expand(n, -1).clone(), self.last.bias.expand(n, -1).clone()
        if self.context is not None and self.context_last is not None:
            sums, skip = sums + self.context(context), skip + self.context_last(context)
        direct = None if self.direct is None else weights[-1]
        return Walk(sums, skip, weights[0], weights[1:last], weights[last], direct)

    def step(self, walk: Walk, d: int) -> Tensor:
        """Dimension d's outputs [n, outputs]."""
        h, rows = F.relu(walk.sums), slice(d * self.outputs, (d + 1) * self.outputs)
        for layer, weight in zip(self.layers[1:], walk.hidden, strict=True):
            assert isinstance(layer, MaskedLinear)
            h = F.relu(F.linear(h, weight, layer.bias))
        return F.linear(h, walk.last[rows]) + walk.skip[:, rows]

    def admit(self, walk: Walk, d: int, x: Tensor) -> None:
        """Adds dimension d's inputs [n, inputs] to the sums: some columns of a product, not the whole."""
        columns = slice(d * self.inputs, (d + 1) * self.inputs)
        walk.sums += x @ walk.first[:, columns].T
        if walk.direct is not None:
            walk.skip += x @ walk.direct[:, columns].T


class MaskedAutoregression(Autoregressive):
    """p(x|c) is the mean over mask sets of prod_d p(x_d | x before d, c), all conditionals from one masked network.

    `places`, `conditionals`, `start`, `step` and `admit` are of one mask set: of number `mask`, the one in training
    use. `log_prob`, `sample` and `complete` are of the mean.

    Source: Germain et al. 2015, arXiv:1502.03509.

    Args:
        data, codec, likelihood, condition: as in `Autoregressive`; one value is one place.
        width, depth, masks, random_order, direct, seed, mirrored: of the `MaskedMlp`.
    """

    mask: Tensor

    def __init__(
        self,
        data: DataSpec,
        codec: Codec,
        likelihood: Likelihood,
        width: int,
        depth: int,
        masks: int = 1,
        random_order: bool = False,
        direct: bool = False,
        seed: int = 0,
        condition: Condition | None = None,
        mirrored: bool = False,
    ) -> None:
        super().__init__(data, codec, likelihood, condition=condition)
        self.num_masks, self.agnostic = masks, random_order and masks > 1
        # what a mask hides is 0: with many orders a bit that is off must differ from it, with one it need not
        self.entry, self.conditioner = Entry(data, signed=self.agnostic), label_conditioner(condition, data)
        self.network = MaskedMlp(
            data.dims, self.entry.size, likelihood.num_params, width, depth, masks, random_order, direct, seed,
            self.conditioner.vector_dim, mirrored,
        )  # fmt: skip
        self.followed: Degrees | None = None
        self.register_buffer("mask", torch.zeros((), dtype=torch.int64))
        self.choose(0)

    @property
    def degrees(self) -> Degrees:
        """The mask set that the conditionals are of."""
        return self.network.degrees(self.mask) if self.followed is None else self.followed

    def choose(self, mask: int) -> None:
        """Makes the conditionals those of mask set number `mask`."""
        self.mask.fill_(mask)
        self.places.copy_(self.degrees.order.argsort()[:, None])

    @contextmanager
    def following(self, degrees: Degrees) -> Iterator[None]:
        """For a while, makes the conditionals those of a mask set that need not be one of the model's own."""
        before = self.places, self.followed
        self.places, self.followed = degrees.order.argsort()[:, None], degrees
        try:
            yield
        finally:
            self.places, self.followed = before

    def entered(self, x: Tensor) -> Tensor:
        """The network's inputs [B, K * inputs] of values [B, K]."""
        return self.entry(x, self.network.last.weight.dtype).flatten(1)

    def context(self, cond: Tensor | None) -> Tensor | None:
        check(self.condition, cond)
        return None if cond is None else self.conditioner.vector(cond).to(self.network.last.weight.dtype)

    def outputs(self, x: Tensor, cond: Tensor | None, mask: Tensor | int | Degrees) -> Tensor:
        """[B, D, K] in the stored order, under one mask set."""
        found: Tensor = self.network(self.entered(x.flatten(1)), mask, self.context(cond))
        return found

    def log_prob_of(self, x: Tensor, cond: Tensor | None, mask: Tensor | int) -> Tensor:
        """[B] nats under one mask set."""
        return self.likelihood.log_prob(self.outputs(x, cond, mask).movedim(2, 1), x.flatten(1))

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats, exact; the ensemble averages probabilities, not log-probabilities."""
        each = torch.stack([self.log_prob_of(x, cond, mask) for mask in range(self.num_masks)])  # [masks, B]
        return each.logsumexp(0) - math.log(self.num_masks)

    def conditionals(self, x: Tensor, cond: Tensor | None) -> Tensor:
        return self.outputs(x, cond, self.degrees)[:, self.places[:, 0]]

    def start(self, n: int, cond: Tensor | None) -> Walk:
        return self.network.start(n, self.degrees, self.context(cond))

    def step(self, state: Walk, place: int) -> Tensor:
        return self.network.step(state, int(self.places[place]))

    def admit(self, state: Walk, place: int, values: Tensor) -> None:
        self.network.admit(state, int(self.places[place]), self.entered(values))

    @torch.no_grad()
    def complete(self, x: Tensor, known: Tensor, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """Draws what is not known of x.

        Where the known values come first in the order of every mask set, the draws have the exact conditional
        distribution: an example takes a set with probability in proportion to what the set gives its known values.
        Where they come first in some sets' orders, an example takes one of these, in the same proportion. Where they
        come first in none, with random orders, each distinct pattern of known values gets an order of its own in which
        they do, drawn by `rng`, with the hidden degrees of one of the sets: what a network trained on many orders can
        do.

        Source: Uria et al. 2014, section 3, arXiv:1310.1757; Germain et al. 2015, section 4.2.

        Args, Returns: as in `Autoregressive`.
        Raises: ValueError when in every order a value is known that comes after one that is not; not of random orders.
        """
        if self.num_masks == 1:
            return super().complete(x, known, rng, cond)
        check(self.condition, cond)
        flat, sets = known.flatten(1), [self.network.degrees(mask) for mask in range(self.num_masks)]
        there = torch.stack([flat[:, degrees.order.argsort()] for degrees in sets], 1)  # [n, masks, D]
        first = ~(there[..., 1:] & ~there[..., :-1]).any(-1)
        some, parts, more = first.any(1), [], 0
        if bool(some.any()):
            log_p, more = self._log_known(x, flat, cond)
            weights = log_p.masked_fill(~first, -math.inf)[some].softmax(1)
            chosen = torch.full(some.shape, -1, device=x.device)
            chosen[some] = torch.multinomial(weights, 1, generator=rng)[:, 0]
            parts = [(degrees, chosen == mask) for mask, degrees in enumerate(sets)]
        for pattern in torch.unique(flat[~some], dim=0):
            degrees = self._beginning_with(pattern, rng) if self.agnostic else sets[0]  # which refuses it
            parts.append((degrees, ~some & (flat == pattern).all(1)))
        drawn, evaluations = x.clone(), 0
        for degrees, rows in parts:
            if bool(rows.any()):
                with self.following(degrees):
                    asked = None if cond is None else cond[rows]
                    drawn[rows] = super().complete(x[rows], known[rows], rng, asked)
                evaluations = max(evaluations, self.evaluations)
        self.evaluations = evaluations + more
        return drawn

    def _log_known(self, x: Tensor, known: Tensor, cond: Tensor | None) -> tuple[Tensor, int]:
        """[n, masks] nats: log p of the known values [n, D] under every mask set, and the evaluations it took."""
        if not bool(known.any()):
            return torch.zeros(len(x), self.num_masks, device=x.device), 0
        log_p, blank = [], torch.where(known.reshape(x.shape), x, torch.zeros_like(x))
        for mask in range(self.num_masks):
            with self.following(self.network.degrees(mask)):
                log_p.append((self.log_probs(blank, cond) * known[:, self.places[:, 0]]).sum(1))
        return torch.stack(log_p, 1), self.num_masks

    def _beginning_with(self, known: Tensor, rng: torch.Generator) -> Degrees:
        """A mask set in whose order, drawn at random, the known dimensions [D] come first."""
        drawn = torch.rand(self.data.dims, generator=rng, device=rng.device)
        order = (drawn + (~known).to(drawn.dtype)).argsort().argsort()
        mask = torch.randint(self.num_masks, (1,), generator=rng, device=rng.device)[0]
        return Degrees(order, self.network.hidden[mask])


class EveryMask(MaximumLikelihood):
    """-log p(x|c); in training each step takes the next mask set, in validation their mean.

    Source: Germain et al. 2015, sections 4.2 and 4.3 (connectivity- and order-agnostic training), arXiv:1502.03509.
    """

    def loss(self, model: MaskedAutoregression, batch: Batch) -> Loss:
        if model.training:
            return Loss(-model.log_prob_of(batch.x, model.given(batch), model.mask).sum())
        return super().loss(model, batch)

    def advance(self, model: MaskedAutoregression, step: int) -> None:
        model.choose((step + 1) % model.num_masks)
