"""Samplers of Gaussian paths: from noise to data by the network's guesses of the data under the noise.

A sampler is a function with settings: `Ddim(steps=20)(denoise, path, x, rng)`. It sees the network as `denoise(x, t)`
alone, so that every sampler runs every model of `nn/diffusion.py`, with guidance and with observations as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dgm_models.construct import Choice, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Range
from dgm_models.ops.ode import rk45
from dgm_models.ops.paths import Grid, Path, Spacing

Spread = Literal["small", "large", "learned"]


class Guess(NamedTuple):
    """What a network says of x_t.

    Attributes:
        x: [B, *event]: E[x_0 | x_t].
        fraction: [B, *event]: where the reverse step's log-variance lies between the smallest, 0, and the largest, 1;
            nothing keeps a network from going further. None of a network that does not say it.
    """

    x: Tensor
    fraction: Tensor | None = None


Denoise = Callable[[Tensor, Tensor], Guess]  # (x_t [B, *event], t scalar float64) -> Guess


@dataclass(frozen=True)
class Sampler(Choice):
    """The contract of a params section such as `sampler: {name: ddim, steps: 20}`.

    Args:
        guidance: of a model with a condition: 1 samples it, above 1 goes further in its direction, 0 ignores it.
    """

    guidance: NonNegativeFloat = 1.0

    @classmethod
    def choices(cls) -> Mapping[str, type]:
        samplers = (Ancestral, Ddim, Euler, Heun, Ode, DpmSolver, Edm, PredictorCorrector, AnnealedLangevin)
        return {sampler.name: sampler for sampler in samplers}

    def __call__(self, denoise: Denoise, path: Path, x: Tensor, rng: torch.Generator) -> Tensor:
        """Data [B, *event] from noise x [B, *event] of time 1.

        Args:
            denoise: the network; every call is one evaluation.
            path: of the model.
            x: x_1.
            rng: of all draws.
        """
        raise NotImplementedError


def normal_like(x: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal draws of x's shape."""
    return torch.randn(x.shape, generator=rng, device=rng.device, dtype=x.dtype)


@dataclass(frozen=True)
class Ancestral(Sampler):
    """x_s ~ q(x_s | x_t, x_0) with the guess for x_0; no noise in the last step.

    Source: Ho et al. 2020, algorithm 2, arXiv:2006.11239. Differs: for every Gaussian path, and for some of the times.

    Args:
        steps: times at which the network is evaluated.
        spread: the variance of a step: "small", that of q(x_s | x_t, x_0); "large", that of q(x_t | x_s); "learned",
            between the two as the network says.
    """

    name: ClassVar[str] = "ancestral"
    steps: Positive = 1000
    spread: Spread = "small"

    def __call__(self, denoise: Denoise, path: Path, x: Tensor, rng: torch.Generator) -> Tensor:
        grid = path.grid(self.steps)
        for i in range(len(grid)):
            alpha, sigma = grid.alpha[i], grid.sigma[i]
            alpha_next, sigma_next = grid.alpha[i + 1], grid.sigma[i + 1]
            guess = denoise(x, grid.t[i])
            kept = alpha / alpha_next
            added = sigma**2 - kept**2 * sigma_next**2  # the variance of q(x_t | x_s)
            small = added * sigma_next**2 / sigma**2
            x = (kept * sigma_next**2 / sigma**2) * x + (alpha_next * added / sigma**2) * guess.x
            if i + 1 < len(grid):
                x = x + self._deviation(guess, small, added) * normal_like(x, rng)
        return x

    def _deviation(self, guess: Guess, small: Tensor, large: Tensor) -> Tensor:
        if self.spread == "learned":
            if guess.fraction is None:
                raise ValueError("sampler.spread: this network has not learned a variance; use small or large")
            log_variance = small.log() + guess.fraction.double() * (large / small).log()
            return (0.5 * log_variance).exp().to(guess.x.dtype)
        return (small if self.spread == "small" else large).sqrt()


