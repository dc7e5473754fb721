"""Persistent contrastive divergence: the chains go on from where the last update left them."""

from __future__ import annotations

import torch

from dgm_models.construct import Fraction, NonNegativeFloat, Positive, PositiveFloat
from dgm_models.nn.contrastive_divergence import ContrastiveDivergence, Replay
from dgm_models.nn.energy import EnergyBased
from dgm_models.nn.networks import Mlp, Network
from dgm_models.ops.mcmc import Chain, Langevin
from dgm_models.protocols import DataSpec


def persistent_cd(
    data: DataSpec,
    network: Network = Mlp(width=128, depth=3, activation="silu"),
    chain: Chain = Langevin(steps=500),
    moves: Positive = 20,
    buffer: Positive = 10_000,
    fresh: Fraction = 0.05,
    regularise: NonNegativeFloat = 0.01,
    spread: PositiveFloat = 1.0,
) -> tuple[EnergyBased, ContrastiveDivergence]:
    """PCD: E(x+) - E(x-), x- from chains that live as long as the training and begin at a Gaussian.

    Samples, and so FID, are of fresh chains of `chain.steps` moves, not of the buffer, whose chains are far older.
    Source: Tieleman 2008, Training restricted Boltzmann machines using approximations to the likelihood gradient; Du
    and Mordatch 2019, arXiv:1903.08689 (the buffer and its fresh share). Differs: the chains take turns, where the
    latter draws them.

    Args:
        data: what is modelled.
        network: gives the energy in front of a Gaussian.
        chain: how x moves, in training and in sampling.
        moves: of the chains between two updates.
        buffer: how many chains live.
        fresh: the share of them that begin anew when it is their turn.
        regularise: weight of the squared energies.
        spread: the Gaussian's standard deviation.
    """
    replay = Replay(data.shape, torch.float32, buffer, fresh)
    return EnergyBased(data, network, chain, spread), ContrastiveDivergence(moves, regularise, replay)
