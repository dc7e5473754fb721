"""A training submitted to a Ray cluster over HTTP, with a token, a bucket and two workers: the whole road of a job."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import psutil
import pytest
from moto.server import ThreadedMotoServer

from dgm_models.training import checkpoint
from tests.support import project

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def _free() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """A head that takes jobs: its address, and the environment of who may submit."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    s3 = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="test", aws_secret_access_key="test",
                      region_name="us-east-1")  # fmt: skip
    s3.create_bucket(Bucket="runs")
    port, dashboard = _free(), _free()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
    environment = os.environ | KEYS | token | {"AWS_ENDPOINT_URL": endpoint, "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="dgm-ray-", ignore_cleanup_errors=True) as folder:
        ray = [sys.executable, "-m", "ray.scripts.scripts"]
        command = [
            *ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}", "--num-cpus=2",
            "--object-store-memory=200000000", "--disable-usage-stats",
        ]  # fmt: skip
        head = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{dashboard}"
            _answers(address, environment, head)
            yield address, environment
        finally:
            processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
            head.terminate()
            _, alive = psutil.wait_procs(processes, timeout=15)
            for process in alive:
                process.kill()
            head.wait(15)
            server.stop()


def _answers(address: str, environment: dict[str, str], head: subprocess.Popen[bytes]) -> None:
    script = f"from ray.job_submission import JobSubmissionClient; JobSubmissionClient({address!r}).list_jobs()"
    end = time.monotonic() + 90
    while subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False).returncode:
        assert head.poll() is None and time.monotonic() < end, "the head does not take jobs"
        time.sleep(1)


def _dgm(
    folder: Path, environment: dict[str, str], *words: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    given = environment | {"DGM_ROOT": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *words], cwd=folder, env=given, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
    return done


def test_submitted_training_equals_the_local_one(tmp_path: Path, cluster: tuple[str, dict[str, str]]) -> None:
    address, environment = cluster
    text = project.PARAMS.replace("steps: 300", "steps: 100")
    local = project.make(tmp_path / "local", text.replace("workers: 1", "workers: 2"))
    project.dgm(local, "prepare", "digits")
    project.dgm(local, "train", "vae")

    here = f"cluster: {{address: '{address}', storage: 's3://runs/store', workers: 2}}"
    laptop = project.make(tmp_path / "laptop", text.replace("cluster: {storage: .dgm/store, workers: 1}", here))
    _dgm(laptop, environment, "prepare", "digits")
    wrong = _dgm(laptop, environment | {"RAY_AUTH_TOKEN": "f" * 32}, "train", "vae", check=False)
    assert wrong.returncode == 2 and "does not take jobs" in wrong.stderr, wrong.stderr

    submitted = json.loads(_dgm(laptop, environment, "submit", "train", "vae", "--json").stdout)
    assert submitted["id"] == f"dgm-train-{submitted['digest']}"
    done = _dgm(laptop, environment, "train", "vae")
    assert "attached to the running job" in done.stderr, done.stderr
    jobs = json.loads(_dgm(laptop, environment, "jobs", "--json").stdout)
    assert [(job["id"], job["state"]) for job in jobs] == [(submitted["id"], "SUCCEEDED")]
    assert _dgm(laptop, environment, "logs", "vae").stdout.strip()

    ours, theirs = laptop / "artifacts" / "vae", local / "artifacts" / "vae"
    checkpoint.verify(ours)
    for name in ("weights.safetensors", "metrics.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    lineage = checkpoint.read_document(ours, "spec")["lineage"]
    assert lineage["world"] == 2 and lineage["run_digest"] == submitted["digest"]
    assert "nothing to train" in _dgm(laptop, environment, "train", "vae").stderr
    assert len(json.loads(_dgm(laptop, environment, "jobs", "--json").stdout)) == 1