@dataclass(frozen=True)
class Ddim(Sampler):
    """x_s = alpha_s x_0 + sqrt(sigma_s^2 - v) eps + sqrt(v) noise, x_0 and eps guessed, v = eta^2 Var q(x_s|x_t,x_0).

    Source: Song et al. 2021, eq. 12 and 16, arXiv:2010.02502.

    Args:
        steps: times at which the network is evaluated.
        eta: 0 is deterministic, 1 has the variance of `ancestral`.
        spacing: of the times.
    """

    name: ClassVar[str] = "ddim"
    steps: Positive = 50
    eta: Annotated[float, Range(0, 1)] = 0.0
    spacing: Spacing = "uniform"

    def __call__(self, denoise: Denoise, path: Path, x: Tensor, rng: torch.Generator) -> Tensor:
        grid = path.grid(self.steps, self.spacing)
        for i in range(len(grid)):
            alpha, sigma = grid.alpha[i], grid.sigma[i]
            alpha_next, sigma_next = grid.alpha[i + 1], grid.sigma[i + 1]
            guess = denoise(x, grid.t[i]).x
            eps = (x - alpha * guess) / sigma
            variance = self.eta**2 * (sigma_next / sigma) ** 2 * (sigma**2 - (alpha / alpha_next * sigma_next) ** 2)
            x = alpha_next * guess + (sigma_next**2 - variance).clamp_min(0).sqrt() * eps
            if self.eta and i + 1 < len(grid):
                x = x + variance.sqrt() * normal_like(x, rng)
        return x


@dataclass(frozen=True)
class Euler(Sampler):
    """The probability-flow ODE dw/dr = eps - x_0 in steps of order 1: `ddim` with eta 0, written as what it is.

    Source: Song et al. 2021, eq. 13, arXiv:2011.13456. Differs: in the coordinates of the straight path.

    Args:
        steps: of the solver.
        spacing: of the times.
    """

    name: ClassVar[str] = "euler"
    corrected: ClassVar[bool] = False
    steps: Positive = 50
    spacing: Spacing = "uniform"

    def __call__(self, denoise: Denoise, path: Path, x: Tensor, rng: torch.Generator) -> Tensor:
        grid = path.grid(self.steps, self.spacing)
        scale = grid.alpha + grid.sigma
        r = grid.sigma / scale
        w = x.double() / scale[0]
        for i in range(len(grid)):
            slope = (w - denoise(scale[i] * w, grid.t[i]).x) / r[i]
            there = w + (r[i + 1] - r[i]) * slope
            if self.corrected and i + 1 < len(grid):
                ahead = (there - denoise(scale[i + 1] * there, grid.t[i + 1]).x) / r[i + 1]
                there = w + (r[i + 1] - r[i]) * (slope + ahead) / 2
            w = there
        return w


@dataclass(frozen=True)
class Heun(Euler):
    """The probability-flow ODE in steps of order 2; the last one is of order 1, so n steps take 2 n - 1 evaluations.

    Source: Karras et al. 2022, algorithm 1, arXiv:2206.00364. Differs: in the coordinates of the straight path.
    """

    name: ClassVar[str] = "heun"
    corrected: ClassVar[bool] = True
    steps: Positive = 25


@dataclass(frozen=True)
class Ode(Sampler):
    """The probability-flow ODE down to the path's smallest time in steps that meet a tolerance, then the guess there.

    Source: Song et al. 2021, section 4.3, arXiv:2011.13456. Differs: in the coordinates of the straight path.

    Args:
        tolerance: relative and absolute, of a step.
    """

    name: ClassVar[str] = "ode"
    tolerance: PositiveFloat = 1e-5

    def __call__(self, denoise: Denoise, path: Path, x: Tensor, rng: torch.Generator) -> Tensor:
        def guess(r: float, w: Tensor) -> Tensor:
            t = path.when(r)
            return denoise((path.alpha(t) + path.sigma(t)) * w, t).x

        grid = path.at(torch.tensor([1.0, path.first], dtype=torch.float64))
        scale = grid.alpha + grid.sigma
        start, stop, _ = (grid.sigma / scale).tolist()
        w = rk45(lambda r, w: (w - guess(r, w)) / r, x.double() / scale[0], start, stop, self.tolerance).y
        return guess(stop, w)


