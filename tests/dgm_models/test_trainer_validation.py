"""The trainer's validation: what is measured, what is kept, when it stops, and that training does not notice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from dgm_models.codecs import Standardized
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer

DATA = DataSpec("vector", (1,))


class Point(Model):
    """One weight, at 0."""

    def __init__(self) -> None:
        super().__init__(DATA, Standardized(DATA))
        self.at = nn.Parameter(torch.zeros(()))
        self.drop = nn.Dropout(0.5)


class Distance(Objective):
    """(at - x)^2 / 2, with noise of the batch's keys where asked."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.noisy = noisy
        self.register_buffer("chain", torch.zeros(()))

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def prepare(self, model: Point, batch: Batch) -> Batch:
        self.chain += 1  # like a persistent chain, it moves with every preparation
        return batch.with_extra(moved=self.chain.expand(len(batch)), noise=torch.randn(len(batch)))

    def loss(self, model: Point, batch: Batch) -> Loss:
        x = batch.x[:, 0] + (batch.normal("x", ()) + batch.extra["noise"] if self.noisy else 0.0)
        dropped = model.drop(torch.ones(len(x))) if self.noisy else 1.0
        return Loss((0.5 * (model.at * dropped - x).square()).sum(), {"chain": batch.extra["moved"].sum()})


def trainer(
    objective: Distance | None = None, to: float = 1.0, valid: float | Sequence[float] = 0.25, **train
) -> Trainer:
    """Training pulls the weight from 0 to `to`; validation asks for `valid`."""
    settings = Train(**{"steps": 20, "batch_size": 4, "report_every": 1, "validate_every": 1} | train)
    values = torch.tensor([valid] * 6 if isinstance(valid, float) else list(valid))[:, None]
    return Trainer(
        Point(), objective or Distance(), ArraySource(torch.full((8, 1), to), DATA), settings,
        Optims(Optim(name="sgd", lr=0.1)), 0, valid=ArraySource(values, DATA, seed=None),
    )  # fmt: skip


def curve(trainer: Trainer) -> list[float]:
    return [metrics["valid/loss"] for _, metrics in trainer.history if "valid/loss" in metrics]


def weight(model: nn.Module) -> float:
    return float(model.at.detach())


def path(steps: int) -> list[float]:
    """The weight after each step: 1 - 0.9^t."""
    return [1 - 0.9 ** (t + 1) for t in range(steps)]


def test_validation_loss_is_the_mean_over_the_whole_split() -> None:
    running = trainer(valid=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], steps=1)  # 6 rows in batches of 4: 4 + 2
    running.run()
    at = path(1)[0]
    assert curve(running) == pytest.approx([sum((at - x) ** 2 for x in range(6)) / 12], rel=1e-6)  # float32


def test_validation_keeps_the_best_weights() -> None:
    running = trainer(keep="best")
    running.run()
    values = [0.5 * (at - 0.25) ** 2 for at in path(20)]
    best = values.index(min(values))
    assert 0 < best < 19
    assert weight(running.final()) == pytest.approx(path(20)[best], rel=1e-5)  # 20 float32 steps
    assert running.best_loss == pytest.approx(min(values), rel=1e-3)  # a difference of squares in float32
    assert curve(running) == pytest.approx(values, abs=1e-6)
    assert weight(trainer_after(keep="last").final()) == pytest.approx(path(20)[-1], rel=1e-5)


def trainer_after(**train) -> Trainer:
    running = trainer(**train)
    running.run()
    return running


@pytest.mark.parametrize("patience", [1, 3])
def test_validation_stops_after_patience_without_a_new_best(patience: int) -> None:
    running = trainer_after(patience=patience, keep="best")
    values = [0.5 * (at - 0.25) ** 2 for at in path(20)]
    best = values.index(min(values)) + 1  # in steps
    assert running.step_number == best + patience
    assert running.done and running.history[-1][0] == running.step_number


def test_validation_patience_survives_a_resume(tmp_path) -> None:
    whole = trainer_after(patience=4)
    for stop in range(1, whole.step_number):
        first = trainer(patience=4)
        while first.step_number < stop:
            first.step()
        first.save(tmp_path / f"{stop}")
        second = trainer(patience=4)
        second.load(tmp_path / f"{stop}")
        second.run()
        assert second.step_number == whole.step_number


def test_validation_measures_the_averaged_weights() -> None:
    running = trainer_after(average=0.5, steps=3)
    at, average = 0.0, 0.0
    for value in path(3):
        at, average = value, 0.5 * average + 0.5 * value
    assert weight(running.model) == pytest.approx(at, rel=1e-6)
    assert curve(running)[-1] == pytest.approx(0.5 * (average - 0.25) ** 2, rel=1e-4)  # a difference of near numbers


def test_validation_keeps_the_averaged_weights_of_its_best() -> None:
    running = trainer_after(average=0.5, keep="best")
    averages, average = [], 0.0
    for value in path(20):
        average = 0.5 * average + 0.5 * value
        averages.append(average)
    best = min(averages, key=lambda at: (at - 0.25) ** 2)
    assert weight(running.final()) == pytest.approx(best, rel=1e-5)  # 20 float32 steps


def test_validation_noise_is_the_same_every_time() -> None:
    running = trainer(Distance(noisy=True), to=0.0, steps=3)
    running.optim = Optims(Optim(name="sgd", lr=1e-30))  # nothing moves, so that only noise could differ
    running.run()
    assert len(set(curve(running))) == 1 and len(curve(running)) == 3


def test_validation_leaves_the_training_as_it_is() -> None:
    runs = [trainer(Distance(noisy=True), steps=6, validate_every=every) for every in (0, 2)]
    for running in runs:
        running.run()
    without, with_ = runs
    assert torch.equal(without.model.at, with_.model.at)
    assert torch.equal(without.objective.chain, with_.objective.chain) and float(with_.objective.chain) == 6
    assert [m["loss"] for _, m in without.history] == [m["loss"] for _, m in with_.history]
    assert with_.model.training


def test_validation_walks_the_lists_that_prepare_gives() -> None:
    class Listed(Distance):
        def prepare(self, model: Point, batch: Batch) -> Sequence[Batch]:
            return list(Distance.prepare(self, model, batch).split(1))

    assert curve(trainer_after(objective=Listed(), steps=2)) == curve(trainer_after(steps=2))


def test_validation_that_is_never_finite_hands_on_the_last_weights() -> None:
    running = trainer_after(valid=float("nan"), keep="best", steps=2)
    assert weight(running.final()) == pytest.approx(path(2)[-1], rel=1e-6)  # not the initial 0


def test_validation_that_is_never_reached_is_refused() -> None:
    with pytest.raises(ValueError, match="validate_every: 50 is never reached in 20 steps"):
        Train(steps=20, validate_every=50, keep="best")
    Train(steps=20, validate_every=20, keep="best")


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"keep": "best"}, "keep: 'best' needs validate_every"), ({"patience": 3}, "patience: needs validate_every")],
)
def test_validation_settings_without_validation_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Train(**fields)


def test_validation_without_a_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.validate_every: needs a validation split"):
        Trainer(
            Point(), Distance(), ArraySource(torch.zeros(4, 1), DATA), Train(steps=1, batch_size=2, validate_every=1),
            Optims(), 0,
        )  # fmt: skip
