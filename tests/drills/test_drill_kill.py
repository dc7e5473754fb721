"""Faults that a training must survive; each drill asserts that its fault really fired."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dgm_models.training import checkpoint
from tests.support import project

SLOW = project.PARAMS.replace("steps: 300", "steps: 1200").replace("steps: 150", "steps: 800")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The store and digests of the same runs, trained without Ray and without a fault."""
    folder = project.make(tmp_path_factory.mktemp("undisturbed"), SLOW)
    project.dgm(folder, "prepare", "digits")
    script = (
        "from dgm_models.training.runtime import Runtime\n"
        "from pipelines import params as p\n"
        "from pipelines.cluster.worker import train\n"
        "from pipelines.stages.train import job_of\n"
        "params = p.load()\n"
        "for run in params.runs.values():\n"
        "    train(job_of(run, params), Runtime(), lambda step, metrics: None)\n"
        "    print(job_of(run, params).digest)\n"
    )
    vae, gan = project.run(folder, sys.executable, "-c", script).stdout.split()
    return folder / ".dgm" / "store", vae, gan


def _wait(found: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90.0) -> object:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        if process.poll() is not None:
            raise AssertionError(f"the training ended before the fault: {process.communicate()}")
        time.sleep(0.02)
    raise AssertionError("nothing to kill appeared")


def _start(folder: Path, run: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", "train", run],
        cwd=folder, env=project.environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def _same_result(folder: Path, run: str, store: Path, digest: str) -> dict[str, object]:
    """The artifact equals the undisturbed one: weights bit for bit, and every reported value."""
    artifact, expected = folder / "artifacts" / run, store / digest / "artifact"
    checkpoint.verify(artifact)
    for name in ("weights.safetensors", "metrics.jsonl"):
        assert (artifact / name).read_bytes() == (expected / name).read_bytes(), name
    lineage: dict[str, object] = checkpoint.read_document(artifact, "spec")["lineage"]
    return lineage


def test_killed_worker_ends_with_the_same_weights(tmp_path: Path, undisturbed: tuple[Path, str, str]) -> None:
    store, digest, _ = undisturbed
    folder = project.make(tmp_path, SLOW)
    project.dgm(folder, "prepare", "digits")
    process = _start(folder, "vae")
    steps = folder / ".dgm" / "store" / digest
    _wait(lambda: list(steps.glob("step-*/manifest.json")), process)
    (worker,) = _workers(process)
    os.kill(worker.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    lineage = _same_result(folder, "vae", store, digest)
    assert lineage["resumed_at"] > 0, "the run was not resumed: the fault did not fire"  # type: ignore[operator]


def test_killed_driver_resumes_with_the_same_command(tmp_path: Path, undisturbed: tuple[Path, str, str]) -> None:
    store, _, digest = undisturbed
    folder = project.make(tmp_path, SLOW)
    project.dgm(folder, "prepare", "digits")
    process = _start(folder, "gan")
    steps = folder / ".dgm" / "store" / digest
    _wait(lambda: list(steps.glob("step-*/manifest.json")), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    left = [child.name() for child in alive if child.is_running()]  # Ray's agents follow their raylet a while later
    assert not [name for name in left if "Train" in name or name == "raylet"], f"the dead driver left {left}"
    assert not (folder / "artifacts" / "gan").exists()
    project.dgm(folder, "train", "gan")
    lineage = _same_result(folder, "gan", store, digest)
    assert lineage["resumed_at"] > 0  # type: ignore[operator]
    again = project.dgm(folder, "train", "gan")
    assert "nothing to train" in again.stderr


def test_changed_params_never_resume_an_old_run(undisturbed: tuple[Path, str, str], tmp_path: Path) -> None:
    """The digest, which is Ray's run name and the store's folder, follows every parameter."""
    _, digest, _ = undisturbed
    folder = project.make(tmp_path, SLOW.replace("lr: 2.0e-3", "lr: 2.1e-3"))
    project.dgm(folder, "prepare", "digits")
    script = (
        "from pipelines import params as p; from pipelines.stages.train import job_of\n"
        "params = p.load(); print(job_of(params.run('vae'), params).digest)"
    )
    assert project.run(folder, sys.executable, "-c", script).stdout.strip() != digest
