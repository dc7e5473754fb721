"""The pictures of a search: any value has a place, nothing that a search can end with breaks them."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.params import Search, Space
from pipelines.views.search import _height as height
from pipelines.views.search import _Scale, front, parallel, pareto

SPACE = {
    "method.divergence": Space(choice=["kl", "jensen_shannon", None]),
    "method.tricks.spectral_norm": Space(choice=[True, False]),
    "optim.critic.lr": Space(log_uniform=(1e-4, 1e-2)),
    "method.tricks.smooth": Space(uniform=(0.0, 0.3)),
}
SEARCH = Search("gan", SPACE, {"fid": 1.0, "recall": 2.0})


def row(trial: int, fid: float, recall: float, state: str = "finished", **values: Any) -> dict[str, Any]:
    own = {"method.divergence": ["kl", None][trial % 2], "method.tricks.spectral_norm": trial % 3 == 0,
           "optim.critic.lr": 1e-3, "method.tricks.smooth": 0.1}  # fmt: skip
    metrics = {"fid": fid, "recall": recall}
    return {"trial": trial, "values": own | values, "metrics": metrics, "objective": SEARCH.score(metrics),
            "state": state}  # fmt: skip


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_front_holds_what_no_other_beats_in_both_directions() -> None:
    points = {0: (1.0, 0.5), 1: (2.0, 0.9), 2: (2.0, 0.8), 3: (3.0, 0.9), 4: (0.5, 0.1), 5: (1.0, 0.5)}
    assert front(points, ("fid", "recall")) == {0, 1, 4, 5}  # lower, higher
    assert front(points, ("fid", "copies")) == {4}  # lower, lower
    assert front({}, ("fid", "recall")) == set()


def test_places_on_an_axis_are_even_for_choices_and_logarithmic_where_the_space_is() -> None:
    choices = [height(SPACE["method.divergence"], value, 0.0) for value in ("kl", "jensen_shannon", None)]
    assert choices == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert height(SPACE["optim.critic.lr"], 1e-3, 0.0) == pytest.approx(0.5)
    assert height(SPACE["method.tricks.smooth"], 0.15, 0.0) == pytest.approx(0.5)
    assert height(SPACE["method.tricks.spectral_norm"], False, 0.01) == pytest.approx(0.76)
    scale = _Scale.of([1.0, 100.0, math.inf, 10.0])
    assert [scale.at(value) for value in (1.0, 10.0, 100.0)] == pytest.approx([0.0, 0.5, 1.0])
    assert scale.at(math.inf) > 1
    assert [_Scale.of([-1.0, 1.0, 3.0]).at(value) for value in (-1.0, 1.0)] == [0.0, 0.5]
    assert _Scale.of([math.inf]).at(math.inf) > 1 and _Scale.of([2.0]).at(2.0) == 0


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(0, math.inf, -math.inf)],
        [row(0, 1.0, 0.5)],
        [row(0, 1.0, 0.5), row(1, 1.0, 0.5, "stopped"), row(2, 50.0, 0.1), row(3, math.inf, -math.inf, "failed")],
        [row(0, 1.0, 0.5), {**row(1, 1.0, 0.5), "metrics": {}, "objective": math.inf, "state": "failed"}],
    ],
)
def test_pictures_of_whatever_a_search_ended_with(rows: list[dict[str, Any]]) -> None:
    marks = {0: "as written", 3: "chosen"}
    across = parallel(rows, SEARCH, marks)
    scatter = pareto(rows, ("fid", "recall"), marks)
    assert across == parallel(rows, SEARCH, marks) and scatter == pareto(rows, ("fid", "recall"), marks)
    assert pixels(across).std() > 0 and pixels(scatter).std() > 0


def test_pictures_follow_the_trials() -> None:
    rows = [row(0, 1.0, 0.5), row(1, 2.0, 0.9), row(2, 4.0, 0.4)]
    before = pixels(pareto(rows, ("fid", "recall"), {}))
    stopped = pixels(pareto([*rows[:2], {**rows[2], "state": "stopped"}], ("fid", "recall"), {}))
    marked = pixels(pareto(rows, ("fid", "recall"), {1: "chosen"}))
    assert before.shape == marked.shape and (before != marked).any()
    assert before.shape != stopped.shape or (before != stopped).any()
    moved = [*rows[:2], {**rows[2], "values": {**rows[2]["values"], "method.tricks.spectral_norm": True}}]
    assert (pixels(parallel(rows, SEARCH, {})) != pixels(parallel(moved, SEARCH, {}))).any()
