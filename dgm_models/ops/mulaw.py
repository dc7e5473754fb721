"""mu-law companding: amplitudes in [-1, 1] as a few levels, fine where the amplitude is small.

Source: ITU-T G.711 (continuous form); van den Oord et al. 2016, section 2.2, arXiv:1609.03499.
"""

from __future__ import annotations

import math

from torch import Tensor


def compress(x: Tensor, levels: int = 256) -> Tensor:
    """The level nearest to f(x) = sign(x) log(1 + mu |x|) / log(1 + mu), mu = levels - 1, of `levels` from -1 to 1.

    Args:
        x: amplitudes in [-1, 1]; what lies beyond is clipped.
        levels: how many.
    Returns: int64 in 0..levels-1, of the same shape. `compress(expand(q)) == q`.
    """
    mu = levels - 1
    x = x.double().clamp(-1.0, 1.0)
    companded = x.sign() * (mu * x.abs()).log1p() / math.log1p(mu)
    return ((companded + 1) * (mu / 2) + 0.5).floor().long()


def expand(q: Tensor, levels: int = 256) -> Tensor:
    """The amplitude of a level: the inverse of f at 2 q / mu - 1.

    Args:
        q: integers in 0..levels-1.
        levels: how many.
    Returns: float64 in [-1, 1], of the same shape.
    """
    mu = levels - 1
    companded = q.double() * (2 / mu) - 1
    return companded.sign() * (companded.abs() * math.log1p(mu)).expm1() / mu
