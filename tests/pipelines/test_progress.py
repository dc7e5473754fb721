"""What a worker's end looks like on the submitter's terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import progress
from pipelines.cluster.callback import Watch
from pipelines.storage import place


def test_failure_is_shown_once_and_that_of_an_earlier_attempt_not_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = place(tmp_path)
    progress.tell(where, 7, {"loss": 1.0}, ["worker 0: of yesterday"])
    with progress.bar("train", 10, where, "starting"):
        watch = Watch(None, where.uri)
        watch.after_report(None, [{"step": 3, "loss": 2.0}], None)
        error = RuntimeError("Traceback:\n  File x\nMemoryError: not enough memory for 4 GiB\n")
        watch.after_exception(None, {1: error})
        watch.after_report(None, [{"step": 5, "loss": 1.5}], None)
    printed = capfd.readouterr().err
    assert printed.count("worker 1 after step 3: MemoryError: not enough memory for 4 GiB") == 1
    assert "yesterday" not in printed


def test_watch_survives_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    watch = Watch(None, str(tmp_path / "file" / "below"))
    watch.after_report(None, [{"step": 1, "loss": 1.0}], None)
    watch.after_exception(None, {0: RuntimeError("gone")})
