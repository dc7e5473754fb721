"""The gate's rules, without any registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from pipelines.promotion import Evaluation, Gate, Verdict, decide

GATE = Gate("fid/digits", coverage="recall/digits", ceiling_fraction=0.5)


class Span(NamedTuple):
    value: float
    low: float
    high: float


def row(metric: str, value: float, half: float | None, **other: Any) -> dict[str, Any]:
    ends = {"low": None, "high": None} if half is None else {"low": value - half, "high": value + half}
    return {
        "metric": metric, "value": value, **ends, "n": 40, "split": "test", "kind": "estimate",
        "extractor_sha256": "e1", "seed": 0, **other,
    }  # fmt: skip


def evaluation(name: str, fid: float, recall: float = 0.5, **other: Any) -> Evaluation:
    rows = [
        row("fid/digits", fid, 1.0, **other), row("recall/digits", recall, 0.05, **other),
        row("fid/digits/ceiling", 100.0, None),
    ]  # fmt: skip
    return Evaluation(name, name, "d1", rows, torch.arange(80.0).view(40, 2), torch.ones(40, 2))


def says(value: float, low: float, high: float) -> Callable[..., Span]:
    return lambda *_: Span(value, low, high)


def never(*_: Any) -> Span:
    raise AssertionError("these two must not be compared")


def refusal(verdict: Verdict) -> str:
    assert not verdict.passed
    return "; ".join(each.reason for each in verdict.criteria if not each.passed)


def test_gate_takes_a_challenger_that_is_better_beyond_the_interval() -> None:
    verdict = decide(evaluation("old", 9.0), evaluation("new", 5.0), GATE, says(4.0, 3.0, 5.0))
    assert verdict.passed and [each.passed for each in verdict.criteria] == [True, True]
    assert verdict.criteria[0].numbers["low"] == 3.0
    assert (verdict.champion, verdict.challenger) == ("old", "new")


@pytest.mark.parametrize(("value", "low", "high"), [(4.0, -0.1, 8.1), (4.0, 0.0, 8.0), (-4.0, -5.0, -3.0)])
def test_gate_refuses_a_difference_whose_interval_reaches_zero(value: float, low: float, high: float) -> None:
    verdict = decide(evaluation("old", 9.0), evaluation("new", 5.0), GATE, says(value, low, high))
    assert "is not lower beyond the interval" in refusal(verdict)


@pytest.mark.parametrize(("recall", "passed"), [(0.44, True), (0.42, False), (0.9, True)])
def test_gate_refuses_lost_coverage_beyond_its_interval(recall: float, passed: bool) -> None:
    """Half-widths of 0.05 each: the difference's is 0.0707."""
    verdict = decide(evaluation("old", 9.0), evaluation("new", 5.0, recall), GATE, says(4.0, 3.0, 5.0))
    assert verdict.passed is passed
    without = decide(
        evaluation("old", 9.0), evaluation("new", 5.0, recall), replace(GATE, coverage=None), says(4.0, 3.0, 5.0)
    )
    assert without.passed and len(without.criteria) == 1


@pytest.mark.parametrize(("fid", "passed"), [(48.9, True), (49.1, False), (120.0, False)])
def test_gate_holds_a_first_champion_against_the_ceiling(fid: float, passed: bool) -> None:
    verdict = decide(None, evaluation("new", fid), GATE, never)
    assert verdict.passed is passed
    assert verdict.criteria[0].numbers["limit"] == 50.0


def test_gate_refuses_a_first_champion_without_ceiling_or_interval() -> None:
    new = evaluation("new", 5.0)
    assert "no row fid/digits/ceiling" in refusal(decide(None, replace(new, rows=new.rows[:2]), GATE, never))
    other = [*new.rows[:2], row("fid/digits/ceiling", 100.0, None, n=20)]
    assert "n = 20, not 40" in refusal(decide(None, replace(new, rows=other), GATE, never))
    bare = [row("fid/digits", 5.0, None), *new.rows[1:]]
    assert "no interval for fid/digits" in refusal(decide(None, replace(new, rows=bare), GATE, never))
    assert decide(None, new, replace(GATE, ceiling="fid/digits/ceiling"), never).passed


