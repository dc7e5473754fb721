"""Samplers of Gaussian paths: from noise to data by the network's guesses of the data under the noise.

A sampler is a function with settings: `Ddim(steps=20)(denoise, path, x, rng)`. It sees the network as `denoise(x, t)`
alone, so that every sampler runs every model of `nn/diffusion.py`, with guidance and with observations as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dgm_models.construct import Choice, NonNegativeFloat, Positive, Range
from dgm_models.ops.paths import Path, Spacing

Spread = Literal["small", "large", "learned"]


class Guess(NamedTuple):
    """What a network says of x_t.

    Attributes:
        x: [B, *event]: E[x_0 | x_t].
        fraction: [B, *event] in [0, 1]: where the reverse step's log-variance lies between the smallest and the
            largest; None of a network that does not say it.
    """

    x: Tensor
    fraction: Tensor | None = None


Denoise = Callable[[Tensor, Tensor], Guess]  # (x_t [B, *event], t scalar float64) -> Guess


@dataclass(frozen=True)
class Sampler(Choice):
    """The contract of a params section such as `sampler: {name: ddim, steps: 20}`.

    Args:
        steps: times at which the network is evaluated.
        guidance: of a model with a condition: 1 samples it, above 1 goes further in its direction, 0 ignores it.
    """

    steps: Positive = 50
    guidance: NonNegativeFloat = 1.0

    @classmethod
    def choices(cls) -> Mapping[str, type]:
        return {sampler.name: sampler for sampler in (Ancestral, Ddim)}

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
            return (0.5 * torch.lerp(small.log(), large.log(), guess.fraction.double())).exp().to(guess.x.dtype)
        return (small if self.spread == "small" else large).sqrt()


@dataclass(frozen=True)
class Ddim(Sampler):
    """x_s = alpha_s x_0 + sqrt(sigma_s^2 - v) eps + sqrt(v) noise, x_0 and eps guessed, v = eta^2 Var q(x_s|x_t,x_0).

    Source: Song et al. 2021, eq. 12 and 16, arXiv:2010.02502.

    Args:
        eta: 0 is deterministic, 1 has the variance of `ancestral`.
        spacing: of the times.
    """

    name: ClassVar[str] = "ddim"
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
