"""Critics against closed forms: two fixed Gaussians, the generator held."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dgm_models.gan.non_saturating import critic_loss, generator_loss
from dgm_models.gan.wgan_gp import slope
from dgm_models.method import Method, build, read_optims
from dgm_models.protocols import DataSpec
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer

DATA = DataSpec("vector", (1,))
GRID = torch.linspace(-8.0, 10.0, 3601, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])


def normal(mean: float, std: float, x: Tensor = GRID) -> Tensor:
    return torch.distributions.Normal(mean, std).log_prob(x).exp()


def held(name: str, mean: float, std: float, **params: object) -> Method:
    """A GAN whose generator gives N(mean, std^2) and stays: the critic's turn alone is taken."""
    network = {"name": "mlp", "width": 48, "depth": 2, "activation": "silu"}
    method = build(name, DATA, network=network, latent_dim=1, **params)
    generator = nn.Linear(1, 1)
    nn.init.constant_(generator.weight, std)
    nn.init.constant_(generator.bias, mean)
    method.model.generator = generator
    critic, _ = method.objective.turns()
    method.objective.turns = lambda: [critic]
    return method


def quantiles(n: int = 4096) -> Tensor:
    """[n, 1] points that stand for N(0, 1) without sampling error."""
    return torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(n) + 0.5) / n)[:, None]


def train(method: Method, steps: int, lr: float) -> Trainer:
    settings = Train(steps=steps, batch_size=256, report_every=50)
    optim = read_optims({"lr": lr, "betas": [0.5, 0.99], "schedule": "cosine"}, "optim")
    trainer = Trainer(method.model, method.objective, ArraySource(quantiles(), DATA), settings, optim, 0)
    trainer.run()
    return trainer


@torch.no_grad()
def critic(trainer: Trainer) -> Tensor:
    """The critic on the grid, float64."""
    return trainer.model.critic(GRID.float()[:, None]).double()


# ---- the GAN's critic is p / (p + q)

MEAN, STD = 1.5, 0.7


@pytest.fixture(scope="module")
def gan() -> Trainer:
    return train(held("gan/non_saturating", MEAN, STD), steps=500, lr=5e-3)


def test_gan_critic_is_the_share_of_the_data(gan: Trainer) -> None:
    p, q = normal(0, 1), normal(MEAN, STD)
    error = (critic(gan).sigmoid() - p / (p + q)).abs()
    mean_error = float((error * (p + q) / 2).sum()) * STEP
    # 256 fakes a batch and a rate that falls to 0: a few percent of a standard error of 1 / 16
    assert mean_error < 0.01
    assert float(error[(p + q) > 0.05].max()) < 0.06


def test_gan_critic_s_loss_is_log_4_minus_twice_the_jensen_shannon_divergence(gan: Trainer) -> None:
    p, q = normal(0, 1), normal(MEAN, STD)
    m = (p + q) / 2
    jsd = float((torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)).nan_to_num().sum()) * STEP / 2
    logits = critic(gan)
    zero = torch.zeros_like(logits)
    loss = float((p * critic_loss(logits, zero - 1e9) + q * critic_loss(zero + 1e9, logits)).sum()) * STEP
    assert loss == pytest.approx(math.log(4) - 2 * jsd, abs=2e-3)  # the loss is flat at its optimum: error squared
    assert loss >= math.log(4) - 2 * jsd - 1e-6  # and it is the optimum; the grid's sums are right to 1e-6


def test_gan_critic_that_is_not_trained_is_far_from_the_share() -> None:
    p, q = normal(0, 1), normal(MEAN, STD)
    untrained = train(held("gan/non_saturating", MEAN, STD), steps=1, lr=1e-6)
    assert float(((critic(untrained).sigmoid() - p / (p + q)).abs() * (p + q) / 2).sum()) * STEP > 0.1


