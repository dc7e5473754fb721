"""Products of experts: trained energies are added up, which takes no normaliser, and the sum is sampled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgm_models.nn.energy import Unnormalised
from dgm_models.ops.mcmc import Chain


class Product(Unnormalised):
    """p(x) = prod_i p_i(x) / Z, E(x) = sum_i E_i(x): high where every expert says so.

    Chains start at the product of the Gaussians at which those of the experts start.
    Source: Hinton 2002, Training products of experts by minimizing contrastive divergence.

    Args:
        experts: models of the same data, whose energies are functions of one space.
        sampler: the chain by which samples are drawn.
    Raises: ValueError when there are fewer than two, or they model different data.
    """

    def __init__(self, experts: list[Unnormalised], sampler: Chain) -> None:
        if len(experts) < 2:
            raise ValueError(f"product: {len(experts)} experts; at least 2")
        first, *others = experts
        for other in others:
            if (other.data, other.codec) != (first.data, first.codec):
                raise ValueError(
                    f"product: one expert models {first.data}, another {other.data}; give them one dataset"
                )
        spread = sum(expert.spread**-2 for expert in experts) ** -0.5
        super().__init__(first.data, first.codec, sampler, spread)
        self.experts = nn.ModuleList(experts)

    def energy(self, x: Tensor) -> Tensor:
        found: Tensor = torch.stack([expert.energy(x) for expert in self.experts]).sum(0)  # type: ignore[operator]
        return found


def product(first: Unnormalised, *others: Unnormalised, sampler: Chain | None = None) -> Product:
    """The product of trained models, sampled by the first one's chain unless told otherwise."""
    return Product([first, *others], sampler or first.sampling).eval()
