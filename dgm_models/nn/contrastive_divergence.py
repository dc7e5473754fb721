"""The objective of models that are trained against samples of their own: the gradient of log Z is E_model[-dE]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgm_models import noise
from dgm_models.nn.tricks import couples
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch
from dgm_models.training import runtime


class Replay(nn.Module):
    """Chains that go on from update to update: the same on every rank, a part of the checkpoint.

    A global batch of B rows moves the next B chains in turn, each rank those of its own rows; what they reach is summed
    into the buffer of every rank. Where there are fewer chains than rows, several rows move on from one chain, and the
    last of them is kept. So any number of ranks makes the same training, and continues that of any other number.

    Args:
        shape, dtype: of a chain's place.
        chains: how many.
        fresh: the share of chains that begin anew when it is their turn.
    """

    chains: Tensor
    ages: Tensor
    position: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, chains: int, fresh: float) -> None:
        super().__init__()
        self.fresh = fresh
        self.register_buffer("chains", torch.zeros(chains, *shape, dtype=dtype))
        self.register_buffer("ages", torch.zeros(chains, dtype=torch.int64))  # moves since a chain began; 0 has not
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # of the chain whose turn is next

    def take(self, batch: Batch, begun: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A chain for every row of this rank's share of a batch.

        Args:
            batch: [B, ...].
            begun: [B, *event], where a new chain begins.
            training: whether the chains take turns; a validation looks at any of them, by the rows' keys.
        Returns: places [B, *event], ages [B], the chains' numbers [B], and which rows are the last of a chain [B] bool.
        """
        size = len(self.chains)
        if training:
            counts = torch.zeros(runtime.current().world, dtype=torch.int64, device=batch.x.device)
            counts[runtime.current().rank] = len(batch)
            runtime.current().sum([counts])
            row = counts[: runtime.current().rank].sum() + torch.arange(len(batch), device=batch.x.device)
            numbers, last = (self.position + row) % size, row >= counts.sum() - size
            self.position.copy_((self.position + counts.sum()) % size)
        else:
            numbers = (batch.uniform("chain", ()) * size).long().clamp_max(size - 1)
            last = torch.zeros_like(numbers, dtype=torch.bool)
        anew = (self.ages[numbers] == 0) | (batch.uniform("fresh", ()) < self.fresh)
        there = self.chains[numbers].to(begun.dtype)
        places = torch.where(anew.reshape(-1, *[1] * (begun.ndim - 1)), begun, there)
        return places, torch.where(anew, 0, self.ages[numbers]), numbers, last

    def keep(self, places: Tensor, ages: Tensor, numbers: Tensor, last: Tensor) -> None:
        """Puts every rank's chains back; places [B, *event], and the rest as `take` gave it."""
        chosen = last.reshape(-1, *[1] * (places.ndim - 1))
        found = torch.zeros_like(self.chains).index_add_(0, numbers, (places * chosen).to(self.chains.dtype))
        old = torch.zeros_like(self.ages).index_add_(0, numbers, ages * last)
        runtime.current().sum([found, old])
        moved = old > 0
        self.chains.copy_(torch.where(moved.reshape(-1, *[1] * (found.ndim - 1)), found, self.chains))
        self.ages.copy_(torch.where(moved, old, self.ages))


class ContrastiveDivergence(Objective):
    """E(x+) - E(x-) + regularise (E(x+)^2 + E(x-)^2), x+ data, x- where `moves` moves of the model's chain end.

    The chains start at the data, or go on from where they stood. There is no gradient through their moves.
    The difference is no likelihood: it is near 0 at the start and at the end, so its validation chooses no weights.

    Args:
        moves: of the chains between two updates.
        regularise: keeps energies near 0. It bends the density: p_model / p_data is about 1 + 4 regularise E.
        replay: the chains that go on; None to start them at the data.
    """

    whole = True

    def __init__(self, moves: int, regularise: float = 0.0, replay: Replay | None = None) -> None:
        super().__init__()
        self.moves, self.regularise = moves, regularise
        self.replay = replay

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def prepare(self, model: Any, batch: Batch) -> Batch:
        if couples(model):
            raise ValueError(
                f"network: {type(model).__name__} holds a layer that couples the examples of a batch, and chains are "
                "no batch of data; take a network without batch normalisation"
            )
        keys = noise.fold(batch.key, "chain")
        if self.replay is None:
            negatives, accepted = model.walk(batch.x, keys, self.moves)
            return batch.with_extra(negatives=negatives, accepted=accepted)
        begun = model.start(len(batch), noise.fold(batch.key, "begin"))
        places, ages, numbers, last = self.replay.take(batch, begun, model.training)
        negatives, accepted = model.walk(places, keys, self.moves)
        if model.training:
            self.replay.keep(negatives, ages + self.moves, numbers, last)
        return batch.with_extra(negatives=negatives, accepted=accepted)

    def loss(self, model: Any, batch: Batch) -> Loss:
        data, chains = model.energy(batch.x), model.energy(batch.extra["negatives"])
        difference = data - chains
        total = difference.sum()
        if self.regularise:
            total = total + self.regularise * (data.square() + chains.square()).sum()
        shown = {"difference": difference, "energy": data, "accepted": batch.extra["accepted"] / self.moves}
        return Loss(total, {name: value.detach().sum() for name, value in shown.items()})
