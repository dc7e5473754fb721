"""The linear VAE is probabilistic PCA: its marginal likelihood, its optimum and its posterior in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from dgm_models.method import build, encoded
from dgm_models.nn.latent import LatentVariable
from dgm_models.nn.networks import Mlp, Network
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer
from dgm_models.vae.beta_vae import BetaElbo
from dgm_models.vae.vae import Elbo

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


def closed_form() -> float:
    """The largest mean log-likelihood of pPCA. Source: Tipping and Bishop 1999, eq. 4 and 8."""
    sigma2 = EIGENVALUES[LATENT:].mean()
    log_det = EIGENVALUES[:LATENT].log().sum() + (DIMS - LATENT) * sigma2.log()
    return float(-0.5 * (DIMS * math.log(2 * math.pi) + log_det + DIMS))


@pytest.fixture(scope="module")
def trained() -> LatentVariable:
    torch.manual_seed(0)
    model = LatentVariable(DATA, Linear(), LATENT, "auto")
    settings = Train(steps=700, batch_size=N, report_every=100)
    optim = Optims(Optim(lr=0.03, schedule="cosine"))
    Trainer(model, Elbo(), ArraySource(rows(), DATA), settings, optim, 0).run()
    return model


def bound(model: LatentVariable, k: int, repeats: int, x: Tensor) -> Tensor:
    """[repeats] mean bounds over x."""
    rng = torch.Generator().manual_seed(k)
    with torch.no_grad():
        return torch.stack([model.elbo(x, rng, k=k).double().mean() for _ in range(repeats)])


def test_linear_vae_reaches_the_likelihood_of_ppca(trained: LatentVariable) -> None:
    found = float(marginal(trained, rows()).mean())
    assert found <= closed_form() + 1e-6  # the maximum; float32 weights
    # one posterior draw an example and a rate that falls to 0: quadratic at the optimum, in about 15 weights
    assert found == pytest.approx(closed_form(), abs=0.005)


def test_linear_vae_finds_the_noise_and_the_subspace_of_ppca(trained: LatentVariable) -> None:
    with torch.no_grad():
        variance = float(trained.decoder.log_variance.exp())
        values = torch.linalg.svdvals(trained.decoder.mean.weight).double() ** 2
    assert variance == pytest.approx(
        float(EIGENVALUES[LATENT:].mean()), rel=0.03
    )  # as the likelihood: noise of the draws
    assert values.tolist() == pytest.approx((EIGENVALUES[:LATENT] - 0.5).tolist(), rel=0.05)
    assert torch.allclose(trained.decoder.mean.bias.detach(), rows().mean(0), atol=0.05)


def test_linear_vae_s_elbo_is_tight_at_the_optimum(trained: LatentVariable) -> None:
    found = bound(trained, 1, 40, rows())
    error = float(found.std()) / math.sqrt(40)
    gap = float(marginal(trained, rows()).mean() - found.mean())
    assert -3 * error < gap < 0.01  # the true posterior is diagonal Gaussian there, and the encoder can give it


@pytest.fixture(scope="module")
def loose() -> tuple[LatentVariable, Tensor]:
    """A linear VAE whose posterior is not the true one."""
    torch.manual_seed(1)
    model = LatentVariable(DATA, Linear(), LATENT, "auto")
    return model, rows()[:128]


def test_linear_vae_bounds_are_below_log_p_and_rise_with_k(loose: tuple[LatentVariable, Tensor]) -> None:
    model, x = loose
    repeats = {1: 200, 5: 60, 50: 20}
    found = {k: bound(model, k, n, x) for k, n in repeats.items()}
    means = [float(value.mean()) for value in found.values()] + [float(marginal(model, x).mean())]
    errors = [float(found[k].std()) / math.sqrt(n) for k, n in repeats.items()] + [0.0]
    for i in range(3):
        assert means[i + 1] - means[i] > 3 * math.hypot(errors[i], errors[i + 1])  # three standard errors


def test_linear_vae_bound_reaches_log_p_with_many_draws(loose: tuple[LatentVariable, Tensor]) -> None:
    model, x = loose
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = model.elbo(x[:16], rng, k=3000).double()
    # without - log k it would be 8 nats above; the importance weights' spread is about exp(2)
    assert float((found - marginal(model, x[:16])).abs().mean()) < 0.1


def test_elbo_loss_is_the_negative_elbo(loose: tuple[LatentVariable, Tensor]) -> None:
    model, x = loose
    keys = torch.arange(200 * 128)
    many = Batch(x.repeat(200, 1), keys, keys)
    found = -Elbo().loss(model, many).total.detach() / len(keys)  # the KL in closed form
    draws = bound(model, 1, 200, x)  # the KL by the same draws
    error = float(draws.std()) * math.sqrt(2 / 200)  # of the difference of two means of 200 repeats
    assert float(found) == pytest.approx(float(draws.mean()), abs=4 * error)  # four standard errors


def test_beta_elbo_with_beta_one_is_the_elbo(loose: tuple[LatentVariable, Tensor]) -> None:
    model, x = loose
    batch = encoded(model, x)
    with torch.no_grad():
        one, two, four = (
            objective.loss(model, batch) for objective in (Elbo(), BetaElbo(1.0, 1.0), BetaElbo(4.0, 1.0))
        )
    assert float(one.total) == pytest.approx(float(two.total), rel=1e-6)  # float32
    assert float(two.metrics["elbo"]) == pytest.approx(-float(two.total), rel=1e-6)
    assert float(four.total - one.total) == pytest.approx(
        3 * float(one.metrics["kl"]), rel=1e-4
    )  # a float32 difference


def test_normalised_beta_is_beta_times_latents_over_dims() -> None:
    objective = build("vae/beta_vae", DataSpec("image", (1, 8, 8), 2), latent_dim=16, beta=4.0).objective
    assert objective.normalised_beta == 4.0 * 16 / 64


def test_vae_terms_are_sums_over_the_event() -> None:
    """A mean over pixels would be a weight of D on the KL."""
    data = DataSpec("image", (1, 2, 3), 2)
    model = LatentVariable(data, Mlp(width=4, depth=1), 2, "auto")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x = torch.randint(2, (4, 1, 2, 3))
    reconstruction, kl = model.terms(x, torch.randn(4, 2))
    assert reconstruction.tolist() == pytest.approx([-6 * math.log(2)] * 4, rel=1e-6)  # six fair coins
    assert kl.tolist() == [0.0] * 4
