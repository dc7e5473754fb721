"""Exponential families whose normaliser is known: an exact reference for everything that does without one."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import Discrete, Standardized
from dgm_models.nn.conditioner import check
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.protocols import DataSpec, Model


class ExponentialFamily(Model):
    """log p(x) = eta . T(x) - log Z(eta), the base measure 1: a subclass gives T, eta and log Z.

    The gradient of the mean log-likelihood with respect to eta is mean T(data) - E_p T: maximum likelihood makes the
    moments of model and data equal.
    """

    def statistics(self, x: Tensor) -> Tensor:
        """T(x) [B, K] of x [B, *event] in model space."""
        raise NotImplementedError

    @property
    def eta(self) -> Tensor:
        """[K]: the natural parameters."""
        raise NotImplementedError

    @property
    def log_z(self) -> Tensor:
        """log Z(eta), a scalar in nats."""
        raise NotImplementedError

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats, exact."""
        check(self.condition, cond)
        return self.statistics(x) @ self.eta - self.log_z


class Gaussian(ExponentialFamily):
    """T = (x, x x^T), eta = (P m, -P / 2): mean m and precision P = R R^T, R lower triangular, its diagonal positive.

    log Z = (m^T P m - log det P + D log 2 pi) / 2.
    """

    def __init__(self, data: DataSpec) -> None:
        super().__init__(data, Standardized(data))
        self.shift = nn.Parameter(torch.zeros(data.dims))  # P m
        self.factor = nn.Parameter(torch.zeros(data.dims, data.dims))  # R below, log of its diagonal on the diagonal

    @property
    def root(self) -> Tensor:
        """R [D, D]."""
        return self.factor.tril(-1) + self.factor.diagonal().exp().diag()

    @property
    def mean(self) -> Tensor:
        """[D]."""
        found: Tensor = torch.cholesky_solve(self.shift[:, None], self.root)[:, 0]
        return found

    @property
    def covariance(self) -> Tensor:
        """[D, D]."""
        return torch.cholesky_inverse(self.root)

    def statistics(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return torch.cat([flat, (flat[:, :, None] * flat[:, None]).flatten(1)], 1)

    @property
    def eta(self) -> Tensor:
        return torch.cat([self.shift, -0.5 * (self.root @ self.root.T).flatten()])

    @property
    def log_z(self) -> Tensor:
        half: Tensor = torch.linalg.solve_triangular(self.root, self.shift[:, None], upper=False)  # R^T m
        return 0.5 * (half.square().sum() + self.data.dims * math.log(2 * math.pi)) - self.factor.diagonal().sum()

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats, exact; P is applied to x, so that no [B, D^2] is made."""
        check(self.condition, cond)
        flat = x.flatten(1)
        log_p: Tensor = flat @ self.shift - 0.5 * (flat @ self.root).square().sum(1) - self.log_z
        return log_p

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        z = torch.randn(n, self.data.dims, generator=rng, device=rng.device, dtype=self.shift.dtype)
        away: Tensor = torch.linalg.solve_triangular(self.root.T, z.T, upper=True).T  # R^-T z: covariance P^-1
        return (self.mean + away).reshape(n, *self.data.shape)


class Laplace(ExponentialFamily):
    """T = |x|, eta = -rate, one positive rate a value: log Z = sum log(2 / rate). The median is 0."""

    def __init__(self, data: DataSpec) -> None:
        super().__init__(data, Standardized(data))
        self.log_rate = nn.Parameter(torch.zeros(data.dims))

    def statistics(self, x: Tensor) -> Tensor:
        return x.flatten(1).abs()

    @property
    def eta(self) -> Tensor:
        return -self.log_rate.exp()

    @property
    def log_z(self) -> Tensor:
        return (math.log(2) - self.log_rate).sum()

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        u = torch.rand(n, self.data.dims, generator=rng, device=rng.device, dtype=torch.float64)
        signed = 2 * u - 1  # in [-1, 1): its size is uniform in [0, 1)
        x = -signed.sign() * torch.log1p(-signed.abs().clamp_max(1 - 2**-53)) / self.log_rate.double().exp()
        return x.to(self.log_rate.dtype).reshape(n, *self.data.shape)


class Categorical(ExponentialFamily):
    """T = one-hot of every value, eta its logits: log Z = sum over values of log sum exp. Of two levels: Bernoulli."""

    def __init__(self, data: DataSpec) -> None:
        super().__init__(data, Discrete(data))
        assert data.levels is not None  # Discrete has refused it
        self.logits = nn.Parameter(0.5 * torch.randn(data.dims, data.levels))

    def statistics(self, x: Tensor) -> Tensor:
        return F.one_hot(x.flatten(1), self.logits.shape[1]).flatten(1).to(self.logits.dtype)

    @property
    def eta(self) -> Tensor:
        return self.logits.flatten()

    @property
    def log_z(self) -> Tensor:
        return self.logits.logsumexp(1).sum()

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats, exact; the logits are looked up."""
        check(self.condition, cond)
        flat = x.flatten(1)
        return self.logits.expand(len(flat), -1, -1).gather(2, flat[..., None])[..., 0].sum(1) - self.log_z

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        drawn = torch.multinomial(self.logits.softmax(1), n, replacement=True, generator=rng)
        return drawn.T.reshape(n, *self.data.shape)


def exponential_family(
    data: DataSpec, statistics: Literal["auto", "gaussian", "laplace", "categorical"] = "auto"
) -> tuple[ExponentialFamily, MaximumLikelihood]:
    """log p(x) = eta . T(x) - log Z(eta) with log Z in closed form, by gradient.

    Source: Koopman 1936; Barndorff-Nielsen 1978, Information and Exponential Families.

    Args:
        data: what is modelled.
        statistics: T: "gaussian" for x and x x^T, "laplace" for |x|, of real data; "categorical" for one-hot levels,
            of whole levels; "auto": gaussian or categorical.
    Raises: ValueError for statistics of the other sort of data.
    """
    real = data.levels is None
    if statistics in ("gaussian", "laplace") and not real:
        raise ValueError(
            f"statistics: {statistics!r} is of real data, and this data has {data.levels} levels; use auto"
        )
    if statistics == "categorical" and real:
        raise ValueError("statistics: 'categorical' is of whole levels, and this data is real; use gaussian or laplace")
    if statistics == "laplace":
        return Laplace(data), MaximumLikelihood()
    return Gaussian(data) if real else Categorical(data), MaximumLikelihood()
