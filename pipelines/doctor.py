"""`dgm doctor`: is everything that a run will need there? One finding a line, with the way to mend it.

Every check is a function of Params that yields findings. It runs in a thread with a time limit: one that raises or
hangs becomes a finding of its own ("unknown") and the next one runs. Probe objects carry a name that nobody else has
and are removed. What looks like a secret is masked in every finding, whoever wrote the words.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit

from pipelines import paths
from pipelines.cluster import nodes
from pipelines.params import Params

State = Literal["ok", "warn", "bad", "unknown"]
ORDER: tuple[State, ...] = ("ok", "unknown", "warn", "bad")

ANSWER_S = 5.0  # for one HTTP answer
NODES_S = 60.0  # for all nodes of the cluster
SKEW_WARN_S, SKEW_BAD_S = 5.0, 300.0  # S3 refuses signatures that are 15 minutes off, some stand-ins 5
WORKER_BYTES, DRIVER_BYTES = 300 << 20, 700 << 20  # idle: a worker; the controller, Ray's processes, its object store
MOMENTS = 4  # a checkpoint holds the weights, their average and Adam's two moments
CHECKPOINTS = 5
GIB = 1 << 30

NOT_CONFIGURED = "not configured (no cluster.address, no RAY_ADDRESS)"
ENCRYPT = (
    "a token does not encrypt: reach the cluster through `ssh -N -L 8265:127.0.0.1:8265 <head>` and the address "
    "http://127.0.0.1:8265, or put TLS in front"
)


@dataclass(frozen=True)
class Finding:
    """What one check saw.

    Attributes:
        check: what was looked at.
        state: ok; warn (works, with a risk); bad (will fail, or is open to others); unknown (could not be seen).
        found: what is there.
        mend: what to do about it; may be empty when the state is ok.
    """

    check: str
    state: State
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Check:
    """A name for what fails outside its findings, the function, and its time limit in seconds."""

    name: str
    look: Callable[[Params], Iterable[Finding]]
    seconds: float = 20.0


def examine(params: Params, checks: Iterable[Check] | None = None) -> list[Finding]:
    """Runs every check, one after the other.

    Args:
        params: params.yaml.
        checks: `CHECKS` by default.

    Returns: the findings in the order of the checks, with secrets masked.
    """
    found = [finding for check in (CHECKS if checks is None else checks) for finding in _limited(check, params)]
    mask = _mask(params)
    return [replace(each, found=mask(each.found), mend=mask(each.mend)) for each in found]


def line(finding: Finding) -> str:
    """The finding as one line of text."""
    mend = f" -> {finding.mend}" if finding.mend else ""
    return f"{finding.state:<8}{finding.check:<24} {finding.found}{mend}"


def _limited(check: Check, params: Params) -> list[Finding]:
    found: list[Finding] = []

    def look() -> None:
        try:
            for finding in check.look(params):
                found.append(finding)
        except Exception as error:  # whatever it is, the next check runs
            words = f"the check failed: {type(error).__name__}: {_words(error)}"
            found.append(Finding(check.name, "unknown", words, "the words say what is missing, or it is a defect here"))

    thread = threading.Thread(target=look, name=f"dgm-doctor-{check.name}", daemon=True)
    thread.start()
    thread.join(check.seconds)
    if thread.is_alive():
        mend = "see whether what it asks is up; an object named dgm-doctor-* may have stayed behind"
        return [*found, Finding(check.name, "unknown", f"no answer within {check.seconds:g} s", mend)]
    return found


def _words(error: object) -> str:
    return " ".join(str(error).split())[:400]


# ---------------------------------------------------------------- secrets

_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|ACCESS_KEY|API_KEY|SAS)(_ID)?$", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
_IN_QUERY = re.compile(
    r"([?&][^=&\s]*(?:secret|token|password|key|credential|signature)[^=&\s]*=)[^&\s]+", re.IGNORECASE
)


def _mask(params: Params) -> Callable[[str], str]:
    """A function that replaces every secret this process can know of, and passwords in addresses, by ***."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    with suppress(OSError):
        secrets.add(_token()[0] or "")
    with suppress(Exception):  # a broken DVC configuration is the business of another check
        for remote in _dvc_config().get("remote", {}).values():
            secrets |= {str(value) for name, value in remote.items() if _SECRET_NAME.search(name)}
    for address in (_address(params) or "", _tracking_uri(params), params.cluster.storage):
        with suppress(ValueError):
            secrets.add(urlsplit(address).password or "")
    known = sorted((each.strip() for each in secrets if len(each.strip()) >= 4), key=len, reverse=True)

    def mask(text: str) -> str:
        for secret in known:
            text = text.replace(secret, "***")
        return _IN_QUERY.sub(r"\1***", _IN_ADDRESS.sub("***@", text))

    return mask


