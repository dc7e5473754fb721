"""Promotion on a real store: the best of many, one winner of several at once, the way back, and mending."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgm_models.training import checkpoint
from pipelines import promotion, registration, tracking
from pipelines.promotion import Gate, Lost, history, promote, rollback
from pipelines.registration import fetch, register, sync

GATE = Gate(ceiling_fraction=0.5)
REAL = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))


def write_run(root: Path, run: str, shift: float, *, n: int = 400, extractor: str = "e1", data: str = "d1") -> None:
    """artifacts/<run> and evaluations/<run> of a model whose samples are off by `shift`: its FID is 2 shift^2."""
    artifact, evaluation = root / "artifacts" / run, root / "evaluations" / run
    lineage: dict[str, Any] = {
        "run": run, "run_digest": hashlib.sha256(f"{run}{data}".encode()).hexdigest(), "data_digest": data,
        "git_commit": "c" * 40, "git_dirty": False, "dataset": "digits", "seed": 0,
    }  # fmt: skip
    data_spec = {"kind": "vector", "shape": [2], "levels": None, "classes": 0, "location": 0.0, "scale": 1.0}
    spec = {"version": 1, "method": "flows/real_nvp", "params": {}, "data": data_spec, "lineage": lineage}
    checkpoint.write(artifact, {"weights": {"w": torch.tensor([shift])}}, {"spec": spec})
    fid = 2 * shift**2
    shared = {"n": n, "split": "test", "extractor_sha256": extractor, "seed": 0, "unit": "", "kind": "estimate"}
    rows = [
        {"metric": "fid/digits", "value": fid, "low": fid - 0.1, "high": fid + 0.1, **shared},
        {"metric": "recall/digits", "value": 0.8, "low": 0.75, "high": 0.85, **shared},
        {"metric": "fid/digits/ceiling", "value": 100.0, "low": None, "high": None, **shared},
    ]
    evaluation.mkdir(parents=True, exist_ok=True)
    (evaluation / "evaluation.json").write_text(json.dumps(rows))
    (evaluation / "grid.png").write_bytes(b"png")
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(int(lineage["run_digest"][:8], 16)))
    save_file(
        {"real": REAL[:n].contiguous(), "fake": (noise + shift)[:n].contiguous()}, evaluation / "features.safetensors"
    )


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    tracking.client(f"sqlite:///{path}")
    return path


def new_server(root: Path, empty_database: Path, name: str) -> str:
    (root / name).mkdir()
    shutil.copy(empty_database, root / name / "mlflow.db")
    return f"sqlite:///{root / name / 'mlflow.db'}"


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    return new_server(tmp_path, empty_database, "server")


def add(root: Path, uri: str, run: str, shift: float, **other: Any) -> str:
    write_run(root, run, shift, **other)
    receipt = root / "receipts" / f"{run}.json"
    found = register(root / "artifacts" / run, root / "evaluations" / run, "digits", receipt, uri=uri)
    return str(found["version"])


def aliases(uri: str) -> dict[str, str]:
    found = tracking.client(uri).get_registered_model("digits").aliases
    return {name: str(number) for name, number in found.items()}


def champion_run(uri: str) -> str:
    return str(registration.resolve(tracking.client(uri), "models:/digits@champion").tags["dgm.run"])


def sync_all(root: Path, uri: str) -> list[str]:
    return sync(sorted((root / "receipts").iterdir()), root / "artifacts", root / "evaluations", uri=uri)


@pytest.mark.parametrize("order", [("good", "fair", "bad"), ("bad", "fair", "good"), ("fair", "good", "bad")])
def test_promote_picks_the_best_whatever_the_order(uri: str, tmp_path: Path, order: tuple[str, ...]) -> None:
    shifts = {"good": 0.5, "fair": 1.0, "bad": 2.0}
    for run in order:
        add(tmp_path, uri, run, shifts[run])
    verdict = promote("digits", GATE, uri=uri)
    assert verdict.passed and verdict.champion is None
    assert champion_run(uri) == "good"
    assert "previous" not in aliases(uri)


def test_promote_compares_with_the_champion_and_moves_both_aliases(uri: str, tmp_path: Path) -> None:
    first = add(tmp_path, uri, "fair", 1.0)
    assert promote("digits", GATE, uri=uri).passed
    again = promote("digits", GATE, uri=uri)
    assert not again.passed and again.challenger is None
    second = add(tmp_path, uri, "good", 0.2)
    verdict = promote("digits", GATE, by="ada", uri=uri)
    assert verdict.passed and verdict.champion == f"version {first} (fair)"
    assert aliases(uri) == {"champion": second, "previous": first}
    told = history("digits", uri=uri)
    assert [(entry.action, entry.source and entry.source.run, entry.to.run) for entry in told] == [
        ("promote", None, "fair"), ("promote", "fair", "good"),
    ]  # fmt: skip
    assert told[1].by == "ada" and told[1].verdict == verdict.digest
    mlflow = tracking.client(uri)
    assert mlflow.get_model_version("digits", second).tags["dgm.verdict"].startswith("promoted: passed: fid/digits")
    text = mlflow.download_artifacts(
        registration.ledger_run(mlflow, "digits"), f"verdicts/{verdict.digest[:16]}.json", str(tmp_path)
    )
    assert Path(text).read_text() == verdict.to_json()


def test_promote_refuses_what_is_not_better_and_says_so_on_the_version(uri: str, tmp_path: Path) -> None:
    add(tmp_path, uri, "fair", 1.0)
    promote("digits", GATE, uri=uri)
    twin, worse = add(tmp_path, uri, "twin", 0.99), add(tmp_path, uri, "worse", 2.0)
    verdict = promote("digits", GATE, uri=uri)
    assert not verdict.passed and verdict.challenger == f"version {twin} (twin)"
    assert any(line.startswith(f"version {worse} (worse)") for line in verdict.others)
    assert champion_run(uri) == "fair" and len(history("digits", uri=uri)) == 1
    tag = tracking.client(uri).get_model_version("digits", twin).tags["dgm.verdict"]
    assert tag.startswith("refused: failed: fid/digits")
    assert promote("digits", GATE, uri=uri).digest == verdict.digest


def test_promote_takes_the_second_best_when_the_best_fails(uri: str, tmp_path: Path) -> None:
    add(tmp_path, uri, "fair", 1.5)
    promote("digits", GATE, uri=uri)
    narrow = add(tmp_path, uri, "narrow", 0.2)
    folder = tmp_path / "evaluations" / "narrow"
    rows = json.loads((folder / "evaluation.json").read_text())
    rows[1] |= {"value": 0.3, "low": 0.25, "high": 0.35}
    (folder / "evaluation.json").write_text(json.dumps(rows))
    tracking.client(uri).delete_model_version("digits", narrow)
    register(tmp_path / "artifacts" / "narrow", folder, "digits", tmp_path / "receipts" / "narrow.json", uri=uri)
    add(tmp_path, uri, "good", 0.6)
    verdict = promote("digits", GATE, uri=uri)
    assert verdict.passed and champion_run(uri) == "good"
    assert any("recall/digits of" in line and "is worse" in line for line in verdict.others)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"n": 300}, "n of fid/digits differs"),
        ({"extractor": "e2"}, "extractor_sha256 of"),
        ({"data": "d2"}, "data digests"),
    ],
)
def test_promote_refuses_what_does_not_compare_by_name(
    uri: str, tmp_path: Path, other: dict[str, Any], reason: str
) -> None:
    add(tmp_path, uri, "fair", 1.0)
    promote("digits", GATE, uri=uri)
    add(tmp_path, uri, "good", 0.2, **other)
    verdict = promote("digits", GATE, uri=uri)
    assert not verdict.passed and reason in verdict.others[0]
    assert champion_run(uri) == "fair"
    assert promote("digits", GATE, restart=True, candidates=[tmp_path / "receipts" / "good.json"], uri=uri).passed
    assert champion_run(uri) == "good" and history("digits", uri=uri)[-1].source is not None


def test_promote_measures_the_champion_by_its_new_evaluation(uri: str, tmp_path: Path) -> None:
    """After a change of n every run is evaluated and registered again; the champion's twin is compared."""
    add(tmp_path, uri, "fair", 1.0)
    promote("digits", GATE, uri=uri)
    twin = add(tmp_path, uri, "fair", 1.0, n=300)
    add(tmp_path, uri, "good", 0.2, n=300)
    verdict = promote("digits", GATE, uri=uri)
    assert verdict.passed and verdict.champion == f"version {twin} (fair)" and champion_run(uri) == "good"


