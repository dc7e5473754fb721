"""Noise contrastive estimation: an energy and its log Z, learned by telling data from noise of known density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgm_models.construct import Positive, PositiveFloat
from dgm_models.nn.networks import Mlp, Network
from dgm_models.nn.self_normalised import SelfNormalised, contrast
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops.mcmc import Chain, Langevin
from dgm_models.protocols import Batch, DataSpec, Density

LEAST = 1e-6  # of a coordinate's variance: constant ones would give 0


class NoiseContrastive(Objective):
    """Logistic regression on log p(x) - log q(x) - log n, with n rows of noise from q for every example.

    q is the Gaussian with mean and covariance of the first global batch. With as many rows B as there are, its
    correlations are multiplied by B / (B + D), which makes it a density for any number of rows. It takes any model
    with `log_prob`; where that is normalised by a parameter, the parameter is learned as well.

    Source: Gutmann and Hyvarinen 2010, Noise-contrastive estimation.

    Args:
        data: what is modelled.
        ratio: n.
    """

    mean: Tensor
    root: Tensor

    def __init__(self, data: DataSpec, ratio: int = 1) -> None:
        super().__init__()
        self.ratio = ratio
        self.register_buffer("mean", torch.zeros(data.dims))
        self.register_buffer("root", torch.eye(data.dims))  # covariance = root root^T

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def initialize(self, model: Any, batch: Batch) -> None:
        rows = batch.x.flatten(1).double()
        mean = rows.mean(0)
        covariance = (rows - mean).T @ (rows - mean) / len(rows)
        variance = covariance.diagonal().clamp_min(LEAST)
        kept = len(rows) / (len(rows) + rows.shape[1])
        root = torch.linalg.cholesky(kept * covariance + (variance - kept * covariance.diagonal()).diag())
        self.mean.copy_(mean)
        self.root.copy_(root)

    def draw(self, batch: Batch) -> Tensor:
        """[B n, *event] from q, n rows for every example."""
        eps = batch.normal("noise", (self.ratio, len(self.mean))).to(self.mean.dtype)
        return (self.mean + eps @ self.root.T).reshape(-1, *batch.x.shape[1:])

    def log_q(self, x: Tensor) -> Tensor:
        """[B] nats of x [B, *event]."""
        away = (x.flatten(1) - self.mean).T
        eps: Tensor = torch.linalg.solve_triangular(self.root, away, upper=False)
        log_det = self.root.diagonal().log().sum()
        return -0.5 * (eps.square().sum(0) + len(self.mean) * math.log(2 * math.pi)) - log_det

    def loss(self, model: Any, batch: Batch) -> Loss:
        if not isinstance(model, Density):
            raise ValueError(f"{type(model).__name__} has no log_prob; give its energy a log Z, such as a parameter")

        x = torch.cat([batch.x, self.draw(batch)])
        log_odds = model.log_prob(x) - self.log_q(x) - math.log(self.ratio)
        return contrast(log_odds[: len(batch)], log_odds[len(batch) :])


def noise_contrastive(
    data: DataSpec,
    network: Network = Mlp(activation="silu"),
    ratio: Positive = 1,
    log_z_rate: PositiveFloat = 10.0,
    chain: Chain = Langevin(),
    spread: PositiveFloat = 1.0,
) -> tuple[SelfNormalised, NoiseContrastive]:
    """An energy and its log Z by noise contrastive estimation against a Gaussian; levels are dequantised.

    `log_prob` is an estimate: it integrates to one as far as log Z has been learned.

    Source: Gutmann and Hyvarinen 2010, Noise-contrastive estimation.

    Args:
        data: what is modelled.
        network: gives the energy.
        ratio: rows of noise for every example.
        log_z_rate: what the learning rate is multiplied by for log Z.
        chain: by which samples are drawn.
        spread: the standard deviation of the Gaussian in front of which the network stands, in model space.
    """
    return SelfNormalised(data, network, chain, spread, log_z_rate), NoiseContrastive(data, ratio)