# ---------------------------------------------------------------- what several checks ask


def _address(params: Params) -> str | None:
    """The cluster that work goes to, None for this machine."""
    given = os.environ.get("RAY_ADDRESS") or params.cluster.address
    return None if given in (None, "local") else given


def _dashboard(address: str) -> str:
    """The HTTP address of the job server: the address itself, or Ray's own port on the same host."""
    if address.startswith(("http://", "https://")):
        return address.rstrip("/")
    host = "127.0.0.1" if address == "auto" else urlsplit(address if "://" in address else f"//{address}").hostname
    return f"http://{f'[{host}]' if host and ':' in host else host}:8265"


def _tracking_uri(params: Params) -> str:
    from pipelines import tracking

    return os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri or tracking.tracking_uri(paths.root())


def _storage(params: Params) -> str:
    storage = params.cluster.storage
    return storage.rstrip("/") if "://" in storage else str((paths.root() / storage).absolute())


def _name() -> str:
    """Of a probe object: nobody else's."""
    return f"dgm-doctor-{uuid.uuid4().hex}"


def _most(workers: int | tuple[int, int]) -> int:
    return workers if isinstance(workers, int) else workers[1]


def _least(workers: int | tuple[int, int]) -> int:
    return workers if isinstance(workers, int) else workers[0]