def test_promote_wants_candidates_for_a_first_champion_that_compare(uri: str, tmp_path: Path) -> None:
    add(tmp_path, uri, "fair", 1.0)
    add(tmp_path, uri, "good", 0.2, n=300)
    with pytest.raises(ValueError, match="do not compare: n of fid/digits differs"):
        promote("digits", GATE, uri=uri)
    assert promote("digits", GATE, candidates=[tmp_path / "receipts" / "fair.json"], uri=uri).passed
    assert champion_run(uri) == "fair"


@pytest.mark.parametrize("name", ["artifact/weights.safetensors", "evaluation/features.safetensors"])
def test_promote_never_promotes_damaged_files(uri: str, tmp_path: Path, name: str) -> None:
    add(tmp_path, uri, "fair", 1.0)
    promote("digits", GATE, uri=uri)
    number = add(tmp_path, uri, "good", 0.2)
    source = tracking.client(uri).get_model_version_download_uri("digits", number).removeprefix("file://")
    path = Path(source) / "artifacts" / name
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01")
    verdict = promote("digits", GATE, uri=uri)
    assert not verdict.passed and f"{name} is changed" in verdict.reasons[0]
    assert champion_run(uri) == "fair"


def test_promote_needs_a_model(uri: str) -> None:
    with pytest.raises(ValueError, match="no registered model 'digits'"):
        promote("digits", GATE, uri=uri)


