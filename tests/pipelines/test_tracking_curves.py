"""Curves in MLflow: one run a digest, no step twice, and a tracker that is down never stops a training."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import tracking
from pipelines.tracking import Curves, replay


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with tables: making them costs 1.5 s, copying them nothing."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    tracking.client(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def closed() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts and never answers."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(8)
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


def curves_at(uri: str, folder: Path, **other: Any) -> Curves:
    params = {"seed": 0, "optim": {"lr": 0.1}}
    return Curves("ddpm", "4f1c", "digits", params, {"git": "abc"}, folder / "spool", uri, **{"wait": 20.0, **other})


def only_run(uri: str) -> Any:
    mlflow = tracking.client(uri)
    found = [run for each in mlflow.search_experiments() for run in mlflow.search_runs([each.experiment_id])]
    assert len(found) == 1
    return found[0]


def steps(uri: str, metric: str = "loss") -> list[int]:
    history = tracking.client(uri).get_metric_history(only_run(uri).info.run_id, metric)
    return [item.step for item in history]


def test_tracking_import_is_cheap() -> None:
    code = (
        "import pipelines.tracking, pipelines.registration, pipelines.promotion, sys; sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tracking_uri_is_the_environments_or_sqlite_in_the_project(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", raising=False)
    found = tracking.tracking_uri(tmp_path)
    assert found == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.artifact_root(found) == f"file://{tmp_path}/mlartifacts"
    assert tracking.artifact_root("http://tracker:5000") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking.tracking_uri(tmp_path) == "http://tracker:5000"


def test_tracking_database_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """Killed at the rename, and before it within a migration: the next process makes the tables anew."""
    database = tmp_path / "mlflow.db"
    code = (
        "import os, signal, sys; from pipelines import tracking\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tracking.client(sys.argv[1])"
    )
    killed = subprocess.run([sys.executable, "-c", code, f"sqlite:///{database}"], check=False)
    assert killed.returncode == -signal.SIGKILL and not database.exists()
    left = tmp_path / "mlflow.db.new"
    left.unlink()
    with contextlib.closing(sqlite3.connect(left)) as half:
        half.execute("create table _alembic_tmp_experiment_tags (key text)")
    assert tracking.client(f"sqlite:///{database}").search_experiments()
    assert database.exists() and not left.exists()


def test_tracking_client_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    tracking.client(uri)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_curves_are_one_run_with_params_tags_and_status(uri: str, tmp_path: Path) -> None:
    curves = curves_at(uri, tmp_path)
    assert curves.log(1, {"loss": 2.0, "fid/digits": 3.0})
    assert curves.log(2, {"loss": 1.0, "a(b)": float("nan")})
    assert only_run(uri).info.status == "RUNNING"
    assert curves.finish("FINISHED")
    run = only_run(uri)
    assert run.info.status == "FINISHED" and run.info.run_name == "ddpm"
    assert run.data.params == {"seed": "0", "optim.lr": "0.1"}
    assert run.data.tags["dgm.run_digest"] == "4f1c" and run.data.tags["git"] == "abc"
    assert run.data.metrics["loss"] == 1.0 and run.data.metrics["fid/digits"] == 3.0
    assert "a_b_" in run.data.metrics
    assert not list((tmp_path / "spool").iterdir())


def test_curves_of_a_restart_go_on_in_the_same_run_and_repeat_no_step(uri: str, tmp_path: Path) -> None:
    first = curves_at(uri, tmp_path)
    for step in range(1, 11):
        assert first.log(step, {"loss": 1 / step})
    first.close()
    second = curves_at(uri, tmp_path)  # resumed from step 5
    for step in range(6, 16):
        assert second.log(step, {"loss": 1 / step})
    assert second.log(15, {"fid": 2.0})  # another metric at a known step is no repetition
    assert second.finish()
    assert steps(uri) == list(range(1, 16))
    assert steps(uri, "fid") == [15]


def test_curves_survive_a_closed_port_cheaply(closed: str, uri: str, tmp_path: Path) -> None:
    curves = curves_at(closed, tmp_path, wait=3.0)
    start = time.monotonic()
    sent = [curves.log(step, {"loss": 1.0}) for step in range(200)]
    assert not any(sent)
    assert time.monotonic() - start < 8  # one try, then the pause
    assert not curves.finish("FAILED")
    assert len(replay(tmp_path / "spool", uri)) == 1
    assert steps(uri) == list(range(200))
    assert only_run(uri).info.status == "FAILED"
    assert replay(tmp_path / "spool", uri) == []


def test_curves_survive_a_tracker_that_never_answers(silent: str, tmp_path: Path) -> None:
    curves = curves_at(silent, tmp_path, wait=0.5)
    start = time.monotonic()
    for step in range(50):
        assert not curves.log(step, {"loss": 1.0})
    assert not curves.finish()
    assert time.monotonic() - start < 4
    assert len(next((tmp_path / "spool").iterdir()).read_text().splitlines()) == 1 + 50 + 1


def test_curves_send_the_spool_when_the_tracker_comes_back(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = curves_at(uri, tmp_path, pause=1.0)
    assert curves.log(1, {"loss": 1.0})
    real = tracking.client

    def down(uri: str | None = None) -> Any:
        raise ConnectionError("down")

    monkeypatch.setattr(tracking, "client", down)
    assert not curves.log(2, {"loss": 1.0})
    monkeypatch.setattr(tracking, "client", real)
    assert not curves.log(3, {"loss": 1.0})  # still pausing
    time.sleep(1.05)
    assert curves.log(4, {"loss": 1.0})
    assert curves.finish()
    assert steps(uri) == [1, 2, 3, 4]


def test_curves_of_a_killed_process_are_sent_by_the_next_start(closed: str, uri: str, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from pipelines.tracking import Curves\n"
        f"curves = Curves('ddpm', '4f1c', 'digits', {{}}, {{}}, Path({str(tmp_path / 'spool')!r}), {closed!r}, 0.05)\n"
        "[curves.log(step, {'loss': 1.0}) for step in range(1, 6)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    spool = next((tmp_path / "spool").iterdir())
    with spool.open("a") as file:
        file.write('{"step": 6, "ti')  # a torn line
    curves = curves_at(uri, tmp_path)
    assert curves.log(4, {"loss": 9.0})  # resumed a little earlier
    assert curves.log(6, {"loss": 1.0})
    assert curves.finish()
    assert steps(uri) == [1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / "spool").iterdir())


def test_replay_fills_gaps_and_repeats_nothing(uri: str, tmp_path: Path) -> None:
    curves = curves_at(uri, tmp_path)
    for step in (1, 2, 7, 8):
        curves.log(step, {"loss": 1.0})
    curves.close()
    header = {"run_name": "ddpm", "run_digest": "4f1c", "experiment": "digits"}
    rows = [{"step": step, "time": 0.0, "metrics": {"loss": 1.0}} for step in range(1, 9)]
    for _ in range(2):
        (tmp_path / "spool" / "4f1c-00000000.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (header, *rows)))
        replay(tmp_path / "spool", uri)
    assert sorted(steps(uri)) == list(range(1, 9))


def test_replay_leaves_the_file_of_a_living_process_alone(closed: str, uri: str, tmp_path: Path) -> None:
    curves = curves_at(closed, tmp_path, wait=0.05)
    curves.log(1, {"loss": 1.0})
    assert replay(tmp_path / "spool", uri) == []
    curves.close()
    assert len(replay(tmp_path / "spool", uri)) == 1


def test_replay_keeps_the_spool_when_the_tracker_is_down(closed: str, uri: str, tmp_path: Path) -> None:
    curves = curves_at(closed, tmp_path, wait=0.05)
    curves.log(1, {"loss": 1.0})
    curves.close()
    before = next((tmp_path / "spool").iterdir()).read_bytes()
    with pytest.raises(Exception, match=r"(?i)refused|retries"):
        replay(tmp_path / "spool", closed)
    assert next((tmp_path / "spool").iterdir()).read_bytes() == before


def test_replay_sets_a_broken_file_aside(uri: str, tmp_path: Path) -> None:
    (tmp_path / "4f1c-00000000.jsonl").write_text('{"run_na\n{"step": 1, "time": 0, "metrics": {}}\n')
    assert "broken" in replay(tmp_path, uri)[0]
    assert (tmp_path / "4f1c-00000000.unreadable").exists()


def test_curves_are_picklable_and_log_after_the_journey(uri: str, tmp_path: Path) -> None:
    curves = pickle.loads(pickle.dumps(curves_at(uri, tmp_path)))  # noqa: S301 (our own bytes: Ray does the same)
    assert curves.log(1, {"loss": 1.0}) and curves.finish()
    assert steps(uri) == [1]


def test_curves_swallow_metrics_that_are_no_numbers(uri: str, tmp_path: Path) -> None:
    curves = curves_at(uri, tmp_path)
    assert curves.log(1, {"loss": 1.0, "note": "text", "none": None})  # type: ignore[dict-item]
    assert set(only_run(uri).data.metrics) == {"loss"}
    with pytest.raises(ValueError, match="none of FINISHED"):
        curves.finish("DONE")


def test_curves_survive_a_spool_that_cannot_be_written(uri: str, closed: str, tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    assert curves_at(uri, tmp_path).log(1, {"loss": 1.0})
    assert not curves_at(closed, tmp_path, wait=0.05).log(1, {"loss": 1.0})


def test_curves_survive_a_locked_database(uri: str, tmp_path: Path) -> None:
    curves = curves_at(uri, tmp_path, wait=0.5, pause=0.0)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        assert not curves.log(1, {"loss": 1.0})
        assert not curves.log(2, {"loss": 1.0})
        assert time.monotonic() - start < 2
        other.rollback()
    curves.wait = 20.0
    assert curves.finish()
    assert steps(uri) == [1, 2]


def test_a_deleted_experiment_is_an_error_by_name(uri: str, tmp_path: Path) -> None:
    mlflow = tracking.client(uri)
    mlflow.delete_experiment(tracking.experiment_id(mlflow, "digits"))
    with pytest.raises(ValueError, match="'digits' is deleted"):
        tracking.experiment_id(mlflow, "digits")
    assert not curves_at(uri, tmp_path).log(1, {"loss": 1.0})
