"""Stored bytes <-> model space, with log|det| in nats: the only place where bytes become floats.

log p(stored) = log p(model space) + log|d(model space)/d(stored)|. A codec is `exact` when this is an identity; with
uniform dequantisation it is a lower bound (Theis, van den Oord, Bethge 2016, arXiv:1511.01844).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.protocols import DataSpec


class Codec(Protocol):
    """The contract: `decode(encode(x)[0]) == x` for every stored x."""

    @property
    def exact(self) -> bool:
        """True when the densities on both sides differ by the log-determinant alone."""
        ...

    def encode(self, x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Stored x [B, *event] and keys [B] -> (model-space x, log_det [B] in nats)."""
        ...

    def decode(self, y: Tensor) -> Tensor:
        """Model-space y [B, *event] -> the stored form: uint8, int32 or float32."""
        ...


def _stored_type(levels: int) -> torch.dtype:
    return torch.uint8 if levels <= 256 else torch.int32


def _levels(data: DataSpec, codec: str) -> int:
    if data.levels is None:
        raise ValueError(f"the {codec} codec needs data of whole levels; this data is real (levels: null)")
    return data.levels


def _inside(y: Tensor, x: Tensor, cell: Callable[[Tensor], Tensor]) -> Tensor:
    """Float64 y as float32, one step back where rounding has left the cell of x: `decode` must give x again."""
    rounded = y.float()
    beyond = (cell(rounded) - x).sign_().float()
    return torch.nextafter(rounded, rounded - beyond)  # inside, where beyond is 0: itself


@dataclass(frozen=True)
class Discrete:
    """The stored integers themselves, as int64: for models with a probability of every level. No Jacobian."""

    data: DataSpec
    exact: bool = True

    def __post_init__(self) -> None:
        _levels(self.data, "Discrete")

    def encode(self, x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return x.long(), torch.zeros(len(x), device=x.device)

    def decode(self, y: Tensor) -> Tensor:
        levels = _levels(self.data, "Discrete")
        return y.clamp(0, levels - 1).to(_stored_type(levels))


@dataclass(frozen=True)
class Dequantized:
    """y = 2 (x + u) / levels - 1 in (-1, 1), u uniform in (0, 1) by the example's key."""

    data: DataSpec
    exact: bool = False

    def __post_init__(self) -> None:
        _levels(self.data, "Dequantized")

    def encode(self, x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self.place(self._noisy(x, key))
        return _inside(y, x, self._cell), log_det

    def place(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v = x + u [B, *event] -> (y, log|det dy/dv| [B] in nats), differentiable."""
        levels = _levels(self.data, "Dequantized")
        log_det = self.data.dims * math.log(2.0 / levels)
        return (v * (2.0 / levels)).sub_(1.0), torch.full((len(v),), log_det, device=v.device)

    def _noisy(self, x: Tensor, key: Tensor) -> Tensor:
        """x + u as float64."""
        return noise.uniform(key, "dequantize", self.data.shape).double().add_(x)

    def decode(self, y: Tensor) -> Tensor:
        levels = _levels(self.data, "Dequantized")
        return self._cell(y).clamp(0, levels - 1).to(_stored_type(levels))

    def _cell(self, y: Tensor) -> Tensor:
        return ((y.double() + 1.0) * (_levels(self.data, "Dequantized") / 2.0)).floor()


@dataclass(frozen=True)
class Logit:
    """y = logit(alpha + (1 - 2 alpha) (x + u) / levels): unbounded, for flows (RealNVP, arXiv:1605.08803, 4.1)."""

    data: DataSpec
    alpha: float = 0.05
    exact: bool = False

    def __post_init__(self) -> None:
        _levels(self.data, "Logit")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha: {self.alpha!r} is not between 0 and 0.5")

    def encode(self, x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self.place(Dequantized(self.data)._noisy(x, key))
        return _inside(y, x, self._cell), log_det.float()

    def place(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v = x + u [B, *event] -> (y, log|det dy/dv| [B] in nats), differentiable."""
        levels = _levels(self.data, "Logit")
        p = self.alpha + (1 - 2 * self.alpha) * v / levels
        # dy/dv = (1 - 2 alpha) / levels / (p (1 - p)), of the squeezed p, not of v
        slope = math.log((1 - 2 * self.alpha) / levels) - p.log() - (-p).log1p()
        return p.logit(), slope.flatten(1).sum(1)

    def decode(self, y: Tensor) -> Tensor:
        levels = _levels(self.data, "Logit")
        return self._cell(y).clamp(0, levels - 1).to(_stored_type(levels))

    def _cell(self, y: Tensor) -> Tensor:
        p = (y.double().sigmoid() - self.alpha) / (1 - 2 * self.alpha)
        return (p * _levels(self.data, "Logit")).floor()


@dataclass(frozen=True)
class Standardized:
    """y = (x - location) / scale, for real data."""

    data: DataSpec
    exact: bool = True

    def encode(self, x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        location, scale = self._map(x)
        return (x - location) / scale, torch.full((len(x),), self._log_det, device=x.device)

    def decode(self, y: Tensor) -> Tensor:
        location, scale = self._map(y)
        return y * scale + location

    def _map(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        location, scale = self.data.location, self.data.scale
        return (
            location if isinstance(location, float | int) else like.new_tensor(location),
            scale if isinstance(scale, float | int) else like.new_tensor(scale),
        )

    @property
    def _log_det(self) -> float:
        scale = self.data.scale
        if isinstance(scale, tuple):
            return -math.fsum(map(math.log, scale))
        return -self.data.dims * math.log(scale)


def continuous(data: DataSpec) -> Codec:
    """The codec of models of real vectors: `Dequantized` for whole levels, `Standardized` for real data."""
    return Standardized(data) if data.levels is None else Dequantized(data)


def discrete(data: DataSpec) -> Codec:
    """The codec of models with a likelihood of the stored values: `Discrete`, or `Standardized` for real data."""
    return Standardized(data) if data.levels is None else Discrete(data)


def centred(x: Tensor, data: DataSpec) -> Tensor:
    """A network's input: levels mapped to [-1, 1], real data as it is."""
    return x if data.levels is None else x.float() * (2.0 / (data.levels - 1)) - 1.0
