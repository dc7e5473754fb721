"""This machine: packages, threads, hostname, telemetry, git, DVC, disk, memory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pipelines import paths
from pipelines.cluster import nodes
from pipelines.doctor.common import (
    GIB,
    Finding,
    bounds,
    default_remote,
    dvc_config,
    existing,
    size,
)
from pipelines.params import Params

WORKER_BYTES, DRIVER_BYTES = 300 << 20, 700 << 20  # idle: a worker; the controller, Ray's processes, its object store
MOMENTS = 4  # a checkpoint holds the weights, their average and Adam's two moments
CHECKPOINTS = 5
GLOO = (
    "where this machine is a node: export GLOO_SOCKET_IFNAME=<interface that the others reach> before `ray start`, "
    "or give the hostname its address in /etc/hosts"
)
PINNED = ("torch", "ray", "mlflow", "dvc", "boto3", "botocore", "pyarrow")


def versions(params: Params) -> Iterator[Finding]:
    """The installed packages against requirements.lock, or against pyproject.toml's ranges when there is no lock."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    lock, project = paths.root() / "requirements.lock", paths.root() / "pyproject.toml"
    wanted: dict[str, SpecifierSet] = {}
    if project.is_file():
        import tomllib

        table = tomllib.loads(project.read_text())["project"]
        wanted["python"] = SpecifierSet(table.get("requires-python", ""))
        if not lock.is_file():
            wanted |= {each.name: each.specifier for each in map(Requirement, table.get("dependencies", ()))}
    if lock.is_file():
        pins = [text.split("#")[0].strip() for text in lock.read_text().splitlines()]
        wanted |= {each.name: each.specifier for each in map(Requirement, filter(None, pins))}
    if not wanted:
        mend = f"put requirements.lock or pyproject.toml into {paths.root()}"
        yield Finding("versions", "unknown", "nothing to compare with", mend)
        return
    source = lock.name if lock.is_file() else project.name
    have, wrong = installed(), []
    for name in ("python", *PINNED):
        allowed = wanted.get(name, SpecifierSet())
        if have[name] is None:
            wrong.append(f"{name} is missing")
        elif not allowed.contains(Version(have[name] or "").public, prereleases=True):
            wrong.append(f"{name} {have[name]} is not {allowed}")
    found = ", ".join(f"{name} {version}" for name, version in have.items() if version)
    if wrong:
        mend = "`make env` (pip install -c requirements.lock -e .)"
        yield Finding("versions", "bad", f"{'; '.join(wrong)} ({source})", mend)
    else:
        yield Finding("versions", "ok", f"{found} (as in {source})")


def installed() -> dict[str, str | None]:
    """The versions of Python and of the packages that decide results or speak over the network; None: missing."""
    import platform
    from importlib import metadata

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PINNED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def threads(params: Params) -> Iterator[Finding]:
    """OMP_NUM_THREADS: the number of threads changes the last bits of sums, and two workers on one core fight."""
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None:
        mend = "export OMP_NUM_THREADS=1 (workers get it anyway; what runs outside of Ray does not)"
        yield Finding("threads", "warn", "OMP_NUM_THREADS is not set", mend)
    elif not given.isdigit() or int(given) < 1:
        yield Finding("threads", "bad", f"OMP_NUM_THREADS={given} is no number of threads", "export OMP_NUM_THREADS=1")
    else:
        yield Finding("threads", "ok", f"OMP_NUM_THREADS={given}")


def hostname(params: Params) -> Iterator[Finding]:
    """A hostname that resolves to loopback makes gloo listen where no other host can reach it."""
    address, interface = nodes.loopback(), os.environ.get("GLOO_SOCKET_IFNAME")
    if address is None or interface or bounds(params.cluster.workers)[1] == 1 or params.cluster.where is None:
        why = f"resolves to {address}" if address else "resolves to no loopback address"
        why += f"; GLOO_SOCKET_IFNAME={interface}" if interface else ""
        why += "; workers meet on this machine alone" if address and not interface else ""
        yield Finding("hostname", "ok", f"{socket.gethostname()} {why}")
        return
    found = f"{socket.gethostname()} resolves to {address}, and workers may meet on several hosts"
    yield Finding("hostname", "warn", found, GLOO)


def telemetry(params: Params) -> Iterator[Finding]:
    """Ray and MLflow phone home unless told otherwise; this project tells them, the environment can say otherwise."""
    loud = [f"RAY_USAGE_STATS_ENABLED={value}" for value in [os.environ.get("RAY_USAGE_STATS_ENABLED")] if value == "1"]
    value = os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true")
    loud += [f"MLFLOW_DISABLE_TELEMETRY={value}"] if value.lower() not in ("true", "1") else []
    if loud:
        mend = "export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true"
        yield Finding("telemetry", "warn", ", ".join(loud), mend)
    else:
        yield Finding("telemetry", "ok", "off for the Ray and MLflow that this project starts")


