"""Contrastive divergence: an energy is lowered at the data and raised where short chains from the data end."""

from __future__ import annotations

from dgm_models.construct import NonNegativeFloat, Positive, PositiveFloat
from dgm_models.nn.contrastive_divergence import ContrastiveDivergence
from dgm_models.nn.energy import EnergyBased
from dgm_models.nn.networks import Mlp, Network
from dgm_models.ops.mcmc import Chain, Langevin
from dgm_models.protocols import DataSpec


def contrastive_divergence(
    data: DataSpec,
    network: Network = Mlp(width=128, depth=3, activation="silu"),
    chain: Chain = Langevin(steps=500),
    moves: Positive = 20,
    regularise: NonNegativeFloat = 0.01,
    spread: PositiveFloat = 1.0,
) -> tuple[EnergyBased, ContrastiveDivergence]:
    """CD-k: E(x+) - E(x-), x- after `moves` moves from x+. Samples, and so FID, are of fresh chains of `chain.steps`.

    The chains never leave the neighbourhood of the data: what the energy is far from it they do not teach.
    Source: Hinton 2002, Training products of experts by minimizing contrastive divergence. Differs: chains of any kind,
    and an L2 penalty of the energies (Du and Mordatch 2019, arXiv:1903.08689).

    Args:
        data: what is modelled.
        network: gives the energy in front of a Gaussian.
        chain: how x moves, in training and in sampling.
        moves: of the chains between two updates.
        regularise: weight of the squared energies.
        spread: the Gaussian's standard deviation.
    """
    return EnergyBased(data, network, chain, spread), ContrastiveDivergence(moves, regularise)
