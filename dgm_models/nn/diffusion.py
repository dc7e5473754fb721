"""The shell of diffusion models: a Gaussian path, a network that guesses the data under the noise, and a sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dgm_models.codecs import continuous
from dgm_models.conditions import Condition
from dgm_models.nn.backbones import Backbone, Denoiser
from dgm_models.nn.conditioner import check
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops.paths import Path, Straight
from dgm_models.ops.restoration import Observation
from dgm_models.ops.samplers import Denoise, Guess, Sampler
from dgm_models.protocols import Batch, DataSpec, Model

Predicts = Literal["noise", "data", "velocity", "direction", "edm"]


class Scaling(NamedTuple):
    """x_0 = skip x_t + out F(into x_t, c): how a network's output F is read; each [B] in float64.

    Source: Karras et al. 2022, table 1 and eq. 7, arXiv:2206.00364.
    """

    skip: Tensor
    out: Tensor
    into: Tensor
    c: Tensor


def scaling(predicts: Predicts, t: Tensor, alpha: Tensor, sigma: Tensor, spread: float) -> Scaling:
    """What the network's output F is.

    Args:
        predicts: "noise": F = eps. "data": F = x_0. "velocity": F = alpha eps - sigma x_0 (Salimans and Ho 2022,
            arXiv:2202.00512). "direction": F = eps - x_0 (Lipman et al. 2023, arXiv:2210.02747). "edm": the F whose
            target has variance 1 for data of standard deviation `spread` (Karras et al. 2022, arXiv:2206.00364).
        t, alpha, sigma: [B] of the path.
        spread: of the data, for "edm" and for the scale of inputs.
    """
    square = (alpha * spread).square() + sigma.square()  # the variance of x_t
    into = square.rsqrt()
    c = 1000 * t.double()
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if predicts == "noise":
        return Scaling(1 / alpha, -sigma / alpha, into, c)
    if predicts == "data":
        return Scaling(zero, one, into, c)
    if predicts == "velocity":
        length = alpha.square() + sigma.square()
        return Scaling(alpha / length, -sigma / length, into, c)
    if predicts == "direction":
        return Scaling(1 / (alpha + sigma), -sigma / (alpha + sigma), into, c)
    c = 250 * (sigma / alpha).log().clamp(max=10)  # the straight path ends without data: alpha is 0
    return Scaling(alpha * spread**2 / square, sigma * spread * into, into, c)


class Diffusion(Model):
    """p(x_0) as what a reverse process makes of noise: x_t = alpha(t) x_0 + sigma(t) eps.

    Args:
        data: what is modelled.
        path: alpha and sigma.
        network: the backbone.
        predicts: what its output is; see `scaling`.
        sampler: how samples are drawn; `resampled` gives the model another one.
        condition: what a sample is asked for, or None.
        optional: the condition can be left out, which guidance needs.
        spread: the standard deviation of the data in model space.
        learned_spread: the network says the variance of a reverse step as well.
    Raises: ValueError for a network that predicts noise on a path whose end has no data: nothing follows from it there.
    """

    tightens = False

    def __init__(
        self,
        data: DataSpec,
        path: Path,
        network: Backbone,
        predicts: Predicts,
        sampler: Sampler,
        condition: Condition | None = None,
        optional: bool = False,
        spread: float = 1.0,
        learned_spread: bool = False,
    ) -> None:
        super().__init__(data, continuous(data))
        if predicts == "noise" and isinstance(path, Straight):
            raise ValueError(f"predicts: noise says nothing of the data at the end of path {path.name}; use direction")
        self.path, self.predicts, self.spread = path, predicts, spread
        self.condition, self.optional = condition, optional
        self.sampling = sampler
        self.network = Denoiser(network, data, 1 + learned_spread, condition, optional)

    def column(self, values: Tensor, like: Tensor) -> Tensor:
        """[B] -> [B, 1, ..] in the type of `like` [B, *event]."""
        return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    def scaling(self, t: Tensor) -> Scaling:
        """Of times t [B]."""
        return scaling(self.predicts, t, self.path.alpha(t), self.path.sigma(t), self.spread)

    def noisy(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t [B, *event] of data x, times t [B] and noise eps."""
        return self.column(self.path.alpha(t), x) * x + self.column(self.path.sigma(t), x) * eps

    def target(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The F [B, *event] that gives data x back from x_t: (x - skip x_t) / out.

        Taken as a x + b eps, with a and b in float64: at small noise x - skip x_t is a difference of nearly equal
        numbers, of which float32 would leave few digits.
        """
        scales, alpha, sigma = self.scaling(t), self.path.alpha(t), self.path.sigma(t)
        a, b = (1 - scales.skip * alpha) / scales.out, -scales.skip * sigma / scales.out
        return self.column(a, x) * x + self.column(b, x) * eps

    def outputs(self, x: Tensor, t: Tensor, cond: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """The network's output [B, outputs, *event] at x_t [B, *event] and t [B]: F, and what else it says."""
        scales = self.scaling(t)
        found: Tensor = self.network(self.column(scales.into, x) * x, scales.c.to(x.dtype), cond, keep)
        return found

    def guess(self, x: Tensor, t: Tensor, cond: Tensor | None = None, keep: Tensor | None = None) -> Guess:
        """What the network says of x_t [B, *event] at t [B]."""
        return self.read(x, t, self.outputs(x, t, cond, keep))

    def read(self, x: Tensor, t: Tensor, found: Tensor) -> Guess:
        """What the network's output [B, outputs, *event] says of x_t [B, *event] at t [B]."""
        scales = self.scaling(t)
        x_0 = self.column(scales.skip, x) * x + self.column(scales.out, x) * found[:, 0]
        return Guess(x_0, found[:, 1].add(1).div(2) if found.shape[1] > 1 else None)

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t] [B, *event] at x_t [B, *event] and t [B], as far as the network has learned it."""
        return self.guess(x, t, cond).x

    def score(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The gradient of log p_t at x [B, *event], t [B] above 0: (alpha E[x_0|x_t] - x) / sigma^2 (Tweedie).

        Taken from the network's output with factors in float64, for the reason that `target` tells.
        """
        scales, alpha, variance = self.scaling(t), self.path.alpha(t), self.path.sigma(t).square()
        found = self.outputs(x, t, cond)[:, 0]
        of_x, of_found = (alpha * scales.skip - 1) / variance, alpha * scales.out / variance
        return self.column(of_x, x) * x + self.column(of_found, x) * found

    # ---- samples

    def noise(self, n: int, rng: torch.Generator) -> Tensor:
        """x_1 [n, *event]."""
        dtype = next(self.parameters()).dtype
        sigma = float(self.path.sigma(torch.ones(1)))
        return sigma * torch.randn(n, *self.data.shape, generator=rng, device=rng.device, dtype=dtype)

    def denoiser(self, cond: Tensor | None) -> Denoise:
        """`denoise` as samplers call it: with guidance and within the data's range; it counts `evaluations`.

        Source: Ho and Salimans 2022, eq. 6, arXiv:2207.12598, whose w is guidance - 1.
        """
        guidance = self.sampling.guidance
        if guidance != 1 and (cond is None or not self.optional):
            raise ValueError(
                f"sampling.guidance: {guidance:g} needs a model with a condition that was at times left out in training"
            )
        self.evaluations = 0

        def denoise(x: Tensor, t: Tensor) -> Guess:
            dtype = next(self.parameters()).dtype
            given, times = x.to(dtype), t.to(x.device).expand(len(x))
            found = self.guess(given, times, cond)
            self.evaluations += 1
            if guidance != 1:
                plain = self.guess(given, times, cond, torch.zeros(len(x), dtype=torch.bool, device=x.device))
                self.evaluations += 1
                found = Guess(torch.lerp(plain.x, found.x, guidance), found.fraction)
            x_0 = found.x if self.data.levels is None else found.x.clamp(-1, 1)
            return Guess(x_0.to(x.dtype), found.fraction)

        return denoise

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        x: Tensor = self.sampling(self.denoiser(cond), self.path, self.noise(n, rng), rng)
        return x.to(next(self.parameters()).dtype)

    @torch.no_grad()
    def restore(self, seen: Observation, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """As `sample`, given what is seen of every sample; with any of the samplers."""
        check(self.condition, cond)
        bound = math.inf if self.data.levels is None else 1.0
        denoise = seen.denoise(self.denoiser(cond), self.path, bound)
        x: Tensor = self.sampling(denoise, self.path, self.noise(len(seen), rng), rng)
        return seen.meet(x).to(next(self.parameters()).dtype)

    # ---- the variational bound

    def elbo(self, x: Tensor, rng: torch.Generator, cond: Tensor | None = None, k: int = 1) -> Tensor:
        """[B] nats: an unbiased estimate of the bound of log p(x) by the reverse chain, from k of its steps.

        The chain is `path.chain`. Its last step, x_0 from the smallest noise, and its end at t = 1 are always
        counted. k steps between are drawn, one from each of k parts that tell as much of normal data of standard
        deviation `spread`, and weighted by their probability. More draws make the estimate less noisy and the bound
        no tighter.

        Source: Ho et al. 2020, eq. 5, arXiv:2006.11239; Kingma et al. 2021, eq. 11, arXiv:2107.00630. Differs: the
        data are dequantised and the last step is a Gaussian density of them, where the paper has a probability.
        """
        check(self.condition, cond)
        times = self.path.chain.t.to(x.device)
        told = (
            self.spread**2 * self.path.snr(times[:-1])
        ).log1p()  # twice the nats up to a time; rises along the chain
        steps, total = told.diff(), told[-1] - told[0]
        found = self._end(x) + self._first(x, times[-2].expand(len(x)), rng, cond)
        between = torch.zeros_like(found)
        for part in range(k if len(steps) else 0):  # a chain of one step has none between
            u = torch.rand(len(x), generator=rng, device=rng.device, dtype=torch.float64)
            i = torch.searchsorted(
                told[1:-1].contiguous(), told[0] + (part + u) / k * total
            )  # times[i] to times[i + 1]
            eps = torch.randn(x.shape, generator=rng, device=rng.device, dtype=x.dtype)
            guess = self.guess(self.noisy(x, times[i], eps), times[i], cond)
            between = between + self.step_kl(x, guess, times[i], times[i + 1]) * (total / steps[i])
        return -(found + between / k).to(x.dtype)

    def step_kl(self, x: Tensor, guess: Guess, t: Tensor, s: Tensor) -> Tensor:
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) [B] nats of data x, a guess at x_t, and times t and s < t [B].

        The variance of p is what the network says, or what it is for normal data of standard deviation `spread`:
        that of q(x_t | x_s) where the noise is small beside the data, that of q(x_s | x_t, x_0) where it is large.
        """
        path = self.path
        kept = path.alpha(t) / path.alpha(s)
        large = path.sigma(t).square() - (kept * path.sigma(s)).square()
        small = large * (path.sigma(s) / path.sigma(t)).square()
        weight = path.alpha(s) * large / path.sigma(t).square()
        apart = (self.column(weight, x) * (guess.x - x)).double().square()
        normal = small + weight.square() * self._unsaid(t)
        log_small, log_large, log_said = (self.column(value.log(), apart) for value in (small, large, normal))
        if guess.fraction is not None:
            log_said = log_small + guess.fraction.double() * (log_large - log_small)
        each = log_said - log_small + (log_small - log_said).exp() - 1 + apart * (-log_said).exp()
        return 0.5 * each.flatten(1).sum(1)

    def _unsaid(self, t: Tensor) -> Tensor:
        """Var[x_0 | x_t] of normal data of standard deviation `spread`, at times t [B]."""
        return 1 / (self.spread**-2 + self.path.snr(t))

    def _end(self, x: Tensor) -> Tensor:
        """KL(q(x_1 | x_0) || N(0, sigma(1)^2)) [B] nats."""
        one = torch.ones(1, device=x.device)
        return 0.5 * self.path.snr(one) * x.double().square().flatten(1).sum(1)

    def _first(self, x: Tensor, t: Tensor, rng: torch.Generator, cond: Tensor | None) -> Tensor:
        """-log N(x_0; E[x_0 | x_t], Var[x_0 | x_t]) [B] nats at the smallest time."""
        eps = torch.randn(x.shape, generator=rng, device=rng.device, dtype=x.dtype)
        apart = (self.denoise(self.noisy(x, t, eps), t, cond) - x).double().square().flatten(1).sum(1)
        variance = self._unsaid(t)
        return 0.5 * (apart / variance + self.data.dims * (2 * math.pi * variance).log())


class Denoising(Objective):
    """E_t,eps |F - F*|^2, F* the output that gives back the data: the squared error in units of the network's output.

    That is the loss of DDPM (F = eps), of progressive distillation (velocity), of flow matching (direction), of EDM,
    whose weight makes it so, and of denoising score matching with the weight sigma^2 (F = eps).

    Args:
        drop: the share of examples whose condition is left out.
    """

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def times(self, model: Diffusion, batch: Batch) -> Tensor:
        """[B] in (0, 1]: uniform over the path's times."""
        return model.path.draw(batch.uniform("time", ()))

    def keep(self, model: Diffusion, batch: Batch) -> Tensor | None:
        """[B] bool: whose condition the network is told; None for all."""
        if not (self.drop and model.condition):
            return None
        return batch.uniform("condition", ()) >= self.drop

    def pair(self, model: Diffusion, batch: Batch) -> tuple[Tensor, Tensor]:
        """Data and noise [B, *event] each."""
        return batch.x, batch.normal("noise", batch.x.shape[1:])

    def loss(self, model: Diffusion, batch: Batch) -> Loss:
        x, eps = self.pair(model, batch)
        t = self.times(model, batch)
        noisy = model.noisy(x, t, eps)
        found = model.outputs(noisy, t, model.given(batch), self.keep(model, batch))
        error = (found[:, 0] - model.target(x, t, eps)).square().flatten(1).sum(1)
        more = self.besides(model, x, noisy, t, found)
        metrics = {"error_per_dim": error.detach().sum() / model.data.dims}
        return Loss(sum(more.values(), error.sum()), metrics | {name: each.detach() for name, each in more.items()})

    def besides(self, model: Diffusion, x: Tensor, noisy: Tensor, t: Tensor, found: Tensor) -> Mapping[str, Tensor]:
        """What else is minimised, by name, each a sum over the batch.

        Args:
            x, noisy: data and x_t [B, *event].
            t: [B].
            found: [B, outputs, *event], the network's output at x_t.
        """
        return {}
