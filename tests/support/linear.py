"""The linear VAE: a model whose likelihood, posterior and bounds are Gaussian integrals, and data to train it on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor, nn

from dgm_models.nn.latent import LatentVariable
from dgm_models.nn.networks import Network
from dgm_models.protocols import Batch, DataSpec

DIMS, LATENT, N = 5, 2, 512
EIGENVALUES = torch.tensor([4.0, 2.0, 0.6, 0.5, 0.4], dtype=torch.float64)
DATA = DataSpec("vector", (DIMS,))


class Constant(nn.Module):
    """Linear means and learned log-variances that do not depend on the input."""

    def __init__(self, in_dim: int, out_dim: int, shared: bool) -> None:
        super().__init__()
        self.mean = nn.Linear(in_dim, out_dim)
        self.log_variance = nn.Parameter(torch.zeros(1 if shared else out_dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x)
        return torch.cat([mean, self.log_variance.expand(mean.shape)], 1)


@dataclass(frozen=True)
class Linear(Network):
    """Linear-Gaussian encoder and decoder; one noise variance for all data dimensions."""

    name: ClassVar[str] = "linear"

    def down(self, shape: tuple[int, ...], out_dim: int) -> nn.Module:
        return Constant(shape[0], out_dim // 2, shared=False)

    def up(self, in_dim: int, shape: tuple[int, ...]) -> nn.Module:
        return Constant(in_dim, shape[0] // 2, shared=True)


def rows() -> Tensor:
    """[N, DIMS] with covariance of exactly the eigenvalues, in rotated axes, around a mean."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(N, DIMS, generator=rng, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / N)).T
    rotation = torch.linalg.qr(torch.randn(DIMS, DIMS, generator=rng, dtype=torch.float64))[0]
    return (x @ (EIGENVALUES.sqrt().diag() @ rotation.T) + torch.arange(DIMS) / 2).float()


def marginal(model: LatentVariable, x: Tensor) -> Tensor:
    """[B] nats, exact: log N(x; b, W W^T + sigma^2 I)."""
    with torch.no_grad():
        weight, bias = model.decoder.mean.weight.double(), model.decoder.mean.bias.double()
        noise = model.decoder.log_variance.double().exp() * torch.eye(DIMS, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(bias, weight @ weight.T + noise).log_prob(x.double())


def true_posterior(model: LatentVariable, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [B, LATENT] and covariance [LATENT, LATENT] of p(z|x), float64."""
    with torch.no_grad():
        weight, bias = model.decoder.mean.weight.double(), model.decoder.mean.bias.double()
        variance = model.decoder.log_variance.double().exp()
        inverse = torch.linalg.inv(weight.T @ weight + variance * torch.eye(LATENT, dtype=torch.float64))
        return (x.double() - bias) @ weight @ inverse, variance * inverse


def closed_form() -> float:
    """The largest mean log-likelihood of pPCA. Source: Tipping and Bishop 1999, eq. 4 and 8."""
    sigma2 = EIGENVALUES[LATENT:].mean()
    log_det = EIGENVALUES[:LATENT].log().sum() + (DIMS - LATENT) * sigma2.log()
    return float(-0.5 * (DIMS * math.log(2 * math.pi) + log_det + DIMS))


class Signs(Batch):
    """A batch of 2^LATENT copies of every example whose normal draws are all vectors of signs.

    Signs have mean 0, covariance I and no third moments: a quadratic has the same mean over them as over normals.
    """

    @classmethod
    def of(cls, x: Tensor) -> Signs:
        key = torch.arange(len(x) * 2**LATENT)
        return cls(x.repeat_interleave(2**LATENT, 0), key, key)

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        signs = torch.tensor(list(product([-1.0, 1.0], repeat=LATENT)), dtype=self.x.dtype)
        return signs.repeat(len(self) // len(signs), 1).reshape(len(self), *shape)