def test_gan_losses_in_logits_are_the_paper_s() -> None:
    real, fake = torch.randn(2, 9, dtype=torch.float64)
    expected = -(real.sigmoid().log() + (1 - fake.sigmoid()).log())
    assert torch.allclose(critic_loss(real, fake), expected, rtol=1e-12)  # float64
    assert torch.allclose(generator_loss(fake), -fake.sigmoid().log(), rtol=1e-12)
    huge = torch.tensor([-1e4, 1e4])
    assert bool(critic_loss(huge, huge).isfinite().all() and generator_loss(huge).isfinite().all())


# ---- the Wasserstein critic


def optimal_slope(shift: float, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal critic's slope s on the grid, the distance w of the distribution functions, the mixed density r.

    In one dimension the gap is the integral of s w, and the penalty that of penalty r (s - 1)^2, so that the best
    slope is s = 1 + w / (2 penalty r).
    """
    cdf = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0).cdf
    w = cdf(GRID) - cdf(GRID - shift)
    eps = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    mean, std = (1 - eps) * shift, (eps**2 + (1 - eps) ** 2).sqrt()
    r = torch.distributions.Normal(mean, std).log_prob(GRID[:, None]).exp().mean(1)
    return 1 + w / (2 * penalty * r), w, r


@pytest.fixture(scope="module", params=[(1.0, 10.0), (2.0, 10.0)], ids=["shift 1", "shift 2"])
def wgan(request: pytest.FixtureRequest) -> tuple[float, float, Trainer]:
    shift, penalty = request.param
    method = held("gan/wgan_gp", shift, 1.0, penalty=penalty, critic_steps=1)
    return shift, penalty, train(method, steps=350, lr=5e-3)


def test_wgan_gap_is_the_shift_and_the_surplus_of_the_penalty(wgan: tuple[float, float, Trainer]) -> None:
    shift, penalty, trainer = wgan
    found = -critic(trainer)  # data at 0, samples at the shift: the critic falls
    gap = float(((normal(shift, 1) - normal(0, 1)) * found).sum()) * STEP
    s, w, _ = optimal_slope(shift, penalty)
    assert gap == pytest.approx(shift, rel=0.15)  # W1 = |shift|; the penalty is soft
    assert gap == pytest.approx(float((s * w).sum()) * STEP, rel=0.02)  # fakes are drawn: 2% of a mean of 256 x 50


def test_wgan_slope_is_near_one(wgan: tuple[float, float, Trainer]) -> None:
    shift, penalty, trainer = wgan
    s, _, r = optimal_slope(shift, penalty)
    found = -torch.gradient(critic(trainer), spacing=STEP)[0]
    mean = float((found * r).sum()) * STEP
    assert mean == pytest.approx(1.0, abs=0.12)
    assert mean == pytest.approx(float((s * r).sum()) * STEP, abs=0.01)  # = 1 + W1 / (2 penalty), exactly
    assert float(((found - s).abs() * r).sum()) * STEP < 0.04
    x = torch.linspace(-1, 2, 7)[:, None]
    nearest = [float(found[(GRID - v).abs().argmin()]) for v in x[:, 0]]
    assert slope(trainer.model.critic, x).tolist() == pytest.approx(nearest, abs=5e-3)  # float32 differences over 0.01


def test_wgan_slope_is_one_number_an_example() -> None:
    weight = torch.randn(3, 4, 4)
    x = torch.randn(5, 3, 4, 4)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(48, 1, bias=False), nn.Flatten(0))
    with torch.no_grad():
        critic[1].weight.copy_(weight.reshape(1, -1))
    # the Euclidean norm of the whole gradient, not of one pixel's channels
    assert slope(critic, x).tolist() == pytest.approx([float(weight.norm())] * 5, rel=1e-5)  # float32


def test_wgan_penalty_reaches_the_weights() -> None:
    critic = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    (slope(critic, torch.randn(4, 2)) - 1).square().sum().backward()
    assert float(critic[0].weight.grad.abs().sum()) > 0  # without create_graph it would be none
