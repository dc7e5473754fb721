"""Critics against closed forms: two fixed Gaussians, the generator held."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dgm_models.method import Method, build, encoded, read_optims
from dgm_models.nn.game import Game, gradient
from dgm_models.ops.divergences import DIVERGENCES
from dgm_models.protocols import DataSpec
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer

DATA = DataSpec("vector", (1,))
UNWATCHED = {"gap_steps": 0, "curvature_steps": 0}
GRID = torch.linspace(-8.0, 10.0, 3601, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])


def normal(mean: float, std: float, x: Tensor = GRID) -> Tensor:
    return torch.distributions.Normal(mean, std).log_prob(x).exp()


def held(name: str, mean: float, std: float, **params: object) -> Method:
    """A GAN whose generator gives N(mean, std^2) and stays: the critic's turn alone is taken."""
    network = {"name": "mlp", "width": 48, "depth": 2, "activation": "silu"}
    method = build(name, DATA, network=network, latent_dim=1, watch=UNWATCHED, **params)
    generator = nn.Linear(1, 1)
    nn.init.constant_(generator.weight, std)
    nn.init.constant_(generator.bias, mean)
    method.model.generator.body = generator
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


def game(name: str, **params: object) -> Game:
    """A method's objective."""
    return build(name, DATA, network={"name": "mlp", "width": 4, "depth": 1}, **params).objective


# ---- the GAN's critic is p / (p + q)

MEAN, STD = 1.5, 0.7
P, Q = normal(0, 1), normal(MEAN, STD)


def integral(values: Tensor) -> float:
    """Over the grid; what underflows in both densities is nothing."""
    return float(values.nan_to_num(0.0, 0.0, 0.0).sum()) * STEP


def jensen_shannon() -> float:
    m = (P + Q) / 2
    return integral(torch.special.xlogy(P, P / m) + torch.special.xlogy(Q, Q / m)) / 2


@pytest.fixture(scope="module")
def gan() -> Trainer:
    return train(held("gan/non_saturating", MEAN, STD), steps=500, lr=5e-3)


def test_gan_critic_is_the_share_of_the_data(gan: Trainer) -> None:
    error = (critic(gan).sigmoid() - P / (P + Q)).abs()
    # 256 fakes a batch and a rate that falls to 0: a few percent of a standard error of 1 / 16
    assert integral(error * (P + Q) / 2) < 0.01
    assert float(error[(P + Q) > 0.05].max()) < 0.06


def test_gan_value_is_twice_the_jensen_shannon_divergence_less_log_4(gan: Trainer) -> None:
    logits = critic(gan)
    value = integral(P * gan.objective.value(logits, logits - 1e9) + Q * gan.objective.value(logits + 1e9, logits))
    best = 2 * jensen_shannon() - math.log(4)
    assert value == pytest.approx(best, abs=2e-3)  # the value is flat at its optimum: error squared
    assert value <= best + 1e-6  # and it is the optimum; the grid's sums are right to 1e-6


def test_gan_distance_from_the_optimum_is_reported(gan: Trainer) -> None:
    last = gan.history[-1][1]
    # 50 batches of 256 pairs: a standard error of a value of order 1
    assert last["critic/from_optimum"] == pytest.approx(2 * jensen_shannon(), abs=4 / math.sqrt(50 * 256))
    assert last["critic/from_optimum"] == pytest.approx(last["critic/value"] + math.log(4), abs=1e-5)  # float32
    assert last["critic/loss"] == pytest.approx(-last["critic/value"], abs=1e-5)
    share = integral(torch.maximum(P, Q)) / 2  # the Bayes classifier's
    assert last["critic/accuracy"] == pytest.approx(share, abs=0.02)  # 25600 examples: 3 standard errors are 0.01
    assert last["critic/real"] > 0 > last["critic/fake"]


def test_gan_critic_that_is_not_trained_is_far_from_the_share() -> None:
    untrained = train(held("gan/non_saturating", MEAN, STD), steps=1, lr=1e-6)
    assert integral((critic(untrained).sigmoid() - P / (P + Q)).abs() * (P + Q) / 2) > 0.1


def test_gan_losses_in_logits_are_the_papers() -> None:
    real, fake = torch.randn(2, 9, dtype=torch.float64)
    log_d, log_not_d = real.sigmoid().log(), (1 - fake.sigmoid()).log()
    minimax, other = game("gan/minimax"), game("gan/non_saturating")
    for objective in (minimax, other):
        assert torch.allclose(objective.critic_loss(real, fake), -(log_d + log_not_d), rtol=1e-12)  # float64
        assert torch.allclose(objective.value(real, fake), log_d + log_not_d, rtol=1e-12)
    assert torch.allclose(minimax.generator_loss(fake), log_not_d, rtol=1e-12)
    assert torch.allclose(other.generator_loss(fake), -fake.sigmoid().log(), rtol=1e-12)
    huge = torch.tensor([-1e4, 1e4])
    for objective in (minimax, other):
        assert bool(
            objective.critic_loss(huge, huge).isfinite().all() and objective.generator_loss(huge).isfinite().all()
        )


