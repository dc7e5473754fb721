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
        return -F.cross_entropy(params.float(), x, reduction="none").flatten(1).sum(1)

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
        upper, lower = (x + 0.5 - location) / scale, (x - 0.5 - location) / scale
        # log(sigmoid(u) - sigmoid(l)) = logsigmoid(u) + logsigmoid(-l) + log(1 - exp(l - u))
        inner = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
        log_p = torch.where(x == 0, F.logsigmoid(upper), torch.where(x == self.levels - 1, F.logsigmoid(-lower), inner))
        return log_p.flatten(1).sum(1)

    def sample(self, params: Tensor, rng: torch.Generator, temperature: float = 1.0) -> Tensor:
        location, scale = self._location_scale(params.float())
        u = torch.rand(location.shape, generator=rng, device=location.device).clamp(1e-6, 1 - 1e-6)
        return (location + temperature * scale * torch.logit(u)).round().clamp(0, self.levels - 1).long()

    def mode(self, params: Tensor) -> Tensor:
        return self._location_scale(params.float())[0].round().clamp(0, self.levels - 1).long()


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
