"""A game on the page: collapse and vanished gradients are named, a healthy game is not flagged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_leaderboard_rows import entry, write_run
from test_report_page import Page

from pipelines.stages.report import curves, panel, panels, report
from pipelines.views import game

STEPS = range(50, 1001, 50)
NASH = {"gradient": 2e-3, "least_curvature": 0.5, "greatest_curvature": 20.0}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    return tmp_path


def trained(generator: Any = lambda step: 0.5, nash: dict[str, float] | None = None, **more: float) -> list[Any]:
    """Rows of metrics.jsonl of a game; `generator`: its gradient norm at a step."""
    rows = []
    for step in STEPS:
        metrics = {
            "critic/loss": 1.3, "generator/loss": 0.7, "critic/gradient_norm": 1.0 + 1 / step,
            "generator/gradient_norm": generator(step), "critic/from_optimum": 100 / step, "critic/gain": 0.1,
            "generator/gain": 0.25, "duality_gap": 0.35, **more,
        }  # fmt: skip
        rows.append({"step": step, "metrics": metrics})
    for player in ("critic", "generator") if nash else ():
        rows[-1]["metrics"] |= {f"nash/{player}/{name}": value for name, value in (nash or {}).items()}
    return rows


def covered(value: float, of: int = 8, half: float = 0.0) -> dict[str, Any]:
    return entry("modes/raw", value, half, of=of)


def seen(root: Path, rows: list[Any], modes: dict[str, Any] | None) -> dict[str, Any]:
    path = root / "artifacts/gan/metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = game.view("gan", curves("gan"), modes, panel)
    assert found is not None
    return found


def flags(found: dict[str, Any]) -> list[str]:
    return [each["text"] for each in found["findings"] if each["bad"]]


def test_game_that_is_healthy_has_no_flag(root: Path) -> None:
    found = seen(root, trained(nash=NASH), covered(8))
    assert flags(found) == []
    assert [each["text"] for each in found["findings"]] == [
        "critic gradient ends at 0.98 of its start",
        "generator gradient ends at 1 of its start",
        "8 of 8 modes covered",
        "duality gap within reach ends at 0.35 nats (critic 0.1, generator 0.25)",
    ]
    assert [each["name"] for each in found["panels"]] == ["gradient norm", "duality gap", "from optimum"]
    assert found["panels"][0]["log"] and not found["panels"][1]["log"]
    assert [line["label"] for line in found["panels"][1]["lines"]] == ["critic", "generator", "sum"]


def test_game_whose_samples_miss_modes_is_flagged(root: Path) -> None:
    found = seen(root, trained(), covered(3))
    assert flags(found) == ["3 of 8 modes covered"]
    assert found["modes"] == {"covered": 3, "of": 8, "interval": ""}
    assert flags(seen(root, trained(), covered(7, half=1.0))) == ["7.0 of 8 modes covered [6.0, 8.0]"]


def test_game_whose_generator_gradient_vanishes_is_flagged_with_its_step(root: Path) -> None:
    found = seen(root, trained(lambda step: 0.5 if step < 400 else 4e-4), covered(8))
    assert flags(found) == ["generator gradient fell below 0.001 of its start at step 400 and stayed there"]
    above = seen(root, trained(lambda step: 0.5 if step < 400 else 6e-4), covered(8))
    assert flags(above) == []


def test_game_whose_gradient_came_back_is_not_flagged_and_the_last_fall_counts(root: Path) -> None:
    assert flags(seen(root, trained(lambda step: 1e-5 if 200 <= step < 900 else 0.5), None)) == []
    twice = seen(root, trained(lambda step: 1e-5 if 200 <= step < 400 or step >= 900 else 0.5), None)
    assert flags(twice) == ["generator gradient fell below 0.001 of its start at step 900 and stayed there"]


def test_game_with_a_gradient_of_exactly_zero_keeps_its_logarithmic_axis(root: Path) -> None:
    found = seen(root, trained(lambda step: 0.5 if step < 400 else 0.0), covered(8))
    assert found["panels"][0]["log"]
    assert "at step 400" in flags(found)[0]
    never = seen(root, trained(lambda step: 0.0), covered(8))
    assert flags(never) == ["generator gradient ends at zero from the start"]


def test_game_without_measured_modes_says_so(root: Path) -> None:
    found = seen(root, trained(), None)
    assert found["modes"] is None and flags(found) == []
    assert any("modes are not measured" in each["text"] for each in found["findings"])


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({}, "nash", "A differential Nash equilibrium"),
        ({"gradient": 0.3}, "moving", "a player's gradient is not zero"),
        ({"least_curvature": -2.0}, "saddle", "falls along a direction of negative curvature"),
        ({"least_curvature": 1e-3}, "undecided", "the second order does not tell"),
    ],
)
def test_game_verdict_says_what_its_numbers_say(root: Path, change: Any, verdict: str, words: str) -> None:
    nash = seen(root, trained(nash=NASH | change), covered(8))["nash"]
    assert nash["verdict"] == verdict and words in nash["text"]
    assert [row["player"] for row in nash["rows"]] == ["critic", "generator"]
    assert {"gradient", "least", "greatest"} <= nash["rows"][0].keys()


def test_turn_with_a_name_of_its_own_is_no_player(root: Path) -> None:
    vanishing = [{**row, "metrics": {**row["metrics"], "r1/gradient_norm": 1 / row["step"] ** 2}}
                 for row in trained(nash=NASH)]  # fmt: skip
    found = seen(root, vanishing, covered(8))
    assert found["nash"]["verdict"] == "nash" and flags(found) == []
    assert {line["label"] for line in found["panels"][0]["lines"]} == {"critic", "generator", "r1"}


def test_game_that_was_not_tested_has_no_verdict(root: Path) -> None:
    assert seen(root, trained(), None)["nash"] is None


def test_run_of_one_player_is_no_game() -> None:
    assert game.view("vae", {"loss": [(1.0, 2.0)], "gradient_norm": [(1.0, 2.0)]}, None, panel) is None


def test_page_shows_games_and_what_is_wrong_with_them(root: Path) -> None:
    for run, rows, modes in (
        ("good", trained(nash=NASH), covered(8)),
        ("collapsed", trained(lambda step: 1 / step**4, NASH | {"least_curvature": -1.0}), covered(2)),
    ):
        write_run(root, run, [entry("fid/raw", 1.0), modes], "gan/minimax", "ring")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "artifacts" / run / "metrics.jsonl").write_text(text)
    write_run(root, "vae", [entry("fid/raw", 3.0)], "vae/vae", "ring")
    page = Page(report(root / "report").read_text())
    assert page.open == []
    assert "Games" in page.text and page.text.count("⚑") == 1
    assert "2 of 8 modes covered" in page.text
    assert "generator gradient fell below 0.001 of its start at step" in page.text
    assert "No Nash equilibrium" in page.text and "A differential Nash equilibrium" in page.text
    assert len([tag for tag, attributes in page.tags if attributes.get("class") == "covered"]) == 10
    assert [each["name"] for each in panels("good")] == [
        "loss", "gradient norm", "duality gap", "from optimum", "gain",
    ]  # fmt: skip


def test_page_without_games_does_not_speak_of_them(root: Path) -> None:
    write_run(root, "vae", [entry("fid/raw", 3.0)], "vae/vae", "ring")
    assert "Games" not in Page(report(root / "report").read_text()).text


def test_page_names_the_evaluation_whose_modes_lack_their_number(root: Path) -> None:
    write_run(root, "gan", [entry("modes/raw", 3.0)], "gan/minimax", "ring")
    text = "".join(json.dumps(row) + "\n" for row in trained())
    (root / "artifacts/gan/metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"gan/evaluation\.json"):
        report(root / "report")


def test_evaluation_counts_modes_where_there_are_labels() -> None:
    import torch

    from pipelines.stages.evaluate import Extractor, Rows, compare

    labels = torch.arange(120) % 4
    rng = torch.Generator().manual_seed(0)
    real, other = (10 * torch.eye(4)[labels] + torch.randn(120, 4, generator=rng) for _ in range(2))
    extractor, found = Extractor("raw", "raw-coordinates", None), Rows("raw-coordinates", "test", 0)
    compare(found, extractor, real, other[labels < 3], other, labels)
    rows = {row["metric"]: row for row in found.rows}
    assert (rows["modes/raw"]["value"], rows["modes/raw"]["of"], rows["modes/raw"]["unit"]) == (3, 4, "modes")
    assert rows["high_quality/raw"]["unit"] == "share" and rows["c2st/raw"]["unit"] == "accuracy"
    assert {rows[name]["kind"] for name in ("modes/raw", "high_quality/raw", "c2st/raw")} == {"estimate"}
    without = Rows("raw-coordinates", "test", 0)
    compare(without, extractor, real, other, other, None)
    assert {row["metric"] for row in without.rows} == rows.keys() - {"modes/raw", "high_quality/raw"}
    assert [each for each in without.refused if each["metric"] == "modes"] == []