def test_promotes_at_once_have_one_winner(uri: str, tmp_path: Path) -> None:
    """All have read the ledger before one writes: the difference is where they meet."""
    add(tmp_path, uri, "fair", 1.0)
    promote("digits", GATE, uri=uri)
    add(tmp_path, uri, "good", 0.2)
    meeting = threading.Barrier(6)

    def difference(real: Any, champion: Any, challenger: Any) -> Any:
        meeting.wait(30)
        return promotion._frechet_difference(real, champion, challenger)

    def one(number: int) -> str:
        try:
            return str(promote("digits", GATE, difference=difference, by=str(number), uri=uri).passed)
        except Lost as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        found = sorted(pool.map(one, range(6)))
    assert found == ["True"] + ["lost: somebody promoted version 2 (good) meanwhile; run again"] * 5
    assert len(history("digits", uri=uri)) == 2
    assert aliases(uri) == {"champion": "2", "previous": "1"}


_RACER = """
import os, sys, time
from pathlib import Path
from pipelines import promotion
me, uri, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
write = promotion._append
def late(*arguments):
    (folder / f"ready-{me}").touch()
    while not (folder / "go").exists():
        time.sleep(0.002)
    write(*arguments)
promotion._append = late
try:
    print(promotion.rollback("digits", by=me, uri=uri).to.run)
except promotion.Lost:
    print("lost")
sys.stdout.flush()
os._exit(0)  # tearing MLflow's modules down costs a second
"""


