"""The shell of normalizing flows: an invertible transform and a base distribution."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import Codec
from dgm_models.conditions import Condition
from dgm_models.nn.conditioner import Conditioner, check
from dgm_models.nn.networks import Network
from dgm_models.nn.tempering import Tempering
from dgm_models.protocols import DataSpec, Model

Base = Literal["normal", "logistic"]


class Transform(nn.Module):
    """An invertible map of [B, *event], which may keep or change the event's shape but not its size.

    Attributes:
        evaluations: how often its network has been evaluated for every example by `inverse`, counted up there.
    """

    evaluations: int = 0

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, *event] and context [B, context_dim] or None -> (z, log|det dz/dx| [B] in nats)."""
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        """The x of `forward`'s z."""
        raise NotImplementedError


class Chain(Transform):
    """Transforms one after another: the first is the closest to the data."""

    def __init__(self, *parts: Transform) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for part in self.parts:
            x, log_det = part(x, context)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        for part in reversed(self.parts):
            assert isinstance(part, Transform)
            z = part.inverse(z, context)
        return z


class Flow(Model):
    """log p(x|c) = log base(f(x; c)) + log|det df/dx|.

    Args:
        data: what is modelled.
        codec: of the data; the flow works in its model space.
        transform: f, from model space to latents of the same size.
        base: the latents' distribution: every coordinate standard normal or standard logistic.
        condition: what a sample is asked for, or None.
        network: turns an image condition into the context vector; without one only labels can be asked for.
    """

    def __init__(
        self,
        data: DataSpec,
        codec: Codec,
        transform: Transform,
        base: Base = "normal",
        condition: Condition | None = None,
        network: Network | None = None,
    ) -> None:
        super().__init__(data, codec)
        self.transform, self.base = transform, base
        self.condition = condition
        self.conditioner = Conditioner(condition, data, network)
        self.sampling = Tempering()

    def context(self, cond: Tensor | None) -> Tensor | None:
        """[B, context_dim], None without a condition."""
        check(self.condition, cond)
        return None if cond is None else self.conditioner.vector(cond)

    def base_log_prob(self, z: Tensor) -> Tensor:
        """[B] nats of latents [B, *event]."""
        flat = z.flatten(1)
        if self.base == "logistic":
            return -(F.softplus(flat) + F.softplus(-flat)).sum(1)
        return -0.5 * (flat.square() + math.log(2 * math.pi)).sum(1)

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats in model space."""
        z, log_det = self.transform(x, self.context(cond))
        log_p: Tensor = self.base_log_prob(z) + log_det
        return log_p

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """The inverse of draws from the base, whose spread is multiplied by the temperature."""
        shape, dtype = (n, self.data.dims), next(self.parameters()).dtype
        if self.base == "logistic":
            u = torch.rand(shape, generator=rng, device=rng.device, dtype=torch.float64)
            tiny = torch.finfo(torch.float64).eps
            z = u.clamp(tiny, 1 - tiny).logit().to(dtype)
        else:
            z = torch.randn(shape, generator=rng, device=rng.device, dtype=dtype)
        parts = [module for module in self.transform.modules() if isinstance(module, Transform)]
        for part in parts:
            part.evaluations = 0
        x = self.decode(z * self.sampling.temperature, cond)
        self.evaluations = sum(part.evaluations for part in parts)
        return x

    @torch.no_grad()
    def encode(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B, D]: the latents."""
        z: Tensor = self.transform(x, self.context(cond))[0]
        return z.flatten(1)

    @torch.no_grad()
    def decode(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B, *event] in model space of latents [B, D]."""
        return self.transform.inverse(z.reshape(len(z), *self.latent_shape), self.context(cond))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one example's latents as the transform gives them: the event's unless a subclass differs."""
        return self.data.shape
