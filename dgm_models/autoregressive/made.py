"""The masked autoencoder for distribution estimation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_models.codecs import Discrete, centred
from dgm_models.construct import NonNegative, Positive
from dgm_models.nn.masked import MaskedMlp
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model

ONE_HOT_LEVELS = 32  # up to here an input is one-hot; above, one number in [-1, 1] unless levels have no order


class Made(Model):
    """p(x) = prod_d p(x_d | x before d), every conditional categorical, all from one masked network.

    With several masks p is the average of their probabilities. `mask` is the set in training use.
    """

    mask: Tensor

    def __init__(
        self, data: DataSpec, width: int, depth: int, masks: int, random_order: bool, direct: bool, seed: int
    ) -> None:
        super().__init__(data, Discrete(data))
        assert data.levels is not None
        self.levels = data.levels
        ordered = data.kind != "codes" and data.levels > ONE_HOT_LEVELS
        inputs = 1 if data.levels == 2 or ordered else data.levels
        outputs = 1 if data.levels == 2 else data.levels
        self.network = MaskedMlp(data.dims, inputs, outputs, width, depth, masks, random_order, direct, seed)
        self.num_masks = masks
        self.register_buffer("mask", torch.zeros((), dtype=torch.int64))

    def logits(self, x: Tensor, mask: Tensor | int) -> Tensor:
        """[B, D, levels] of the stored integers x, for one mask set."""
        logits: Tensor = self.network(self.entered(x.flatten(1)), mask)
        return F.pad(logits, (1, 0)) if self.levels == 2 else logits  # a Bernoulli's logit against 0

    def entered(self, x: Tensor) -> Tensor:
        """The network's inputs [B, K * inputs] of stored integers [B, K]."""
        if self.network.inputs > 1:
            return F.one_hot(x, self.levels).float().flatten(1)
        return centred(x, self.data)

    def log_prob_of(self, x: Tensor, mask: Tensor | int) -> Tensor:
        """[B] nats under one mask set."""
        logits = self.logits(x, mask)
        if self.levels == 2:
            sign = 2.0 * x.flatten(1) - 1.0
            return F.logsigmoid(sign * logits[..., 1]).sum(1)
        return -F.cross_entropy(logits.movedim(2, 1).float(), x.flatten(1), reduction="none").sum(1)

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats, exact; the ensemble averages probabilities, not log-probabilities."""
        if cond is not None:
            raise ValueError("cond: this model was built without a condition")
        each = torch.stack([self.log_prob_of(x, mask) for mask in range(self.num_masks)])  # [masks, B]
        return each.logsumexp(0) - math.log(self.num_masks)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """Ancestral, dimension by dimension; the first layer's sums are kept, so that a step costs one column of it."""
        if cond is not None:
            raise ValueError("cond: this model was built without a condition")
        chosen = torch.randint(self.num_masks, (n,), generator=rng, device=rng.device)
        x = torch.zeros(n, self.data.dims, dtype=torch.int64, device=rng.device)
        for mask in sorted(set(chosen.tolist())):
            rows = chosen == mask
            part = x[rows]
            entered = torch.zeros(len(part), self.data.dims * self.network.inputs, device=rng.device)
            sums = self.network.start(len(part), mask)
            for d in self.network.order[mask].argsort().tolist():
                logits = self.network.step(sums, d, entered, mask)
                logits = F.pad(logits, (1, 0)) if self.levels == 2 else logits
                part[:, d] = torch.multinomial(logits.float().softmax(1), 1, generator=rng)[:, 0]
                new = self.entered(part[:, d : d + 1])
                entered[:, d * self.network.inputs : (d + 1) * self.network.inputs] = new
                self.network.admit(sums, new, d, mask)
            x[rows] = part
        return x.reshape(n, *self.data.shape)


class Nll(Objective):
    """-log p(x); in training each step takes the next mask set (connectivity-agnostic training).

    Source: Germain et al. 2015, section 4.2, arXiv:1502.03509.
    """

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def loss(self, model: Made, batch: Batch) -> Loss:
        if model.training:
            return Loss(-model.log_prob_of(batch.x, model.mask).sum())
        return Loss(-model.log_prob(batch.x).sum())  # validation sees the ensemble

    def advance(self, model: Made, step: int) -> None:
        model.mask.fill_((step + 1) % model.num_masks)


def made(
    data: DataSpec,
    width: Positive = 512,
    depth: Positive = 1,
    masks: Positive = 1,
    random_order: bool = False,
    direct: bool = False,
    mask_seed: NonNegative = 0,
) -> tuple[Made, Nll]:
    """MADE over data of whole levels.

    Args:
        data: what is modelled.
        width: hidden units a layer.
        depth: hidden layers.
        masks: mask sets, walked in training and averaged in probability afterwards.
        random_order: each mask set has its own order of the dimensions.
        direct: connections from inputs to outputs as well.
        mask_seed: of the mask sets.
    """
    return Made(data, width, depth, masks, random_order, direct, mask_seed), Nll()