@dataclass(frozen=True)
class _Answer:
    status: int
    text: str
    skew: float | None  # the server's clock minus this one's, seconds; None without a Date header
    trip: float


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A redirect is an answer: a token must not follow it to another host."""


def _ask(url: str, headers: Mapping[str, str] | None = None) -> _Answer:
    """One GET, whatever the status. Raises: OSError when nobody answers."""
    parts = urlsplit(url)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    trust = ssl.create_default_context(cafile=os.environ.get("REQUESTS_CA_BUNDLE"))  # what `requests` obeys
    opener = urllib.request.build_opener(_Stay, urllib.request.HTTPSHandler(context=trust))
    before = time.time()
    try:
        response = opener.open(urllib.request.Request(bare, headers=dict(headers or {})), timeout=ANSWER_S)
    except HTTPError as error:
        response = error
    after = time.time()
    with response:
        text = response.read(1 << 16).decode(errors="replace")
        date = response.headers.get("Date")
    return _Answer(response.status, text, _skew(date, before, after), after - before)


def _skew(date: str | None, before: float, after: float) -> float | None:
    """A Date header against this clock at half the round trip; it has whole seconds, so half of one is added."""
    if date is None:
        return None
    return parsedate_to_datetime(date).timestamp() + 0.5 - (before + after) / 2


def _clock(check: str, skew: float | None, trip: float, grain: float = 0.5) -> Finding:
    if skew is None:
        return Finding(check, "unknown", "the answer has no Date header", "compare `date -u` on both machines")
    off = max(0.0, abs(skew) - grain - trip / 2)  # what is certain
    found = f"{skew:+.1f} s against this machine (within {grain + trip / 2:.1f} s)"
    if off <= SKEW_WARN_S:
        return Finding(check, "ok", found)
    mend = "let both machines keep time by NTP (`timedatectl set-ntp true`, or chrony)"
    if off <= SKEW_BAD_S:
        return Finding(check, "warn", found, mend)
    return Finding(check, "bad", found, f"S3 refuses requests signed at another time: {mend}")


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"


# ---------------------------------------------------------------- this machine

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
    have, wrong = _installed(), []
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


def _installed() -> dict[str, str | None]:
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
    if address is None or interface or _most(params.cluster.workers) == 1 or _address(params) is None:
        why = f"resolves to {address}" if address else "resolves to no loopback address"
        why += f"; GLOO_SOCKET_IFNAME={interface}" if interface else ""
        why += "; workers meet on this machine alone" if address and not interface else ""
        yield Finding("hostname", "ok", f"{socket.gethostname()} {why}")
        return
    found = f"{socket.gethostname()} resolves to {address}, and workers may meet on several hosts"
    yield Finding("hostname", "warn", found, GLOO)


GLOO = (
    "where this machine is a node: export GLOO_SOCKET_IFNAME=<interface that the others reach> before `ray start`, "
    "or give the hostname its address in /etc/hosts"
)


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


def _dvc_config() -> Mapping[str, Any]:
    from dvc.config import Config  # type: ignore[import-untyped, unused-ignore]

    found: Mapping[str, Any] = Config(str(paths.root() / ".dvc"))
    return found


def dvc(params: Params) -> Iterator[Finding]:
    """DVC: a repository, no analytics, somewhere to push to."""
    if not (paths.root() / ".dvc").is_dir():
        found = f"no DVC repository in {paths.root()}: outputs have no versions"
        yield Finding("dvc", "warn", found, "dvc init (dvc init --no-scm without git)")
        return
    config = _dvc_config()
    if config["core"].get("analytics", True) and not os.environ.get("DVC_NO_ANALYTICS"):
        yield Finding("dvc analytics", "warn", "on: DVC phones home", "dvc config core.analytics false")
    else:
        yield Finding("dvc analytics", "ok", "off")
    name, remotes = config["core"].get("remote"), config["remote"]
    if name in remotes:
        yield Finding("dvc remote", "ok", f"{name}: {remotes[name]['url']}")
    elif remotes:
        found = f"{', '.join(remotes)}, none of them the default: `dvc push` does not know where to"
        yield Finding("dvc remote", "warn", found, f"dvc remote default {next(iter(remotes))}")
    else:
        found = "none: the cache on this machine is the only copy of data and artifacts"
        yield Finding("dvc remote", "warn", found, "dvc remote add -d <name> s3://bucket/prefix")


def disk(params: Params) -> Iterator[Finding]:
    """Free space where the project, DVC's cache and a local run store lie; one line a file system."""
    need, why = needed()
    cache = paths.root() / ".dvc" / "cache"
    if (paths.root() / ".dvc").is_dir():
        cache = Path(_dvc_config()["cache"].get("dir") or cache)
    places = {"project": paths.root(), "cache": cache}
    if "://" not in params.cluster.storage:
        places["store"] = Path(_storage(params))
    together: dict[int, list[tuple[str, Path]]] = {}
    for name, folder in places.items():
        there = _existing(folder)
        together.setdefault(there.stat().st_dev, []).append((name, there))
    for group in together.values():
        free = shutil.disk_usage(group[0][1]).free
        check = f"disk ({', '.join(name for name, _ in group)})"
        found = f"{_size(free)} free, {_size(need)} needed: {why}"
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
        f"the largest of 1 GiB and dataset {dataset} ({_size(largest)}) + {CHECKPOINTS} checkpoints "
        f"of {_size(checkpoint)} ({MOMENTS} times the weights of {run})"
    )
    return total, why


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def memory(params: Params) -> Iterator[Finding]:
    """Free memory here against the workers that start here; the model and its data come on top."""
    here = _address(params) is None
    workers = _most(params.cluster.workers) if here else 0
    need, free = workers * WORKER_BYTES + DRIVER_BYTES, nodes.free_memory()
    found = f"{_size(free)} free; {_size(need)} for {f'Ray and {workers} idle workers' if here else 'the driver'}"
    mend = "end other programs, or lower cluster.workers"
    yield Finding("memory", "ok", found) if free >= need else Finding("memory", "bad", found, mend)


# ---------------------------------------------------------------- the cluster's door


