"""Probabilistic principal component analysis: the linear VAE, with likelihood, posterior and optimum in closed form."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from dgm_models.codecs import continuous
from dgm_models.construct import Positive
from dgm_models.nn.computed import Computed
from dgm_models.nn.conditioner import check
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.protocols import DataSpec, Model
from dgm_models.training import runtime

LEAST = 1e-10  # of the noise's variance: data within a plane would give 0


class Ppca(Model):
    """x = W z + mean + noise, z ~ N(0, I_q), noise ~ N(0, sigma^2 I): p(x) = N(x; mean, W W^T + sigma^2 I); float64.

    Source: Tipping and Bishop 1999, eq. 2 to 6.

    Args:
        data: real data of any shape; an example is its D values.
        factors: q, the dimension of z.
    Raises: ValueError unless q < D.
    """

    def __init__(self, data: DataSpec, factors: int) -> None:
        super().__init__(data, continuous(data))
        if factors >= data.dims:
            raise ValueError(f"factors: {factors} of {data.dims} dimensions leave none to the noise; use fewer")
        self.factors = factors
        self.mean = nn.Parameter(torch.zeros(data.dims))
        self.weight = nn.Parameter(torch.randn(data.dims, factors) / math.sqrt(data.dims))
        self.log_variance = nn.Parameter(torch.zeros(1))

    def _inner(self) -> tuple[Tensor, Tensor, Tensor]:
        """W [D, q], sigma^2 [1] and M = W^T W + sigma^2 I [q, q]; float64."""
        weight, variance = self.weight.double(), self.log_variance.double().exp()
        eye = torch.eye(self.factors, dtype=torch.float64, device=weight.device)
        return weight, variance, weight.T @ weight + variance * eye

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats, exact, float64; a q x q system in place of the D x D covariance."""
        check(self.condition, cond)
        weight, variance, inner = self._inner()
        away = x.flatten(1).double() - self.mean.double()
        root = torch.linalg.cholesky(inner)
        explained = torch.linalg.solve_triangular(root, (away @ weight).T, upper=False).square().sum(0)
        square = (away.square().sum(1) - explained) / variance
        rest = self.data.dims - self.factors
        log_det = 2 * root.diagonal().log().sum() + rest * self.log_variance.double()
        log_p: Tensor = -0.5 * (square + log_det + self.data.dims * math.log(2 * math.pi))
        return log_p

    def gaussian_posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, q] and covariance [q, q] of p(z|x): M^-1 W^T (x - mean) and sigma^2 M^-1; float64."""
        weight, variance, inner = self._inner()
        inverse = torch.linalg.inv(inner)
        return (x.flatten(1).double() - self.mean.double()) @ weight @ inverse, variance * inverse

    @torch.no_grad()
    def encode(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        return self.gaussian_posterior(x)[0].to(self.mean.dtype)

    @torch.no_grad()
    def decode(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        return (z @ self.weight.T + self.mean).reshape(len(z), *self.data.shape)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        z = torch.randn(n, self.factors, generator=rng, device=rng.device, dtype=self.mean.dtype)
        eps = torch.randn(n, *self.data.shape, generator=rng, device=rng.device, dtype=self.mean.dtype)
        return self.decode(z) + (0.5 * self.log_variance).exp() * eps


class ClosedForm(Computed):
    """Maximum likelihood in closed form, for all examples seen so far.

    Counts, sums and second moments are added up over batches and ranks, in float64: after every whole number of epochs
    the parameters are the dataset's.

    Source: Tipping and Bishop 1999, eq. 7 and 8.
    """

    seen: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        for name, shape in {"seen": (), "first": (dims,), "second": (dims, dims)}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def target(self, model: Ppca, x: Tensor) -> dict[str, Tensor]:
        rows = x.flatten(1).double()
        moments = [rows.new_tensor(float(len(rows))), rows.sum(0), rows.T @ rows]
        runtime.current().sum(moments)
        for kept, new in zip((self.seen, self.first, self.second), moments, strict=True):
            kept += new
        mean = self.first / self.seen
        weight, log_variance = principal(self.second / self.seen - torch.outer(mean, mean), model.factors)
        return {"mean": mean, "weight": weight, "log_variance": log_variance}


def principal(covariance: Tensor, factors: int) -> tuple[Tensor, Tensor]:
    """The most likely W [D, q] and log sigma^2 [1] of a covariance [D, D], whose last eigenvalues have mean sigma^2.

    Source: Tipping and Bishop 1999, eq. 7 and 8, with R = I and the largest entry of every column of W positive.
    """
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    variance = values[:-factors].mean().clamp_min(LEAST)
    weight = vectors[:, -factors:] * (values[-factors:] - variance).clamp_min(0).sqrt()
    largest = weight.gather(0, weight.abs().argmax(0, keepdim=True))
    return (weight * torch.where(largest < 0, -1.0, 1.0)).flip(1), variance.log()[None]


def ppca(
    data: DataSpec, factors: Positive = 1, fit: Literal["closed_form", "gradient"] = "closed_form"
) -> tuple[Ppca, MaximumLikelihood | ClosedForm]:
    """Probabilistic PCA, in closed form or by gradient.

    Args:
        data: what is modelled.
        factors: the dimension of z, below that of the data.
        fit: "closed_form" wants `optim: {name: sgd, lr: 1.0}`; "gradient" takes any optimizer.
    """
    return Ppca(data, factors), ClosedForm(data.dims) if fit == "closed_form" else MaximumLikelihood()
