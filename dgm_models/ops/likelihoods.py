"""Decoder likelihoods as parts: each a true likelihood of the stored data, so that bits/dim is comparable.

A likelihood reads `num_params` network outputs for every stored value: params [B, num_params, *event].
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_models.protocols import DataSpec

Name = Literal["auto", "bernoulli", "categorical", "logistic", "gaussian"]


class Likelihood(Protocol):
    @property
    def num_params(self) -> int:
        """Network outputs for every stored value."""
        ...

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """[B] nats, summed over the event."""
        ...

    def sample(self, params: Tensor, rng: torch.Generator, temperature: float = 1.0) -> Tensor:
        """[B, *event] in model space; logits are divided by the temperature, scales multiplied."""
        ...

    def mode(self, params: Tensor) -> Tensor:
        """[B, *event]: the most probable value (the mean for a Gaussian)."""
        ...


class Bernoulli:
    """Binary values; params are logits."""

    num_params = 1

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(params[:, 0], x.to(params.dtype), reduction="none").flatten(1).sum(1)

    def sample(self, params: Tensor, rng: torch.Generator, temperature: float = 1.0) -> Tensor:
        return torch.bernoulli((params[:, 0] / temperature).sigmoid(), generator=rng).long()

    def mode(self, params: Tensor) -> Tensor:
        return (params[:, 0] > 0).long()


class Categorical:
    """A free probability of every level; params are logits."""

    def __init__(self, levels: int) -> None:
        self.num_params = levels

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        params, target = params.float(), x
        if params.stride(1) == 1:  # levels side by side in memory; torch is slow over any axis but the last
            params, target = params.movedim(1, -1).reshape(-1, self.num_params), x.flatten()
        return -F.cross_entropy(params, target, reduction="none").reshape(x.shape).flatten(1).sum(1)

    def sample(self, params: Tensor, rng: torch.Generator, temperature: float = 1.0) -> Tensor:
        probabilities = (params.float() / temperature).softmax(1).movedim(1, -1)
        flat = torch.multinomial(probabilities.reshape(-1, self.num_params), 1, generator=rng)
        return flat.reshape(probabilities.shape[:-1])

    def mode(self, params: Tensor) -> Tensor:
        return params.argmax(1)


class Logistic:
    """A logistic density integrated over each level's cell, the edge cells over the tails.

    Source: Salimans et al. 2017, arXiv:1701.05517, section 2.1, with one component.
    """

    num_params = 2

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def _location_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        location = (params[:, 0] + 1) * (self.levels - 1) / 2  # the network works in [-1, 1]
        return location, (params[:, 1].clamp(-7, 7) + math.log(self.levels / 8)).exp()

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        location, scale = self._location_scale(params.float())
        return _log_cell(x, location, scale, self.levels).flatten(1).sum(1)

    def sample(self, params: Tensor, rng: torch.Generator, temperature: float = 1.0) -> Tensor:
        location, scale = self._location_scale(params.float())
        u = torch.rand(location.shape, generator=rng, device=location.device).clamp(1e-6, 1 - 1e-6)
        return (location + temperature * scale * torch.logit(u)).round().clamp(0, self.levels - 1).long()

    def mode(self, params: Tensor) -> Tensor:
        return self._location_scale(params.float())[0].round().clamp(0, self.levels - 1).long()


def _log_cell(x: Tensor, location: Tensor, scale: Tensor, levels: int) -> Tensor:
    """log of a logistic's probability of the cell of level x, the first and the last with their tails."""
    upper, lower = (x + 0.5 - location) / scale, (x - 0.5 - location) / scale
    # log(sigmoid(u) - sigmoid(l)) = logsigmoid(u) + logsigmoid(-l) + log(1 - exp(l - u))
    inner = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
    return torch.where(x == 0, F.logsigmoid(upper), torch.where(x == levels - 1, F.logsigmoid(-lower), inner))