def _token() -> tuple[str | None, Path | None]:
    """The token that Ray would send, and the file that it stands in. Raises: OSError when the file cannot be read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip(), None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return (path.read_text().strip() or None, path) if path.is_file() else (None, None)


def token_mode(params: Params) -> Iterator[Finding]:
    """RAY_AUTH_MODE: explicit on every machine, or one of them decides otherwise."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if _address(params) is None:
        yield Finding("token mode", "ok", NOT_CONFIGURED)
    elif mode.lower() == "token":
        yield Finding("token mode", "ok", "RAY_AUTH_MODE=token")
    else:
        state: State = "bad" if mode else "warn"
        found = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is not set: whether a token is sent is left to Ray"
        yield Finding("token mode", state, found, "export RAY_AUTH_MODE=token, here and on every node")


def token_file(params: Params) -> Iterator[Finding]:
    """The token's file: readable by its owner alone (`ray get-auth-token --generate` writes it 0644)."""
    cluster = _address(params) is not None
    token, path = _token()
    if path is not None:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            found = f"{path} has mode {mode:04o}: others on this machine can read it"
            yield Finding("token file", "bad" if cluster else "warn", found, f"chmod 600 {path}")
        else:
            yield Finding("token file", "ok", f"{path} has mode {mode:04o}")
    elif token:
        yield Finding("token file", "ok", "none; the token is in RAY_AUTH_TOKEN")
    elif cluster:
        mend = "copy the head's ~/.ray/auth_token here, mode 0600, or set RAY_AUTH_TOKEN_PATH"
        yield Finding("token file", "bad", "no token on this machine", mend)
    else:
        yield Finding("token file", "ok", NOT_CONFIGURED)


def token_asked(params: Params) -> Iterator[Finding]:
    """The job server runs what it is sent: without a token it must answer 401, with a wrong one 403."""
    address = _address(params)
    if address is None:
        yield Finding("token asked for", "ok", NOT_CONFIGURED)
        return
    url, token = f"{_dashboard(address)}/api/jobs/", _token()[0]
    try:
        none = _ask(url).status
        wrong = _ask(url, {"Authorization": f"Bearer {uuid.uuid4().hex}"}).status
        # ours is shown to nobody who does not ask for one
        ours = _ask(url, {"Authorization": f"Bearer {token}"}).status if token and none == 401 else None
    except OSError as error:
        mend = "is the head up (`ray status` there), its port open to this machine, or the tunnel running?"
        yield Finding("token asked for", "bad", f"{url} does not answer: {_words(error)}", mend)
        return
    found = f"{url}: {none} without a token, {wrong} with a wrong one"
    mend = "start the head and every node with RAY_AUTH_MODE=token and one token file"
    if none < 300 or wrong < 300:
        yield Finding("token asked for", "bad", f"{found}: whoever reaches it runs code on the cluster", mend)
    elif ours in (401, 403):
        mend = "copy the head's ~/.ray/auth_token here, mode 0600"
        yield Finding("token asked for", "bad", f"{found}, {ours} with this machine's", mend)
    elif (none, wrong) != (401, 403):
        found += "; Ray answers 401 and 403: something else stands in front, or it is no job server"
        yield Finding("token asked for", "warn", found, mend)
    else:
        yield Finding("token asked for", "ok", found + (f", {ours} with this machine's" if ours else ""))


def dashboard(params: Params) -> Iterator[Finding]:
    """The address of the job server: on this machine, in a private network, or open to the world."""
    import ipaddress

    address = _address(params)
    if address is None:
        yield Finding("dashboard address", "ok", NOT_CONFIGURED)
        return
    parts = urlsplit(_dashboard(address))
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(parts.hostname, parts.port or 80)}
    except OSError as error:
        mend = "correct cluster.address, or RAY_ADDRESS where it is set"
        yield Finding("dashboard address", "bad", f"{parts.hostname} does not resolve: {_words(error)}", mend)
        return
    resolved = [ipaddress.ip_address(str(each).split("%")[0]) for each in sorted(map(str, found))]
    text = f"{parts.hostname} is {', '.join(map(str, resolved))}"
    if any(each.is_global for each in resolved):
        mend = f"close the port to the world (security group, --dashboard-host=127.0.0.1); {ENCRYPT}"
        yield Finding("dashboard address", "warn", f"{text}: a public address", mend)
    elif all(each.is_loopback for each in resolved):
        yield Finding("dashboard address", "ok", f"{text}: this machine, or the end of a tunnel")
    else:
        plain = parts.scheme == "http"
        text += ": private; the token crosses the network unencrypted" if plain else ": private, TLS"
        yield Finding("dashboard address", "ok", text, ENCRYPT if plain else "")


