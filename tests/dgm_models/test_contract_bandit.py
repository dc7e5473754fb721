"""Contract: a one-token bandit under PPO and DPO reaches pi* = pi_ref exp(r / beta) / Z by the ordinary trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import Discrete
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model
from dgm_models.training.average import Average
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer
from tests.laws import cases

ARMS = 4
BETA = 0.5
REWARD = torch.tensor([0.0, 1.0, 0.3, -0.5])
REFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
BEST = (REFERENCE + REWARD / BETA).log_softmax(0)


class Policy(nn.Module):
    """log pi over the arms, at the reference to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(REFERENCE.clone())

    def forward(self) -> Tensor:
        return self.logits.log_softmax(0)


def divergence(policy: nn.Module) -> float:
    """KL(pi || pi*) in nats."""
    log_pi = policy().detach().double()
    return float((log_pi.exp() * (log_pi - BEST.double())).sum())


# ---- PPO

EPOCHS, MINIBATCHES = 2, 4


class ActorCritic(Model):
    """Two players: the policy, and the value that is its baseline."""

    def __init__(self, data: DataSpec) -> None:
        super().__init__(data, Discrete(data))
        self.policy = Policy()
        self.value = nn.Linear(1, 1)

    def players(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "value": self.value}


class Ppo(Objective):
    """Clipped ratio on advantages of the reward r - beta log(pi / pi_ref), over epochs of one rollout's minibatches.

    Source: Schulman et al. 2017, eq. 7, arXiv:1707.06347; the reward as in Ziegler et al. 2019, arXiv:1909.08593.
    """

    def __init__(self, beta: float = BETA) -> None:
        super().__init__()
        self.beta = beta
        self.rollouts: list[list[list[int]]] = []  # the ids of every minibatch, as a record for the tests
        self.ratios: list[Tensor] = []

    def turns(self) -> Sequence[Turn]:
        updates = EPOCHS * MINIBATCHES
        return Turn("policy", self.policy_turn, updates=updates), Turn("value", self.value_turn, updates=updates)

    def prepare(self, model: ActorCritic, batch: Batch) -> Sequence[Batch]:
        log_pi = model.policy()
        action = (batch.uniform("action", (1,)) > log_pi.exp().cumsum(0)).sum(1).clamp(max=ARMS - 1)
        old = log_pi[action]
        rewarded = REWARD[action] - self.beta * (old - REFERENCE[action])
        advantage = rewarded - model.value(torch.ones(len(batch), 1))[:, 0]
        batch = batch.with_extra(action=action, old=old, rewarded=rewarded, advantage=advantage)
        parts = []
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(batch)).chunk(MINIBATCHES):
                parts.append(batch.map(lambda tensor, rows=rows: tensor[rows]))
        self.rollouts.append([part.id.tolist() for part in parts])
        return parts

    def policy_turn(self, model: ActorCritic, batch: Batch) -> Loss:
        ratio = (model.policy()[batch.extra["action"]] - batch.extra["old"]).exp()
        self.ratios.append(ratio.detach())
        advantage = batch.extra["advantage"]
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return Loss(-surrogate.sum(), {"ratio": ratio.sum()})

    def value_turn(self, model: ActorCritic, batch: Batch) -> Loss:
        return Loss((model.value(torch.ones(len(batch), 1))[:, 0] - batch.extra["rewarded"]).square().sum())


def ppo(objective: Ppo, steps: int = 120) -> Trainer:
    """A trainer whose batches are prompts without content."""
    data = DataSpec("tokens", (1,), 2)
    prompts = ArraySource(torch.zeros(256, 1, dtype=torch.uint8), data)
    optim = Optims(Optim(lr=0.03, schedule="linear"), {"value": Optim(lr=0.05)})
    return Trainer(ActorCritic(data), objective, prompts, Train(steps=steps, batch_size=128), optim, 0)


