"""A mixture of isotropic Gaussians under noise, in closed form: what samplers and likelihoods are held against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dgm_models.ops.paths import Path
from dgm_models.ops.samplers import Denoise, Guess


@dataclass(frozen=True)
class Mixture:
    """sum_k weights_k N(means_k, stds_k^2 I): means [K, D], stds [K], weights [K], float64."""

    means: Tensor
    stds: Tensor
    weights: Tensor

    def _at(self, y: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Of y = alpha x + sigma eps [B, D]: the components' variances [K] and their log joint density [B, K]."""
        variance = (alpha * self.stds).square() + sigma**2
        apart = (y.double()[:, None] - alpha * self.means).square().sum(2)
        return variance, self.weights.log() - apart / (2 * variance) - y.shape[1] / 2 * (2 * math.pi * variance).log()

    def log_prob(self, y: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        """[B] nats."""
        return self._at(y, torch.as_tensor(alpha), torch.as_tensor(sigma))[1].logsumexp(1)

    def posterior(self, y: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        """[B, K] the components' probabilities."""
        return self._at(y, torch.as_tensor(alpha), torch.as_tensor(sigma))[1].softmax(1)

    def guess(self, y: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x | alpha x + sigma eps = y] [B, D]."""
        variance, joint = self._at(y, alpha, sigma)
        gain = alpha * self.stds.square() / variance  # [K]
        each = self.means + gain[:, None] * (y.double()[:, None] - alpha * self.means)  # [B, K, D]
        return (joint.softmax(1)[:, :, None] * each).sum(1)

    def denoiser(self, path: Path) -> Denoise:
        """The guess that a perfect network makes."""
        return lambda x, t: Guess(self.guess(x, path.alpha(t), path.sigma(t)))

    def mean(self) -> Tensor:
        return (self.weights[:, None] * self.means).sum(0)

    def covariance(self) -> Tensor:
        apart = self.means - self.mean()
        within = (self.weights * self.stds.square()).sum() * torch.eye(self.means.shape[1], dtype=torch.float64)
        return (self.weights[:, None] * apart).T @ apart + within


TWO = Mixture(
    torch.tensor([[-0.6, 0.3], [0.7, -0.2]], dtype=torch.float64),
    torch.tensor([0.25, 0.35], dtype=torch.float64),
    torch.tensor([0.3, 0.7], dtype=torch.float64),
)
