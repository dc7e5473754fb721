"""Networks of noisy data by name: (x_t, how noisy, what is asked for) -> one or more values for every value of x."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.construct import Choice, Positive
from dgm_models.nn.conditioner import check
from dgm_models.nn.layers import Activation, activation
from dgm_models.protocols import DataSpec

Layer = TypeVar("Layer", bound=nn.Module)


class Backbone(Choice):
    """The contract of a params section such as `network: {name: unet, channels: 64}`.

    Attributes:
        embed_dim: of the vector that says how noisy x is and what is asked for.
        waves: how many sines and cosines say how noisy x is.
    """

    @classmethod
    def choices(cls) -> Mapping[str, type]:
        from dgm_models.nn.dit import DiT  # their files need this one
        from dgm_models.nn.unet import UNet

        return {backbone.name: backbone for backbone in (NoisyMlp, UNet, DiT)}

    @property
    def embed_dim(self) -> int:
        raise NotImplementedError

    @property
    def waves(self) -> int:
        return self.embed_dim

    def build(self, shape: tuple[int, ...], out_shape: tuple[int, ...], tokens: bool = False) -> nn.Module:
        """A module (x [B, *shape], embedding [B, embed_dim], tokens [B, T, embed_dim] or None) -> [B, *out_shape].

        Its last layer begins at 0. Without `tokens` it is given None. Modules that do not read tokens pass them over:
        the embedding holds their mean.

        Raises: ValueError for shapes that the network does not take.
        """
        raise NotImplementedError


def sides(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """Channels, height and width of an image's shape. Raises ValueError for another one, naming the network."""
    if len(shape) != 3:
        raise ValueError(f"network.name: {name} takes images [C, H, W], not {shape}; use mlp")
    channels, height, width = shape
    return channels, height, width


def zeroed(layer: Layer) -> Layer:
    """The layer with all its parameters 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sinusoidal(c: Tensor, dim: int, period: float = 10_000.0) -> Tensor:
    """[B] -> [B, dim]: cos(w c), sin(w c) for dim / 2 frequencies w from 1 to 1 / period.

    Source: Vaswani et al. 2017, section 3.5, arXiv:1706.03762.
    """
    half = dim // 2
    w = (-math.log(period) / half * torch.arange(half, device=c.device, dtype=c.dtype)).exp()
    angles = c[:, None] * w
    found = torch.cat([angles.cos(), angles.sin()], 1)
    return found if dim % 2 == 0 else torch.cat([found, torch.zeros_like(found[:, :1])], 1)


class Embedding(nn.Module):
    """How noisy x is and what is asked for, as a vector; what a network does not get told is a learned vector.

    Args:
        dim: of the vector.
        condition, data: what can be asked for, of what; a label or a sequence of tokens. An image is joined to x.
        optional: the condition can be left out for some examples (`keep`), which guidance needs.
        waves: how many sines and cosines say how noisy x is; `dim` by default.
    """

    def __init__(
        self, dim: int, condition: Condition | None, data: DataSpec, optional: bool, waves: int | None = None
    ) -> None:
        super().__init__()
        self.waves = waves or dim
        self.condition = condition
        spec = condition.spec(data) if condition else None
        self.spec = spec
        self.noise = nn.Sequential(nn.Linear(self.waves, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.planes = spec.shape[0] if spec and spec.kind == "image" else 0
        self.table = nn.Embedding(spec.levels, dim) if spec and spec.kind == "tokens" and spec.levels else None
        sequence = self.table is not None and spec is not None and spec.shape[0] > 1
        self.places = nn.Parameter(torch.randn(spec.shape[0], dim) * 0.02) if spec and sequence else None
        self.nothing = nn.Parameter(torch.randn(dim) * 0.02) if optional and self.table is not None else None

    def forward(self, c: Tensor, cond: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """c [B], cond, keep [B] bool or None (all) -> (vector [B, dim], tokens [B, T, dim] or None)."""
        check(self.condition, cond)
        vector: Tensor = self.noise(sinusoidal(c, self.waves))
        if self.table is None or cond is None:
            return vector, None
        tokens: Tensor = self.table(cond if cond.ndim == 2 else cond[:, None])  # [B, T, dim]
        if self.places is not None:
            tokens = tokens + self.places
        if self.nothing is not None:
            kept = torch.ones_like(c, dtype=torch.bool) if keep is None else keep
            tokens = torch.where(kept[:, None, None], tokens, self.nothing)
        return vector + tokens.mean(1), tokens if self.places is not None else None

    def join(self, x: Tensor, cond: Tensor | None, keep: Tensor | None) -> Tensor:
        """x [B, C, H, W] with an image condition's channels, zero where it is left out; x without one."""
        if not self.planes or cond is None:
            return x
        planes = cond.to(x.dtype)
        if keep is not None:
            planes = planes * keep[:, None, None, None]
        return torch.cat([x, planes], 1)


class Denoiser(nn.Module):
    """A backbone with its embedding.

    Args:
        backbone: by name.
        data: what is modelled.
        outputs: values for every value of x.
        condition: what is asked for, or None.
        optional: see `Embedding`.
    Raises: ValueError for an image condition of data that is no image.
    """

    def __init__(
        self, backbone: Backbone, data: DataSpec, outputs: int = 1, condition: Condition | None = None,
        optional: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.outputs, self.shape = outputs, data.shape
        self.embedding = Embedding(backbone.embed_dim, condition, data, optional, backbone.waves)
        channels, *rest = data.shape
        joined = (channels + self.embedding.planes, *rest)
        self.body = backbone.build(joined, (outputs * channels, *rest), self.embedding.places is not None)

    def forward(self, x: Tensor, c: Tensor, cond: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """[B, outputs, *event].

        Args:
            x: [B, *event].
            c: [B], how noisy x is; numbers of about -1000 to 1000.
            cond: [B, ...].
            keep: [B] bool, for which examples cond holds; None for all.
        """
        vector, tokens = self.embedding(c, cond, keep)
        y: Tensor = self.body(self.embedding.join(x, cond, keep), vector, tokens)
        return y.reshape(len(x), self.outputs, *self.shape)


@dataclass(frozen=True)
class NoisyMlp(Backbone):
    """Hidden layers over the flattened event, to each of which the embedding is added through a linear map."""

    name: ClassVar[str] = "mlp"
    width: Positive = 128
    depth: Positive = 3
    activation: Activation = "silu"

    @property
    def embed_dim(self) -> int:
        return self.width

    def build(self, shape: tuple[int, ...], out_shape: tuple[int, ...], tokens: bool = False) -> nn.Module:
        return _Mlp(self, math.prod(shape), out_shape)


class _Mlp(nn.Module):
    def __init__(self, settings: NoisyMlp, in_dim: int, out_shape: tuple[int, ...]) -> None:
        super().__init__()
        width = settings.width
        self.out_shape = out_shape
        self.first = nn.Linear(in_dim, width)
        self.told = nn.ModuleList(nn.Linear(width, width) for _ in range(settings.depth))
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(settings.depth - 1))
        self.act = activation(settings.activation)
        self.last = zeroed(nn.Linear(width, math.prod(out_shape)))

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None) -> Tensor:
        h = self.act(self.first(x.flatten(1)) + self.told[0](embedding))
        for layer, told in zip(self.hidden, list(self.told)[1:], strict=True):
            h = h + self.act(layer(h) + told(embedding))
        found: Tensor = self.last(h).unflatten(1, self.out_shape)
        return found
