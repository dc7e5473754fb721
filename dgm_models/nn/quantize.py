"""Vector quantisation: codebooks, how they follow the data, and the shell of models with codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models import noise
from dgm_models.codecs import discrete
from dgm_models.nn.composite import code_bound
from dgm_models.nn.conditioner import check
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops.likelihoods import Name, likelihood
from dgm_models.protocols import Batch, DataSpec, Model

Learning = Literal["ema", "gradient"]


class Reducer(Protocol):
    """What a codebook needs of `training.runtime.Runtime`."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def sum(self, tensors: Sequence[Tensor]) -> None: ...


class Quantizer(nn.Module):
    """K vectors e_j of D numbers; the code of a vector z is the number of the nearest one.

    Its soft codes are q(j|z) = softmax_j(-|z - e_j|^2 / (2 spread)): the responsibilities of a mixture of Gaussians at
    the e_j with equal weights, of which the nearest code is the limit of no spread.

    Args:
        size: K.
        dim: D.
        learning: "gradient": the codebook is a parameter; "ema": a buffer that follows its vectors' means.
    Attributes:
        usage: [K] EMA of the share of vectors that took each code.
        sums: [K, D] EMA of their sum over the number of all vectors; an "ema" codebook is sums / usage.
        spread: EMA of the mean squared distance between a vector and its code, for one of its D numbers.
    """

    codebook: Tensor
    usage: Tensor
    sums: Tensor
    spread: Tensor

    def __init__(self, size: int, dim: int, learning: Learning) -> None:
        super().__init__()
        self.size, self.dim, self.learning = size, dim, learning
        codebook = torch.randn(size, dim)
        if learning == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("usage", torch.full((size,), 1 / size))
        self.register_buffer("sums", codebook / size)
        self.register_buffer("spread", torch.ones(()))

    def distances(self, z: Tensor) -> Tensor:
        """[..., K] of z [..., D]: |z - e_j|^2 - |z|^2, which orders the codes as the squared distance does."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 has too few digits to tell codes apart
            return self.codebook.square().sum(1) - 2 * z.to(self.codebook.dtype) @ self.codebook.T

    def nearest(self, z: Tensor) -> Tensor:
        """[...] int64 of z [..., D]; the first of equally near ones."""
        return self.distances(z.detach()).argmin(-1)

    def draw(self, z: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Soft codes [B, n] of z [B, n, D], and their log q summed over n: [B] nats."""
        log_q = (-self.distances(z) / (2 * self.spread.clamp_min(1e-6))).log_softmax(-1)  # [B, n, K]
        codes = torch.multinomial(log_q.exp().flatten(0, 1), 1, generator=rng).reshape(log_q.shape[:2])
        return codes, log_q.gather(2, codes[..., None]).sum((1, 2))

    def forward(self, codes: Tensor) -> Tensor:
        """[..., D]: the vectors of codes [...]."""
        vectors: Tensor = F.embedding(codes, self.codebook)
        return vectors

    @torch.no_grad()
    def place(self, rows: Tensor, where: Tensor) -> None:
        """Puts vectors [K, D] in the place of the codes that `where` [K] names, each with a mean code's usage."""
        rows = rows.to(self.codebook.dtype)
        self.codebook.copy_(torch.where(where[:, None], rows, self.codebook))
        self.usage.masked_fill_(where, 1 / self.size)
        self.sums.copy_(torch.where(where[:, None], rows / self.size, self.sums))

    @torch.no_grad()
    def follow(self, counts: Tensor, sums: Tensor, square: Tensor, decay: float) -> None:
        """Moves the averages by one batch: counts [K], sums [K, D] of its vectors by code, and its squared distance.

        Source: van den Oord et al. 2017, appendix A.1. Differs: counts and sums are divided by the number of vectors,
        which cancels in their ratio.
        """
        total = counts.sum()
        self.usage.lerp_(counts / total, 1 - decay)
        self.sums.lerp_(sums / total, 1 - decay)
        self.spread.lerp_(square / (total * self.dim), 1 - decay)
        if self.learning == "ema":
            least = 1e-12  # both averages of an unused code shrink alike, and in the end its vector stays
            means = self.sums / self.usage.clamp_min(least)[:, None]
            self.codebook.copy_(torch.where(self.usage[:, None] > least, means, self.codebook))

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the usage, in codes: between 1 and K."""
        share = self.usage / self.usage.sum()
        entropy: Tensor = torch.special.entr(share).sum()
        return entropy.exp()


@dataclass(frozen=True)
class Level:
    """One grid of codes: its codebook, the encoder's vectors z [B, n, D], and their codes [B, n]."""

    quantizer: Quantizer
    z: Tensor
    codes: Tensor

    @property
    def through(self) -> Tensor:
        """[B, n, D]: the codes' vectors in value, the identity of z in gradient (the straight-through estimator)."""
        e: Tensor = self.quantizer(self.codes).to(self.z.dtype)
        return self.z + (e - self.z).detach()


