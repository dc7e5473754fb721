"""An energy whose distribution is a Gaussian, and data with given moments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgm_models.codecs import continuous
from dgm_models.nn.energy import Unnormalised
from dgm_models.ops.mcmc import Chain
from dgm_models.protocols import DataSpec

DATA = DataSpec("vector", (2,))
MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=torch.float64)


class Quadratic(Unnormalised):
    """E(x) = |R (x - m)|^2 / 2: N(m, (R^T R)^-1), log Z = log 2 pi - log|det R|."""

    def __init__(self, sampler: Chain, spread: float = 1.0) -> None:
        super().__init__(DATA, continuous(DATA), sampler, spread)
        self.mean = nn.Parameter(torch.zeros(2))
        self.root = nn.Parameter(torch.eye(2))

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, sampler: Chain, spread: float = 1.0) -> Quadratic:
        """Float64, with these moments."""
        model = cls(sampler, spread).double()
        with torch.no_grad():
            model.mean.copy_(mean)
            model.root.copy_(torch.linalg.cholesky(torch.linalg.inv(covariance)).T)
        return model

    def energy(self, x: Tensor) -> Tensor:
        return 0.5 * ((x - self.mean) @ self.root.T).square().sum(1)

    def moments(self) -> tuple[Tensor, Tensor]:
        root = self.root.detach().double()
        return self.mean.detach().double(), torch.linalg.inv(root.T @ root)


def rows(n: int = 4096) -> Tensor:
    """[n, 2] float32 with exactly `MEAN` and `COVARIANCE`."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T, correction=0))).T
    return (x @ torch.linalg.cholesky(COVARIANCE).T + MEAN).float()