def git(params: Params) -> Iterator[Finding]:
    """What the lineage of a run started now would say."""

    def ask(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=paths.root(), capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "--short", "HEAD")
    changes = ask("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")  # `dvc repro` writes it
    if commit is None or changes is None:
        found = "no git repository with a commit: lineage will say git_commit = null"
        yield Finding("git", "warn", found, "git init; git add -A; git commit")
    elif changes:
        found = f"{len(changes.splitlines())} tracked files differ from {commit}: lineage will say git_dirty = true"
        yield Finding("git", "warn", found, "git commit (or git stash) before a run that should be reproducible")
    else:
        yield Finding("git", "ok", f"clean at {commit}")


def dvc(params: Params) -> Iterator[Finding]:
    """DVC: a repository, no analytics, somewhere to push to."""
    if not (paths.root() / ".dvc").is_dir():
        found = f"no DVC repository in {paths.root()}: outputs have no versions"
        yield Finding("dvc", "warn", found, "dvc init (dvc init --no-scm without git)")
        return
    config = dvc_config()
    if config["core"].get("analytics", True) and not os.environ.get("DVC_NO_ANALYTICS"):
        yield Finding("dvc analytics", "warn", "on: DVC phones home", "dvc config core.analytics false")
    else:
        yield Finding("dvc analytics", "ok", "off")
    default, remotes = default_remote(), config["remote"]
    if default:
        yield Finding("dvc remote", "ok", f"{default[0]}: {default[1]['url']}")
    elif remotes:
        found = f"{', '.join(remotes)}, none of them the default: `dvc push` does not know where to"
        yield Finding("dvc remote", "warn", found, f"dvc remote default {next(iter(remotes))}")
    else:
        found = "none: the cache on this machine is the only copy of data and artifacts"
        yield Finding("dvc remote", "warn", found, "dvc remote add -d <name> s3://bucket/prefix")


def disk(params: Params) -> Iterator[Finding]:
    """Free space where the project, DVC's cache and a local run store lie; one line a file system."""
    need, why = needed()
    cache = Path(dvc_config()["cache"].get("dir") or paths.root() / ".dvc" / "cache")
    places = {"project": paths.root(), "cache": cache}
    if "://" not in params.cluster.storage:
        places["store"] = Path(params.cluster.store)
    together: dict[int, list[tuple[str, Path]]] = {}
    for name, folder in places.items():
        there = existing(folder)
        together.setdefault(there.stat().st_dev, []).append((name, there))
    for group in together.values():
        free = shutil.disk_usage(group[0][1]).free
        check = f"disk ({', '.join(name for name, _ in group)})"
        found = f"{size(free)} free, {size(need)} needed: {why}"
        mend = "make room (`dvc gc -w`, old runs in cluster.storage), or move it: dvc cache dir, cluster.storage"
        yield Finding(check, "ok", found) if free >= need else Finding(check, "bad", found, mend)


def needed() -> tuple[int, str]:
    """Bytes that a next training may write, and how they were computed from what is there: never below 1 GiB."""

    def bytes_of(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    root = paths.root()
    data = [(bytes_of(folder), folder.name) for folder in (root / "data").glob("*") if folder.is_dir()]
    weights = [(file.stat().st_size, file.parent.name) for file in (root / "artifacts").glob("*/*.safetensors")]
    largest, dataset = max(data, default=(0, "none"))
    checkpoint, run = max(weights, default=(0, "none"))
    checkpoint *= MOMENTS
    total = max(GIB, largest + CHECKPOINTS * checkpoint)
    why = (
        f"the largest of 1 GiB and dataset {dataset} ({size(largest)}) + {CHECKPOINTS} checkpoints "
        f"of {size(checkpoint)} ({MOMENTS} times the weights of {run})"
    )
    return total, why


def memory(params: Params) -> Iterator[Finding]:
    """Free memory here against the workers that start here; the model and its data come on top."""
    here = params.cluster.where is None
    workers = bounds(params.cluster.workers)[1] if here else 0
    need, free = workers * WORKER_BYTES + DRIVER_BYTES, nodes.free_memory()
    found = f"{size(free)} free; {size(need)} for {f'Ray and {workers} idle workers' if here else 'the driver'}"
    mend = "end other programs, or lower cluster.workers"
    yield Finding("memory", "ok", found) if free >= need else Finding("memory", "bad", found, mend)