@dataclass(frozen=True)
class DpmSolver(Sampler):
    """DPM-Solver++(2M): x_s = sigma_s / sigma_t x_t - alpha_s (exp(-h) - 1) D, D extrapolated from two guesses.

    h is the step in log(alpha / sigma). The first two steps and those that end at the path's smallest time or at data
    are of order 1: h is infinite or long beside the step before it, even from a time without data.

    Source: Lu et al. 2022, algorithm 2, arXiv:2211.01095.

    Args:
        steps: times at which the network is evaluated.
        spacing: of the times.
    """

    name: ClassVar[str] = "dpm_solver"
    steps: Positive = 20
    spacing: Spacing = "uniform"

    def __call__(self, denoise: Denoise, path: Path, x: Tensor, rng: torch.Generator) -> Tensor:
        grid = path.grid(self.steps, self.spacing)
        h = (grid.alpha / grid.sigma).log().diff()
        x, before = x.double(), None
        for i in range(len(grid)):
            guess = denoise(x, grid.t[i]).x
            blend = guess
            if before is not None and grid.t[i + 1] > path.first:
                blend = guess + 0.5 * (h[i] / h[i - 1]) * (guess - before)
            x = grid.sigma[i + 1] / grid.sigma[i] * x - grid.alpha[i + 1] * (-h[i]).expm1() * blend
            before = guess
        return x


def _clean(path: Path, grid: Grid, name: str) -> None:
    """Raises ValueError for a path that has no data at time 1: x / alpha is not finite there."""
    if not grid.alpha[0] > 0:
        raise ValueError(
            f"sampler.name: {name} needs a path whose alpha is above 0 at time 1, which {path.name} has not; "
            f"use heun, ode, ddim or dpm_solver"
        )


