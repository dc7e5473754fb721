"""Contract: when turns are taken, what each of them sees, and what the trainer refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dgm_models.codecs import Standardized
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.runtime import Runtime, current
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer

DATA = DataSpec("vector", (1,))
ROWS = 12


class Pair(Model):
    """Two players of one weight each."""

    def __init__(self) -> None:
        super().__init__(DATA, Standardized(DATA))
        self.left, self.right = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

    def players(self) -> dict[str, nn.Module]:
        return {"left": self.left, "right": self.right}


class Recorder(Objective):
    """Turns as given; notes what it is called with."""

    def __init__(self, *turns: Turn, parts: int = 0) -> None:
        super().__init__()
        self.given, self.parts = turns, parts
        self.seen: list[tuple[str, list[int]]] = []
        self.keys: list[Tensor] = []
        self.prepared: list[list[int]] = []
        self.initialized: list[list[int]] = []
        self.advanced: list[int] = []
        self.grad_enabled: set[bool] = set()

    def turns(self) -> Sequence[Turn]:
        return [replace(turn, loss=self.loss_of(turn.player)) for turn in self.given]

    def loss_of(self, player: str):
        def loss(model: Pair, batch: Batch) -> Loss:
            self.seen.append((player, batch.id.tolist()))
            self.keys.append(batch.key)
            return Loss(model.players()[player](batch.x).square().sum())

        return loss

    def initialize(self, model: Pair, batch: Batch) -> None:
        self.initialized.append(batch.id.tolist())
        self.grad_enabled.add(torch.is_grad_enabled())
        model.left.weight.fill_(3.0)

    def prepare(self, model: Pair, batch: Batch) -> Batch | Sequence[Batch]:
        self.prepared.append(batch.id.tolist())
        self.grad_enabled.add(torch.is_grad_enabled())
        return list(batch.split(self.parts)) if self.parts else batch

    def advance(self, model: Pair, step: int) -> None:
        self.advanced.append(step)
        self.grad_enabled.add(torch.is_grad_enabled())


def turn(player: str, **fields: int | bool) -> Turn:
    return Turn(player, lambda model, batch: Loss(batch.x.sum()), **fields)  # type: ignore[arg-type]


def trainer(
    objective: Objective,
    optims: Optims | None = None,
    runtime: Runtime | None = None,
    lr: float = 0.01,
    **train: object,
) -> Trainer:
    settings = Train(**{"steps": 1, "batch_size": 2, **train})  # type: ignore[arg-type]
    source = ArraySource(torch.ones(ROWS, 1), DATA, seed=None)  # in order: row i is position i
    optims = optims or Optims(Optim(name="sgd", lr=lr))
    return Trainer(Pair(), objective, source, settings, optims, 0, runtime, source)


def run(*turns: Turn, steps: int = 1, parts: int = 0, **train: object) -> Recorder:
    objective = Recorder(*turns, parts=parts)
    trainer(objective, steps=steps, **train).run()
    return objective


def test_turns_share_one_batch() -> None:
    seen = run(turn("left"), turn("right"), steps=2).seen
    assert seen == [("left", [0, 1]), ("right", [0, 1]), ("left", [2, 3]), ("right", [2, 3])]


def test_turns_updates_without_fresh_repeat_the_batch() -> None:
    assert run(turn("left", updates=3), turn("right")).seen == [("left", [0, 1])] * 3 + [("right", [0, 1])]


def test_turns_fresh_updates_draw_a_batch_each() -> None:
    seen = run(turn("left", updates=2, fresh=True), turn("right"), steps=2).seen
    rows = [ids for _, ids in seen]
    assert [player for player, _ in seen] == ["left", "left", "right"] * 2
    assert rows == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_turns_after_a_fresh_one_share_what_came_before() -> None:
    seen = run(turn("left"), turn("right", fresh=True), turn("left")).seen
    assert [ids for _, ids in seen] == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_turns_every_are_taken_at_its_multiples(every: int) -> None:
    objective = Recorder(turn("left"), turn("right", every=every))
    running = trainer(objective)
    taken = []
    for step in range(6):
        objective.seen.clear()
        running.step()
        taken += [step] * (("right", objective.seen[0][1]) in objective.seen)
    assert taken == [step for step in range(6) if step % every == 0]


def test_turns_that_are_left_out_draw_no_batch() -> None:
    objective = run(turn("left"), turn("right", every=2, fresh=True), steps=4)
    assert objective.prepared == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]  # 2 + 1 + 2 + 1


def test_turns_see_noise_of_their_own() -> None:
    keys = run(turn("left", updates=2), turn("right"), turn("right"), steps=2).keys
    assert len({tuple(key.tolist()) for key in keys}) == len(keys) == 8


def test_turns_walk_the_list_that_prepare_gave() -> None:
    seen = run(turn("left", updates=3), turn("right", updates=3), batch_size=6, parts=3).seen
    assert [ids for _, ids in seen] == [[0, 1], [2, 3], [4, 5]] * 2


def test_turns_refuse_a_list_of_another_length() -> None:
    with pytest.raises(ValueError, match="prepare gave 2 batches for the 3 updates of 'left'"):
        run(turn("left", updates=3), batch_size=6, parts=2)


def test_turns_end_with_one_advance() -> None:
    assert run(turn("left", updates=2), turn("right"), steps=3).advanced == [0, 1, 2]


def test_turns_begin_with_one_initialisation_on_the_global_batch() -> None:
    objective = Recorder(turn("left"))
    running = trainer(objective, steps=3, batch_size=4, runtime=Share())
    running.run()
    assert objective.initialized == [[0, 1, 2, 3]]
    assert objective.prepared == [[2, 3], [6, 7], [10, 11]]  # the second rank's shares


class Share(Runtime):
    """The second rank of two, alone."""

    def share(self, rows: int) -> tuple[int, int]:
        return rows // 2, rows


def test_turns_prepare_advance_and_initialize_have_no_gradient() -> None:
    assert run(turn("left")).grad_enabled == {False}


def test_turns_know_the_runtime_that_steps() -> None:
    runtimes: list[Runtime] = []

    class Asks(Recorder):
        def prepare(self, model: Pair, batch: Batch) -> Batch:
            runtimes.append(current())
            return batch

    runtime = Runtime()
    trainer(Asks(turn("left")), runtime=runtime).run()
    assert runtimes == [runtime] and runtimes[0] is runtime
    assert current() is not runtime


def test_average_begins_at_the_initialised_weights() -> None:
    running = trainer(Recorder(turn("left")), steps=1, average=1.0)
    running.run()
    assert running.average is not None
    assert float(running.average.module.left.weight) == 3.0  # decay 1: where it began, which `initialize` has set
    assert float(running.model.left.weight.detach()) != 3.0


def test_initialisation_is_not_repeated_by_a_resume(tmp_path) -> None:
    first = trainer(Recorder(turn("left")), steps=2)
    first.step()
    first.save(tmp_path / "run")
    objective = Recorder(turn("left"))
    second = trainer(objective, steps=2)
    second.load(tmp_path / "run")
    second.run()
    assert objective.initialized == []


# ---- refusals


class Coupled(Recorder):
    additive = False


class Differentiates(Recorder):
    double_backward = True


def test_turns_of_a_coupled_objective_refuse_accumulation() -> None:
    with pytest.raises(ValueError, match=r"train\.accumulate: Coupled couples the examples of a batch; set it to 1"):
        trainer(Coupled(turn("left")), accumulate=2)
    trainer(Coupled(turn("left")), accumulate=1).run()


def test_turns_with_a_double_backward_refuse_compilation() -> None:
    with pytest.raises(ValueError, match=r"train\.compile: Differentiates differentiates a gradient"):
        trainer(Differentiates(turn("left")), compile=True)


def test_turns_of_an_unknown_player_are_refused() -> None:
    with pytest.raises(ValueError, match="turn of 'middle', but the model has left, right"):
        trainer(Recorder(turn("middle")))


def test_optim_of_an_unknown_player_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.middle: the model has no such player; it has left, right"):
        trainer(Recorder(turn("left")), Optims(players={"middle": Optim()}))


def test_batch_smaller_than_its_parts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size: 2 is less than 3 workers x 1 micro-batches"):
        trainer(Recorder(turn("left")), runtime=Runtime(world=3))
    with pytest.raises(ValueError, match="accumulate: 3 micro-batches of 2 examples"):
        trainer(Recorder(turn("left")), accumulate=3)


def test_games_have_no_validation_loss() -> None:
    with pytest.raises(ValueError, match=r"train\.validate_every: a game has no validation loss"):
        trainer(Recorder(turn("left"), turn("right")), validate_every=1)


def test_player_without_a_turn_stays_where_it_is() -> None:
    running = trainer(Recorder(turn("left")), steps=3)
    before = running.model.right.weight.clone()
    running.run()
    assert torch.equal(running.model.right.weight, before)


def test_each_player_has_its_own_settings() -> None:
    running = trainer(
        Recorder(turn("left"), turn("right")), Optims(Optim(name="sgd", lr=0.1), {"right": Optim(name="sgd", lr=0.2)})
    )
    with torch.no_grad():
        running.model.right.weight.fill_(3.0)
    running.run()
    # one step from 3 with the gradient 2 w of (w x)^2 at x = 1: w - lr 2 w
    moved = [float(player.weight.detach()) for player in (running.model.left, running.model.right)]
    assert moved == pytest.approx([3 - 0.1 * 6, 3 - 0.2 * 6], rel=1e-6)  # float32