class LogisticMixture:
    """A mixture over the V channels of a pixel together.

    In a component every channel is a logistic, integrated over its levels' cells, with a mean that is linear in the
    channels before it. A component has a logit, V means and V log-scales, for levels in [-1, 1] as in `Logistic`, and
    V (V - 1) / 2 coefficients, of which tanh is taken; all logits come first, then means, log-scales, coefficients.

    Args:
        levels: of every channel.
        components: K.
        channels: V.

    Source: Salimans et al. 2017, sections 2.1 and 2.2, arXiv:1701.05517.
    """

    def __init__(self, levels: int, components: int, channels: int) -> None:
        self.levels, self.components, self.channels = levels, components, channels
        self._sizes = [1, channels, channels, channels * (channels - 1) // 2]
        self.num_params = components * sum(self._sizes)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[N, K] logits, [N, K, V] means in [-1, 1] and scales in levels, [N, K, V, V] coefficients below 0s."""
        wide = params.flatten(1).to(torch.promote_types(params.dtype, torch.float32))
        parts = torch.split(wide, [self.components * size for size in self._sizes], 1)
        shaped = (part.reshape(len(wide), self.components, size) for part, size in zip(parts, self._sizes, strict=True))
        logits, means, log_scales, coefficients = shaped
        rows, columns = torch.tril_indices(self.channels, self.channels, -1, device=params.device)
        coupling = wide.new_zeros(len(wide), self.components, self.channels, self.channels)
        coupling[..., rows, columns] = coefficients.tanh()
        return logits[..., 0], means, (log_scales.clamp(-7, 7) + math.log(self.levels / 8)).exp(), coupling

    def _locations(self, means: Tensor, coupling: Tensor, x: Tensor) -> Tensor:
        """[N, K, V] in levels, given x [N, V]; of a channel the values before it alone are read."""
        centred = x.to(means.dtype) * (2.0 / (self.levels - 1)) - 1.0
        # no matrix product: a value that is not known yet meets a coefficient of exactly 0
        return (means + (coupling * centred[:, None, None]).sum(-1) + 1) * (self.levels - 1) / 2

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """[N] nats of x [N, V], params [N, num_params, 1]."""
        logits, means, scales, coupling = self._split(params)
        cells = _log_cell(x[:, None], self._locations(means, coupling, x), scales, self.levels)  # [N, K, V]
        return (logits.log_softmax(1) + cells.sum(2)).logsumexp(1)

    def sample(self, params: Tensor, rng: torch.Generator, temperature: float = 1.0) -> Tensor:
        logits, means, scales, coupling = self._split(params)
        chosen = torch.multinomial((logits / temperature).softmax(1), 1, generator=rng)
        u = torch.rand(means[:, 0].shape, generator=rng, device=means.device, dtype=means.dtype)
        noise = temperature * torch.logit(u.clamp(1e-6, 1 - 1e-6))
        return self._walk(means, scales, coupling, chosen, noise)

    def mode(self, params: Tensor) -> Tensor:
        """[N, V]: the locations of the most probable component."""
        logits, means, scales, coupling = self._split(params)
        return self._walk(means, scales, coupling, logits.argmax(1, keepdim=True), torch.zeros_like(means[:, 0]))

    def _walk(self, means: Tensor, scales: Tensor, coupling: Tensor, chosen: Tensor, noise: Tensor) -> Tensor:
        """[N, V] int64, channel by channel: the level nearest to location + scale * noise in the chosen component."""
        row = torch.arange(len(means), device=means.device)[:, None]
        means, scales, coupling = means[row, chosen], scales[row, chosen], coupling[row, chosen]  # [N, 1, ...]
        x = torch.zeros_like(noise, dtype=torch.int64)
        for channel in range(self.channels):
            location = self._locations(means, coupling, x)[:, 0, channel]
            drawn = (location + scales[:, 0, channel] * noise[:, channel]).round().clamp(0, self.levels - 1)
            x[:, channel] = drawn.long()
        return x


class Gaussian:
    """Real values with a learned variance; params are mean and log-variance."""

    num_params = 2

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_variance = params[:, 0], params[:, 1].clamp(-14, 14)
        square = (x - mean) ** 2 * (-log_variance).exp()
        return -0.5 * (square + log_variance + math.log(2 * math.pi)).flatten(1).sum(1)

    def sample(self, params: Tensor, rng: torch.Generator, temperature: float = 1.0) -> Tensor:
        mean, log_variance = params[:, 0], params[:, 1].clamp(-14, 14)
        eps = torch.randn(mean.shape, generator=rng, device=mean.device, dtype=mean.dtype)
        return mean + temperature * (0.5 * log_variance).exp() * eps

    def mode(self, params: Tensor) -> Tensor:
        return params[:, 0]


class MixtureOfGaussians:
    """Real values, each with a density of its own: sum_k w_k N(mean_k, scale_k^2).

    Params are K logits of the weights, K means and K logarithms of the scales, which are kept within [-7, 7].

    Source: Bishop 1994, Mixture Density Networks, eq. 22 and 23.
    """

    def __init__(self, components: int) -> None:
        self.components = components
        self.num_params = 3 * components

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, means and log-scales, each [B, K, *event]."""
        logits, means, log_scales = params.chunk(3, 1)
        return logits, means, log_scales.clamp(-7, 7)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        logits, means, log_scales = self._split(params)
        square = ((x[:, None] - means) * (-log_scales).exp()).square()
        joint = logits.log_softmax(1) - 0.5 * (square + math.log(2 * math.pi)) - log_scales
        return joint.logsumexp(1).flatten(1).sum(1)

    def sample(self, params: Tensor, rng: torch.Generator, temperature: float = 1.0) -> Tensor:
        logits, means, log_scales = self._split(params)
        weights = (logits / temperature).softmax(1).movedim(1, -1)
        chosen = torch.multinomial(weights.reshape(-1, self.components), 1, generator=rng)
        index = chosen.reshape(weights.shape[:-1])[:, None]
        mean, log_scale = means.gather(1, index)[:, 0], log_scales.gather(1, index)[:, 0]
        eps = torch.randn(mean.shape, generator=rng, device=mean.device, dtype=mean.dtype)
        return mean + temperature * log_scale.exp() * eps

    def mode(self, params: Tensor) -> Tensor:
        """The mean of the component of largest weight: what `sample` draws as the temperature falls to 0."""
        logits, means, _ = self._split(params)
        return means.gather(1, logits.argmax(1, keepdim=True))[:, 0]


def likelihood(name: Name, data: DataSpec) -> Likelihood:
    """The likelihood called `name`; "auto" is Bernoulli for 2 levels, categorical up to 32, logistic above.

    Raises: ValueError when the data cannot have it.
    """
    if data.levels is None:
        if name not in ("auto", "gaussian"):
            raise ValueError(f"likelihood: {name!r} needs data of whole levels; real data takes gaussian")
        return Gaussian()
    if name == "gaussian":
        raise ValueError("likelihood: 'gaussian' is a density of real data; whole levels take categorical or logistic")
    if name == "auto":
        name = "bernoulli" if data.levels == 2 else "categorical" if data.levels <= 32 else "logistic"
    if name == "bernoulli":
        if data.levels != 2:
            raise ValueError(f"likelihood: 'bernoulli' is for 2 levels, the data has {data.levels}")
        return Bernoulli()
    return Categorical(data.levels) if name == "categorical" else Logistic(data.levels)