def test_gan_generator_gradient_saturates_in_minimax_alone() -> None:
    sure = torch.full((1,), -20.0, requires_grad=True)  # the critic is sure of samples

    def push(name: str) -> float:
        (found,) = torch.autograd.grad(game(name).generator_loss(sure).sum(), sure)
        return -float(found)

    assert 0 < push("gan/minimax") < 1e-8
    assert push("gan/non_saturating") == pytest.approx(1.0, abs=1e-6)


def test_hinge_value_at_its_best_critic_is_twice_the_total_variation_less_2() -> None:
    objective = game("gan/hinge")
    best = (P - Q).sign()
    inside = -torch.ones_like(best)  # max(0, 1 - D) and max(0, 1 + D) are 0 there
    value = integral(P * objective.value(best, inside) + Q * objective.value(-inside, best))
    assert value - objective.optimum == pytest.approx(integral((P - Q).abs()), abs=1e-7)  # 0.7 is float32 in Q
    for other in (best * 0.9, best * 1.1, torch.zeros_like(best)):
        worse = integral(P * objective.value(other, inside) + Q * objective.value(-inside, other))
        assert worse < value - 1e-3
    real, fake = torch.tensor([0.3, 2.0]), torch.tensor([-0.4, 1.0])
    assert objective.critic_loss(real, fake).tolist() == pytest.approx([0.7 + 0.6, 0.0 + 2.0])
    assert objective.generator_loss(fake).tolist() == pytest.approx([0.4, -1.0])


# ---- the f-GAN's critic is f'(p / q)


@pytest.fixture(scope="module", params=["kl", "pearson", "hellinger"])
def f_gan(request: pytest.FixtureRequest) -> tuple[str, Trainer]:
    return request.param, train(held("gan/f_gan", 0.6, 1.1, divergence=request.param), steps=400, lr=5e-3)


def test_f_gan_critic_is_the_slope_at_the_ratio(f_gan: tuple[str, Trainer]) -> None:
    name, trainer = f_gan
    p, q = normal(0, 1), normal(0.6, 1.1)
    best, found = DIVERGENCES[name].slope(p / q), DIVERGENCES[name].activation(critic(trainer))
    spread = integral((best - integral(best * p)).square() * p) ** 0.5
    assert integral((found - best).abs() * p) < 0.2 * spread
    assert integral((DIVERGENCES[name].threshold - best).abs() * p) > 0.5 * spread  # a constant critic is far away


def test_f_gan_bound_is_the_divergence(f_gan: tuple[str, Trainer]) -> None:
    name, trainer = f_gan
    p, q = normal(0, 1), normal(0.6, 1.1)
    divergence = DIVERGENCES[name]
    v = critic(trainer)
    bound = integral(p * divergence.activation(v)) - integral(q * divergence.conjugate_at(v))
    exact = integral(q * divergence.f(p / q))
    assert bound == pytest.approx(exact, rel=0.05)
    assert bound <= exact + 1e-6
    # 50 batches of 256 pairs, of which the bound's terms have a standard deviation of about 1
    assert trainer.history[-1][1]["critic/from_optimum"] == pytest.approx(exact, abs=4 / math.sqrt(50 * 256))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_f_gan_generator_minimises_the_bound_or_the_alternative(name: str) -> None:
    divergence = DIVERGENCES[name]
    fake = torch.randn(9, dtype=torch.float64)
    bound = game("gan/f_gan", divergence=name, descent="bound").generator_loss(fake)
    other = game("gan/f_gan", divergence=name, descent="alternative").generator_loss(fake)
    assert torch.allclose(bound, -divergence.conjugate(divergence.activation(fake)), rtol=1e-10)  # float64
    assert torch.allclose(other, -divergence.activation(fake), rtol=1e-12)


def test_f_gan_of_the_gan_divergence_is_minimax() -> None:
    real, fake = torch.randn(2, 9, dtype=torch.float64)
    one, two = game("gan/f_gan", divergence="gan", descent="bound"), game("gan/minimax")
    assert torch.allclose(one.critic_loss(real, fake), two.critic_loss(real, fake), rtol=1e-12)
    assert torch.allclose(one.generator_loss(fake), two.generator_loss(fake), rtol=1e-12)
    assert one.optimum == pytest.approx(two.optimum)
    assert torch.equal(one.right(real, fake), two.right(real, fake))


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
    slopes = torch.linalg.vector_norm(gradient(trainer.model.critic, x), dim=1)
    assert slopes.tolist() == pytest.approx(nearest, abs=5e-3)  # float32 differences over 0.01


