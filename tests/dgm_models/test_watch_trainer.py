"""The hook by which an objective watches its game: when it is called, what it sees, and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import Standardized
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops import games
from dgm_models.protocols import Batch, DataSpec, Model
from dgm_models.training import trainer as training
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.runtime import Runtime, current
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer
from tests.laws import cases

DATA = DataSpec("vector", (2,))
STEPS, EVERY, ROWS = 7, 3, 8  # reports after steps 3, 6 and 7


class Noisy(nn.Module):
    """Draws from torch's own generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(x.shape)


class Duel(Model):
    def __init__(self) -> None:
        super().__init__(DATA, Standardized(DATA))
        self.critic = nn.Sequential(Noisy(), nn.Linear(2, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1))
        self.generator = nn.Linear(2, 2)

    def players(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "generator": self.generator}


class Plain(Objective):
    """A game with a buffer that moves in every loss, and watched by nobody."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.additive = False
        self.register_buffer("calls", torch.zeros(()))

    def turns(self) -> Sequence[Turn]:
        return Turn("critic", self.critic_turn), Turn("generator", self.generator_turn)

    def critic_turn(self, model: Duel, batch: Batch) -> Loss:
        self.calls += 1
        real, fake = model.critic(batch.x), model.critic(self.fake(model, batch).detach())
        return Loss((F.softplus(-real) + F.softplus(fake)).sum())

    def generator_turn(self, model: Duel, batch: Batch) -> Loss:
        self.calls += 1
        return Loss(F.softplus(-model.critic(self.fake(model, batch))).sum())

    def fake(self, model: Duel, batch: Batch) -> Tensor:
        found: Tensor = model.generator(batch.normal("latent", (2,)))
        return found


class Watching(Plain):
    def watch(self, model: Duel, batch: Batch, last: bool) -> Mapping[str, Tensor]:
        return games.watch(model, self, batch, last, games.Watch(gap_steps=3, curvature_steps=2))


class Careless(Plain):
    """Changes everything that it can reach."""

    def watch(self, model: Duel, batch: Batch, last: bool) -> Mapping[str, Tensor]:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers(), *self.buffers()):
                tensor.zero_()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        self.additive = True
        torch.manual_seed(123)
        model.eval().requires_grad_(False)
        return {"draw": torch.rand(())}


def trainer(objective: Objective, runtime: Runtime | None = None, seed: int = 0, **train: Any) -> Trainer:
    torch.manual_seed(seed)
    x = torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
    settings = Train(**{"steps": STEPS, "batch_size": ROWS, "average": 0.9, "report_every": EVERY} | train)
    return Trainer(Duel(), objective, ArraySource(x, DATA), settings, Optims(Optim(lr=0.02)), 0, runtime)


@pytest.mark.parametrize("objective", [Watching, Careless])
def test_watch_changes_nothing_of_the_training(objective: type[Plain]) -> None:
    plain, watched = trainer(Plain()), trainer(objective())
    plain.run()
    watched.run()
    assert cases.differences(cases.state_of(plain), cases.state_of(watched)) == ["history"]
    for (step, told), (other, more) in zip(plain.history, watched.history, strict=True):
        assert step == other and {name: more[name] for name in told} == told and len(more) > len(told)
    assert watched.model.training and not watched.objective.additive
    assert all(p.requires_grad and p.grad is None for p in watched.model.parameters())


def test_watch_twin_that_is_given_the_game_itself_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, touched = trainer(Plain(), average=0.0), trainer(Touching(), average=0.0)
    monkeypatch.setattr(training.copy, "deepcopy", lambda given: given)
    plain.run()
    touched.run()
    assert "model.generator.weight" in cases.differences(cases.state_of(plain), cases.state_of(touched))


class Touching(Plain):
    def watch(self, model: Duel, batch: Batch, last: bool) -> Mapping[str, Tensor]:
        with torch.no_grad():
            model.generator.weight.mul_(0.5)
        return {}


class Noting(Plain):
    """Notes what it is called with, in a list that its copies share."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = Shared(seen)

    def watch(self, model: Duel, batch: Batch, last: bool) -> Mapping[str, Tensor]:
        assert model.training and torch.is_grad_enabled()
        self.seen.items.append((current().world, last, batch.id.tolist(), batch.key.tolist()))
        return {"rows": torch.tensor(float(len(batch))), "draw": torch.rand(())}


