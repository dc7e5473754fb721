"""What noise contrastive estimation and its game with a flow share: an energy with a learned log Z, and the loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.nn.conditioner import check
from dgm_models.nn.energy import EnergyBased
from dgm_models.nn.networks import Network
from dgm_models.nn.score_matching import without_constant
from dgm_models.objective import Loss
from dgm_models.ops.mcmc import Chain
from dgm_models.protocols import DataSpec


class SelfNormalised(EnergyBased):
    """log p(x) = -E(x) - log Z with log Z a parameter: an estimate, since nothing makes p integrate to one.

    log Z begins as that of the Gaussian in front of which the network stands; the energy has no constant of its own.

    Args:
        data, network, sampler, spread: as for `EnergyBased`.
        rate: what the learning rate is multiplied by for log Z, with optimizers whose step does not depend on the
            gradient's size, such as Adam.
    """

    estimated = True

    def __init__(self, data: DataSpec, network: Network, sampler: Chain, spread: float, rate: float) -> None:
        super().__init__(data, network, sampler, spread)
        without_constant(self)
        self.rate = rate
        self.excess = nn.Parameter(torch.zeros(1))  # a vector: never decayed

    @property
    def log_z(self) -> Tensor:
        """The estimate of log Z, a scalar in nats."""
        return 0.5 * self.data.dims * math.log(2 * math.pi * self.spread**2) + self.rate * self.excess[0]

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats in model space, as far as log Z has been learned."""
        check(self.condition, cond)
        return -self.energy(x) - self.log_z


def contrast(data: Tensor, noise: Tensor) -> Loss:
    """The loss of telling data from noise: -log P(data | x) over the data, -log P(noise | x) over the noise.

    Args:
        data: [B] log-odds of "data" at examples: log p - log q - log n, with n rows of noise for an example.
        noise: [B n] log-odds at the noise.
    Returns: the sum in nats; `accuracy`: the mean of the shares of right answers among data and among noise.
    """
    right = 0.5 * ((data > 0).sum() + (noise < 0).sum() * (len(data) / len(noise)))
    return Loss(F.softplus(-data).sum() + F.softplus(noise).sum(), {"accuracy": right})
