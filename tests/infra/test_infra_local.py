"""infra/local: private files, doors that are shut, and an end for what it started and nothing else."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

FILE = Path(__file__).parents[2] / "infra" / "local" / "local.py"
_spec = importlib.util.spec_from_file_location("dgm_infra_local", FILE)
assert _spec and _spec.loader
local = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(local)


SUBMIT = """
import os, time
from ray.job_submission import JobSubmissionClient

jobs = JobSubmissionClient(os.environ["RAY_ADDRESS"])
job = jobs.submit_job(entrypoint="python -c 'import ray; ray.init(); print(ray.is_initialized())'")
while not jobs.get_job_status(job).is_terminal():
    time.sleep(0.2)
print(jobs.get_job_status(job).value, jobs.get_job_logs(job))
"""


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Any]:
    made = local.Local(tmp_path / "home", offset=free_offset())
    made.home.mkdir()
    yield made
    made.down()


def free_offset() -> int:
    """An offset at which every port is free."""
    for offset in range(100, 5000, 10):
        sockets = [socket.socket() for _ in local.PORTS]
        try:
            for each, port in zip(sockets, local.PORTS.values(), strict=True):
                each.bind((local.HOST, port + offset))
            return offset
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no free ports")


def sleeper(**environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ | environment)


def stated(services: Any, mark: str, **processes: dict[str, Any]) -> None:
    services.run.mkdir(exist_ok=True)
    services.write({"mark": mark, "run": str(services.run), "processes": processes, "ports": services.ports})


def test_infra_local_down_ends_what_it_started(services: Any) -> None:
    ours, stray, other = sleeper(), sleeper(**{local.MARK: "m" * 32}), sleeper(**{local.MARK: "another"})
    try:
        stated(services, "m" * 32, s3={"pid": ours.pid, "started": psutil.Process(ours.pid).create_time()})
        assert services.down() == 2
        assert ours.poll() is not None and stray.poll() is not None
        assert other.poll() is None
        assert not services.run.exists() and services.state() == {}
    finally:
        for each in (ours, stray, other):
            each.kill()
            each.wait()


def test_infra_local_down_spares_a_process_that_got_the_pid_later(services: Any) -> None:
    other = sleeper()
    try:
        stated(services, "m" * 32, s3={"pid": other.pid, "started": psutil.Process(other.pid).create_time() - 3600})
        assert services.status()["s3"] == "not running"
        assert services.down() == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_infra_local_down_without_up_does_nothing(services: Any) -> None:
    assert services.down() == 0


def test_infra_local_up_names_a_port_that_is_taken(services: Any) -> None:
    with (
        socket.create_server((local.HOST, services.ports["mlflow"])),
        pytest.raises(local.LocalError, match=rf"port {services.ports['mlflow']} \(mlflow\) is taken"),
    ):
        services.up()
    assert services.state() == {}


def test_infra_local_shows_the_log_of_a_service_that_ended(services: Any) -> None:
    stated(services, "m" * 32)
    services.command = lambda name: ([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], {})
    services.healthy = lambda name: False
    services.start("s3")
    with pytest.raises(local.LocalError, match=r"s3 ended; its log is .*s3\.log\n  the reason"):
        services.wait("s3")


def test_infra_local_secrets_are_private_from_their_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o644)
    local.private(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == "new"


def test_infra_local_listens_on_loopback_alone(services: Any) -> None:
    assert local.HOST == "127.0.0.1"
    for name in ("s3", "mlflow", "ray"):
        words, _ = services.command(name)
        assert "0.0.0.0" not in " ".join(words) and local.HOST in " ".join(words)
    assert "--dashboard-host=127.0.0.1" in services.command("ray")[0]
    words, extra = services.command("mlflow")
    assert not any("password" in word for word in words) and extra["PGPASSFILE"] == str(services.password)
    assert services.exports()["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in services.exports()


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses on which processes listen."""
    found = set()
    for process in processes:
        try:
            found |= {each.laddr.ip for each in process.net_connections() if each.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue
    return found


def test_infra_local_up_serves_and_down_leaves_nothing(services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole: a put and a get, an MLflow run with an artifact on S3, a Ray job, 401 without the token, the end."""
    for program in ("initdb", "postgres"):
        try:
            local.postgres(program)
        except local.LocalError as error:
            pytest.skip(str(error))
    services.up()
    assert set(services.status().values()) == {"healthy"}
    services.up()  # again: nothing is started
    for path in (services.token, services.password, services.home / "env.sh"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert listening(services.ours()) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    jobs = f"{services.url('dashboard')}/api/jobs/"
    assert (local.answer(jobs), local.answer(jobs, "wrong")) == (401, 403)

    for name, value in services.exports().items():
        monkeypatch.setenv(name, value)
    import boto3
    import mlflow

    s3 = boto3.client("s3")
    assert {each["Name"] for each in s3.list_buckets()["Buckets"]} == set(local.BUCKETS)
    s3.put_object(Bucket="dgm-data", Key="a/b", Body=b"bytes")
    assert s3.get_object(Bucket="dgm-data", Key="a/b")["Body"].read() == b"bytes"
    client = mlflow.MlflowClient(services.url("mlflow"))
    run = client.create_run(client.create_experiment("local"))
    client.log_text(run.info.run_id, "words", "a.txt")
    keys = [each["Key"] for each in s3.list_objects_v2(Bucket="dgm-mlflow")["Contents"]]
    assert len(keys) == 1 and keys[0].endswith("a.txt")
    script = services.home / "submit.py"
    script.write_text(SUBMIT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60)
    assert "SUCCEEDED" in done.stdout and "True" in done.stdout
    started = services.ours()
    assert services.down() >= len(local.SERVICES)
    time.sleep(0.2)
    assert not [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert all(local.answer(services.url(name)) == 0 for name in ("s3", "mlflow", "dashboard"))
    assert not services.run.exists()
