"""The parts that go with any adversarial method, each against its formula, and all of them together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm_models.construct import ConfigError
from dgm_models.method import Method, build, encoded, load, read_optims, save
from dgm_models.nn.adversarial import Tricks
from dgm_models.nn.game import between_means, gradient
from dgm_models.nn.networks import Mlp
from dgm_models.nn.tricks import VirtualBatch
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.runtime import Runtime, use
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer

DATA = DataSpec("vector", (2,), classes=3)
IMAGE = DataSpec("image", (1, 8, 8), 256, classes=3)
MLP = {"name": "mlp", "width": 16, "depth": 1}
DCGAN = {"name": "dcgan", "channels": 4, "stages": 2}
METHODS = ("minimax", "non_saturating", "f_gan", "wgan", "wgan_gp", "hinge")
UNWATCHED = {"gap_steps": 0, "curvature_steps": 0}
RNG = torch.Generator().manual_seed(0)
ROWS = torch.randn(64, 2, generator=RNG)


def made(name: str = "non_saturating", data: DataSpec = DATA, network: dict | None = None, **params: Any) -> Method:
    return build(f"gan/{name}", data, network=network or MLP, latent_dim=4, watch=UNWATCHED, **params)


def a_batch(method: Method, n: int = 8) -> Batch:
    x = ROWS[:n] if method.data is DATA else torch.arange(n * 64).reshape(n, 1, 8, 8).remainder(251).byte()
    return encoded(method.model, x, labels=torch.arange(n) % 3)


def trainer(method: Method, steps: int, optim: dict[str, Any] | None = None, **train: Any) -> Trainer:
    x = ROWS if method.data is DATA else torch.randint(256, (64, 1, 8, 8), generator=RNG).byte()
    source = ArraySource(x, method.data, torch.arange(64) % 3)
    optim = optim or {"name": "sgd", "lr": 0.05}
    settings = Train(steps=steps, **({"batch_size": 8} | train))
    return Trainer(method.model, method.objective, source, settings, read_optims(optim, "optim"), 0)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in module.parameters()])


# ---- the default is none of them


@pytest.mark.parametrize("name", METHODS)
def test_tricks_by_default_leave_the_critic_the_network(name: str) -> None:
    method = made(name)
    plain = Mlp(width=16, depth=1).down((2,), 1)
    assert [p.shape for p in method.model.critic.parameters()] == [p.shape for p in plain.parameters()]
    assert method.objective.additive
    assert method.objective.double_backward == (name == "wgan_gp")
    assert [turn.player for turn in method.objective.turns()] == ["critic", "generator"]
    assert method.objective.state_dict() == {}


def test_tricks_see_data_and_samples_apart() -> None:
    method = made()
    seen: list[int] = []
    method.model.critic.body.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    method.objective.critic_turn(method.model, a_batch(method, 6))
    assert seen == [6, 6]


# ---- label smoothing


@pytest.mark.parametrize("name", ["minimax", "non_saturating"])
def test_smoothing_moves_the_best_critic_to_its_targets(name: str) -> None:
    objective = made(name, tricks={"smooth_real": 0.9, "smooth_fake": 0.05}).objective
    p, q = torch.rand(2, 5, dtype=torch.float64, generator=RNG)
    logits = ((0.9 * p + 0.05 * q) / (p + q)).logit().requires_grad_(True)
    zero = torch.zeros_like(logits)
    loss = p * objective.critic_loss(logits, zero) + q * objective.critic_loss(zero, logits)
    (found,) = torch.autograd.grad(loss.sum(), logits)
    assert float(found.abs().max()) < 1e-12  # float64


def test_smoothing_of_one_side_leaves_the_samples_and_the_reported_value() -> None:
    smoothed, plain = made(tricks={"smooth_real": 0.9}).objective, made().objective
    real, fake = torch.randn(2, 7, dtype=torch.float64, generator=RNG)
    difference = smoothed.critic_loss(real, fake) - plain.critic_loss(real, fake)
    assert torch.allclose(difference, 0.1 * real)  # softplus(v) - 0.9 v against softplus(v) - v
    assert torch.equal(smoothed.value(real, fake), plain.value(real, fake))
    assert torch.equal(smoothed.generator_loss(fake), plain.generator_loss(fake))


@pytest.mark.parametrize("name", ["f_gan", "wgan", "wgan_gp", "hinge"])
@pytest.mark.parametrize("side", [{"smooth_real": 0.9}, {"smooth_fake": 0.1}])
def test_smoothing_of_a_critic_without_log_odds_is_refused(name: str, side: dict) -> None:
    with pytest.raises(ConfigError, match=r"tricks\.smooth_real, tricks\.smooth_fake: .* gives no log-odds"):
        made(name, tricks=side)


@pytest.mark.parametrize(
    ("tricks", "message"),
    [
        ({"smooth_real": 0.3, "smooth_fake": 0.3}, r"method\.tricks: smooth_fake: 0.3 is not below smooth_real, 0.3"),
        ({"adversarial": 0.0}, r"method\.tricks: adversarial: 0 leaves the generator without a loss"),
        ({"r1_evry": 4}, r'method\.tricks\.r1_evry: unknown key; did you mean "r1_every"'),
    ],
)
def test_tricks_that_cannot_be_are_refused(tricks: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(tricks=tricks)


# ---- historical averaging


def test_historical_averaging_holds_the_mean_of_the_iterates() -> None:
    method = made(tricks={"historical_averaging": 0.1})
    running = trainer(method, 5)
    players = method.model.players()
    past: dict[str, list[Tensor]] = {name: [] for name in players}
    for step in range(1, 6):
        running.step()
        for name, player in players.items():
            past[name].append(flat(player))
            mean = torch.stack(past[name]).mean(0)
            assert torch.allclose(flat(method.objective.means[name].module), mean, atol=1e-6)  # float32
        assert int(method.objective.means["critic"].updates) == step
    assert all(float((past[name][0] - past[name][-1]).abs().max()) > 1e-3 for name in players)


@pytest.mark.parametrize("player", ["critic", "generator"])
def test_historical_averaging_adds_the_squared_distance_an_example(player: str) -> None:
    method, plain = made(tricks={"historical_averaging": 0.1}), made()
    with torch.no_grad():
        for module in method.model.players().values():
            for p in module.parameters():
                p.add_(0.3)
    plain.model.load_state_dict(method.model.state_dict())
    batch = a_batch(method)
    found, without = (
        getattr(m.objective, f"{player}_turn")(m.model, batch).total.detach() for m in (method, plain)
    )  # fmt: skip
    size = sum(p.numel() for p in method.model.players()[player].parameters())
    # the mean is where the player began: 0.3 away in every coordinate
    assert float(found - without) == pytest.approx(len(batch) * 0.1 * size * 0.3**2, rel=1e-4)  # float32


# ---- R1


def test_r1_is_half_the_squared_norm_of_the_whole_gradient() -> None:
    method = made(data=IMAGE, tricks={"r1": 3.0, "r1_every": 1})
    weight = torch.randn(64, generator=RNG)
    linear = nn.Linear(64, 1)
    with torch.no_grad():
        linear.weight.copy_(weight[None])
    method.model.critic.body = nn.Sequential(nn.Flatten(), linear)
    loss = method.objective.r1_turn(method.model, a_batch(method, 5))
    square = float(weight.square().sum())
    assert float(loss.total.detach()) == pytest.approx(5 * 3.0 / 2 * square, rel=1e-5)  # float32
    assert float(loss.metrics["r1"].detach()) == pytest.approx(5 * square, rel=1e-5)
    loss.total.backward()
    assert torch.allclose(linear.weight.grad[0], 5 * 3.0 * weight, rtol=1e-5)


def test_r1_taken_lazily_moves_the_critic_as_the_eager_one_does() -> None:
    def moved(**tricks: float) -> Tensor:
        method = made(network={"name": "mlp", "width": 16, "depth": 1, "activation": "tanh"}, tricks=tricks)
        before = flat(method.model.critic)
        # the critic hardly moves, so that R1's gradient is the same at every step but for the batch
        trainer(method, 16, {"name": "sgd", "lr": 1e-3, "generator": {"lr": 1e-9}}, batch_size=64).run()
        return flat(method.model.critic) - before

    plain, lazy, eager = moved(), moved(r1=5.0, r1_every=16), moved(r1=5.0, r1_every=1)
    assert float((eager - plain).norm()) > 5 * float((lazy - eager).norm())
    assert float((lazy - plain).norm()) == pytest.approx(float((eager - plain).norm()), rel=0.1)


def test_r1_is_a_turn_of_its_own_between_the_others() -> None:
    objective = made("wgan", tricks={"r1": 1.0, "r1_every": 4}).objective
    assert [(t.player, t.every, t.updates) for t in objective.turns()] == [
        ("critic", 1, 5), ("critic", 4, 1), ("generator", 1, 1)
    ]  # fmt: skip
    assert objective.double_backward


def test_r1_of_every_step_is_part_of_the_critic_s_loss() -> None:
    method, plain = made(tricks={"r1": 3.0, "r1_every": 1}), made()
    batch = a_batch(method)
    assert [turn.player for turn in method.objective.turns()] == ["critic", "generator"]
    found, without = (m.objective.critic_turn(m.model, batch) for m in (method, plain))
    square = gradient(method.model.critic, batch.x).square().sum()
    assert float((found.total - without.total).detach()) == pytest.approx(1.5 * float(square.detach()), rel=1e-4)
    assert found.metrics.keys() - without.metrics.keys() == {"r1"}


# ---- feature matching


def test_feature_matching_is_the_squared_distance_of_the_means() -> None:
    method, plain = made(tricks={"feature_matching": 2.0, "adversarial": 0.5, "feature_dim": 8}), made()
    assert plain.objective.additive and not method.objective.additive
    model, batch = method.model, a_batch(method)
    loss = method.objective.generator_turn(model, batch)
    fake = model.generate(batch)
    means = model.critic.features(fake).mean(0) - model.critic.features(batch.x).mean(0).detach()
    expected = len(batch) * 2.0 * means.square().sum()
    expected = expected + 0.5 * method.objective.generator_loss(model.critic(fake)).sum()
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)  # float32
    parameters = list(model.generator.parameters())
    one, two = (torch.autograd.grad(total, parameters) for total in (loss.total, expected))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(one, two, strict=True))
    assert float(loss.metrics["feature_distance"].detach()) == pytest.approx(
        len(batch) * float(means.detach().square().sum()), rel=1e-5
    )


def test_feature_matching_of_two_ranks_is_that_of_all_rows() -> None:
    class Beside(Runtime):
        """One of two ranks, with the other's share in the reduction."""

        def sum(self, tensors: Any) -> None:
            for mine, theirs in zip(tensors, others, strict=True):
                mine += theirs

    real, fake = torch.randn(2, 7, 3, dtype=torch.float64, generator=RNG)
    weight = torch.randn(3, 3, dtype=torch.float64, generator=RNG, requires_grad=True)
    whole = between_means(fake @ weight, real)
    (expected,) = torch.autograd.grad(whole, weight)
    total, found = 0.0, torch.zeros_like(weight)
    for mine, theirs in ((slice(0, 3), slice(3, 7)), (slice(3, 7), slice(0, 3))):
        other = (fake[theirs] @ weight).detach()
        others = [torch.stack([other.sum(0), real[theirs].sum(0)]), torch.tensor(float(len(other)))]
        with use(Beside(world=2)):
            share = between_means(fake[mine] @ weight, real[mine])
        total += float(share.detach())
        found += torch.autograd.grad(share, weight)[0]
    assert total == pytest.approx(float(whole.detach()), rel=1e-6)  # the rows are counted in float32
    assert torch.allclose(found, expected, rtol=1e-6)


