"""Restoring an example from what is seen of it: y = A x + noise, x drawn given y by any sampler of a trained model.

A part of an example, a smaller picture, a grey one, one with noise: A is linear, and all that it keeps it scales alike:
A A^T = gain^2 I. A sampler of a Gaussian path sees a network as `denoise`, a Markov chain a model as `energy`; an
observation wraps either function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_models.ops.mcmc import Energy
from dgm_models.ops.paths import Path
from dgm_models.ops.samplers import Denoise, Guess

FLOOR = 1e-3  # of a guess's variance: what is added to all variances, some of which are 0
LEAST = 1e-30  # a divisor that would be 0
TRUSTED = 20.0  # sigma / alpha, in standard deviations of the data, up to which a guess's covariance is asked


class View:
    """What is seen of an example: A, and its pseudo-inverse. Both map a constant to the same constant.

    Attributes:
        gain: A A^T = gain^2 I.
    """

    @property
    def gain(self) -> float:
        return 1.0

    def see(self, x: Tensor) -> Tensor:
        """A x [B, ...] of x [B, *event]."""
        raise NotImplementedError

    def back(self, y: Tensor) -> Tensor:
        """A^+ y [B, *event] of y [B, ...]: of all x with A x = y the smallest."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Part(View):
    """The values that are known; y is [B, number of them].

    Args:
        known: [*event] bool.
    """

    known: Tensor

    def see(self, x: Tensor) -> Tensor:
        return x[:, self.known.to(x.device)]

    def back(self, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), *self.known.shape)
        x[:, self.known.to(y.device)] = y
        return x


