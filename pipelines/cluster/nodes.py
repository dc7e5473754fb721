"""What the nodes of a Ray cluster are: versions, GPUs, disk, memory, clock. `dgm doctor` judges it.

This file is a script too, and imports the standard library alone: it is sent by itself as a Ray job, or run on this
machine against an address, and has to start with whatever Python and whatever version of this project a node has.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time

MARK = "dgm-nodes "  # the line of the output that is meant; everything else is Ray's
PACKAGES = ("torch", "ray")


def facts(gpu: bool, marker: str | None = None, store: str | None = None) -> dict:
    """What the machine that runs this has.

    Args:
        gpu: ask torch for GPUs, which imports it.
        marker: a file that the asking machine has made; whether it is seen tells a shared folder from a local one.
        store: s3://bucket/key of an object that is put and deleted with this machine's own credentials.

    Returns: versions, `disk` (bytes free where temporary files go), `memory` (bytes that can be had), `loopback` (the
        address of the hostname, when it is one that no other machine can reach), `interface` (GLOO_SOCKET_IFNAME),
        `sees` (the marker), `store` (what S3 said, "" when it took the object), `gpus` (that torch can use).
    """
    found: dict = {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "disk": shutil.disk_usage(tempfile.gettempdir()).free,
        "memory": free_memory(),
        "loopback": loopback(),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "sees": None if marker is None else os.path.exists(marker),
        "store": None if store is None else _put(store),
    }
    if gpu:
        found["gpus"] = _gpus()
    return found


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _put(uri: str) -> str:
    try:
        import boto3
        from botocore.config import Config

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        style = {"addressing_style": "path" if endpoint else "auto"}
        config = Config(connect_timeout=5, read_timeout=5, retries={"total_max_attempts": 2}, s3=style)
        client = boto3.session.Session().client("s3", config=config, endpoint_url=endpoint)
        bucket, _, key = uri[len("s3://") :].partition("/")
        client.put_object(Bucket=bucket, Key=key, Body=b"probe")
        client.delete_object(Bucket=bucket, Key=key)
    except Exception as error:  # boto3 may be missing, or say anything: the words are the fact
        return f"{type(error).__name__}: {error}"
    return ""


def _gpus() -> int:
    try:
        import torch
    except ImportError:  # the line of versions says that torch is missing
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_memory() -> int:
    """Bytes that a new process can have: the machine's, or what is left of the container's limit."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no limit: no such file, or the word "max"
        pass
    return free


def loopback() -> str | None:
    """The address of this machine's hostname, when it is a loopback address: gloo would bind to it."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
    return address if address.startswith("127.") else None


def survey(gpu: bool, marker: str | None, store: str | None, seconds: float) -> list:
    """Asks every node of the cluster at RAY_ADDRESS, with an actor of no CPU, so that a busy node answers too.

    Returns: for every node {host, alive, cpus, gpus, facts or None, error, clock, trip}; `clock` is the node's clock
        minus this one's, in seconds, and `trip` the round trip that it was measured over.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Node:
        def facts(self) -> dict:
            if not os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
                del os.environ["CUDA_VISIBLE_DEVICES"]  # Ray hides the GPUs from an actor that asked for none
            return facts(gpu, marker, store)

        def clock(self) -> float:
            return time.time()

    ray.init(log_to_driver=False, logging_level="ERROR")
    rows, asked = [], {}
    for node in ray.nodes():
        has = node.get("Resources", {})
        row = {"host": node["NodeManagerAddress"], "alive": node["Alive"], "cpus": has.get("CPU", 0.0)}
        row.update({"gpus": has.get("GPU", 0.0), "facts": None, "error": "", "clock": 0.0, "trip": 0.0})
        rows.append(row)
        if node["Alive"]:
            on_it = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            actor = ray.remote(num_cpus=0)(Node).options(scheduling_strategy=on_it).remote()
            asked[actor.facts.remote()] = (row, actor)
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=seconds) if asked else ([], [])
    for reference in silent:
        asked[reference][0]["error"] = f"no answer within {seconds:g} s"
    for reference in answered:
        row, actor = asked[reference]
        try:
            row["facts"] = ray.get(reference)
            trips = []
            for _ in range(5):
                before = time.time()
                there = ray.get(actor.clock.remote(), timeout=5)
                after = time.time()
                trips.append((after - before, there - (before + after) / 2))
            row["trip"], row["clock"] = min(trips)
        except Exception as error:  # a node that dies while it is asked is a finding, not the end of the survey
            row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    ray.shutdown()
    return rows


if __name__ == "__main__":
    print(MARK + json.dumps(survey(**json.loads(sys.argv[1]))), flush=True)
