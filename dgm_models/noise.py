"""Randomness as a function of a key, never a state.

Every example of a batch carries a 64-bit key. A draw is a hash of (key, stream, element), so it does not depend
on the order of draws, on the micro-batch, on the rank or on the number of ranks, and a resumed run needs no saved
generator: the key of an example follows from the seed, the step and its place in the data stream.

Source: the finalizer of SplitMix64 (Steele, Lea, Flood 2014), as counter-based hash; Box-Muller for normals.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _array(keys: Tensor) -> Any:
    """What the hash is computed with: NumPy's array on a CPU, where an operation costs less than torch's; same bits."""
    plain = type(keys) is Tensor and keys.device.type == "cpu" and not torch.compiler.is_compiling()
    return keys.numpy() if plain else keys


def _tensor(x: Any) -> Tensor:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def _shift_right(x: Any, bits: int) -> Any:
    x = x >> bits
    x &= (1 << (64 - bits)) - 1  # int64 shifts are arithmetic: the mask makes them logical
    return x


def _mix(x: Any) -> Any:
    """The finalizer, in the memory of x: fresh memory for each of its steps took half of the time of a large draw."""
    x ^= _shift_right(x, 30)
    x *= _MULTIPLIERS[0]
    x ^= _shift_right(x, 27)
    x *= _MULTIPLIERS[1]
    x ^= _shift_right(x, 31)
    return x


def digest(*path: int | str) -> int:
    """64 bits (signed) that stand for a path of names and numbers, such as `("seed", 0, "step", 12)`."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in path)
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def fold(keys: Tensor, *path: int | str) -> Tensor:
    """New keys [B] int64 from keys [B] and a path: independent of the old ones for every other path."""
    return _tensor(_fold(_array(keys), *path))


def _fold(keys: Any, *path: int | str) -> Any:
    x = keys * _GOLDEN
    x += digest(*path)
    return _mix(x)


def _bits(keys: Tensor, stream: str, count: int) -> Any:
    given = _array(keys)
    if given is keys:
        counter: Any = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    else:
        counter = np.arange(1, count + 1, dtype=np.int64)
    counter *= _GOLDEN
    return _mix(_mix(_fold(given, stream)[:, None] + counter))  # [B, count]


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
    raw = _tensor(_shift_right(_bits(keys, stream, math.prod(shape)), 64 - bits))
    return raw.to(dtype).add_(0.5).mul_(2.0**-bits).reshape(len(keys), *shape)


def normal(keys: Tensor, stream: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws [B, *shape]; arguments as `uniform`. Tails end at 6.6 standard deviations."""
    count = math.prod(shape)
    raw = _bits(keys, stream, (count + 1) // 2)
    share = _tensor(_shift_right(raw, 32)).to(dtype).add_(0.5).mul_(2.0**-32)
    radius = share.log_().mul_(-2.0).clamp_min_(0.0).sqrt_()
    angle = _tensor(raw & 0xFFFFFFFF).to(dtype).mul_(2.0 * math.pi * 2.0**-32)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both[:, :count].reshape(len(keys), *shape)