class Shared:
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __deepcopy__(self, memo: Any) -> Shared:
        return self


def test_watch_is_called_at_every_report_with_the_rows_of_the_next_two_batches() -> None:
    seen: list[Any] = []
    watched = trainer(Noting(seen))
    watched.run()
    assert [step for step, _ in watched.history] == [3, 6, 7]
    assert [last for _, last, *_ in seen] == [False, False, True]
    for (step, metrics), (_, _, ids, keys) in zip(watched.history, seen, strict=True):
        following = watched.source.batch(step * ROWS, (step + 2) * ROWS)
        assert ids == following.id.tolist()
        assert set(keys).isdisjoint(following.fold("seed", 0, "train").key.tolist())
        assert metrics["rows"] == 2 * ROWS
    assert len({tuple(keys) for *_, keys in seen}) == 3  # other noise at every report


def test_watch_sees_no_more_rows_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WATCHED", 5)
    seen: list[Any] = []
    trainer(Noting(seen), steps=1).run()
    assert [len(ids) for _, _, ids, *_ in seen] == [5]


def test_watch_is_of_no_cost_where_it_is_not_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trainer(Plain(), average=0.0)
    asked: list[tuple[int, int]] = []
    batch = plain.source.batch
    monkeypatch.setattr(plain.source, "batch", lambda start, stop: asked.append((start, stop)) or batch(start, stop))
    monkeypatch.setattr(training.copy, "deepcopy", lambda given: pytest.fail("a game that nobody watches was copied"))
    plain.run()
    assert asked == [(step * ROWS, (step + 1) * ROWS) for step in range(STEPS)]


@pytest.mark.parametrize("killed", [4, 6])
def test_watch_of_a_resumed_training_says_the_same(killed: int, tmp_path: Path) -> None:
    undisturbed = trainer(Watching())
    undisturbed.run()
    first = trainer(Watching(), checkpoint_every=killed)

    def save(running: Trainer) -> None:
        if running.step_number == killed:
            running.save(tmp_path / "run")

    first.run(save=save)
    again = trainer(Watching(), seed=5)
    again.load(tmp_path / "run")
    again.run()
    assert cases.differences(cases.state_of(undisturbed), cases.state_of(again)) == []
    assert "nash/critic/gradient" in again.history[-1][1] and "duality_gap" in again.history[-1][1]


class Second(Runtime):
    """The second of two ranks; the first one is not there."""

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def sum(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor *= 2  # the other rank has found the same


def test_watch_on_a_rank_works_as_if_alone_and_counts_once() -> None:
    seen: list[Any] = []
    watched = trainer(Noting(seen), average=0.0)
    watched.runtime = Second(rank=1, world=2)
    watched._watch(last=False)
    (world, last, ids, _) = seen[0]
    assert (world, last) == (1, False)
    assert ids == watched.source.batch(ROWS, 2 * ROWS).id.tolist()  # its share; the real `gather` adds the others'
    first = trainer(Noting([]), average=0.0)
    torch.manual_seed(7)  # as an update leaves torch's generator: in another state on every rank
    first._watch(last=False)
    assert watched.metrics() == {"rows": ROWS, "draw": first.metrics()["draw"]}


def test_watch_of_sharded_parameters_is_refused() -> None:
    class Alone(Watching):
        def turns(self) -> Sequence[Turn]:
            return (Turn("model", lambda model, batch: Loss(model.generator(batch.x).sum())),)

    class One(Duel):
        def players(self) -> dict[str, nn.Module]:
            return {"model": self}

    source = ArraySource(torch.zeros(8, 2), DATA)
    with pytest.raises(ValueError, match=r"cluster\.shard: Alone watches copies of the model"):
        Trainer(One(), Alone(), source, Train(steps=1), Optims(Optim()), 0, Runtime(shard=True))