def test_rollbacks_of_several_processes_at_once_have_one_winner(uri: str, tmp_path: Path) -> None:
    for run, shift in (("one", 2.0), ("two", 1.0), ("three", 0.2)):
        add(tmp_path, uri, run, shift)
        assert promote("digits", GATE, uri=uri).passed
    started = [
        subprocess.Popen([sys.executable, "-c", _RACER, str(me), uri, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for me in range(2)
    ]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    (tmp_path / "go").touch()
    assert sorted(process.communicate(timeout=60)[0].strip() for process in started) == ["lost", "two"]
    assert len(history("digits", uri=uri)) == 4 and champion_run(uri) == "two"


def test_an_entry_whose_answer_was_lost_counts_as_written(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    add(tmp_path, uri, "fair", 1.0)
    real = MlflowClient.log_param

    def broken(self: MlflowClient, *arguments: Any) -> None:
        real(self, *arguments)
        raise MlflowException("500: no answer")

    monkeypatch.setattr(MlflowClient, "log_param", broken)
    assert promote("digits", GATE, uri=uri).passed
    assert champion_run(uri) == "fair"


@pytest.mark.parametrize("mender", ["promote", "sync"])
def test_a_stop_between_entry_and_alias_is_mended(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mender: str
) -> None:
    from mlflow import MlflowClient

    add(tmp_path, uri, "fair", 1.0)
    promote("digits", GATE, uri=uri)
    add(tmp_path, uri, "good", 0.2)

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(Killed):
            promote("digits", GATE, uri=uri)
    assert aliases(uri) == {"champion": "1"} and len(history("digits", uri=uri)) == 2
    if mender == "promote":
        assert not promote("digits", GATE, uri=uri).passed
    else:
        assert len(sync_all(tmp_path, uri)) == 2
    assert aliases(uri) == {"champion": "2", "previous": "1"} and len(history("digits", uri=uri)) == 2


def test_an_alias_moved_by_hand_goes_back_to_the_ledger_s(uri: str, tmp_path: Path) -> None:
    add(tmp_path, uri, "fair", 1.0)
    add(tmp_path, uri, "bad", 2.0)
    promote("digits", GATE, uri=uri)
    tracking.client(uri).set_registered_model_alias("digits", "champion", "2")
    assert sync_all(tmp_path, uri) == ["digits: alias champion 2 -> 1"]
    assert sync_all(tmp_path, uri) == []


def test_a_slow_mender_does_not_undo_a_later_promotion(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read the ledger, slept through a promotion, and now sets what it had read."""
    from mlflow import MlflowClient

    add(tmp_path, uri, "fair", 1.0)
    promote("digits", GATE, uri=uri)
    tracking.client(uri).delete_registered_model_alias("digits", "champion")
    add(tmp_path, uri, "good", 0.2)
    real = MlflowClient.set_registered_model_alias
    slept: list[bool] = []

    def slow(self: MlflowClient, *arguments: Any) -> None:
        if not slept:
            slept.append(True)
            promote("digits", GATE, uri=uri)
        real(self, *arguments)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", slow)
    promotion.settle(tracking.client(uri), "digits")
    assert champion_run(uri) == "good"


def test_rollback_goes_back_step_by_step_and_bars_what_it_left(uri: str, tmp_path: Path) -> None:
    for run, shift in (("one", 2.0), ("two", 1.0), ("three", 0.2)):
        add(tmp_path, uri, run, shift)
        assert promote("digits", GATE, uri=uri).passed
    assert rollback("digits", uri=uri).to.run == "two"
    assert aliases(uri) == {"champion": "2", "previous": "1"}
    verdict = promote("digits", GATE, uri=uri)
    assert not verdict.passed and "version 3 (three): was rolled back" in verdict.others
    assert rollback("digits", uri=uri).to.run == "one"
    assert aliases(uri) == {"champion": "1"}
    with pytest.raises(ValueError, match="the first champion: nothing to go back to"):
        rollback("digits", uri=uri)
    assert promote("digits", GATE, readmit=True, uri=uri).passed
    assert champion_run(uri) == "three"
    assert [entry.action for entry in history("digits", uri=uri)] == ["promote"] * 3 + ["rollback"] * 2 + ["promote"]


def test_rollback_needs_a_version_to_go_back_to(uri: str, tmp_path: Path) -> None:
    add(tmp_path, uri, "one", 1.0)
    with pytest.raises(ValueError, match="no champion: nothing to go back to"):
        rollback("digits", uri=uri)
    promote("digits", GATE, uri=uri)
    add(tmp_path, uri, "two", 0.2)
    promote("digits", GATE, uri=uri)
    tracking.client(uri).delete_model_version("digits", "1")
    with pytest.raises(ValueError, match=r"\(one\) has no version: sync its receipt"):
        rollback("digits", uri=uri)
    assert sync_all(tmp_path, uri) == ["digits: run one: version 3 created", "digits: alias previous none -> 3"]
    assert rollback("digits", uri=uri).to.version == "3"


def test_a_deleted_champion_is_an_error_until_synced(uri: str, tmp_path: Path) -> None:
    add(tmp_path, uri, "one", 1.0)
    promote("digits", GATE, uri=uri)
    tracking.client(uri).delete_model_version("digits", "1")
    add(tmp_path, uri, "two", 0.2)
    with pytest.raises(ValueError, match=r"the champion \(one\) has no version"):
        promote("digits", GATE, uri=uri)
    sync_all(tmp_path, uri)
    assert champion_run(uri) == "one"


def test_sync_tells_the_history_to_another_server_and_only_forward(
    uri: str, tmp_path: Path, empty_database: Path
) -> None:
    receipt = tmp_path / "receipts" / "promotion.json"
    for run, shift in (("bad", 2.0), ("fair", 1.0)):
        add(tmp_path, uri, run, shift)
        promote("digits", GATE, receipt=receipt, uri=uri)
    early = receipt.read_bytes()
    other = new_server(tmp_path, empty_database, "other")
    register(  # another number than on the first server
        tmp_path / "artifacts" / "fair", tmp_path / "evaluations" / "fair", "digits", tmp_path / "x.json", uri=other
    )
    assert "digits: ledger 0002: promote fair" in sync_all(tmp_path, other)
    assert aliases(other) == {"champion": "1", "previous": "2"}
    assert sync_all(tmp_path, other) == []
    assert [entry.id for entry in history("digits", uri=other)] == [entry.id for entry in history("digits", uri=uri)]

    rollback("digits", receipt=receipt, uri=uri)
    assert json.loads(receipt.read_text())["champion"]["run"] == "bad"
    assert "digits: ledger 0003: rollback bad" in sync_all(tmp_path, other)
    assert champion_run(other) == "bad"
    receipt.write_bytes(early)  # a clone that has not pulled: the server knows more
    assert sync_all(tmp_path, other) == []
    assert champion_run(other) == "bad"


def test_sync_leaves_a_ledger_alone_that_tells_another_story(uri: str, tmp_path: Path, empty_database: Path) -> None:
    add(tmp_path, uri, "fair", 1.0)
    promote("digits", GATE, receipt=tmp_path / "receipts" / "promotion.json", uri=uri)
    other = new_server(tmp_path, empty_database, "other")
    add(tmp_path, other, "good", 0.2)
    promote("digits", GATE, uri=other)
    done = sync_all(tmp_path, other)
    assert any("tells another story" in line for line in done)
    assert champion_run(other) == "good"


def test_promote_leaves_an_unchanged_receipt_alone(uri: str, tmp_path: Path) -> None:
    add(tmp_path, uri, "fair", 1.0)
    receipt = tmp_path / "receipts" / "promotion.json"
    promote("digits", GATE, receipt=receipt, uri=uri)
    before = receipt.stat().st_mtime_ns
    promote("digits", GATE, receipt=receipt, uri=uri)
    assert receipt.stat().st_mtime_ns == before
    receipt.unlink()  # as DVC does before a stage
    promote("digits", GATE, receipt=receipt, uri=uri)
    assert json.loads(receipt.read_text())["champion"]["run"] == "fair"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """A real MLflow server that keeps the files itself."""
    root = tmp_path_factory.mktemp("mlflow-server")
    shutil.copy(empty_database, root / "mlflow.db")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}",
        "--artifacts-destination", str(root / "files"), "--serve-artifacts",
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"no MLflow server: {(root / 'log').read_text()[-2000:]}")
                time.sleep(0.1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_promotion_works_through_a_server(server: str, tmp_path: Path) -> None:
    curves = tracking.Curves("fair", hashlib.sha256(b"faird1").hexdigest(), "digits", {}, {}, tmp_path, server, 20.0)
    assert curves.log(1, {"loss": 1.0}) and curves.log(2, {"loss": 0.5}) and curves.finish()
    add(tmp_path, server, "fair", 1.0)
    assert add(tmp_path, server, "fair", 1.0) == "1"
    mlflow = tracking.client(server)
    assert mlflow.get_model_version("digits", "1").run_id == curves.run_id
    assert promote("digits", GATE, uri=server).passed
    add(tmp_path, server, "good", 0.2)
    meeting = threading.Barrier(4)

    def one(_: int) -> str:
        def difference(*features: Any) -> Any:
            meeting.wait(30)
            return promotion._frechet_difference(*features)

        try:
            return str(promote("digits", GATE, difference=difference, uri=server).passed)
        except Lost:
            return "Lost"

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(one, range(4))) == ["Lost", "Lost", "Lost", "True"]
    assert aliases(server) == {"champion": "2", "previous": "1"}
    found = fetch("models:/digits@champion", tmp_path / "fetched", tracker=server)
    assert load_file(found / "weights.safetensors")["w"].item() == pytest.approx(0.2)
    assert rollback("digits", uri=server).to.run == "fair"
    assert sync_all(tmp_path, server) == []