def test_feature_matching_alone_trains_the_generator() -> None:
    method = made(tricks={"feature_matching": 1.0, "adversarial": 0.0})
    before = flat(method.model.generator)
    trainer(method, 2).run()
    assert float((flat(method.model.generator) - before).abs().max()) > 0


# ---- what changes the networks


def test_spectral_norm_bounds_the_critic_s_slope() -> None:
    method = made("hinge", tricks={"spectral_norm": True})
    with torch.no_grad():
        for name, p in method.model.critic.named_parameters():
            if "original" in name:
                p.mul_(30.0)
    slopes = torch.linalg.vector_norm(gradient(method.model.critic.eval(), torch.randn(50, 2, generator=RNG)), dim=1)
    assert 0 < float(slopes.detach().max()) <= 1.0 + 1e-4  # the power iterations stop short of the last digits
    free = made("hinge")
    with torch.no_grad():
        for p in free.model.critic.parameters():
            p.mul_(30.0)
    slopes = torch.linalg.vector_norm(gradient(free.model.critic, torch.randn(50, 2, generator=RNG)), dim=1)
    assert float(slopes.detach().min()) > 10


@pytest.mark.parametrize("tricks", [{"minibatch_discrimination": 3}, {"minibatch_std": True}])
def test_minibatch_parts_let_the_critic_see_its_batch(tricks: dict) -> None:
    method = made(tricks={"feature_dim": 8, **tricks})
    x = ROWS[:6]
    alone, together = method.model.critic(x[:2]), method.model.critic(x)[:2]
    assert not torch.allclose(alone, together, atol=1e-4)
    assert torch.allclose(made().model.critic(x[:2]), made().model.critic(x)[:2], atol=1e-6)
    with pytest.raises(ValueError, match=r"train\.accumulate: NonSaturating couples the examples of a batch"):
        trainer(method, 1, accumulate=2)


