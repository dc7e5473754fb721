"""A notice makes one checkpoint at once, and every rank asks at the same steps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dgm_models.training.runtime import Runtime
from pipelines.cluster import worker
from pipelines.cluster.worker import Notices

NOBODY = ("", math.inf)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_notices_are_asked_about_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = Clock(), []
    monkeypatch.setattr(worker, "time", clock)
    notices = Notices(Runtime(), lambda: asked.append(clock.now) or NOBODY, lambda: False)
    for step in range(1, 2001):
        clock.now += 0.01
        assert notices(step) is None
    assert 18 <= len(asked) <= 26, asked  # 20 seconds of steps; the first questions come faster
    assert max(b - a for a, b in itertools.pairwise(asked[5:])) < 1.1


def test_slow_steps_are_asked_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = Clock(), []
    monkeypatch.setattr(worker, "time", clock)
    notices = Notices(Runtime(), lambda: asked.append(clock.now) or NOBODY, lambda: False)
    for step in range(1, 6):
        clock.now += 5.0
        notices(step)
    assert len(asked) == 5


def test_notice_counts_once_and_a_new_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, nodes, stop = Clock(), [NOBODY], [False]
    monkeypatch.setattr(worker, "time", clock)
    notices = Notices(Runtime(), lambda: nodes[0], lambda: stop[0])
    found = []
    for step in range(1, 9):
        clock.now += 2.0
        nodes[0] = NOBODY if step < 3 else ("a", math.inf) if step < 5 else ("a,b", math.inf)
        stop[0] = step >= 7
        found.append(notices(step))
    assert found == [None, None, 0.0, None, 0.0, None, 0.0, None]


def test_other_ranks_follow_the_chief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next question's step, and the driver's notice, are the chief's: the sum over ranks holds nothing else."""

    class Second(Runtime):
        def sum(self, tensors: object) -> None:
            (facts,) = tensors  # type: ignore[misc]
            assert torch.equal(facts, torch.zeros(3)), "another rank added its own clock"
            facts += torch.tensor([7.0, 1.0, 0.0])

    def never() -> bool:
        raise AssertionError("asked on a rank that is not the chief")

    notices = Notices(Second(rank=1, world=2), lambda: ("", 1.0), never)
    assert notices(1) == 0.0
    assert all(notices(step) is None for step in range(2, 8)) and notices.asked_step == 1
    assert notices(8) is None and notices.asked_step == 8


def test_notice_with_an_end_saves_at_once_and_holds_shortly_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)
    notices = Notices(Runtime(), lambda: ("a", 25.0 - clock.now), lambda: False)
    found = []
    for step in range(1, 13):
        clock.now += 2.0
        found.append(notices(step))
    assert found == [0.0] + [None] * 6 + [25.0 - 16.0] + [None] * 4  # 9 s before the end: the first question within 10
