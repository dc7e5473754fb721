"""`dgm doctor`: every check tells the good state from the bad one, and none of them stops the others."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from pipelines import doctor
from pipelines import params as params_module
from pipelines.cluster import nodes
from pipelines.doctor import Check, Finding, door, machine, storage, survey, tracker
from pipelines.doctor.common import GIB
from pipelines.params import Params
from pipelines.storage import place

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, and an environment that says nothing."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.setenv("DGM_ROOT", str(root))
    return root


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="module")
def bucket(moto: str) -> Any:
    import boto3

    keys = {"aws_access_key_id": "mykey", "aws_secret_access_key": "mysecret", "region_name": "us-east-1"}
    client = boto3.session.Session().client("s3", endpoint_url=moto, **keys)
    client.create_bucket(Bucket="bucket")
    return client


@pytest.fixture
def s3(bucket: Any, moto: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of an S3 stand-in with one empty bucket called `bucket`, and the environment that leads to it."""
    environment = {"AWS_ENDPOINT_URL": moto, "AWS_ACCESS_KEY_ID": "mykey", "AWS_SECRET_ACCESS_KEY": "mysecret"}
    for name, value in {**environment, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    return bucket


Answers = Callable[[str, str | None], tuple[int, str]]  # (path, Authorization) -> status and body


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts HTTP servers that answer as told, with a clock that is off by `skew` seconds."""
    servers = []

    def start(answers: Answers, skew: float = 0.0) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, body = answers(self.path, self.headers.get("Authorization"))
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body.encode())

            do_HEAD = do_POST = do_GET

            def date_time_string(self, timestamp: float | None = None) -> str:
                return formatdate(time.time() + skew, usegmt=True)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def params(**sections: Any) -> Params:
    return params_module.parse(sections)


def on(address: str, **cluster: Any) -> Params:
    return params(cluster={"address": address, **cluster})


def only(found: Any) -> Finding:
    (finding,) = found
    assert isinstance(finding, Finding)
    return finding


def closed_port() -> str:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{holder.getsockname()[1]}"


# ---------------------------------------------------------------- the examination itself


def test_doctor_goes_on_after_a_check_that_raises_and_one_that_hangs() -> None:
    def raises(_: Params) -> Iterator[Finding]:
        yield Finding("first", "ok", "seen before")
        raise LookupError("nobody expected this")

    def hangs(_: Params) -> Iterator[Finding]:
        yield Finding("second", "ok", "seen before")
        threading.Event().wait()

    checks = [Check("raises", raises), Check("hangs", hangs, 0.2), Check("last", lambda _: [Finding("last", "ok", "")])]
    found = doctor.examine(params(), checks)
    assert [(each.check, each.state) for each in found] == [
        ("first", "ok"), ("raises", "unknown"), ("second", "ok"), ("hangs", "unknown"), ("last", "ok"),
    ]  # fmt: skip
    assert "LookupError: nobody expected this" in found[1].found
    assert "no answer within 0.2 s" in found[3].found


def test_doctor_without_a_cluster_has_nothing_bad_and_leaves_nothing_behind(project: Path) -> None:
    found = doctor.examine(params())
    states = {each.check: each.state for each in found}
    assert "bad" not in states.values()
    for check in ("token mode", "token file", "token asked for", "dashboard address", "clock (cluster)", "cluster"):
        finding = next(each for each in found if each.check == check)
        assert finding.state == "ok" and "not configured" in finding.found
    assert all(each.mend for each in found if each.state != "ok")
    assert not any(project.iterdir())


def test_doctor_writes_one_line_a_finding() -> None:
    found = doctor.examine(params(), [Check("raises", lambda _: (_ for _ in ()).throw(ValueError("two\nlines")))])
    assert "\n" not in doctor.line(only(found))
    assert doctor.line(Finding("disk", "bad", "full", "make room")).endswith("full -> make room")


def test_doctor_masks_secrets_whoever_says_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, project: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret-value")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "mlflow-password-value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    (tmp_path / "token").write_text(TOKEN + "\n")
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text("['remote \"r\"']\nurl = s3://b\nsecret_access_key = dvc-secret-value\n")
    told = f"aws-secret-value {TOKEN} mlflow-password-value dvc-secret-value postgresql://me:hidden@host/db false"
    told += " https://justatoken@host/x?a=b&X-Amz-Signature=f00&c=d"
    check = Check("tells", lambda _: [Finding("tells", "bad", told, told)])
    found = only(doctor.examine(params(tracking={"uri": "postgresql://me:hidden@host/db"}), [check]))
    assert (
        found.found
        == found.mend
        == ("*** *** *** *** postgresql://***@host/db false https://***@host/x?a=b&X-Amz-Signature=***&c=d")
    )


# ---------------------------------------------------------------- this machine


def test_versions_are_held_against_the_lock_or_else_the_ranges(project: Path) -> None:
    from importlib import metadata

    assert only(machine.versions(params())).state == "unknown"
    (project / "pyproject.toml").write_text('[project]\nrequires-python = ">=3.11"\ndependencies = ["ray[tune]<2"]\n')
    found = only(machine.versions(params()))
    assert found.state == "bad" and f"ray {metadata.version('ray')} is not <2" in found.found
    lock = project / "requirements.lock"
    lock.write_text(f"# pinned\nray=={metadata.version('ray')}\ntorch=={metadata.version('torch').split('+')[0]}\n")
    assert only(machine.versions(params())).state == "ok"
    lock.write_text("pyarrow==1.0\n")
    found = only(machine.versions(params()))
    assert found.state == "bad" and "is not ==1.0" in found.found and "pip install" in found.mend


@pytest.mark.parametrize(("value", "state"), [(None, "warn"), ("1", "ok"), ("many", "bad"), ("0", "bad")])
def test_threads_are_pinned(value: str | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert only(machine.threads(params())).state == state


def test_a_loopback_hostname_matters_to_several_hosts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(nodes, "loopback", lambda: "127.0.1.1")
    several = on("http://head:8265", workers=2)
    found = only(machine.hostname(several))
    assert found.state == "warn" and "127.0.1.1" in found.found and "GLOO_SOCKET_IFNAME" in found.mend
    assert only(machine.hostname(params(cluster={"workers": 2}))).state == "ok"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert only(machine.hostname(several)).state == "ok"


def test_telemetry_that_the_environment_turns_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    assert only(machine.telemetry(params())).state == "ok"
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    found = only(machine.telemetry(params()))
    assert found.state == "warn" and "RAY_USAGE_STATS_ENABLED=1, MLFLOW_DISABLE_TELEMETRY=false" in found.found


def test_git_says_what_lineage_will_say(project: Path) -> None:
    def git(*words: str) -> None:
        identity = ("-c", "user.email=t@example.org", "-c", "user.name=t")
        subprocess.run(["git", *identity, *words], cwd=project, check=True, capture_output=True)

    assert "git_commit = null" in only(machine.git(params())).found
    git("init")
    assert only(machine.git(params())).state == "warn"  # no commit yet
    (project / "params.yaml").write_text("runs: {}\n")
    (project / "dvc.lock").write_text("")
    git("add", "-A")
    git("commit", "-m", "start")
    (project / "notes").write_text("untracked")
    (project / "dvc.lock").write_text("written by repro")
    assert only(machine.git(params())).state == "ok"
    (project / "params.yaml").write_text("runs: {a: b}\n")
    found = only(machine.git(params()))
    assert found.state == "warn" and "1 tracked files" in found.found and "git_dirty = true" in found.found


def test_dvc_tells_analytics_and_a_missing_remote(project: Path) -> None:
    assert only(machine.dvc(params())).state == "warn"
    (project / ".dvc").mkdir()
    analytics, remote = machine.dvc(params())
    assert (analytics.state, remote.state) == ("warn", "warn")
    assert analytics.mend == "dvc config core.analytics false"
    text = "[core]\nanalytics = false\nremote = r\n['remote \"r\"']\nurl = s3://bucket/dvc\n"
    (project / ".dvc" / "config").write_text(text)
    analytics, remote = machine.dvc(params())
    assert (analytics.state, remote.state, remote.found) == ("ok", "ok", "r: s3://bucket/dvc")


def test_disk_must_hold_the_largest_dataset_and_five_checkpoints(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.needed()[0] == GIB
    for name, size in (("data/small/part", 1 << 20), ("data/large/train/part", GIB)):
        (project / name).parent.mkdir(parents=True)
        with (project / name).open("wb") as file:
            file.truncate(size)  # holes: no byte of them is written
    (project / "artifacts" / "vae").mkdir(parents=True)
    (project / "artifacts" / "vae" / "weights.safetensors").write_bytes(bytes(1000))
    need = GIB + 5 * 4 * 1000
    assert machine.needed()[0] == need
    free = {"bytes": need}
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free["bytes"]}))
    found = only(machine.disk(params()))
    assert found.state == "ok" and found.check == "disk (project, cache, store)"
    free["bytes"] -= 1
    assert only(machine.disk(params())).state == "bad"


def test_memory_must_hold_the_workers_that_start_here(monkeypatch: pytest.MonkeyPatch) -> None:
    four = params(cluster={"workers": 4})
    need = 4 * machine.WORKER_BYTES + machine.DRIVER_BYTES
    monkeypatch.setattr(nodes, "free_memory", lambda: need)
    assert only(machine.memory(four)).state == "ok"
    monkeypatch.setattr(nodes, "free_memory", lambda: need - 1)
    assert only(machine.memory(four)).state == "bad"
    assert only(machine.memory(on("http://head:8265", workers=4))).state == "ok"


# ---------------------------------------------------------------- the cluster's door


@pytest.mark.parametrize(
    ("without", "wrong", "state"),
    [(401, 403, "ok"), (200, 200, "bad"), (401, 200, "bad"), (200, 403, "bad"), (302, 302, "warn"), (404, 404, "warn")],
)
def test_a_job_server_must_ask_for_the_token(without: int, wrong: int, state: str, serve: Callable[..., str]) -> None:
    url = serve(lambda path, given: (200 if path == "/elsewhere" else wrong if given else without, ""))
    found = only(door.token_asked(on(url)))
    assert found.state == state and f"{without} without a token, {wrong} with a wrong one" in found.found


def test_a_token_that_the_cluster_refuses_is_bad_and_none_is_shown_to_an_open_door(
    serve: Callable[..., str], tmp_path: Path
) -> None:
    seen: list[str | None] = []

    def answers(right: str | None) -> Answers:
        def answer(_: str, given: str | None) -> tuple[int, str]:
            seen.append(given)
            return (200 if right is None or given == f"Bearer {right}" else 403 if given else 401), ""

        return answer

    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert "200 with this machine's" in only(door.token_asked(on(serve(answers(TOKEN))))).found
    found = only(door.token_asked(on(serve(answers("another")))))
    assert found.state == "bad" and "403 with this machine's" in found.found
    seen.clear()
    assert only(door.token_asked(on(serve(answers(None))))).state == "bad"
    assert len(seen) == 2 and f"Bearer {TOKEN}" not in seen


def test_a_job_server_that_is_down_is_bad() -> None:
    found = only(door.token_asked(on(closed_port())))
    assert found.state == "bad" and "does not answer" in found.found


@pytest.mark.parametrize(("mode", "state"), [(0o600, "ok"), (0o400, "ok"), (0o644, "bad"), (0o660, "bad")])
def test_the_token_file_is_the_owners_alone(mode: int, state: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(mode)
    found = only(door.token_file(on("http://head:8265")))
    assert found.state == state and f"{mode:04o}" in found.found
    assert state == "ok" or found.mend == f"chmod 600 {tmp_path / 'token'}"


def test_a_missing_token_is_bad_where_a_cluster_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(door.token_file(on("http://head:8265"))).state == "bad"
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert only(door.token_file(on("http://head:8265"))).state == "ok"


@pytest.mark.parametrize(("mode", "state"), [("token", "ok"), ("", "warn"), ("disabled", "bad")])
def test_the_token_mode_is_explicit(mode: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert only(door.token_mode(params())).state == state


@pytest.mark.parametrize(
    ("address", "state", "mend"),
    [
        ("http://127.0.0.1:8265", "ok", ""),
        ("http://[::1]:8265", "ok", ""),
        ("auto", "ok", ""),
        ("http://10.1.2.3:8265", "ok", "ssh -N -L"),
        ("10.1.2.3:6379", "ok", "ssh -N -L"),
        ("https://10.1.2.3", "ok", ""),
        ("http://8.8.8.8:8265", "warn", "ssh -N -L"),
        ("https://8.8.8.8", "warn", "close the port"),
        ("http://no-such-host.invalid:8265", "bad", "cluster.address"),
    ],
)
def test_a_dashboard_address_is_private(address: str, state: str, mend: str) -> None:
    found = only(door.dashboard(on(address)))
    assert found.state == state and mend in found.mend and bool(mend) == bool(found.mend)


# ---------------------------------------------------------------- clocks


@pytest.mark.parametrize(("skew", "state"), [(0, "ok"), (-60, "warn"), (60, "warn"), (600, "bad"), (-600, "bad")])
def test_a_clock_that_is_off_is_seen_at_every_server(
    skew: int, state: str, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(lambda *_: (403, ""), skew)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    assert only(storage.s3_clock(params(cluster={"storage": "s3://bucket/store"}))).state == state
    assert only(door.cluster_clock(on(url))).state == state
    clock, _ = tracker.tracking_server(params(tracking={"uri": url}))
    assert (clock.check, clock.state) == ("clock (tracking)", state)


def test_an_s3_endpoint_that_is_down_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", closed_port())
    found = only(storage.s3_clock(params(cluster={"storage": "s3://bucket/store"})))
    assert found.state == "bad" and "AWS_ENDPOINT_URL" in found.mend


# ---------------------------------------------------------------- storage


def keys(s3: Any) -> list[str]:
    return [each["Key"] for each in s3.list_objects_v2(Bucket="bucket").get("Contents", ())]


def test_storage_rights_are_proved_by_doing_and_nothing_stays(s3: Any) -> None:
    found = only(storage.storage_rights(params(cluster={"storage": "s3://bucket/store"})))
    assert (found.state, keys(s3)) == ("ok", [])
    assert found.found == "s3://bucket/store: put, get, conditional put, list, delete"


def test_storage_rights_name_a_missing_bucket(s3: Any) -> None:
    found = only(storage.storage_rights(params(cluster={"storage": "s3://nowhere/store"})))
    assert found.state == "bad" and "NoSuchBucket" in found.found and "put needs s3:PutObject" in found.mend


@pytest.mark.parametrize(
    ("operation", "act", "right"),
    [("get_object", "get", "s3:GetObject"), ("list_objects_v2", "list", "s3:ListBucket"),
     ("delete_objects", "delete", "s3:DeleteObject")],
)  # fmt: skip
def test_storage_rights_name_the_right_that_is_missing(
    operation: str, act: str, right: str, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.client import BaseClient
    from botocore.exceptions import ClientError

    call = BaseClient._make_api_call
    name = "".join(part.title() for part in operation.split("_"))

    def refuse(client: Any, asked: str, arguments: Any) -> Any:
        if asked == name:
            error = {"Error": {"Code": "AccessDenied", "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
            raise ClientError(error, asked)
        return call(client, asked, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    found = only(storage.storage_rights(params(cluster={"storage": "s3://bucket/store"})))
    monkeypatch.undo()
    assert found.state == "bad" and f"{act} failed" in found.found and "AccessDenied" in found.found
    assert found.mend.startswith(f"{act} needs {right} on s3://bucket/store")
    left = keys(s3)
    assert len(left) == (0 if act == "get" else 1)  # Place.delete lists, too: without either right the probe stays
    for key in left:
        s3.delete_object(Bucket="bucket", Key=key)


def test_storage_that_ignores_conditions_is_bad(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = type(place("s3://bucket"))
    monkeypatch.setattr(bucket, "write_new", lambda self, name, content: self.write(name, content))
    found = only(storage.storage_rights(params(cluster={"storage": "s3://bucket/store"})))
    assert found.state == "bad" and "If-None-Match replaced" in found.found and keys(s3) == []


def test_storage_in_a_folder_that_cannot_be_written_is_bad(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert only(storage.storage_rights(params(cluster={"storage": str(tmp_path / "new")}))).state == "ok"
    assert not (tmp_path / "new").exists()
    found = only(storage.storage_rights(params(cluster={"storage": str(tmp_path / "file")})))
    assert found.state == "bad" and "cluster.storage" in found.mend


def test_dvc_rights_go_through_the_remotes_own_settings(s3: Any, moto: str, project: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")  # the remote's endpointurl alone says where it is
    (project / ".dvc").mkdir()
    text = "[core]\nremote = r\n['remote \"r\"']\nurl = s3://{}/dvc\nendpointurl = {}\n"
    (project / ".dvc" / "config").write_text(text.format("bucket", moto))
    found = only(storage.dvc_rights(params()))
    assert (found.state, found.found) == ("ok", "s3://bucket/dvc: put, get, list, delete")
    assert keys(s3) == []
    (project / ".dvc" / "config").write_text(text.format("nowhere", moto))
    found = only(storage.dvc_rights(params()))
    assert found.state == "bad" and "put needs s3:PutObject on s3://nowhere/dvc" in found.mend


# ---------------------------------------------------------------- MLflow


def test_a_tracking_server_that_is_down_is_bad_by_its_first_answer() -> None:
    at = params(tracking={"uri": closed_port()})
    assert only(tracker.tracking_server(at)).state == "bad"
    assert only(tracker.artifact_rights(at)).state == "unknown"


@pytest.mark.parametrize(("version", "state"), [("same", "ok"), ("2.1.0", "warn")])
def test_a_tracking_server_of_another_version_is_told(version: str, state: str, serve: Callable[..., str]) -> None:
    from importlib import metadata

    said = metadata.version("mlflow") if version == "same" else version
    url = serve(lambda path, _: (200, said if path == "/version" else "{}"))
    clock, found = tracker.tracking_server(params(tracking={"uri": url}))
    assert (clock.state, found.state) == ("ok", state) and f"server {said}" in found.found


def test_a_database_is_not_made_by_looking(project: Path) -> None:
    assert only(tracker.tracking_server(params())).state == "ok"
    assert not any(project.iterdir())


def test_mlflow_artifact_rights_go_through_mlflows_own_client(s3: Any, moto: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", moto)
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", "s3://bucket/artifacts")
    found = only(tracker.artifact_rights(params()))
    assert (found.state, found.found) == ("ok", "s3://bucket/artifacts: put, get, list, delete")
    assert keys(s3) == []
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", "s3://nowhere/artifacts")
    assert only(tracker.artifact_rights(params())).state == "bad"


# ---------------------------------------------------------------- nodes


def row(**changes: Any) -> dict[str, Any]:
    """What the survey says of a node that is like this machine."""
    facts = {**nodes.facts(False), "loopback": None, "interface": None, "gpus": 0, **changes.pop("facts", {})}
    plain = {"host": "10.0.0.2", "alive": True, "cpus": 2.0, "gpus": 0.0, "error": "", "clock": 0.0, "trip": 0.001}
    return {**plain, "facts": facts, **changes}


def test_node_facts_are_plain_and_true(tmp_path: Path) -> None:
    import platform

    import torch

    (tmp_path / "marker").write_text("")
    found = nodes.facts(True, str(tmp_path / "marker"))
    assert json.loads(json.dumps(found)) == found
    assert found["python"] == platform.python_version() and found["versions"]["torch"] == torch.__version__
    assert found["gpus"] == torch.cuda.device_count() and found["sees"] is True
    assert found["disk"] > 0 and found["memory"] > 0 and found["store"] is None
    assert nodes.facts(False, str(tmp_path / "absent"))["sees"] is False


def test_node_facts_put_and_delete_with_the_nodes_own_keys(s3: Any) -> None:
    assert nodes.facts(False, None, "s3://bucket/store/probe")["store"] == ""
    assert keys(s3) == []
    assert "NoSuchBucket" in nodes.facts(False, None, "s3://nowhere/probe")["store"]


def test_the_node_script_needs_the_standard_library_alone() -> None:
    code = f"import runpy; print(runpy.run_path({nodes.__file__!r})['facts'](False)['versions'])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "{'torch': None, 'ray': None}", done.stderr


def test_a_node_like_this_machine_is_ok() -> None:
    room, node = survey.judge([row()], on("http://head:8265", workers=2))
    assert (room.state, node.state, node.check) == ("ok", "ok", "node 10.0.0.2")


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        ({"facts": {"python": "3.9.1"}}, "bad", "python is"),
        ({"facts": {"versions": {"torch": "1.0", "ray": None}}}, "bad", "torch is 1.0"),
        ({"facts": {"disk": 1}}, "bad", "needed on disk"),
        ({"facts": {"memory": 1}}, "bad", "idle workers take"),
        ({"facts": {"loopback": "127.0.1.1"}}, "bad", "127.0.1.1 and GLOO_SOCKET_IFNAME"),
        ({"facts": {"loopback": "127.0.1.1", "interface": "eth0"}}, "ok", ""),
        ({"facts": {"sees": False}}, "bad", "does not see"),
        ({"facts": {"store": "NoCredentialsError: none"}}, "bad", "NoCredentialsError"),
        ({"clock": 20.0}, "warn", "clock is off"),
        ({"clock": -400.0}, "bad", "clock is off"),
        ({"host": "8.8.8.8"}, "warn", "public address"),
        ({"facts": None, "error": "no answer within 30 s"}, "bad", "no answer"),
    ],
)
def test_a_node_that_differs_is_told_with_its_mend(changes: dict[str, Any], state: str, words: str) -> None:
    bare = changes.get("facts", {}) is None
    odd = row(**{**changes, "facts": {}}) | ({"facts": None} if bare else {}) if bare else row(**changes)
    _, first, second = survey.judge([row(), odd], on("http://head:8265", workers=2))
    assert first.state == "ok"
    assert second.state == state and words in second.found and bool(second.mend) == (state != "ok")


def test_the_local_part_of_torchs_version_is_no_difference() -> None:
    from importlib import metadata

    torch = metadata.version("torch").split("+")[0] + "+cu126"
    facts = {"versions": {"torch": torch, "ray": metadata.version("ray")}}
    assert [each.state for each in survey.judge([row(facts=facts)], on("http://head:8265"))] == ["ok", "ok"]


def test_gpus_that_torch_does_not_see_are_bad() -> None:
    wanted = on("http://head:8265", workers=2, gpu=True)
    room, node = survey.judge([row(gpus=2.0, facts={"gpus": 2})], wanted)
    assert (room.state, node.state) == ("ok", "ok")
    room, node = survey.judge([row(gpus=2.0)], wanted)
    assert node.state == "bad" and "0 of 2 GPUs" in node.found
    room, _ = survey.judge([row(gpus=1.0, facts={"gpus": 1})], wanted)
    assert room.state == "bad" and "room for 1 workers" in room.found


def test_room_counts_whole_workers_on_living_nodes() -> None:
    def state(workers: Any, cpus: float, rows: list[dict[str, Any]]) -> str:
        return next(survey.judge(rows, on("http://head:8265", workers=workers, cpus=cpus))).state

    assert state(2, 2.0, [row(), row()]) == "ok"
    assert state(1, 4.0, [row(), row()]) == "bad"  # four CPUs in all, but on no single node
    assert state([1, 3], 2.0, [row(), row()]) == "warn"
    assert state(2, 2.0, [row(), row(alive=False)]) == "bad"


def test_a_survey_is_found_among_rays_own_words() -> None:
    rows = [row()]
    assert survey._rows(f"(raylet) hello\n{nodes.MARK}{json.dumps(rows)}\nbye") == rows
    with pytest.raises(RuntimeError, match="Version mismatch"):
        survey._rows("Traceback\nRuntimeError: Version mismatch\n")


def test_a_job_whose_record_comes_back_is_deleted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    class Client:
        records, deletes, stopped = 1, 0, False

        def get_job_status(self, job: str) -> Any:
            return SimpleNamespace(is_terminal=lambda: self.stopped)

        def stop_job(self, job: str) -> None:
            self.stopped = True

        def list_jobs(self) -> list[Any]:
            status = self.get_job_status("mine")
            return [SimpleNamespace(submission_id=job, status=status) for job in ["other"] + ["mine"] * self.records]

        def delete_job(self, job: str) -> None:
            assert job == "mine"
            self.deletes += 1
            self.records = 2 - self.deletes  # the monitor writes it once more

    monkeypatch.setattr(survey.time, "sleep", lambda _: None)
    client = Client()
    survey._delete_job(client, "mine")
    assert (client.stopped, client.deletes, client.records) == (True, 2, 0)


def test_a_cluster_that_cannot_be_asked_is_unknown_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str, arguments: Any) -> Any:
        raise ConnectionError(f"{address} refused")

    monkeypatch.setattr(survey, "_survey_by_job", refuse)
    found = only(survey.cluster_nodes(on("http://head:8265")))
    assert found.state == "unknown" and "http://head:8265 refused" in found.found