@pytest.fixture(scope="module")
def trained_ppo() -> Trainer:
    torch.manual_seed(0)
    trainer = ppo(Ppo())
    assert divergence(trainer.model.policy) > 0.5
    trainer.run()
    return trainer


def test_ppo_reaches_the_closed_form(trained_ppo: Trainer) -> None:
    # at pi* every arm has one and the same regularised reward, so that the gradient's noise vanishes there
    assert divergence(trained_ppo.model.policy) < 1e-3


def test_ppo_value_is_the_log_partition_function(trained_ppo: Trainer) -> None:
    expected = BETA * float((REFERENCE + REWARD / BETA).logsumexp(0))  # r - beta log(pi* / pi_ref) for every arm
    found = float(trained_ppo.model.value(torch.ones(1, 1)).detach())
    assert found == pytest.approx(expected, abs=0.02)  # 2% of the rewards, which span 1.5


def test_ppo_begins_each_rollout_with_ratio_one(trained_ppo: Trainer) -> None:
    updates = EPOCHS * MINIBATCHES
    first, later = trained_ppo.objective.ratios[::updates], trained_ppo.objective.ratios[1::updates]
    assert all(torch.equal(ratio, torch.ones_like(ratio)) for ratio in first)
    assert not any(torch.equal(ratio, torch.ones_like(ratio)) for ratio in later[:50])


def test_ppo_walks_every_prompt_once_an_epoch_in_a_new_order(trained_ppo: Trainer) -> None:
    rollouts = trained_ppo.objective.rollouts
    assert len(rollouts) == 120  # one for both players
    for parts in rollouts:
        assert [len(part) for part in parts] == [32] * (EPOCHS * MINIBATCHES)
        each = [parts[i * MINIBATCHES : (i + 1) * MINIBATCHES] for i in range(EPOCHS)]
        epochs = [[row for part in epoch for row in part] for epoch in each]
        assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


def test_ppo_without_the_regulariser_leaves_the_closed_form() -> None:
    torch.manual_seed(0)
    trainer = ppo(Ppo(beta=0.0), steps=60)
    trainer.run()
    assert divergence(trainer.model.policy) > 0.1  # it runs to the best arm alone: KL = -log pi*(best) at the end


class Killed(Exception):
    pass


@pytest.mark.parametrize("turn", ["policy_turn", "value_turn"])
def test_ppo_resumes_bit_exactly_from_the_middle_of_a_rollout(turn: str, tmp_path: Path) -> None:
    class Mortal(Ppo):
        """Dies in the third update of the sixth step."""

        calls = 0

        def loss_of(self, model: ActorCritic, batch: Batch) -> Loss:
            self.calls += 1
            if self.calls == 5 * EPOCHS * MINIBATCHES + 3:
                raise Killed
            return getattr(Ppo, turn)(self, model, batch)

        def turns(self) -> Sequence[Turn]:
            updates = EPOCHS * MINIBATCHES
            losses = {"policy": self.policy_turn, "value": self.value_turn, turn.split("_")[0]: self.loss_of}
            return [Turn(player, loss, updates=updates) for player, loss in losses.items()]

    torch.manual_seed(0)
    whole = ppo(Ppo(), steps=8)
    whole.run()
    torch.manual_seed(0)
    killed = ppo(Mortal(), steps=8)
    with pytest.raises(Killed):
        while True:
            killed.step()
            if killed.step_number == 4:
                killed.save(tmp_path / "run")
    assert killed.step_number == 5
    torch.manual_seed(1)
    resumed = ppo(Ppo(), steps=8)
    resumed.load(tmp_path / "run")
    resumed.run()
    assert cases.differences(cases.state_of(whole), cases.state_of(resumed)) == []
    assert resumed.objective.rollouts == whole.objective.rollouts[4:]


# ---- DPO


class Preferred(Model):
    def __init__(self, data: DataSpec) -> None:
        super().__init__(data, Discrete(data))
        self.policy = Policy()


