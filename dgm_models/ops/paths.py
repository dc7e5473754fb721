"""Gaussian paths from data to noise: x_t = alpha(t) x_0 + sigma(t) eps, t = 0 is data and t = 1 is noise.

Every such path is the straight one, w = (1 - r) x_0 + r eps, seen through a scale: w = x_t / (alpha + sigma) and
r = sigma / (alpha + sigma). What is written once for the straight path, such as an ODE solver, holds for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dgm_models.construct import Choice, Positive, PositiveFloat

Spacing = Literal["uniform", "quadratic"]


@dataclass(frozen=True)
class Grid:
    """The times at which a sampler evaluates its network, and data at the end.

    Attributes:
        t: [steps + 1] float64, falling from 1; the last one, 0, is data and no network is evaluated there.
        alpha, sigma: [steps + 1] float64; 1 and 0 at the end, whatever noise the path's smallest time has.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        return len(self.t) - 1


class Path(Choice):
    """The contract of a params section such as `path: {name: cosine}`. sigma / alpha rises with t."""

    @property
    def first(self) -> float:
        """The smallest time at which a network is trained and evaluated."""
        return 1e-3

    @property
    def chain(self) -> Grid:
        """The steps whose variational bound is taken: log(1 + snr) rises by the same amount in each of 1000.

        Of normal data every step then tells the same number of nats, and both ends are finite for every path. Steps
        that are uniform in t double the noise in one step where sigma is near 0.
        """
        low, high = self.snr(torch.tensor([1.0, self.first], dtype=torch.float64)).log1p().tolist()
        t = self._when(torch.linspace(low, high, 1000, dtype=torch.float64).expm1().rsqrt())
        t[0], t[-1] = 1.0, self.first
        return self.at(t)

    @classmethod
    def choices(cls) -> Mapping[str, type]:
        paths = (Linear, Cosine, VariancePreserving, SubVariancePreserving, VarianceExploding, Karras, Straight)
        return {path.name: path for path in paths}

    def alpha(self, t: Tensor) -> Tensor:
        """The scale of data at times t, in float64."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """The noise's standard deviation at times t, in float64."""
        raise NotImplementedError

    def draw(self, u: Tensor) -> Tensor:
        """Times from u in (0, 1): uniform over those at which a network is evaluated."""
        return self.first + (1 - self.first) * u

    def grid(self, steps: int, spacing: Spacing = "uniform") -> Grid:
        """`steps` times from 1 to `first`, and data.

        Args:
            steps: evaluations of the network.
            spacing: "uniform" in t, or "quadratic": t is the square of something uniform, denser near data.
        """
        u = torch.linspace(1, 0, steps, dtype=torch.float64)
        return self.at(self.first + (1 - self.first) * (u if spacing == "uniform" else u.square()))

    def at(self, t: Tensor) -> Grid:
        """The grid of given times [steps], falling; data is added at the end."""
        end = torch.zeros(1, dtype=torch.float64)
        return Grid(torch.cat([t, end]), torch.cat([self.alpha(t), end + 1]), torch.cat([self.sigma(t), end]))

    def snr(self, t: Tensor) -> Tensor:
        """alpha^2 / sigma^2."""
        return (self.alpha(t) / self.sigma(t)).square()

    def ratio(self, t: Tensor) -> Tensor:
        """r = sigma / (alpha + sigma) at times t: the time of the straight path; rises with t."""
        sigma = self.sigma(t)
        return sigma / (self.alpha(t) + sigma)

    def when(self, r: Tensor | float) -> Tensor:
        """The times in [0, 1], float64, at which `ratio` is r; the nearer end for an r that the path has not."""
        r = torch.as_tensor(r, dtype=torch.float64)
        return self._when(r / (1 - r)).clamp(0, 1)

    def _when(self, noise: Tensor) -> Tensor:
        """The times at which sigma / alpha is `noise`, which may be infinite, in float64."""
        raise NotImplementedError


class Tabulated(Path):
    """A chain of `length` steps: alpha^2 at the times i / length is a table, and log alpha^2 linear between them."""

    length: int

    @property
    def first(self) -> float:
        return 1 / self.length

    @property
    def chain(self) -> Grid:
        return self.grid(self.length)

    def squares(self) -> Tensor:
        """[length + 1] float64: alpha^2 after each number of steps, 1 at first."""
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        table = self.squares().log().to(t.device)
        place = t.double() * self.length
        below = place.floor().clamp(0, self.length - 1).long()
        return (0.5 * torch.lerp(table[below], table[below + 1], place - below)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t).square()).sqrt()

    def _when(self, noise: Tensor) -> Tensor:
        rising = -self.squares().log().to(noise.device)
        found = noise.square().log1p().clamp(max=rising[-1])  # -log alpha^2 of a path that preserves variance
        above = torch.searchsorted(rising, found).clamp(min=1)
        return (above - (rising[above] - found) / (rising[above] - rising[above - 1])) / self.length

    def draw(self, u: Tensor) -> Tensor:
        """One of the chain's steps."""
        return ((u.double() * self.length).floor() + 1) / self.length

    def grid(self, steps: int, spacing: Spacing = "uniform") -> Grid:
        """Steps of the chain: the last one first, 0 at the end."""
        if steps > self.length:
            raise ValueError(f"steps: {steps} of a chain that has {self.length}")
        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
        places = ((u if spacing == "uniform" else u.square()) * self.length).round()
        least = torch.arange(steps, 0, -1, dtype=torch.float64)  # no step of the chain is taken twice
        return self.at(torch.maximum(places, least) / self.length)


