"""The table of drills is sound, and a drill cannot pass when what must hold does not."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dgm_models.training import checkpoint
from pipelines import drills
from pipelines.drills import record
from pipelines.drills.bench import DrillFailed, Moment, Outcome, Project, same_result


def test_every_drill_has_its_function_and_its_own_name() -> None:
    assert len({drill.name for drill in drills.DRILLS}) == len(drills.DRILLS)
    for drill in drills.DRILLS:
        module, _, function = drill.run.partition(":")
        assert callable(getattr(importlib.import_module(f"pipelines.drills.{module}"), function)), drill.name
        assert drill.hosts == (module in ("cluster", "road")), drill.name
        assert not (drill.short and drill.hosts), f"{drill.name}: `make test` has no hosts"
    assert json.loads(json.dumps(drills.listing())) == drills.listing()


def test_unknown_drill_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r'did you mean "?s3-busy'):
        drills.chosen(["s3-bussy"])


def test_failed_drill_is_recorded_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.drills import local

    def fails(bench: object) -> Outcome:
        raise DrillFailed("two steps were lost")

    monkeypatch.setattr(local, "kill_worker", fails)
    monkeypatch.setattr(local, "kill_driver", lambda bench: Outcome(3.0, 7))
    log = tmp_path / "log.jsonl"
    attempts = drills.run(["worker-killed", "driver-killed"], repeat=2, log=log, folder=tmp_path, say=lambda text: None)
    assert [attempt["passed"] for attempt in attempts] == [False, True] * 2
    assert "two steps were lost" in attempts[0]["error"]
    assert (attempts[1]["recovery_s"], attempts[1]["lost_steps"]) == (3.0, 7)
    assert [json.loads(line) for line in log.read_text().splitlines()] == attempts


def _artifact(folder: Path, value: float, steps: list[int]) -> Path:
    folder.mkdir()
    save_file({"w": torch.tensor([value])}, folder / "weights.safetensors")
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "metrics": {}}) + "\n" for step in steps))
    checkpoint.seal(folder)
    return folder


def test_another_result_is_no_equal_result(tmp_path: Path) -> None:
    control = _artifact(tmp_path / "control", 1.0, [10, 20])
    same_result(_artifact(tmp_path / "same", 1.0, [10, 20]), control)
    with pytest.raises(DrillFailed, match="weights"):
        same_result(_artifact(tmp_path / "weights", 1.0000001, [10, 20]), control)
    with pytest.raises(DrillFailed, match="metrics"):
        same_result(_artifact(tmp_path / "missing", 1.0, [10]), control)
    twice = _artifact(tmp_path / "twice", 1.0, [10, 10])
    with pytest.raises(DrillFailed, match="twice"):
        same_result(twice, twice)
    torn = shutil.copytree(control, tmp_path / "torn")
    (torn / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(checkpoint.Damaged):
        same_result(torn, control)


@pytest.mark.parametrize(
    ("resumed_at", "seen", "acknowledged", "words"),
    [
        (50, 120, 100, "50, 100 was acknowledged"),
        (0, 20, 0, "did not strike"),
        (100, 160, 100, "60 steps were lost"),
    ],
)
def test_lost_work_is_seen(tmp_path: Path, resumed_at: int, seen: int, acknowledged: int, words: str) -> None:
    project = Project(tmp_path, "long", "digits", "d", lambda name: None, lambda *_: None, lambda ask: None)  # type: ignore[arg-type, return-value]
    moment = Moment(0.0, seen, acknowledged, 1)
    with pytest.raises(DrillFailed, match=words):
        project.check_resume(resumed_at, moment)
    assert project.check_resume(100, Moment(0.0, 130, 100, 1), 9.0) == Outcome(9.0, 30)


def test_record_counts_attempts_and_takes_recovery_of_those_that_passed(tmp_path: Path) -> None:
    def line(drill: str, passed: bool, recovery_s: float | None, lost_steps: int | None) -> str:
        row = {"drill": drill, "passed": passed, "recovery_s": recovery_s, "lost_steps": lost_steps, "seconds": 9.0}
        return json.dumps(row) + "\n"

    page, log = tmp_path / "page.md", tmp_path / "log.jsonl"
    log.write_text(line("a", True, 2.0, 5) + line("b", True, None, None) + line("a", False, None, None))
    page.write_text(f"before\n{record.BEGIN}\nold\n{record.END}\nafter\n")
    record.update(page, log)
    record.update(page, log)
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "| `a` | 1 of 2 | 2.0, 2.0 | 5 | 9 |" in lines
    assert "| `b` | 1 of 1 |  |  | 9 |" in lines
    page.write_text("nothing")
    with pytest.raises(ValueError, match="marks"):
        record.update(page, log)


def test_an_error_in_the_log_names_no_folder_of_its_machine() -> None:
    from pipelines import drills, paths

    text = f'File "{paths.code()}/pipelines/cli.py", line 1\nFile "{sys.prefix}/lib/torch.py", line 2'
    assert drills.without_folders(text) == 'File "pipelines/cli.py", line 1\nFile "lib/torch.py", line 2'