@pytest.mark.parametrize(("key", "value"), [("n", 20), ("extractor_sha256", "e2"), ("kind", "bound")])
def test_gate_refuses_other_extractors_and_sizes_by_name(key: str, value: Any) -> None:
    text = refusal(decide(evaluation("old", 9.0), evaluation("new", 5.0, **{key: value}), GATE, never))
    assert text == f"{key} of fid/digits differs: old has {evaluation('old', 9.0).rows[0][key]}, new has {value}"


def test_gate_refuses_other_data_by_name() -> None:
    verdict = decide(evaluation("old", 9.0), replace(evaluation("new", 5.0), data_digest="d2"), GATE, never)
    assert refusal(verdict) == "data digests differ: old has d1, new has d2"


def test_gate_refuses_other_features() -> None:
    old, new = evaluation("old", 9.0), evaluation("new", 5.0)
    assert "real features of" in refusal(decide(old, replace(new, real=new.real + 1), GATE, never))
    assert "shapes of the fake" in refusal(decide(old, replace(new, fake=new.fake[:20]), GATE, never))
    assert "shapes of the real" in refusal(decide(old, replace(new, real=new.real[:, :1]), GATE, never))


@pytest.mark.parametrize(
    "rows", [[], [row("fid/digits", float("nan"), 1.0)], [row("fid/digits", 1.0, 1.0, split="valid")]]
)
def test_gate_refuses_a_missing_row(rows: list[dict[str, Any]]) -> None:
    verdict = decide(evaluation("old", 9.0), replace(evaluation("new", 5.0), rows=rows), GATE, never)
    assert refusal(verdict) == "new has no row fid/digits of split test with a value"


def test_gate_fills_in_the_model() -> None:
    assert Gate().of("digits") == Gate("fid/digits", "recall/digits")
    assert Gate(coverage=None).of("digits").coverage is None
    with pytest.raises(ValueError, match="ceiling_fraction"):
        Gate(ceiling_fraction=0.0)


def test_verdict_is_the_same_json_for_the_same_decision() -> None:
    one, two = (decide(evaluation("a", 9.0), evaluation("b", 5.0), GATE, says(4.0, 3.0, 5.0)) for _ in range(2))
    assert one.to_json() == two.to_json() and one.digest == two.digest
    told = json.loads(one.to_json())
    assert told["passed"] and told["criteria"][0]["numbers"]["value"] == 4.0
    assert one.reasons[0] == "passed: fid/digits of b is lower beyond the interval: the difference is 4 [3, 5]"


def test_gate_knows_the_library_s_difference() -> None:
    """`frechet_difference(real, champion, challenger)` must be positive for a better challenger."""
    from dgm_models.metrics.frechet import frechet_difference

    rng = torch.Generator().manual_seed(0)
    real, good, bad = (torch.randn(400, 4, generator=rng) + shift for shift in (0.0, 0.0, 1.0))
    gate = replace(GATE, coverage=None)
    old, new = (
        replace(evaluation("old", 4.0), real=real, fake=bad),
        replace(evaluation("new", 0.1), real=real, fake=good),
    )
    assert decide(old, new, gate, frechet_difference).passed
    assert not decide(new, old, gate, frechet_difference).passed
    assert not decide(old, replace(old, name="same"), gate, frechet_difference).passed


@pytest.mark.parametrize(
    ("flag", "copiers", "passed"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_gate_refuses_a_copier_of_training_rows(flag: bool, copiers: bool, passed: bool) -> None:
    new = evaluation("new", 5.0)
    new = replace(new, rows=[*new.rows, row("copies", 0.4, 0.1, flag=flag)])
    gate = replace(GATE, copiers=copiers)
    for champion in (None, evaluation("old", 9.0)):
        verdict = decide(champion, new, gate, says(4.0, 3.0, 5.0))
        assert verdict.passed is passed
    assert passed or "copier" in refusal(verdict)