def cluster_clock(params: Params) -> Iterator[Finding]:
    """The head's clock, by the Date header of the job server."""
    address = _address(params)
    if address is None:
        yield Finding("clock (cluster)", "ok", NOT_CONFIGURED)
        return
    try:
        answer = _ask(f"{_dashboard(address)}/api/version")
    except OSError as error:
        yield Finding("clock (cluster)", "unknown", f"no answer: {_words(error)}", "see `token asked for`")
        return
    yield _clock("clock (cluster)", answer.skew, answer.trip)


# ---------------------------------------------------------------- the cluster's nodes


def cluster_nodes(params: Params) -> Iterator[Finding]:
    """Every node: versions, GPUs, disk, memory, clock; and whether all of them have room for the workers."""
    cluster, address = params.cluster, _address(params)
    if address is None:
        yield Finding("cluster", "ok", NOT_CONFIGURED)
        here = nodes.facts(cluster.gpu)
        count = here.get("gpus", 0)
        yield _room([{"alive": True, "cpus": float(os.cpu_count() or 1), "gpus": float(count)}], params, "this machine")
        return
    with _marker(params) as marker:
        store = f"{_storage(params)}/{_name()}" if marker is None else None
        arguments = {"gpu": cluster.gpu, "marker": marker, "store": store, "seconds": NODES_S / 2}
        survey = _survey_by_job if address.startswith(("http://", "https://")) else _survey_here
        try:
            rows = survey(address, arguments)
        except Exception as error:  # Ray has many words for "cannot connect"
            mend = "the lines `token` and `dashboard` say whether the door is open; `ray status` on the head"
            yield Finding("cluster", "unknown", f"its nodes cannot be asked: {_words(error)}", mend)
            return
    yield from judge(rows, params)


