"""Markov chains of an energy: x moves so that its distribution becomes exp(-E(x)) / Z."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dgm_models.construct import Choice, NonNegative, PositiveFloat

Energy = Callable[[Tensor], Tensor]  # [B, *event] -> [B] nats


def gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """E(x) [B] and dE/dx [B, *event] at x [B, *event], both without a graph; parameters get no gradient."""
    with torch.enable_grad():
        given = x.detach().requires_grad_(True)
        value = energy(given)
        (slope,) = torch.autograd.grad(value.sum(), given)
    return value.detach(), slope


@dataclass(frozen=True)
class Chain(Choice):
    """The contract of a params section such as `sampler: {name: langevin, steps: 60}`.

    Args:
        steps: moves of a chain.
    """

    steps: NonNegative = 60

    @classmethod
    def choices(cls) -> Mapping[str, type]:
        return {chain.name: chain for chain in (Langevin,)}

    def __call__(self, energy: Energy, x: Tensor, rng: torch.Generator) -> Tensor:
        """The chains' states [B, *event] after `steps` moves from x [B, *event]; every row is a chain of its own."""
        raise NotImplementedError


@dataclass(frozen=True)
class Langevin(Chain):
    """x <- x - (step / 2) dE/dx + sqrt(step temperature) noise: exp(-E / temperature), with an error of order `step`.

    Source: Roberts and Tweedie 1996; Du and Mordatch 2019, arXiv:1903.08689, whose settings have a step and a noise
    that do not belong together, which is a temperature (docs/errata.md).

    Args:
        step: of the gradient.
        temperature: 1 for exp(-E).
    """

    name: ClassVar[str] = "langevin"
    step: PositiveFloat = 0.01
    temperature: PositiveFloat = 1.0

    def __call__(self, energy: Energy, x: Tensor, rng: torch.Generator) -> Tensor:
        for _ in range(self.steps):
            _, slope = gradient(energy, x)
            noise = torch.randn(x.shape, generator=rng, device=rng.device, dtype=x.dtype)
            x = x - 0.5 * self.step * slope + (self.step * self.temperature) ** 0.5 * noise
        return x