def test_virtual_batch_norm_takes_the_first_batch_and_frees_the_rows() -> None:
    coupled = made(data=IMAGE, network=DCGAN)
    method = made(data=IMAGE, network=DCGAN, tricks={"virtual_batch_norm": 5})
    assert not coupled.objective.additive and method.objective.additive
    bodies = [player.body for player in method.model.players().values()]
    assert all(isinstance(body, VirtualBatch) for body in bodies)
    running = trainer(method, 1)
    running.step()
    first = running._fetch(running.source, 0, 8, "initialize")
    assert torch.equal(method.model.critic.body.reference, first.x[:5])
    z = first.normal("latent", (4,))
    assert torch.equal(method.model.generator.body.reference, z[:5])
    x = first.x
    assert torch.allclose(method.model.critic(x[:2]), method.model.critic(x)[:2], atol=1e-5)  # float32
    assert not torch.allclose(coupled.model.critic(x[:2]), coupled.model.critic(x)[:2], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "tricks", "where"),
    [("wgan_gp", {}, "penalty"), ("hinge", {"r1": 1.0}, r"tricks\.r1")],
)
def test_slopes_of_a_critic_with_batch_norm_are_refused(name: str, tricks: dict, where: str) -> None:
    with pytest.raises(ConfigError, match=f"{where}: penalises the critic's slope at each example"):
        made(name, IMAGE, DCGAN, tricks=tricks)
    made(name, IMAGE, DCGAN | {"norm_down": "none"}, tricks=tricks)
    made(name, IMAGE, DCGAN, tricks=tricks | {"virtual_batch_norm": 4})