@contextmanager
def _marker(params: Params) -> Iterator[str | None]:
    """A file in a run store that is a folder: nodes that do not see it would keep checkpoints to themselves."""
    if "://" in params.cluster.storage:
        yield None
        return
    with tempfile.NamedTemporaryFile(prefix="dgm-doctor-", dir=_existing(Path(_storage(params)))) as file:
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
    import logging

    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every upload
    client, until = JobSubmissionClient(address), time.monotonic() + NODES_S
    with tempfile.TemporaryDirectory(prefix="dgm-doctor-") as folder:
        shutil.copy(nodes.__file__, folder)
        job = client.submit_job(
            entrypoint=f"python {Path(nodes.__file__).name} {shlex.quote(json.dumps(arguments))}",
            submission_id=_name(),
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
    least, most = _least(cluster.workers), _most(cluster.workers)
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
    import ipaddress

    check, has = f"node {row['host']}", row["facts"]
    if has is None:
        return Finding(check, "bad", row["error"], "look at its raylet's log; `ray stop` and start it again")
    here, there = _installed(), has["versions"]
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
        say("bad", f"{_size(need)} needed on disk", "make room in its temporary folder")
    held = min(_places(row, params), _most(params.cluster.workers))
    if has["memory"] < held * WORKER_BYTES:
        say("bad", f"{held} idle workers take {_size(held * WORKER_BYTES)}", "a larger node, or more cpus a worker")
    if has["loopback"] and not has["interface"] and count > 1 and _most(params.cluster.workers) > 1:
        say("bad", f"its hostname resolves to {has['loopback']} and GLOO_SOCKET_IFNAME is not set", GLOO)
    if has["sees"] is False:
        words = f"it does not see this machine's cluster.storage = {params.cluster.storage}"
        say("bad", words, "cluster.storage: s3://bucket/prefix, or a folder that all machines share")
    if has["store"]:
        words = f"it cannot write to {params.cluster.storage}: {_words(has['store'])}"
        say("bad", words, "export AWS_* (keys, AWS_ENDPOINT_URL) where `ray start` runs, or give the node a role")
    clock = _clock(check, row["clock"], row["trip"], grain=0.0)
    if clock.state != "ok":
        say(clock.state, "its clock is off", clock.mend)
    if ipaddress.ip_address(row["host"]).is_global:
        say("warn", "it has a public address", "let no port of Ray's in from outside (security group, firewall)")
    what = [f"python {has['python']}", *(f"{name} {version}" for name, version in there.items() if version)]
    asker = "the head's" if (_address(params) or "").startswith("http") else "this one's"
    what += [
        f"{_size(has['disk'])} disk",
        f"{_size(has['memory'])} memory",
        f"clock {row['clock']:+.3f} s from {asker}",
    ]
    what += [f"{has['gpus']} GPUs"] if params.cluster.gpu else []
    states: list[State] = ["ok", *(state for state, _, _ in problems)]
    found = ", ".join(what) + "".join(f"; {words}" for _, words, _ in problems)
    return Finding(
        check, max(states, key=ORDER.index), found, "; ".join(dict.fromkeys(mend for _, _, mend in problems))
    )


# ---------------------------------------------------------------- storage


Act = tuple[str, str, Callable[[], Any]]  # what is done, the right that it needs, the doing


@dataclass(frozen=True)
class _Door:
    """One way into a bucket, as four or five acts on one small object."""

    check: str
    where: str
    acts: list[Act]
    clean: Callable[[], Any]
    advice: str = ""


def _rights(door: _Door) -> Finding:
    done = []
    try:
        for act, right, do in door.acts:
            try:
                do()
            except Exception as error:  # every client has exceptions of its own
                advice = f"; {door.advice}" if door.advice else ""
                mend = f"{act} needs {right} on {door.where}{advice}"
                return Finding(door.check, "bad", f"{door.where}: {act} failed: {_words(error)}", mend)
            done.append(act)
    finally:
        if done and "delete" not in done:
            with suppress(Exception):  # without the right to delete it stays, and the finding says so
                door.clean()
    return Finding(door.check, "ok", f"{door.where}: {', '.join(done)}")


def _hold(true: bool, words: str) -> None:
    if not true:
        raise OSError(words)


@contextmanager
def _short_patience() -> Iterator[None]:
    """A place tries for two minutes; here a few seconds must do."""
    before = os.environ.get("DGM_STORAGE_PATIENCE")
    os.environ["DGM_STORAGE_PATIENCE"] = "3"
    try:
        yield
    finally:
        os.environ.pop("DGM_STORAGE_PATIENCE")
        if before is not None:
            os.environ["DGM_STORAGE_PATIENCE"] = before


def storage_rights(params: Params) -> Iterator[Finding]:
    """A real put, get, conditional put, list and delete under cluster.storage."""
    check, uri = "storage rights", _storage(params)
    if "://" not in uri:
        yield _folder_rights(check, Path(uri), "cluster.storage")
        return
    from pipelines.storage import place

    name, content = _name(), uuid.uuid4().bytes
    with _short_patience():
        there = place(uri)

        def get() -> None:
            _hold(there.read(name) == content, "other bytes came back than were sent: do not keep anything there")

        def conditional() -> None:
            with suppress(FileExistsError):
                there.write_new(name, b"second")
                raise OSError("a write with If-None-Match replaced what was there: two writers would lose each other's")
            there.swap(name, content, there.read_versioned(name)[1])

        def listed() -> None:
            _hold([entry.name for entry in there.list(name)] == [name], "what was written is not in the list")

        def delete() -> None:
            there.delete(name)
            with suppress(FileNotFoundError):
                there.read(name)
                raise OSError("it is still there after it was deleted")

        acts: list[Act] = [
            ("put", "s3:PutObject", lambda: _hold(bool(there.write(name, content)), "no version came back")),
            ("get", "s3:GetObject", get),
            ("conditional put", "s3:PutObject and an endpoint that obeys If-None-Match and If-Match", conditional),
            ("list", "s3:ListBucket", listed),
            ("delete", "s3:DeleteObject", delete),
        ]
        yield _rights(_Door(check, uri, acts, lambda: there.delete(name)))


def _folder_rights(check: str, folder: Path, key: str) -> Finding:
    there = _existing(folder)
    try:
        with tempfile.NamedTemporaryFile(prefix="dgm-doctor-", dir=there) as file:
            file.write(b"probe")
    except OSError as error:
        return Finding(check, "bad", f"{folder}: cannot be written ({_words(error)})", f"chown it, or change {key}")
    return Finding(check, "ok", f"{folder}: a folder, writable" + ("" if there == folder else " (not made yet)"))


def dvc_rights(params: Params) -> Iterator[Finding]:
    """A real put, get, list and delete in DVC's default remote, through DVC's own client and settings."""
    check = "dvc remote rights"
    config = _dvc_config() if (paths.root() / ".dvc").is_dir() else {"core": {}, "remote": {}}
    name = config["core"].get("remote")
    if name not in config["remote"]:
        yield Finding(check, "ok", "no default remote")
        return
    url = str(config["remote"][name]["url"])
    if not url.startswith("s3://"):
        if "://" in url:
            yield Finding(check, "unknown", f"{url}: only s3:// and folders are probed", "`dvc push` shows it")
        else:
            yield _folder_rights(check, paths.root() / ".dvc" / url, f"the url of remote {name}")
        return
    from dvc.fs import get_cloud_fs  # type: ignore[import-untyped, unused-ignore]

    kind, settings, path = get_cloud_fs(config, name=name)
    remote = kind(**{"connect_timeout": ANSWER_S, "read_timeout": ANSWER_S, **settings}).fs
    target, content = f"{path}/{_name()}", uuid.uuid4().bytes

    def listed() -> None:
        remote.invalidate_cache()
        _hold(any(each.endswith(target) for each in remote.find(path, prefix=Path(target).name)), "not in the list")

    acts: list[Act] = [
        ("put", "s3:PutObject", lambda: remote.pipe_file(target, content)),
        ("get", "s3:GetObject", lambda: _hold(remote.cat_file(target) == content, "other bytes came back")),
        ("list", "s3:ListBucket", listed),
        ("delete", "s3:DeleteObject", lambda: remote.rm_file(target)),
    ]
    advice = f"`dvc remote modify --local {name}` holds its endpointurl, profile and keys"
    yield _rights(_Door(check, url, acts, lambda: remote.rm_file(target), advice))


def s3_clock(params: Params) -> Iterator[Finding]:
    """The clocks of the S3 endpoints in use, by the Date header of an unsigned request: refusals have one too."""
    used: dict[str | None, str] = {}
    own = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if params.cluster.storage.startswith("s3://"):
        used[own] = params.cluster.storage
    if (paths.root() / ".dvc").is_dir():
        config = _dvc_config()
        remote = config["remote"].get(config["core"].get("remote"), {})
        if str(remote.get("url", "")).startswith("s3://"):
            used.setdefault(remote.get("endpointurl") or own, str(remote["url"]))
    if not used:
        yield Finding("clock (S3)", "ok", "no s3:// in use")
    for endpoint, uri in used.items():
        yield _s3_clock(endpoint, urlsplit(uri).netloc)


def _s3_clock(endpoint: str | None, bucket: str) -> Finding:
    import boto3  # type: ignore[import-untyped, unused-ignore]
    from botocore import UNSIGNED  # type: ignore[import-untyped, unused-ignore]
    from botocore.config import Config  # type: ignore[import-untyped, unused-ignore]
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped, unused-ignore]

    check = "clock (S3)" if endpoint is None else f"clock ({urlsplit(endpoint).netloc.rpartition('@')[2]})"
    config = Config(
        signature_version=UNSIGNED,
        connect_timeout=ANSWER_S,
        read_timeout=ANSWER_S,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    client = boto3.session.Session().client("s3", config=config, endpoint_url=endpoint)
    before = time.time()
    try:
        answer = client.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except BotoCoreError as error:
        mend = "is the endpoint up, and AWS_ENDPOINT_URL right?"
        return Finding(check, "bad", f"no answer: {_words(error)}", mend)
    after = time.time()
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return _clock(check, _skew(date, before, after), after - before)


# ---------------------------------------------------------------- MLflow


def tracking_server(params: Params) -> Iterator[Finding]:
    """The tracker answers, its registry too, and speaks the client's version. Reads only: MLflow's deletes are soft."""
    from importlib import metadata

    from pipelines import tracking

    check, uri = "tracking", _tracking_uri(params)
    database = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", uri)
    if database and not Path(database[1]).exists():
        yield Finding(check, "ok", f"{uri}: not made yet; the first run makes it")
        return
    mine, theirs, remote = metadata.version("mlflow"), None, uri.startswith(("http://", "https://"))
    down = "start the server (infra/README.md), or correct MLFLOW_TRACKING_URI or tracking.uri"
    if remote:
        try:
            answer = _ask(f"{uri.rstrip('/')}/version")
        except OSError as error:  # asked first, in seconds: MLflow's client would try for a long time
            yield Finding(check, "bad", f"{uri} does not answer: {_words(error)}", down)
            return
        yield _clock("clock (tracking)", answer.skew, answer.trip)
        theirs = answer.text.strip() if answer.status == 200 else None
    try:
        client = tracking.client(uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
    except Exception as error:  # MLflow's, SQLAlchemy's, requests'
        mend = down + "; 401 or 403: MLFLOW_TRACKING_USERNAME and _PASSWORD, and --allowed-hosts of the server"
        yield Finding(check, "bad", f"{uri}: experiments and models cannot be listed: {_words(error)}", mend)
        return
    found = f"{uri}: lists experiments and models; client {mine}"
    found += f", server {theirs or 'does not tell its version'}" if remote else ""
    if theirs and theirs.split(".")[:2] != mine.split(".")[:2]:
        yield Finding(check, "warn", found, "run the server and the clients with one version of MLflow")
    else:
        yield Finding(check, "ok", found)


def artifact_rights(params: Params) -> Iterator[Finding]:
    """A real put, get, list and delete under MLflow's artifact root where clients write to S3 themselves."""
    from pipelines import tracking

    check, uri = "mlflow artifacts", _tracking_uri(params)
    root = tracking.artifact_root(uri)
    if root is None:
        try:
            _ask(uri)
        except OSError:
            yield Finding(check, "unknown", "the tracking server does not answer", "see `tracking`")
            return
        known = tracking.client(uri).search_experiments(max_results=1)
        root = known[0].artifact_location if known else ""
    if not root.startswith("s3://"):
        door = "through the server" if root.startswith("mlflow-artifacts:") else "not on S3"
        yield Finding(check, "ok", f"{root or 'no experiment yet'}: {door}")
        return
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository, name, content = get_artifact_repository(root), _name(), uuid.uuid4().bytes
    with tempfile.TemporaryDirectory(prefix="dgm-doctor-") as folder:
        source, copy = Path(folder, "probe"), Path(folder, "copy")
        source.write_bytes(content)
        copy.mkdir()

        def get() -> None:
            _hold(
                Path(repository.download_artifacts(f"{name}/probe", str(copy))).read_bytes() == content, "other bytes"
            )

        acts: list[Act] = [
            ("put", "s3:PutObject", partial(repository.log_artifact, str(source), name)),
            ("get", "s3:GetObject", get),
            ("list", "s3:ListBucket", lambda: _hold(bool(repository.list_artifacts(name)), "not in the list")),
            ("delete", "s3:DeleteObject", partial(repository.delete_artifacts, name)),
        ]
        yield _rights(_Door(check, root, acts, partial(repository.delete_artifacts, name)))


CHECKS = (
    Check("versions", versions),
    Check("threads", threads),
    Check("hostname", hostname, 10),
    Check("telemetry", telemetry),
    Check("git", git),
    Check("dvc", dvc),
    Check("disk", disk),
    Check("memory", memory),
    Check("storage rights", storage_rights, 40),
    Check("dvc remote rights", dvc_rights, 40),
    Check("clock (S3)", s3_clock, 30),
    Check("tracking", tracking_server, 40),
    Check("mlflow artifacts", artifact_rights, 40),
    Check("token mode", token_mode),
    Check("token file", token_file),
    Check("token asked for", token_asked, 20),
    Check("dashboard address", dashboard, 10),
    Check("clock (cluster)", cluster_clock, 10),
    Check("cluster", cluster_nodes, NODES_S + 20),
)
