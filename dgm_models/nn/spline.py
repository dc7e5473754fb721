"""Monotone rational-quadratic splines: a map of single numbers with an inverse in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_models.nn.coupling import Bijection

LEAST = 1e-3  # of a bin's share of the interval, and of a slope: bins stay bins, and slopes stay invertible
UNIT = math.log(math.expm1(1 - LEAST))  # softplus of it, plus LEAST, is 1


@dataclass(frozen=True)
class RationalQuadratic(Bijection):
    """On [-bound, bound] a monotone spline of quotients of quadratics, outside of it z = x; slopes are continuous.

    Source: Durkan et al. 2019, eq. 4 to 8, arXiv:1906.04032; Gregory and Delbourgo 1982.

    Args:
        bins: K, the pieces; the K - 1 inner knots have free slopes, the outer two slope 1.
        bound: B.
    Raises: ValueError when so many bins do not fit.
    """

    bins: int
    bound: float

    def __post_init__(self) -> None:
        most = math.ceil(1 / LEAST) - 1
        if not 1 <= self.bins <= most:
            raise ValueError(f"bins: {self.bins}; each takes {LEAST} of the interval at least, so at most {most} fit")

    @property
    def size(self) -> int:
        """K widths, K heights, K - 1 slopes."""
        return 3 * self.bins - 1

    def knots(self, params: Tensor) -> Tensor:
        """[..., 3, K + 1]: places, values and slopes of the knots."""
        raw, slopes = params[..., : 2 * self.bins], params[..., 2 * self.bins :]
        raw = raw.reshape(*raw.shape[:-1], 2, self.bins)
        share = LEAST + (1 - LEAST * self.bins) * raw.softmax(-1)
        inner = (2 * self.bound) * share[..., :-1].cumsum(-1) - self.bound
        edges = F.pad(F.pad(inner, (1, 0), value=-self.bound), (0, 1), value=self.bound)
        slopes = F.pad(F.softplus(slopes + UNIT) + LEAST, (1, 1), value=1.0)
        return torch.cat([edges, slopes[..., None, :]], -2)

    def _piece(self, given: Tensor, params: Tensor, axis: int) -> tuple[Tensor, ...]:
        """(x_k, y_k, width, height, slope at k, slope at k + 1) of the bin that holds `given` along the axis."""
        knots = self.knots(params)
        left = (given[..., None] >= knots[..., axis, 1:-1]).sum(-1, keepdim=True)
        ends = torch.cat([left, left + 1], -1)[..., None, :].expand(*knots.shape[:-1], 2)
        before, after = knots.gather(-1, ends).unbind(-1)  # each [..., 3]
        (x0, y0, d0), (width, height, _) = before.unbind(-1), (after - before).unbind(-1)
        return x0, y0, width, height, d0, after[..., 2]

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.abs() < self.bound
        x0, y0, width, height, d0, d1 = self._piece(x, params, 0)
        s = height / width
        u = torch.where(inside, (x - x0) / width, 0.5)  # place within the bin; what lies outside meets no formula
        v = 1 - u
        below = s + (d0 + d1 - 2 * s) * u * v
        z = y0 + height * (s * u * u + d0 * u * v) / below
        log_slope = (d1 * u * u + 2 * s * u * v + d0 * v * v).log() + 2 * (s.log() - below.log())
        return torch.where(inside, z, x), torch.where(inside, log_slope, 0.0)

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        inside = z.abs() < self.bound
        x0, y0, width, height, d0, d1 = self._piece(z, params, 1)
        s = height / width
        up = torch.where(inside, z - y0, 0.0)
        bend = up * (d0 + d1 - 2 * s)
        a, b, c = height * (s - d0) + bend, height * d0 - bend, -s * up
        # of the two forms of a quadratic's root this one subtracts nothing of equal size: b >= 0 in a monotone piece
        root = (b * b - 4 * a * c).clamp_min(0.0).sqrt()
        return torch.where(inside, x0 + width * (2 * c / (-b - root)), z)