@dataclass(frozen=True)
class Edm(Sampler):
    """Heun's steps of dy/ds = (y - D) / s in y = x / alpha, s = sigma / alpha, each after noise is added ("churn").

    n steps take 2 n - 1 evaluations. With `churn` 0 it is deterministic.

    Source: Karras et al. 2022, algorithm 2, arXiv:2206.00364. Differs: no noise goes above the path's largest.

    Args:
        steps: of the solver.
        churn: S_churn: s grows by the factor 1 + min(churn / steps, sqrt(2) - 1) before a step.
        churn_min, churn_max: S_min and S_max: only where s is between them; None for no upper end.
        churn_scale: S_noise: the standard deviation of what is added, in units of what it should be.
    """

    name: ClassVar[str] = "edm"
    steps: Positive = 18
    churn: NonNegativeFloat = 0.0
    churn_min: NonNegativeFloat = 0.0
    churn_max: PositiveFloat | None = None
    churn_scale: PositiveFloat = 1.0

    def __call__(self, denoise: Denoise, path: Path, x: Tensor, rng: torch.Generator) -> Tensor:
        grid = path.grid(self.steps)
        _clean(path, grid, self.name)
        noise = grid.sigma / grid.alpha
        top = math.inf if self.churn_max is None else self.churn_max
        y = x.double() / grid.alpha[0]
        for i in range(len(grid)):
            t, s, s_next = grid.t[i], noise[i], noise[i + 1]
            if self.churn and i and self.churn_min <= s <= top:
                s_hat = (s * (1 + min(self.churn / self.steps, math.sqrt(2) - 1))).clamp(max=noise[0])
                y = y + (s_hat.square() - s.square()).sqrt() * self.churn_scale * normal_like(y, rng)
                s, t = s_hat, path.when(s_hat / (1 + s_hat))
            slope = (y - denoise(path.alpha(t) * y, t).x) / s
            there = y + (s_next - s) * slope
            if i + 1 < len(grid):
                ahead = (there - denoise(grid.alpha[i + 1] * there, grid.t[i + 1]).x) / s_next
                there = y + (s_next - s) * (slope + ahead) / 2
            y = there
        return y


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """The reverse diffusion x_s = (2 - k) x_t + v score + sqrt(v) noise, k = alpha_t / alpha_s and v = Var q(x_t|x_s),
    and after every step Langevin steps of size 2 (k snr sigma_s)^2 at the time that it has reached.

    n steps take n + (n - 1) `corrections` evaluations. The last step gives the guess.

    Source: Song et al. 2021, appendix E and G, algorithms 2 to 5, arXiv:2011.13456. Differs: the size of a Langevin
    step there has |noise| / |score| for sigma, a mean over the batch: a sample then depends on what it is drawn with.

    Args:
        steps: of the reverse diffusion.
        corrections: Langevin steps after each.
        snr: their signal-to-noise ratio.
    """

    name: ClassVar[str] = "predictor_corrector"
    steps: Positive = 500
    corrections: NonNegative = 1
    snr: PositiveFloat = 0.16

    def __call__(self, denoise: Denoise, path: Path, x: Tensor, rng: torch.Generator) -> Tensor:
        grid = path.grid(self.steps)
        _clean(path, grid, self.name)

        def score(x: Tensor, i: int) -> Tensor:
            return (grid.alpha[i] * denoise(x, grid.t[i]).x - x) / grid.sigma[i].square()

        for i in range(len(grid) - 1):
            kept = grid.alpha[i] / grid.alpha[i + 1]
            added = grid.sigma[i].square() - (kept * grid.sigma[i + 1]).square()
            x = (2 - kept) * x + added * score(x, i) + added.sqrt() * normal_like(x, rng)
            size = 2 * (kept * self.snr * grid.sigma[i + 1]).square()
            for _ in range(self.corrections):
                x = x + size * score(x, i + 1) + (2 * size).sqrt() * normal_like(x, rng)
        return denoise(x, grid.t[-2]).x


@dataclass(frozen=True)
class AnnealedLangevin(Sampler):
    """`moves` Langevin steps y + a / 2 score + sqrt(a) noise at every level s of noise, a = share s^2.

    In y = x / alpha and s = sigma / alpha, where the score is (D - y) / s^2; n levels take n `moves` + 1 evaluations.
    The last one gives the guess at the smallest level.

    Source: Song and Ermon 2019, algorithm 1, arXiv:1907.05600; the guess at the end: Song and Ermon 2020,
    arXiv:2006.09011. Differs: `share` is their eps / sigma_L^2, 2e-5 / 0.01^2, which holds for any smallest level.

    Args:
        steps: levels, along the path.
        moves: T, Langevin steps at a level.
        share: of s^2; from 4 on the steps do not settle.
    """

    name: ClassVar[str] = "annealed_langevin"
    steps: Positive = 10
    moves: Positive = 100
    share: Annotated[float, Range(0, 4, "both")] = 0.2

    def __call__(self, denoise: Denoise, path: Path, x: Tensor, rng: torch.Generator) -> Tensor:
        grid = path.grid(self.steps)
        _clean(path, grid, self.name)
        y = x.double() / grid.alpha[0]
        for i in range(len(grid)):
            deviation = math.sqrt(self.share) * grid.sigma[i] / grid.alpha[i]
            for _ in range(self.moves):
                guess = denoise(grid.alpha[i] * y, grid.t[i]).x
                y = y + self.share / 2 * (guess - y) + deviation * normal_like(y, rng)
        return denoise(grid.alpha[-2] * y, grid.t[-2]).x