def test_wgan_penalty_is_of_every_example_s_whole_gradient() -> None:
    data = DataSpec("image", (3, 4, 4), 256)
    method = build("gan/wgan_gp", data, network={"name": "mlp", "width": 4, "depth": 1}, penalty=2.0)
    weight = torch.randn(48, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(48, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight[None])
    method.model.critic.body = nn.Sequential(nn.Flatten(), linear)
    x = torch.randn(5, 3, 4, 4)
    assert torch.allclose(gradient(method.model.critic, x), weight.expand(5, 48))
    found = method.objective.penalty(method.model, encoded(method.model, torch.zeros(5, 3, 4, 4).byte()), x)
    # 2 (|w| - 1)^2 an example; a norm along the channels would be one number a pixel
    assert float(found.total.detach()) == pytest.approx(5 * 2.0 * (float(weight.norm()) - 1) ** 2, rel=1e-5)  # float32
    assert float(found.metrics["slope"].detach()) == pytest.approx(5 * float(weight.norm()), rel=1e-5)


def test_wgan_penalty_is_taken_between_data_and_samples_at_one_place_an_example() -> None:
    method = build("gan/wgan_gp", DataSpec("vector", (2,)), network={"name": "mlp", "width": 4, "depth": 1})
    seen: list[Tensor] = []

    class Seeing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return x.square().sum(1, keepdim=True)

    method.model.critic.body = Seeing()
    batch = encoded(method.model, torch.zeros(64, 2))
    method.objective.penalty(method.model, batch, torch.tensor([1.0, 3.0]).expand(64, 2))
    (x,) = seen
    assert torch.allclose(x[:, 1], 3 * x[:, 0])  # one eps for all coordinates of an example
    assert len(x[:, 0].unique()) == 64 and float(x[:, 0].min()) > 0 and float(x[:, 0].max()) < 1  # and one for each


def test_wgan_penalty_reaches_the_weights() -> None:
    critic = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    gradient(critic, torch.randn(4, 2)).square().sum().backward()
    assert float(critic[0].weight.grad.abs().sum()) > 0  # without create_graph it would be none


@pytest.mark.parametrize("name", ["gan/wgan", "gan/wgan_gp"])
def test_wgan_losses_are_the_gap(name: str) -> None:
    objective = game(name)
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    assert objective.critic_loss(real, fake).tolist() == [-1.5, 2.0]
    assert objective.value(real, fake).tolist() == [1.5, -2.0]
    assert objective.generator_loss(fake).tolist() == [-0.5, -1.0]
    assert objective.right(real, fake).tolist() == [1.0, 0.0]
    assert objective.right(real, torch.tensor([3.0, -2.0])).tolist() == [0.0, 1.0]  # whatever their signs
    assert objective.optimum == 0.0


def test_wgan_clips_the_critic_alone_before_every_loss() -> None:
    network = {"name": "mlp", "width": 8, "depth": 1}
    method = build("gan/wgan", DATA, network=network, clip=0.05, critic_steps=2, watch=UNWATCHED)
    used: list[float] = []

    def note(module: nn.Module, given: object) -> None:
        used.append(max(float(p.detach().abs().max()) for p in method.model.critic.parameters()))

    method.model.critic.body.register_forward_pre_hook(note)
    widest = max(float(p.detach().abs().max()) for p in method.model.generator.parameters())
    settings = Train(steps=3, batch_size=8)
    Trainer(
        method.model, method.objective, ArraySource(quantiles(64), DATA), settings,
        read_optims({"name": "sgd", "lr": 0.05}, "optim"), 0,
    ).run()  # fmt: skip
    assert len(used) == 3 * (2 * 2 + 1)
    assert max(used) == pytest.approx(0.05)
    assert max(float(p.detach().abs().max()) for p in method.model.generator.parameters()) > 0.5 * widest > 0.05


def test_wgan_critic_s_slope_is_what_its_weights_allow() -> None:
    clip = 0.3
    method = held("gan/wgan", 2.0, 1.0, clip=clip, critic_steps=1)
    trainer = train(method, steps=150, lr=0.05)
    steepest = float(gradient(trainer.model.critic, GRID.float()[:, None]).abs().max())
    assert (
        0.1 < steepest <= clip**3 * 48**2 * 1.1**2
    )  # three matrices of 1, 48 and 48 inputs; silu's slope is below 1.1
