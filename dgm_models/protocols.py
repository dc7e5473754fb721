"""DataSpec, Batch, Model, and the capabilities that a trained model may have.

Shapes: `x` is [B, *event]; every scalar output is [B], in nats, summed over the event.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dgm_models import noise

if TYPE_CHECKING:
    from dgm_models.codecs import Codec
    from dgm_models.conditions import Condition
    from dgm_models.ops.annealing import Bracket
    from dgm_models.ops.restoration import Observation

Kind = Literal["image", "vector", "tokens", "codes", "audio"]
KINDS: tuple[str, ...] = ("image", "vector", "tokens", "codes", "audio")


@dataclass(frozen=True)
class DataSpec:
    """What one example of a dataset is, as stored.

    Attributes:
        kind: "image" [C, H, W], "vector" [D], "tokens" [T], "codes" [..], "audio" [C, T].
        shape: the event's shape.
        levels: stored values are the integers 0..levels-1; None for real numbers.
        classes: number of class labels, 0 without labels.
        location, scale: for real data, the affine map (x - location) / scale that the codec applies: one number each,
            or one for every value of a vector.
        class_names: one a class, or empty.
    """

    kind: Kind
    shape: tuple[int, ...]
    levels: int | None = None
    classes: int = 0
    location: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        for name in ("location", "scale"):
            if isinstance(getattr(self, name), list | tuple):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in KINDS:
            raise ValueError(f"data.kind: {self.kind!r} is none of {', '.join(KINDS)}")
        if not self.shape or any(not isinstance(n, int) or n < 1 for n in self.shape):
            raise ValueError(f"data.shape: {self.shape!r} is no tuple of positive sizes")
        if self.kind == "image" and len(self.shape) != 3:
            raise ValueError(f"data.shape: an image is (channels, height, width), not {self.shape!r}")
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"data.levels: {self.levels!r} is below 2 (None means real numbers)")
        if self.classes < 0:
            raise ValueError(f"data.classes: {self.classes!r} is negative")
        if self.class_names and len(self.class_names) != self.classes:
            raise ValueError(f"data.class_names: {len(self.class_names)} names for {self.classes} classes")
        for name, numbers in (("location", self.location), ("scale", self.scale)):
            if isinstance(numbers, tuple) and self.shape != (len(numbers),):
                raise ValueError(f"data.{name}: {len(numbers)} numbers for values of shape {self.shape!r}")
        if not all(number > 0 for number in (self.scale if isinstance(self.scale, tuple) else (self.scale,))):
            raise ValueError(f"data.scale: {self.scale!r} is not above 0")

    @property
    def dims(self) -> int:
        """The number of stored values of one example: the D of bits/dim."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Batch:
    """Rows of data, frozen; every tensor's first axis is the example.

    Attributes:
        x: [B, *event], as stored, or in model space once the codec has encoded it.
        key: [B] int64: the source of all noise of an example (see `dgm_models.noise`).
        id: [B] int64: the example's row in its dataset.
        cond: the model's conditions, or the dataset's labels where the model has none; None without labels.
        mask: [B, T] bool, which positions are real, or None.
        log_det: [B] log|d(model space)/d(stored space)| in nats, set by the codec.
        extra: what `Objective.prepare` adds: negatives, advantages, reference log-probs.
    """

    x: Tensor
    key: Tensor
    id: Tensor
    cond: Tensor | None = None
    mask: Tensor | None = None
    log_det: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def uniform(self, stream: str, shape: Sequence[int]) -> Tensor:
        """[B, *shape] in (0, 1), by the examples' keys."""
        return noise.uniform(self.key, stream, tuple(shape), _float(self.x))

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """[B, *shape] standard normal, by the examples' keys."""
        return noise.normal(self.key, stream, tuple(shape), _float(self.x))

    def fold(self, *path: int | str) -> Batch:
        """The same rows with new keys."""
        return replace(self, key=noise.fold(self.key, *path))

    def with_extra(self, **tensors: Tensor) -> Batch:
        return replace(self, extra={**self.extra, **tensors})

    def map(self, function: object) -> Batch:
        """Applies `function` to every tensor."""
        assert callable(function)

        def each(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        return Batch(
            x=function(self.x), key=function(self.key), id=function(self.id), cond=each(self.cond),
            mask=each(self.mask), log_det=each(self.log_det),
            extra={name: function(tensor) for name, tensor in self.extra.items()},
        )  # fmt: skip

    def to(self, device: torch.device) -> Batch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> Iterator[Batch]:
        """`parts` micro-batches, as even as can be, in order; none is empty."""
        if parts == 1:
            yield self
            return
        for part in range(parts):
            start, stop = len(self) * part // parts, len(self) * (part + 1) // parts
            if stop > start:  # fewer rows than parts: fewer micro-batches
                yield self.map(lambda tensor, start=start, stop=stop: tensor[start:stop])


def _float(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Model(nn.Module):
    """A generative model: networks, a codec, and the capabilities below that its class implements.

    Attributes:
        data: the stored data it was built for.
        codec: stored bytes <-> the space in which the capabilities work.
        condition: what `cond` is, None for a model without one.
        sampling: the settings of its sampler, a dataclass; None for a model that has none.
        evaluations: how often the network was evaluated for every sample of the last call of `sample`.
        estimated: `log_prob` is an estimate, neither the density nor a bound of it.
        tightens: more draws make its bound tighter; where not, they make the estimate of one bound less noisy.
    """

    data: DataSpec
    codec: Codec
    condition: Condition | None
    sampling: Any = None
    evaluations: int = 1
    estimated: bool = False
    tightens: bool = True

    def __init__(self, data: DataSpec, codec: Codec) -> None:
        super().__init__()
        self.data = data
        self.codec = codec
        self.condition = None

    def given(self, batch: Batch) -> Tensor | None:
        """The batch's conditions; labels that the model was not built for are passed over."""
        return batch.cond if self.condition else None

    def conditions(self, x: Tensor, labels: Tensor | None, key: Tensor) -> Tensor | None:
        """The conditions of stored x [B, *event] with labels [B] and keys [B]; None for a model without one."""
        return self.condition.of(self.data, x, labels, key) if self.condition else None

    def players(self) -> dict[str, nn.Module]:
        """Who plays: disjoint sets of parameters, by name."""
        return {"model": self}


@runtime_checkable
class Samples(Protocol):
    """Draws from the model's distribution."""

    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """[n, *event] in model space, without gradient."""
        ...


@runtime_checkable
class Density(Protocol):
    """An exact log-density or log-probability."""

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats in model space."""
        ...


@runtime_checkable
class Bound(Protocol):
    """A lower bound of the log-density."""

    def elbo(self, x: Tensor, rng: torch.Generator, cond: Tensor | None = None, k: int = 1) -> Tensor:
        """[B] nats; with k > 1 the importance-weighted bound of k draws, or a less noisy one: see `Model.tightens`."""
        ...


@runtime_checkable
class Energy(Protocol):
    """An unnormalised density."""

    def energy(self, x: Tensor) -> Tensor:
        """[B] nats: -log p(x) up to a constant."""
        ...


@runtime_checkable
class Bracketed(Protocol):
    """An energy whose normaliser can be enclosed."""

    def bracket_log_z(self, chains: int, temperatures: int, rng: torch.Generator) -> Bracket:
        """Stochastic bounds of log Z, nats, from either end of an annealing."""
        ...


@runtime_checkable
class Score(Protocol):
    """The gradient of the log-density of data with noise."""

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, *event]: the gradient of log p_t at x; t = 0 is data, t = 1 is noise."""
        ...


@runtime_checkable
class Latents(Protocol):
    """A code for every example, and back."""

    def encode(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B, latent_dim]: the posterior's mean, or the latents that x has."""
        ...

    def decode(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B, *event] in model space: the likelihood's mode or mean, or the x that has these latents."""
        ...


@runtime_checkable
class DiagonalPosterior(Protocol):
    """A code's uncertainty."""

    def posterior(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x, c), each [B, latent_dim]."""
        ...


@runtime_checkable
class Completes(Protocol):
    """Draws what is missing of an example from its distribution given the rest."""

    def complete(self, x: Tensor, known: Tensor, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """[n, *event] in model space: x where known [n, *event] bool, drawn elsewhere."""
        ...


@runtime_checkable
class Restores(Protocol):
    """Draws an example from its distribution given what is seen of it."""

    def restore(self, seen: Observation, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """[B, *event] in model space, without gradient, for the B rows of the observation."""
        ...


@runtime_checkable
class Codes(Protocol):
    """Data as codes, whole numbers or real ones: what a prior is trained on, and what makes data of its samples."""

    @property
    def code_spec(self) -> DataSpec:
        """What the codes of one example are, as data: kind "codes"; location and scale are those of a data set."""
        ...

    def codes(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """[B, *code_spec.shape]: the codes of model-space x, int64 or real ones: drawn by keys [B], or their means."""
        ...

    def draw_codes(self, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Codes drawn from a posterior q(codes|x), and its log q [B] in nats."""
        ...

    def log_likelihood(self, x: Tensor, codes: Tensor) -> Tensor:
        """[B] nats: log p(x|codes) of model-space x."""
        ...

    def decode_codes(self, codes: Tensor, rng: torch.Generator) -> Tensor:
        """[B, *event] in model space, drawn from p(x|codes)."""
        ...


@runtime_checkable
class Features(Protocol):
    """What an extractor gives: the coordinates in which samples are compared."""

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """([B, feature_dim], [B, classes] probabilities) of model-space x."""
        ...


CAPABILITIES: dict[str, type] = {
    "samples": Samples,
    "density": Density,
    "bound": Bound,
    "energy": Energy,
    "score": Score,
    "latents": Latents,
    "completes": Completes,
    "restores": Restores,
    "codes": Codes,
    "features": Features,
}


def capabilities(model: nn.Module) -> tuple[str, ...]:
    """The capabilities that `model` has, by name, in the order of `CAPABILITIES`."""
    return tuple(name for name, protocol in CAPABILITIES.items() if isinstance(model, protocol))
