"""The nodes of the cluster: each one asked, and judged against this machine and the project."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.cluster import nodes
from pipelines.doctor.common import (
    NOT_CONFIGURED,
    Finding,
    State,
    bounds,
    clock_finding,
    existing,
    probe_name,
    said,
    size,
)
from pipelines.doctor.machine import GLOO, WORKER_BYTES, installed, needed
from pipelines.params import Params

NODES_S = 60.0  # for all nodes of the cluster
ORDER: tuple[State, ...] = ("ok", "unknown", "warn", "bad")


def cluster_nodes(params: Params) -> Iterator[Finding]:
    """Every node: versions, GPUs, disk, memory, clock; and whether all of them have room for the workers."""
    cluster, address = params.cluster, params.cluster.where
    if address is None:
        yield Finding("cluster", "ok", NOT_CONFIGURED)
        here = nodes.facts(cluster.gpu)
        count = here.get("gpus", 0)
        yield _room([{"alive": True, "cpus": float(os.cpu_count() or 1), "gpus": float(count)}], params, "this machine")
        return
    with _marker(params) as marker:
        store = f"{params.cluster.store}/{probe_name()}" if marker is None else None
        arguments = {"gpu": cluster.gpu, "marker": marker, "store": store, "seconds": NODES_S / 2}
        survey = _survey_by_job if address.startswith(("http://", "https://")) else _survey_here
        try:
            rows = survey(address, arguments)
        except Exception as error:  # Ray has many words for "cannot connect"
            mend = "the lines `token` and `dashboard` say whether the door is open; `ray status` on the head"
            yield Finding("cluster", "unknown", f"its nodes cannot be asked: {said(error)}", mend)
            return
    yield from judge(rows, params)


@contextmanager
def _marker(params: Params) -> Iterator[str | None]:
    """A file in a run store that is a folder: nodes that do not see it would keep checkpoints to themselves."""
    if "://" in params.cluster.storage:
        yield None
        return
    with tempfile.NamedTemporaryFile(prefix="dgm-doctor-", dir=existing(Path(params.cluster.store))) as file:
        yield file.name


def _rows(output: str) -> list[dict[str, Any]]:
    lines = [text for text in output.splitlines() if text.startswith(nodes.MARK)]
    if not lines:
        words = [text for text in output.splitlines() if text.strip()]
        raise RuntimeError(words[-1] if words else "the survey said nothing")
    found: list[dict[str, Any]] = json.loads(lines[-1].removeprefix(nodes.MARK))
    return found


def _survey_here(address: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Asks from a process of its own, which can be ended, and leaves this one without a Ray session."""
    environment = {"RAY_USAGE_STATS_ENABLED": "0", **os.environ, "RAY_ADDRESS": address}
    command = [sys.executable, nodes.__file__, json.dumps(arguments)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=NODES_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise TimeoutError(f"no answer from {address} within {NODES_S:g} s") from None
    return _rows(output)


def _survey_by_job(address: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Asks by a Ray job that carries one file; the job is deleted afterwards."""
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every upload
    client, until = JobSubmissionClient(address), time.monotonic() + NODES_S
    with tempfile.TemporaryDirectory(prefix="dgm-doctor-") as folder:
        shutil.copy(nodes.__file__, folder)
        job = client.submit_job(
            entrypoint=f"python {Path(nodes.__file__).name} {shlex.quote(json.dumps(arguments))}",
            submission_id=probe_name(),
            runtime_env={"working_dir": folder},
        )
    try:
        while not client.get_job_status(job).is_terminal():
            if time.monotonic() > until:
                raise TimeoutError(f"the job {job} did not end within {NODES_S:g} s")
            time.sleep(0.5)
        return _rows(client.get_job_logs(job))
    finally:
        _delete_job(client, job)


def _delete_job(client: Any, job: str) -> None:
    """Ends and deletes a job. Ray's monitor looks once a second; a record that it misses it writes again."""
    if not client.get_job_status(job).is_terminal():
        client.stop_job(job)
    for _ in range(4):
        time.sleep(2.0)
        left = [each for each in client.list_jobs() if each.submission_id == job]
        if not left:
            return
        if left[0].status.is_terminal():  # no other can be deleted
            client.delete_job(job)


def judge(rows: Iterable[Mapping[str, Any]], params: Params) -> Iterator[Finding]:
    """What a survey's rows mean for this project: one finding for the whole, one for every node."""
    rows = list(rows)
    alive = sum(row["alive"] for row in rows)
    yield _room(rows, params, f"{alive} node{'s' if alive != 1 else ''}")
    need, _ = needed()
    for row in rows:
        if row["alive"]:
            yield _node(row, params, need, alive)


def _places(row: Mapping[str, Any], params: Params) -> int:
    """How many workers a node can hold."""
    places = int(row["cpus"] / params.cluster.cpus)
    return min(places, int(row["gpus"])) if params.cluster.gpu else places


def _room(rows: list[Any], params: Params, what: str) -> Finding:
    alive = [row for row in rows if row["alive"]]
    cluster, places = params.cluster, sum(_places(row, params) for row in alive)
    least, most = bounds(cluster.workers)
    each = f"{cluster.cpus:g} CPU{' and a GPU' if cluster.gpu else ''}"
    found = f"{what} with {sum(row['cpus'] for row in alive):g} CPUs and {sum(row['gpus'] for row in alive):g} GPUs"
    found += (
        f": room for {places} workers of {each}; cluster.workers = {least if least == most else f'{least}..{most}'}"
    )
    dead = len(rows) - len(alive)
    found += f"; {dead} nodes of the past are dead" if dead else ""
    mend = "start more nodes, or lower cluster.workers or cluster.cpus"
    if places < least:
        return Finding("workers", "bad", found, f"a training would wait for ever: {mend}")
    return Finding("workers", "warn", found, mend) if places < most else Finding("workers", "ok", found)


def _node(row: Mapping[str, Any], params: Params, need: int, count: int) -> Finding:
    check, has = f"node {row['host']}", row["facts"]
    if has is None:
        return Finding(check, "bad", row["error"], "look at its raylet's log; `ray stop` and start it again")
    here, there = installed(), has["versions"]
    most = bounds(params.cluster.workers)[1]
    problems: list[tuple[State, str, str]] = []

    def say(state: State, words: str, mend: str) -> None:
        problems.append((state, words, mend))

    minor = (here["python"] or "").rpartition(".")[0]
    if has["python"].rpartition(".")[0] != minor:
        say("bad", f"python is {here['python']} here", "one image or lock for all machines")
    for name, version in there.items():
        if (version or "").split("+")[0] != (here[name] or "").split("+")[0]:  # +cpu and +cu126 are one release
            words = f"{name} is {'missing' if version is None else version}, {here[name]} here"
            say("bad", words, "pip install -c requirements.lock there")
    if params.cluster.gpu and has["gpus"] < row["gpus"]:
        words = f"torch sees {has['gpus']} of {row['gpus']:g} GPUs"
        say("bad", words, "install the driver (`nvidia-smi` there) and a CUDA build of torch")
    if has["disk"] < need:
        say("bad", f"{size(need)} needed on disk", "make room in its temporary folder")
    held = min(_places(row, params), most)
    if has["memory"] < held * WORKER_BYTES:
        say("bad", f"{held} idle workers take {size(held * WORKER_BYTES)}", "a larger node, or more cpus a worker")
    if has["loopback"] and not has["interface"] and count > 1 and most > 1:
        say("bad", f"its hostname resolves to {has['loopback']} and GLOO_SOCKET_IFNAME is not set", GLOO)
    if has["sees"] is False:
        words = f"it does not see this machine's cluster.storage = {params.cluster.storage}"
        say("bad", words, "cluster.storage: s3://bucket/prefix, or a folder that all machines share")
    if has["store"]:
        words = f"it cannot write to {params.cluster.storage}: {said(has['store'])}"
        say("bad", words, "export AWS_* (keys, AWS_ENDPOINT_URL) where `ray start` runs, or give the node a role")
    clock = clock_finding(check, row["clock"], row["trip"], grain=0.0)
    if clock.state != "ok":
        say(clock.state, "its clock is off", clock.mend)
    if ipaddress.ip_address(row["host"]).is_global:
        say("warn", "it has a public address", "let no port of Ray's in from outside (security group, firewall)")
    what = [f"python {has['python']}", *(f"{name} {version}" for name, version in there.items() if version)]
    asker = "the head's" if (params.cluster.where or "").startswith("http") else "this one's"
    what += [
        f"{size(has['disk'])} disk",
        f"{size(has['memory'])} memory",
        f"clock {row['clock']:+.3f} s from {asker}",
    ]
    what += [f"{has['gpus']} GPUs"] if params.cluster.gpu else []
    states: list[State] = ["ok", *(state for state, _, _ in problems)]
    found = ", ".join(what) + "".join(f"; {words}" for _, words, _ in problems)
    return Finding(
        check, max(states, key=ORDER.index), found, "; ".join(dict.fromkeys(mend for _, _, mend in problems))
    )
