"""The short set of `dgm drill`: one test a drill, one session of undisturbed runs for all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipelines import drills
from pipelines.drills.bench import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("drills")) as bench:
        yield bench


@pytest.mark.parametrize("drill", drills.chosen([], short=True), ids=lambda drill: drill.name)
def test_drill_holds(drill: drills.Drill, bench: Bench) -> None:
    attempt = drills.attempt(drill, bench)
    assert attempt["passed"], attempt["error"]