Pick = Callable[[Quantizer, Tensor], Tensor]


class Quantized(Model):
    """p(x) = sum over codes c of p(x|c) p(c), p(c) uniform; the shell of models whose latents are codes.

    A model gives `levels` and `outputs`; the grids' codes stand one after the other in `codes`. A prior that is trained
    on the codes replaces the uniform one in `nn/composite.py`.

    Args:
        data: what is modelled.
        name: the decoder's likelihood.
        quantizers: one codebook a level, all of one size.
        shape: of an example's codes.
    """

    def __init__(self, data: DataSpec, name: Name, quantizers: Sequence[Quantizer], shape: tuple[int, ...]) -> None:
        super().__init__(data, discrete(data))
        self.likelihood = likelihood(name, data)
        self.quantizers = nn.ModuleList(quantizers)
        size, names = quantizers[0].size, data.class_names
        self.code_spec = DataSpec("codes", shape, size, data.classes, class_names=names)

    def levels(self, x: Tensor, pick: Pick) -> list[Level]:
        """What the encoder makes of model-space x [B, *event]; `pick` gives the codes [B, n] of vectors [B, n, D]."""
        raise NotImplementedError

    def outputs(self, vectors: Sequence[Tensor]) -> Tensor:
        """The likelihood's params [B, num_params, *event] from the vectors [B, n, D] of every level."""
        raise NotImplementedError

    def sizes(self) -> list[int]:
        """How many codes of an example each level has."""
        raise NotImplementedError

    @torch.no_grad()
    def codes(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        return torch.cat([level.codes for level in self.levels(x, Quantizer.nearest)], 1).reshape(
            len(x), *self.code_spec.shape
        )

    def draw_codes(self, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        log_q: list[Tensor] = []

        def draw(quantizer: Quantizer, z: Tensor) -> Tensor:
            codes, log_p = quantizer.draw(z, rng)
            log_q.append(log_p)
            return codes

        codes = torch.cat([level.codes for level in self.levels(x, draw)], 1)
        return codes.reshape(len(x), *self.code_spec.shape), torch.stack(log_q).sum(0)

    def outputs_of(self, codes: Tensor) -> Tensor:
        """The likelihood's params [B, num_params, *event] of codes [B, *code_spec.shape]."""
        parts = torch.split(codes.long().flatten(1), self.sizes(), 1)
        return self.outputs([codebook(part) for codebook, part in zip(self.quantizers, parts, strict=True)])

    def log_likelihood(self, x: Tensor, codes: Tensor) -> Tensor:
        return self.likelihood.log_prob(self.outputs_of(codes), x)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor, rng: torch.Generator) -> Tensor:
        return self.likelihood.sample(self.outputs_of(codes), rng)

    def elbo(self, x: Tensor, rng: torch.Generator, cond: Tensor | None = None, k: int = 1) -> Tensor:
        """[B] nats under the uniform prior, whose log p(c) is -(number of codes) log K; see `code_bound`."""
        check(None, cond)
        spec = self.code_spec
        assert spec.levels is not None
        log_prior = -spec.dims * math.log(spec.levels)
        return code_bound(self, lambda codes: torch.full((len(codes),), log_prior, device=codes.device), x, rng, k)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """From uniform codes: what the decoder makes of codes that no example has."""
        check(None, cond)
        spec = self.code_spec
        assert spec.levels is not None
        codes = torch.randint(spec.levels, (n, *spec.shape), generator=rng, device=rng.device)
        return self.decode_codes(codes, rng)


# ---- training


class Seen(nn.Module):
    """What one step's vectors say of a codebook: sums over micro-batches, and over ranks once they are reduced.

    Attributes:
        counts, sums, square: as `Quantizer.follow` takes them.
        rows: [K, D] the K vectors of the highest priority, for codes that nothing uses.
        priority: [K] of the rows, descending; 0 where there is no row.
    """

    counts: Tensor
    sums: Tensor
    square: Tensor
    rows: Tensor
    priority: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        size, dim = quantizer.size, quantizer.dim
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, dim))
        self.register_buffer("square", torch.zeros(()))
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("priority", torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def add(self, level: Level, priority: Tensor) -> None:
        """Adds vectors z [B, n, D] with their codes [B, n] and priorities [B, n]."""
        z, codes = level.z.flatten(0, 1).to(self.sums.dtype), level.codes.flatten()
        self.counts.index_add_(0, codes, torch.ones_like(z[:, 0]))
        self.sums.index_add_(0, codes, z)
        self.square += (z - level.quantizer(codes)).square().sum()
        self.offer(z, priority.flatten())

    @torch.no_grad()
    def offer(self, rows: Tensor, priority: Tensor) -> None:
        """Keeps the best of its rows and these, [m, D] with priorities [m]."""
        every, ranked = torch.cat([self.rows, rows]), torch.cat([self.priority, priority])
        best, order = ranked.topk(len(self.priority))
        self.rows.copy_(every[order])
        self.priority.copy_(best)

    @torch.no_grad()
    def reduce(self, runtime: Reducer) -> None:
        """The same for the vectors of all ranks, on every rank."""
        table = self.priority.new_zeros(runtime.world, len(self.priority))
        table[runtime.rank] = self.priority
        runtime.sum([self.counts, self.sums, self.square, table])
        best, order = table.flatten().topk(len(self.priority))
        mine = order // len(self.priority) == runtime.rank
        rows = self.rows[order % len(self.priority)] * mine[:, None]  # the others' places are theirs to fill
        runtime.sum([rows])
        self.rows.copy_(rows)
        self.priority.copy_(best)

    @torch.no_grad()
    def clear(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()


class Quantization(Objective):
    """-log p(x|z + sg[e - z]) + beta |z - sg[e]|^2, and |sg[z] - e|^2 where the codebook is learned by gradient.

    Squares are summed over an example's codes and their D numbers. An "ema" codebook has no loss: it follows its
    vectors' means, over micro-batches and ranks, once a step.

    Args:
        quantizers: the model's.
        runtime: `training.runtime.current`.
        commitment: beta.
        decay: of the averages, and of an "ema" codebook.
        restart: a code that is used less than this share of 1/K is put onto one of the batch's vectors.

    Source: van den Oord et al. 2017, eq. 3 and appendix A.1, arXiv:1711.00937; restarts: Dhariwal et al. 2020,
    section 3.1, arXiv:2005.00341. Differs: the squares are summed over the codes, where the paper takes their mean,
    as its log p(x|z) is summed over the data; codebooks begin at vectors of the first batch.
    """

    def __init__(
        self,
        quantizers: Sequence[Quantizer],
        runtime: Callable[[], Reducer],
        commitment: float,
        decay: float,
        restart: float,
    ) -> None:
        super().__init__()
        self.runtime = runtime
        self.commitment, self.decay, self.restart = commitment, decay, restart
        self.seen = nn.ModuleList(Seen(quantizer) for quantizer in quantizers)

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def loss(self, model: Quantized, batch: Batch) -> Loss:
        levels = model.levels(batch.x, Quantizer.nearest)
        reconstruction = model.likelihood.log_prob(model.outputs([level.through for level in levels]), batch.x)
        total = -reconstruction
        metrics = {"reconstruction": reconstruction.detach().sum()}
        for index, level in enumerate(levels):
            e = level.quantizer(level.codes)
            distance = (level.z - e.detach()).square().sum((1, 2))
            total = total + self.commitment * distance
            if level.quantizer.learning == "gradient":
                total = total + (level.z.detach() - e).square().sum((1, 2))
            name = f"/{index}" if len(levels) > 1 else ""
            metrics[f"distance{name}"] = distance.detach().sum()
            metrics[f"perplexity{name}"] = level.quantizer.perplexity * len(batch)  # of the run, not of this batch
            if model.training:
                self._see(index, level, batch)
        return Loss(total.sum(), metrics)

    def _see(self, index: int, level: Level, batch: Batch) -> None:
        seen = self.seen[index]
        assert isinstance(seen, Seen)
        # by the example's key: the same vectors are chosen however the batch is divided
        seen.add(level, noise.uniform(batch.key, f"restart-{index}", (level.z.shape[1],), torch.float64))

    def _pairs(self, model: Quantized) -> list[tuple[Quantizer, Seen]]:
        pairs = zip(model.quantizers, self.seen, strict=True)
        return [(one, two) for one, two in pairs if isinstance(one, Quantizer) and isinstance(two, Seen)]

    def advance(self, model: Quantized, step: int) -> None:
        for quantizer, seen in self._pairs(model):
            seen.reduce(self.runtime())
            quantizer.follow(seen.counts, seen.sums, seen.square, self.decay)
            dead = quantizer.usage < self.restart / quantizer.size  # alike on every rank
            turn = (dead.cumsum(0) - 1).clamp_min(0)  # the first dead code takes the first row
            quantizer.place(seen.rows[turn], dead & (seen.priority[turn] > 0))
            seen.clear()

    def initialize(self, model: Quantized, batch: Batch) -> None:
        """Codes begin at vectors of the batch, level after level; with fewer vectors than codes the rest stays."""
        for index, (quantizer, seen) in enumerate(self._pairs(model)):
            self._see(index, model.levels(batch.x, Quantizer.nearest)[index], batch)
            quantizer.place(seen.rows, seen.priority > 0)
            seen.clear()
            level = model.levels(batch.x, Quantizer.nearest)[index]
            quantizer.spread.copy_((level.z - quantizer(level.codes)).square().mean())


def to_vectors(grid: Tensor) -> Tensor:
    """[B, D, h, w] -> [B, h w, D]."""
    return grid.flatten(2).transpose(1, 2)


def to_grid(vectors: Tensor, sides: tuple[int, int]) -> Tensor:
    """[B, h w, D] -> [B, D, h, w]."""
    return vectors.transpose(1, 2).reshape(len(vectors), -1, *sides)