@dataclass(frozen=True)
class Linear(Tabulated):
    """beta_i rises linearly from `beta_first` to `beta_last`, alpha_i^2 = prod_j<=i (1 - beta_j).

    Source: Ho et al. 2020, section 4, arXiv:2006.11239. The published betas are for 1000 steps; a chain of another
    length has them times 1000 / length, which leaves about the same noise at the end (`beta_last` below 1 is needed).
    """

    name: ClassVar[str] = "linear"
    length: Positive = 1000
    beta_first: PositiveFloat = 1e-4
    beta_last: PositiveFloat = 0.02

    def __post_init__(self) -> None:
        if self.beta_last * 1000 / self.length >= 1:
            raise ValueError(f"beta_last: {self.beta_last:g} * 1000 / {self.length} is not below 1; use more steps")

    def squares(self) -> Tensor:
        betas = torch.linspace(self.beta_first, self.beta_last, self.length, dtype=torch.float64) * 1000 / self.length
        return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])


@dataclass(frozen=True)
class Cosine(Tabulated):
    """alpha_i^2 = f(i) / f(0), f(i) = cos^2(pi/2 (i/length + s) / (1 + s)), every beta_i at most 0.999.

    Source: Nichol and Dhariwal 2021, eq. 17, arXiv:2102.09672.
    """

    name: ClassVar[str] = "cosine"
    length: Positive = 1000
    s: PositiveFloat = 0.008

    def squares(self) -> Tensor:
        u = torch.arange(self.length + 1, dtype=torch.float64) / self.length
        f = ((u + self.s) / (1 + self.s) * (math.pi / 2)).cos().square()
        kept = (f[1:] / f[:-1]).clamp(min=1 - 0.999)
        return torch.cat([torch.ones(1, dtype=torch.float64), kept.cumprod(0)])


@dataclass(frozen=True)
class VariancePreserving(Path):
    """log alpha^2 = -(beta_min t + (beta_max - beta_min) t^2 / 2), sigma^2 = 1 - alpha^2.

    Source: Song et al. 2021, eq. 29 and 32, arXiv:2011.13456.
    """

    name: ClassVar[str] = "variance_preserving"
    beta_min: PositiveFloat = 0.1
    beta_max: PositiveFloat = 20.0

    def __post_init__(self) -> None:
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min: {self.beta_min:g} is above beta_max, {self.beta_max:g}")

    def _log_square(self, t: Tensor) -> Tensor:
        t = t.double()
        return -(self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t.square())

    def alpha(self, t: Tensor) -> Tensor:
        return (0.5 * self._log_square(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(self._log_square(t))).sqrt()

    def _when(self, noise: Tensor) -> Tensor:
        return self._at_log_square(-noise.square().log1p())

    def _at_log_square(self, value: Tensor) -> Tensor:
        """The times at which log alpha^2 is `value`: the root of a quadratic, in the form that does not cancel."""
        lost = -value.clamp(min=-1e6)
        return 2 * lost / (self.beta_min + (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * lost).sqrt())


@dataclass(frozen=True)
class SubVariancePreserving(VariancePreserving):
    """The alpha of the variance-preserving path with the square of its sigma.

    Source: Song et al. 2021, eq. 29, arXiv:2011.13456.
    """

    name: ClassVar[str] = "sub_variance_preserving"

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(self._log_square(t))

    def _when(self, noise: Tensor) -> Tensor:  # alpha is the root of alpha^2 + noise alpha - 1
        return self._at_log_square(2 * (2 / (noise + (noise.square() + 4).sqrt())).log())


class Exploding(Path):
    """Data as they are with noise from `sigma_min`, at time 0, to `sigma_max`: alpha = 1."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min: {self.sigma_min:g} is not below sigma_max, {self.sigma_max:g}")

    @property
    def first(self) -> float:
        return 0.0  # there is noise at time 0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)


@dataclass(frozen=True)
class VarianceExploding(Exploding):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t: geometric.

    Source: Song and Ermon 2019, arXiv:1907.05600; Song et al. 2021, eq. 30, arXiv:2011.13456.
    """

    name: ClassVar[str] = "variance_exploding"
    sigma_min: PositiveFloat = 0.01
    sigma_max: PositiveFloat = 50.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (t.double() * math.log(self.sigma_max / self.sigma_min)).exp()

    def _when(self, noise: Tensor) -> Tensor:
        return (noise / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class Karras(Exploding):
    """alpha = 1, sigma^(1/rho) linear from sigma_min^(1/rho) to sigma_max^(1/rho).

    Source: Karras et al. 2022, eq. 5, arXiv:2206.00364.
    """

    name: ClassVar[str] = "karras"
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 7.0

    def sigma(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        found: Tensor = (low + t.double() * (high - low)) ** self.rho
        return found

    def _when(self, noise: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        found: Tensor = (noise ** (1 / self.rho) - low) / (high - low)
        return found


@dataclass(frozen=True)
class Straight(Path):
    """alpha = 1 - t, sigma = t.

    Source: Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003. Differs: their t is 1 - t.
    """

    name: ClassVar[str] = "straight"

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def when(self, r: Tensor | float) -> Tensor:
        return torch.as_tensor(r, dtype=torch.float64).clamp(0, 1)

    def _when(self, noise: Tensor) -> Tensor:
        return 1 / (1 + 1 / noise)
