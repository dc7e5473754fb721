"""Randomness as a function of a key, never a state.

Every example of a batch carries a 64-bit key. A draw is a hash of (key, stream, element), so it does not depend
on the order of draws, on the micro-batch, on the rank or on the number of ranks, and a resumed run needs no saved
generator: the key of an example follows from the seed, the step and its place in the data stream.

Source: the finalizer of SplitMix64 (Steele, Lea, Flood 2014), as counter-based hash; Box-Muller for normals.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic: the mask makes them logical


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift_right(x, 31)


def digest(*path: int | str) -> int:
    """64 bits (signed) that stand for a path of names and numbers, such as `("seed", 0, "step", 12)`."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in path)
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def fold(keys: Tensor, *path: int | str) -> Tensor:
    """New keys [B] int64 from keys [B] and a path: independent of the old ones for every other path."""
    return _mix(keys * _signed(_GOLDEN) + digest(*path))


def _bits(keys: Tensor, stream: str, count: int) -> Tensor:
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64) * _signed(_GOLDEN)
    return _mix(_mix(fold(keys, stream)[:, None] + counter))  # [B, count]


def uniform(keys: Tensor, stream: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform draws in the open interval (0, 1).

    Args:
        keys: [B] int64, one key an example.
        stream: the name of the draw; two draws of one loss need two names.
        shape: the shape of one example's draw.
        dtype: float32 (23 random bits) or float64 (52 random bits).
    Returns: [B, *shape].
    """
    bits = 52 if dtype == torch.float64 else 23
    raw = _shift_right(_bits(keys, stream, math.prod(shape)), 64 - bits)
    return ((raw.to(dtype) + 0.5) * 2.0**-bits).reshape(len(keys), *shape)


def normal(keys: Tensor, stream: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws [B, *shape]; arguments as `uniform`. Tails end at 6.6 standard deviations."""
    count = math.prod(shape)
    raw = _bits(keys, stream, (count + 1) // 2)
    radius = (-2.0 * ((_shift_right(raw, 32).to(dtype) + 0.5) * 2.0**-32).log()).clamp_min(0.0).sqrt()
    angle = (raw & 0xFFFFFFFF).to(dtype) * (2.0 * math.pi * 2.0**-32)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both[:, :count].reshape(len(keys), *shape)