@dataclass(frozen=True)
class Smaller(View):
    """The means over squares of factor x factor pixels; y is [B, C, H / factor, W / factor]."""

    factor: int

    @property
    def gain(self) -> float:
        return 1 / self.factor

    def see(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor)

    def back(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


@dataclass(frozen=True)
class Grey(View):
    """The mean over the channels; y is [B, 1, H, W]."""

    channels: int

    @property
    def gain(self) -> float:
        return 1 / math.sqrt(self.channels)

    def see(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)

    def back(self, y: Tensor) -> Tensor:
        return y.expand(-1, self.channels, -1, -1)


@dataclass(frozen=True)
class Whole(View):
    """All of it, which is of use where it has noise; y is [B, *event]."""

    def see(self, x: Tensor) -> Tensor:
        return x

    def back(self, y: Tensor) -> Tensor:
        return y


@dataclass(frozen=True, eq=False)
class Observation:
    """y = A x + noise eps, in a model's space.

    Args:
        y: [B, ...].
        view: A.
        noise: standard deviation of y's noise.
        rounds: of the conjugate gradients that tell what a guess of the data has to do with what is seen of it; each
            takes a backward pass of the network. 0: what is not seen stays as it is guessed.
    """

    y: Tensor
    view: View
    noise: float = 0.0
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"rounds: {self.rounds}; expected at least 0")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def spread(self) -> float:
        """Standard deviation of A^+ y around A^+ A x, in every direction that is seen."""
        return self.noise / self.view.gain

    def seen(self, x: Tensor) -> Tensor:
        """A^+ A x [B, *event]: the part of x that is seen."""
        return self.view.back(self.view.see(x))

    def missed(self, x: Tensor) -> Tensor:
        """A^+ (y - A x) [B, *event]: what has to be added to x for A x = y."""
        return self.view.back(self.y.to(x.dtype) - self.view.see(x))

    def meet(self, x: Tensor) -> Tensor:
        """The nearest [B, *event] to x that looks like y, where y has no noise; x itself where it has."""
        return x if self.noise else x + self.missed(x)

    # ---- Gaussian paths

    def denoise(self, denoise: Denoise, path: Path, bound: float = math.inf) -> Denoise:
        """E[x_0 | x_t, y] in the place of E[x_0 | x_t], for any sampler of the path.

        Args:
            denoise: the network.
            path: of the model.
            bound: the largest size of a value of the data.
        """
        if isinstance(self.view, Whole):
            return self._two_views(denoise, path)
        return self._corrected(denoise, path, bound)

    def _two_views(self, denoise: Denoise, path: Path) -> Denoise:
        """x_t / alpha and y are the same x_0 with noise: their weighted mean is one such view with less noise.

        Exact for every distribution of the data.
        """
        if not self.noise:
            raise ValueError("noise: 0; all of the example is seen as it is, and nothing is left to be restored")

        def together(x: Tensor, t: Tensor) -> Guess:
            of_x, of_y = path.snr(t), self.noise**-2
            variance = 1 / (of_x + of_y)
            z = (variance * path.alpha(t) / path.sigma(t) ** 2) * x + (variance * of_y) * self.y.to(x.dtype)
            noise = variance.sqrt()
            s = path.when(noise / (1 + noise)).clamp_min(path.first)
            return denoise(path.alpha(s) * z, s)

        return together

    def _corrected(self, denoise: Denoise, path: Path, bound: float) -> Denoise:
        """D + C P (P C P + spread^2)^-1 (A^+ y - P D), D = denoise(x_t), P = A^+ A, C = (sigma^2 / alpha) dD/dx_t.

        C is Cov[x_0 | x_t] where D is exact (Tweedie), so this is E[x_0 | x_t, y] of normal data. The system is solved
        by `rounds` of conjugate gradients. What they leave of A^+ y - P D is added as far as it is larger than y's
        noise: the share 1 - spread^2 / (its mean square) of it. Without noise that is all, and A x = y at the end.
        Where the noise is above `TRUSTED`, no round is made: the errors of a network's D are multiplied by
        (sigma / alpha)^2 in C.

        Source: Wang, Yu, Zhang 2023, arXiv:2212.00490 (the null-space method), which is this with `rounds` 0; Song et
        al. 2023, ICLR (pseudo-inverse guidance); Boys et al. 2023, arXiv:2310.06721 (with this C). Differs: the
        scaling for a y with noise depends on the guess alone, not on the step of a sampler, so any sampler has it.
        """
        variance = self.spread**2

        def corrected(x: Tensor, t: Tensor) -> Guess:
            alpha, sigma = path.alpha(t), path.sigma(t)
            rounds = self.rounds if sigma <= TRUSTED * alpha else 0
            with torch.set_grad_enabled(rounds > 0):
                given = x.detach().requires_grad_(rounds > 0)
                guess = denoise(given, t)
            found = guess.x.detach()
            left = self.missed(found)
            square = _dot(left, left) / self.y[0].numel()  # its mean, over the directions that are seen
            share = (1 - variance / square.clamp_min(LEAST)).clamp_min(0)
            added, direction = variance + FLOOR * square, left
            for _ in range(rounds):
                (slope,) = torch.autograd.grad(guess.x, given, direction, retain_graph=True)
                moved = sigma**2 / alpha * slope  # C direction
                ahead = self.seen(moved) + added * direction
                size, curvature = _dot(left, left), _dot(direction, ahead)
                convex = curvature > 0.5 * added * _dot(direction, direction)  # of a covariance; a network may err
                step = torch.where(convex, size / curvature.clamp_min(LEAST), 0.0)
                found, left = found + step * moved, left - step * ahead
                direction = left + _dot(left, left) / size.clamp_min(LEAST) * direction
            found = found.clamp(-bound, bound)
            return Guess(found + share * left if self.noise else self.meet(found), guess.fraction)

        return corrected

    # ---- energies

    def place(self, v: Tensor) -> Tensor:
        """The x [B, *event] of a chain's v [B, *event]: v where nothing is seen, A^+ y + spread v where it is.

        So v has a standard deviation of about 1 where x has that of y's noise, and one step fits all.
        """
        seen = self.seen(v)
        return v - seen + self.view.back(self.y.to(v.dtype)) + self.spread * seen

    def energy(self, energy: Energy) -> Energy:
        """-log p(x | y) + const [B] nats as a function of v, x = `place(v)`: E(x) + |A^+ A v|^2 / 2, for any chain."""
        return lambda v: energy(self.place(v)) + 0.5 * self.seen(v).square().flatten(1).sum(1)

    def start(self, x: Tensor) -> Tensor:
        """The v [B, *event] of which the place is x where nothing is seen, and A^+ y where it is."""
        return x - self.seen(x)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[B, 1, ..]: the inner products of the rows."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))
