"""Law of the resume: a training that was killed and loaded equals the one that was never killed, bit for bit, on CPU.

The killed run stops by an exception inside a loss: at a step's first loss, between the micro-batches of an
accumulation, in a player's second update, and in a validation. It is resumed in a fresh trainer, whose initial
weights differ, and in the trainer that was interrupted.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from torch import nn

from dgm_models.method import Method
from dgm_models.objective import Loss
from dgm_models.training.trainer import Train, Trainer
from tests.laws import cases
from tests.laws.cases import FIRST, Case

STEPS, SAVED, KILLED = 8, 5, 6  # the checkpoint after step 5 is older than the kill, inside step index 6
VALIDATION = -1  # the place of the validation among the turns
OPTIM = {"lr": 0.02, "warmup": 3, "schedule": "cosine", "clip": 5.0}


class Killed(Exception):
    """Stands for the signal that ends a process."""


def settings(method: Method) -> Train:
    single = len(method.objective.turns()) == 1
    return Train(
        steps=STEPS,
        batch_size=8,
        accumulate=2 if method.objective.additive else 1,
        average=0.9,
        report_every=4,  # the checkpoint falls between two reports: sums in progress are state
        checkpoint_every=SAVED,
        validate_every=2 if single else 0,
        keep="best" if single else "last",
    )


def points(case: Case) -> dict[str, tuple[int, int]]:
    """Where to kill: name -> (turn or VALIDATION, number of its losses in the step that go well before)."""
    method = cases.made(case)
    accumulate = settings(method).accumulate
    found = {"step": (0, 0), "last turn": (len(method.objective.turns()) - 1, 0)}
    if accumulate > 1:
        found["accumulation"] = (0, 1)
    if settings(method).validate_every:
        found["validation"] = (VALIDATION, 0)
    for index, turn in enumerate(method.objective.turns()):
        if turn.updates > 1 and KILLED % turn.every == 0:
            found["second update"] = (index, accumulate)
    return found


def start(case: Case, seed: int = 0, kill: tuple[int, int] | None = None, kind: type[Trainer] = Trainer) -> Trainer:
    """A trainer whose validation loss is made to rise, so that the best weights are those of the first validation."""
    method = cases.made(case, seed=seed)
    holder: list[Trainer] = []
    calls = [0]

    def after(index: int, model: nn.Module, loss: Loss) -> Loss:
        step = holder[0].step_number
        here = index if model.training else VALIDATION
        if kill and step == KILLED and here == kill[0]:
            calls[0] += 1
            if calls[0] == kill[1] + 1:
                raise Killed
        return loss if model.training else Loss(loss.total + 100.0 * step)

    cases.intercept(method, after)
    holder.append(cases.trainer(method, settings(method), OPTIM, kind=kind))
    return holder[0]


def undisturbed(case: Case) -> tuple[dict, dict]:
    """The states after step 5 and after the last one of a run that is never killed."""
    at_save: list[dict] = []
    trainer = start(case)

    def keep(running: Trainer) -> None:
        if running.step_number == SAVED:
            at_save.append(cases.state_of(running))

    trainer.run(save=keep)
    return at_save[0], cases.state_of(trainer)


def interrupted(case: Case, kill: tuple[int, int], folder: Path) -> Trainer:
    trainer = start(case, kill=kill)
    with pytest.raises(Killed):
        trainer.run(save=lambda running: running.save(folder))
    assert trainer.step_number == KILLED
    return trainer


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_resume_is_bit_exact_wherever_the_run_was_killed(case: Case, tmp_path: Path) -> None:
    at_save, at_end = undisturbed(case)
    assert cases.differences(at_save, at_end)
    for name, kill in points(case).items():
        broken = interrupted(case, kill, tmp_path / name)
        fresh = start(case, seed=1)
        for trainer in (fresh, broken):
            trainer.load(tmp_path / name)
            assert cases.differences(at_save, cases.state_of(trainer)) == [], name
            trainer.run()
            assert cases.differences(at_end, cases.state_of(trainer)) == [], name


@pytest.mark.parametrize("name", ["gan/wgan_gp", "gan/non_saturating"])
def test_resume_kills_inside_a_critic_phase_where_there_is_one(name: str) -> None:
    assert ("second update" in points(Case(name, "vector:real"))) == (name == "gan/wgan_gp")


def forgetting(piece: str) -> type[Trainer]:
    """A trainer whose `load` leaves one piece as it is in a fresh trainer: what a `save` without it would do."""

    class Forgetful(Trainer):
        def load(self, folder: Path) -> None:
            modules = self._modules()
            if piece in modules:
                kept = copy.deepcopy(modules[piece].state_dict())
                super().load(folder)
                modules[piece].load_state_dict(kept)
            elif piece.startswith("optimizer."):
                player = piece.split(".")[1]
                kept_optimizer = self.optim.of(player).build(self.players[player])
                super().load(folder)
                self.optimizers[player] = kept_optimizer
            else:
                kept_value = copy.copy(getattr(self, piece))
                super().load(folder)
                setattr(self, piece, kept_value)

    return Forgetful


def pieces(trainer: Trainer) -> list[str]:
    names = ["model", "average", *(f"optimizer.{player}" for player in trainer.players)]
    names += ["step_number", "position", "history", "_sums"]
    return names + (["best", "best_loss", "since_best"] if trainer.best else [])


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_resume_that_forgets_any_piece_differs_at_the_end(case: Case, tmp_path: Path) -> None:
    _, at_end = undisturbed(case)
    interrupted(case, (0, 0), tmp_path / "run")
    for piece in pieces(start(case)):
        trainer = start(case, seed=1, kind=forgetting(piece))
        trainer.load(tmp_path / "run")
        trainer.run()
        assert cases.differences(at_end, cases.state_of(trainer)), f"a resume without {piece} went unnoticed"


@pytest.mark.parametrize("case", FIRST[:1], ids=str)
def test_resume_of_a_finished_run_does_nothing(case: Case, tmp_path: Path) -> None:
    trainer = start(case)
    trainer.run(save=lambda running: running.save(tmp_path / "run"))
    again = start(case, seed=1)
    again.load(tmp_path / "run")
    assert again.done
    again.run(save=lambda running: pytest.fail("a finished run saved again"))
    assert cases.differences(cases.state_of(trainer), cases.state_of(again)) == []


def test_resume_from_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    from dgm_models.training.checkpoint import Damaged

    case = FIRST[0]
    start(case).save(tmp_path / "run")
    path = next((tmp_path / "run").glob("optimizer-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(Damaged, match=path.name):
        start(case).load(tmp_path / "run")