# ---- conditions


def test_projection_adds_the_inner_product_with_the_features() -> None:
    method = made(cond={"name": "label"}, projection=True, tricks={"feature_dim": 8})
    critic, x = method.model.critic, ROWS[:5]
    one, two = torch.zeros(5, dtype=torch.int64), torch.full((5,), 2)
    assert torch.equal(critic.features(x, one), critic.features(x, two))
    v = critic.projection.weight  # [8, 3]
    expected = critic.features(x, one) @ (v[:, 2] - v[:, 0])
    assert torch.allclose(critic(x, two) - critic(x, one), expected, atol=1e-6)  # float32
    assert float(expected.detach().abs().min()) > 1e-4


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("cond", [{"name": "label"}, {"name": "edges"}, {"name": "masked"}], ids=lambda c: c["name"])
def test_conditions_reach_both_players(cond: dict, projection: bool) -> None:
    method = made("hinge", IMAGE, cond=cond, projection=projection, tricks={"feature_dim": 8})
    batch = a_batch(method, 6)
    other = batch.cond.roll(1, 0)
    z = torch.randn(6, 4, generator=RNG)
    assert not torch.allclose(method.model.generator(z, batch.cond), method.model.generator(z, other))
    assert not torch.allclose(method.model.critic(batch.x, batch.cond), method.model.critic(batch.x, other))
    with pytest.raises(ValueError, match="cond: missing"):
        method.model.critic(batch.x)
    with pytest.raises(ValueError, match="cond: missing"):
        method.model.sample(2, torch.Generator())
    before = [flat(player) for player in method.model.players().values()]
    trainer(method, 2).run()
    after = [flat(player) for player in method.model.players().values()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_conditions_are_needed_for_a_projection() -> None:
    with pytest.raises(ConfigError, match="projection: needs a condition"):
        made(projection=True)


def test_conditions_of_a_dataset_are_not_read_by_a_model_without_one() -> None:
    method = made()
    batch = a_batch(method)
    assert batch.cond is not None and method.model.given(batch) is None
    method.objective.critic_turn(method.model, batch)


# ---- together

EVERYTHING = {
    "feature_matching": 0.1, "historical_averaging": 1e-3, "r1": 0.1, "r1_every": 2, "spectral_norm": True,
    "minibatch_discrimination": 2, "minibatch_std": True, "feature_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_tricks_go_together_and_their_state_is_in_the_checkpoint(name: str, tmp_path) -> None:
    smooth = {"smooth_real": 0.9} if name in ("minimax", "non_saturating") else {}
    tricks = EVERYTHING | smooth

    def start(seed: int) -> Trainer:
        return trainer(made(name, cond={"name": "label"}, projection=True, tricks=tricks, seed=seed), 4)

    whole, first, second = start(0), start(0), start(1)
    whole.run()
    first.step()
    first.step()
    first.save(tmp_path / "checkpoint")
    second.load(tmp_path / "checkpoint")
    second.run()
    for module in ("model", "objective"):
        one, two = getattr(whole, module).state_dict(), getattr(second, module).state_dict()
        assert one and all(torch.equal(one[key], two[key]) for key in one)
    assert all(bool(p.isfinite().all()) for p in whole.model.parameters())


def test_tricks_are_part_of_an_artifact(tmp_path) -> None:
    method = made(cond={"name": "label"}, projection=True, tricks=EVERYTHING)
    again = load(save(method, tmp_path / "artifact"))
    assert again.objective.tricks == method.objective.tricks == Tricks(**EVERYTHING)
    x, y = ROWS[:4], torch.tensor([0, 1, 2, 0])
    assert torch.equal(again.model.critic(x, y), method.model.eval().critic(x, y))
