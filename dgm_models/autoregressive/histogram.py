"""Counted distributions: independent dimensions, a Markov chain, the table of all states."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import Discrete
from dgm_models.construct import PositiveFloat
from dgm_models.nn.autoregression import Autoregressive
from dgm_models.nn.computed import Computed
from dgm_models.ops.likelihoods import Categorical
from dgm_models.protocols import DataSpec
from dgm_models.training import runtime

Form = Literal["independent", "markov", "table"]
MOST = 2**24  # cells of all tables together


class Histogram(Autoregressive):
    """p(x_d | x before d) = p(x_d | the k values before it): a table of logits for every dimension.

    `independent` is k = 0, `markov` (first order, a table for every dimension) is k = 1, and `table` is k = D - 1: any
    distribution at all.

    Raises: ValueError for tables of more than 2^24 cells, with their number.
    """

    first_row: Tensor

    def __init__(self, data: DataSpec, form: Form) -> None:
        assert data.levels is not None
        super().__init__(data, Discrete(data), Categorical(data.levels))
        self.levels, dims = data.levels, data.dims
        self.memory = {"independent": 0, "markov": 1, "table": dims - 1}[form]
        self.sizes = [self.levels ** min(place, self.memory) for place in range(dims)]
        cells = sum(self.sizes) * self.levels
        if cells > MOST:
            simpler = {"table": "markov or independent", "markov": "independent"}.get(form, "a network")
            size = f"{cells:,}" if cells < 10**12 else f"about 10^{len(str(cells)) - 1}"
            raise ValueError(
                f"form: the {form} form of {dims} dimensions with {self.levels} levels has {size} cells, and at most "
                f"{MOST:,} are counted; use {simpler}, or a model that shares parameters, such as autoregressive/nade"
            )
        self.register_buffer("first_row", torch.tensor([0, *self.sizes[:-1]]).cumsum(0))
        self.logits = nn.Parameter(torch.randn(sum(self.sizes), self.levels))  # until the counts are there

    def rows(self, x: Tensor) -> Tensor:
        """[B, D]: the row of `logits` in use at every place, from x [B, *event]."""
        flat = x.flatten(1)
        found = torch.zeros_like(flat)
        for back in range(self.memory):  # the last value counts 1, the one before it `levels`, ...
            found[:, back + 1 :] += flat[:, : self.data.dims - 1 - back] * self.levels**back
        return found + self.first_row

    def conditionals(self, x: Tensor, cond: Tensor | None) -> Tensor:
        return F.embedding(self.rows(x), self.logits)

    def start(self, n: int, cond: Tensor | None) -> Tensor:
        """The known values [n, D], of which the last k are read."""
        return torch.zeros(n, self.data.dims, dtype=torch.int64, device=self.logits.device)

    def step(self, state: Tensor, place: int) -> Tensor:
        oldest = max(0, place - self.memory)
        weights = self.levels ** torch.arange(place - oldest - 1, -1, -1, device=state.device)
        return self.logits[self.first_row[place] + (state[:, oldest:place] * weights).sum(1)]

    def admit(self, state: Tensor, place: int, values: Tensor) -> None:
        state[:, place] = values[:, 0]


class Counts(Computed):
    """log of counts + pseudocounts, normalised, over all rows drawn so far.

    Counts are added up over batches and ranks: after every whole number of epochs their shares are the dataset's. After
    one epoch they are the dataset's counts; each further one counts every row again, so that pseudocounts weigh less.

    In the table form a state's share is exactly (count + pseudocount) / (rows + pseudocount levels^D): a cell of the
    table of dimension d gets the pseudocounts of all states that begin like it.
    """

    counts: Tensor
    prior: Tensor

    def __init__(self, model: Histogram, form: Form, pseudocount: float) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(model.logits.shape, dtype=torch.float64))
        last = model.data.dims - 1
        prior = [
            torch.full(
                (size, 1), pseudocount * model.levels ** (last - place if form == "table" else 0), dtype=torch.float64
            )
            for place, size in enumerate(model.sizes)
        ]
        self.register_buffer("prior", torch.cat(prior))  # [rows, 1]

    def target(self, model: Histogram, x: Tensor) -> dict[str, Tensor]:
        cells = (model.rows(x) * model.levels + x.flatten(1)).flatten()
        new = torch.zeros_like(self.counts)
        new.view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=new.dtype))
        runtime.current().sum([new])
        self.counts += new
        weight = self.counts + self.prior
        return {"logits": weight.log() - weight.sum(1, keepdim=True).log()}


def histogram(data: DataSpec, form: Form = "markov", pseudocount: PositiveFloat = 1.0) -> tuple[Histogram, Counts]:
    """Counts as a model: the baselines of everything that learns. Wants `optim: {name: sgd, lr: 1.0}`.

    Maximum likelihood within its form: as the pseudocount falls to 0, the mean nll of the counted rows becomes their
    empirical entropy: of each dimension, of each given the one before it, or of the whole.

    Args:
        data: what is modelled.
        form: "independent" dimensions; "markov", each given the one before it in the stored order; "table", the joint
            table of all states, for small spaces.
        pseudocount: added to the count of every cell of every conditional table; of every state in the table form.
    """
    model = Histogram(data, form)
    return model, Counts(model, form, pseudocount)