class Dpo(Objective):
    """-log sigmoid(beta [log pi/pi_ref (winner) - log pi/pi_ref (loser)]); the reference's share comes from `prepare`.

    Source: Rafailov et al. 2023, eq. 7, arXiv:2305.18290.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.reference = Average(policy, 1.0)

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def prepare(self, model: Preferred, batch: Batch) -> Batch:
        log_p = self.reference.module()[batch.x]  # [B, 2]
        return batch.with_extra(reference=log_p[:, 0] - log_p[:, 1])

    def loss(self, model: Preferred, batch: Batch) -> Loss:
        log_p = model.policy()[batch.x]
        margin = BETA * (log_p[:, 0] - log_p[:, 1] - batch.extra["reference"])
        return Loss(-F.logsigmoid(margin).sum(), {"accuracy": (margin > 0).sum()})

    def advance(self, model: Preferred, step: int) -> None:
        self.reference.update(model.policy)  # with decay 1 it stays where it is


def preferences(each: int = 300) -> Tensor:
    """[N, 2] winners and losers of every pair, in the shares that Bradley and Terry's model gives."""
    rows = []
    for a in range(ARMS):
        for b in range(a):
            wins = round(each * float(torch.sigmoid(REWARD[a] - REWARD[b])))
            rows += [[a, b]] * wins + [[b, a]] * (each - wins)
    return torch.tensor(rows, dtype=torch.uint8)


def dpo(steps: int = 300, **train: int) -> Trainer:
    data = DataSpec("tokens", (2,), ARMS)
    model = Preferred(data)
    source = ArraySource(preferences(), data)
    settings = Train(steps=steps, batch_size=len(source), report_every=1, **train)
    return Trainer(
        model, Dpo(model.policy), source, settings, Optims(Optim(lr=0.05, schedule="linear")), 0, valid=source
    )


@pytest.fixture(scope="module")
def trained_dpo() -> Trainer:
    trainer = dpo(validate_every=100)
    trainer.run()
    return trainer


def test_dpo_begins_at_log_2(trained_dpo: Trainer) -> None:
    assert trained_dpo.history[0][1]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the reward margin is 0: float32


def test_dpo_reaches_the_closed_form(trained_dpo: Trainer) -> None:
    # shares of 300 are rounded by at most 1/600, which moves a reward by less than 0.01 and the KL by its square
    assert divergence(trained_dpo.model.policy) < 1e-4


def test_dpo_reference_stays_where_it_was(trained_dpo: Trainer) -> None:
    reference = trained_dpo.objective.reference
    assert torch.equal(reference.module.logits, REFERENCE)
    assert int(reference.updates) == 300
    assert not any(p.requires_grad for p in reference.parameters())


def test_dpo_validation_prepares_its_batches(trained_dpo: Trainer) -> None:
    values = [metrics["valid/loss"] for _, metrics in trained_dpo.history if "valid/loss" in metrics]
    losses = [metrics["loss"] for _, metrics in trained_dpo.history]
    assert len(values) == 3
    # the validation data are the training data, one full batch: its loss after 100 steps is that of the next step
    assert values[0] == pytest.approx(losses[100], rel=1e-6)  # a float32 sum in another order


def test_dpo_reference_is_in_the_checkpoint(tmp_path: Path) -> None:
    trainer = dpo(steps=2)
    with torch.no_grad():
        trainer.objective.reference.module.logits.add_(torch.arange(float(ARMS)))
    trainer.save(tmp_path / "run")
    other = dpo(steps=2)
    other.load(tmp_path / "run")
    assert torch.equal(other.objective.reference.module.logits, trainer.objective.reference.module.logits)


def test_dpo_with_a_reference_that_follows_does_not_reach_the_closed_form() -> None:
    trainer = dpo(steps=300)
    trainer.objective.reference.decay = 0.9
    trainer.run()
    assert divergence(trainer.model.policy) > 0.1  # the margin is paid for again and again
