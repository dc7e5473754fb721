"""MLflow's door: where the tracker is, one run per training digest, and curves that never stop a training.

MLflow is imported inside the functions, so that importing this module for its names costs nothing.

What a down tracker costs. `Curves.log` first writes its row to a spool file, then lets a thread of its own send what
is pending and waits for it at most `wait` seconds; after a failure nothing is tried for `pause` seconds. A hanging
server, a locked database or a long `Retry-After` therefore costs one `wait` a `pause`, and a process that is killed
at any moment leaves its unsent rows in the spool, where the next start (or `replay`) finds them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipelines import paths

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

log = logging.getLogger(__name__)

RUN_DIGEST = "dgm.run_digest"
PARENT = "mlflow.parentRunId"  # MLflow shows a run with this tag under the run that it names
ARTIFACTS = "mlartifacts"
DATABASE = "mlflow.db"

_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # 7 with backoff by default: minutes of hang when the server is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_BATCH = 500  # metrics in one request; MLflow refuses more than 1000
_opened: set[str] = set()
_opening = threading.Lock()


# ---------------------------------------------------------------- where the tracker is


def tracking_uri(root: Path | None = None, given: str | None = None) -> str:
    """MLFLOW_TRACKING_URI, the URI given, or sqlite beside the project.

    Args:
        root: the project's folder; found from the working directory by default.
        given: what the project's params say.

    Raises:
        ValueError: outside a project, when neither is there.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or given
    return uri or f"sqlite:///{(root or paths.root()).resolve() / DATABASE}"


def shared_uri(given: str | None) -> str | None:
    """The tracker that every machine can reach: MLFLOW_TRACKING_URI or the URI given, None when it is a file."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or given or ""
    return None if not uri or uri.startswith(("sqlite", "file:", "/")) or "://" not in uri else uri


def artifact_root(uri: str) -> str | None:
    """Where a new experiment keeps its files: None lets a server decide.

    MLflow's own default is `mlruns` under whatever the working directory happens to be; a database that is opened
    without a server gets MLFLOW_DEFAULT_ARTIFACT_ROOT, or `mlartifacts` beside the sqlite file.
    """
    if uri.startswith(("http://", "https://", "databricks")):
        return None
    given = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT", "").strip()
    if given:
        return given
    database = _sqlite_file(uri)
    return ((database.parent if database else paths.root()) / ARTIFACTS).as_uri()


def client(uri: str | None = None) -> MlflowClient:
    """An MLflow client for tracking and registry both, with this project's defaults for what the user left unset."""
    _set_defaults()
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    uri = uri or tracking_uri()
    database = _sqlite_file(uri)
    if database is None or uri in _opened:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    # Two processes that both find no tables would both create them, and one would fail.
    database.parent.mkdir(parents=True, exist_ok=True)
    name = "dgm-" + hashlib.sha256(str(database).encode()).hexdigest()[:16] + ".lock"
    with _opening, open(Path(tempfile.gettempdir()) / name, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():  # asked before there is a client: making one makes the tables
            _create(database)
        made = MlflowClient(tracking_uri=uri, registry_uri=uri)
        made.search_experiments(max_results=1)
        _opened.add(uri)
    return made


def _create(database: Path) -> None:
    """A database with MLflow's tables, whole or not at all: one that a kill left half migrated can never be opened."""
    from mlflow import MlflowClient

    new = database.with_name(f"{database.name}.new")
    for end in ("", "-journal", "-wal", "-shm"):
        new.with_name(new.name + end).unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{new}", registry_uri=f"sqlite:///{new}").search_experiments(max_results=1)
    os.replace(new, database)


def artifact_store(root: str) -> ArtifactRepository:
    """MLflow's own client of the files below an artifact root, with the settings of `client`."""
    _set_defaults()
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(root)


def _set_defaults() -> None:
    for key, value in _DEFAULTS.items():
        os.environ.setdefault(key, value)


def _sqlite_file(uri: str) -> Path | None:
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", uri)
    return Path(match[1]).resolve() if match and match[1] != ":memory:" else None


# ---------------------------------------------------------------- experiments and runs


def experiment_id(mlflow: MlflowClient, name: str) -> str:
    """The experiment of that name, created if it is new.

    Raises:
        ValueError: it was deleted in MLflow, which keeps the name and refuses new runs.
    """
    from mlflow.exceptions import MlflowException

    found = mlflow.get_experiment_by_name(name)
    if found is None:
        root = artifact_root(mlflow.tracking_uri)
        place = None if root is None else f"{root}/{_clean(name)}"
        try:
            return str(mlflow.create_experiment(name, artifact_location=place))
        except MlflowException:
            found = mlflow.get_experiment_by_name(name)  # somebody else created it meanwhile
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ValueError(f"the MLflow experiment {name!r} is deleted: restore it, or purge it with `mlflow gc`")
    return str(found.experiment_id)


def digest_run(mlflow: MlflowClient, experiment: str, run_digest: str, run_name: str, tags: Mapping[str, str]) -> Run:
    """The one run of a training digest: found by its tag, or created.

    Args:
        experiment: the experiment's name.
        tags: written when the run is created.
    """
    place = experiment_id(mlflow, experiment)
    found = _runs_of(mlflow, place, run_digest)
    if found:
        return found[0]
    texts = {name: str(value)[:5000] for name, value in tags.items()}
    made = mlflow.create_run(place, run_name=run_name, tags={**texts, RUN_DIGEST: run_digest})
    first = _runs_of(mlflow, place, run_digest)[0]
    if first.info.run_id != made.info.run_id:  # two writers at once: the older run stays
        mlflow.delete_run(made.info.run_id)
    return first


def _runs_of(mlflow: MlflowClient, place: str, run_digest: str) -> list[Run]:
    if not re.fullmatch(r"[\w.:-]+", run_digest):
        raise ValueError(f"{run_digest!r} is no digest")
    found = mlflow.search_runs([place], f"tags.`{RUN_DIGEST}` = '{run_digest}'")
    return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))


def send_rows(mlflow: MlflowClient, run_id: str, rows: Iterable[Mapping[str, Any]], gaps: bool) -> int:
    """Logs the values that the run does not hold yet; MLflow itself would store a step twice.

    Args:
        rows: {"step": int, "time": seconds, "metrics": {name: value}}, in the order of their steps; without a time
            (an artifact's metrics.jsonl has none, so that it is the same every time) the run's start stands in.
        gaps: False: only what is past a metric's last step. True: older steps that are missing, too (reads the
            metric's whole history).

    Returns:
        the number of values logged.
    """
    from mlflow.entities import Metric

    run = mlflow.get_run(run_id)
    last = {item.key: item.step for item in run.data.to_proto().metrics}
    known: dict[str, set[int]] = {}
    fresh: list[Metric] = []
    for row in rows:
        step = int(row["step"])
        time_ms = int(float(row["time"]) * 1000) if "time" in row else int(run.info.start_time)
        for name, value in row["metrics"].items():
            key = _clean(name)
            if key not in known:
                held = mlflow.get_metric_history(run_id, key) if gaps and key in last else []
                known[key] = {item.step for item in held}
            if step in known[key] or (not gaps and key in last and step <= last[key]):
                continue
            known[key].add(step)
            fresh.append(Metric(key, float(value), time_ms, step))
    for start in range(0, len(fresh), _BATCH):
        mlflow.log_batch(run_id, metrics=fresh[start : start + _BATCH])
    return len(fresh)


def send_params(mlflow: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Logs the params that the run does not hold yet; nested mappings become dotted names."""
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    flat = {_clean(name): value[:6000] for name, value in _flatten(params).items()}
    for attempt in range(3):
        held = mlflow.get_run(run_id).data.params
        fresh = [Param(name, value) for name, value in flat.items() if name not in held]
        try:
            for start in range(0, len(fresh), 100):
                mlflow.log_batch(run_id, params=fresh[start : start + 100])
            return
        except MlflowException:  # another writer logged the same params meanwhile: only what it left is sent
            if attempt == 2:
                raise


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _clean(name: str) -> str:
    """A name that MLflow takes: one refused name would hold up every row behind it."""
    return re.sub(r"[^\w\-. :/]", "_", str(name))[:250].strip("/ .") or "_"


# ---------------------------------------------------------------- curves


@dataclass(frozen=True)
class _Header:
    """The first line of a spool file: all that is needed to send it without its training."""

    run_name: str
    run_digest: str
    experiment: str
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    parent: dict[str, Any] | None = None  # the header of the run under which this one is nested


@dataclass
class _Family:
    """What a run and those nested under it share: until when a tracker that failed is left alone, and the runs' ids."""

    until: float = -math.inf
    run_ids: dict[str, str] = field(default_factory=dict)


class Curves:
    """The curves of one training in MLflow: one run per digest, however often the training is restarted.

    No method raises because of the tracker. Constructing costs nothing and touches nothing: an instance can be
    pickled and sent to the process that will log (it arrives without its pending rows).

    Args:
        run_name: what people read; the digest is what identifies.
        run_digest: the identity of the training.
        experiment: MLflow's experiment, by convention the dataset's name (as `registration.register` expects).
        params: logged once, nested mappings as dotted names.
        tags: logged when the run is created.
        spool: a local folder for rows that are not sent yet.
        uri: the tracker; resolved here and now by default, so that it is the submitter's.
        wait: the most seconds that one call may cost.
        pause: seconds without a try after a failure.
        parent: the header of the run under which this one is nested (`child` gives it).

    Example:
        >>> curves = Curves("ddpm", "4f1c", "digits", {"seed": 0}, {}, Path("run/spool"))  # doctest: +SKIP
        >>> curves.log(10, {"loss": 2.3})                                                  # doctest: +SKIP
        >>> curves.finish("FINISHED")                                                      # doctest: +SKIP
    """

    def __init__(
        self,
        run_name: str,
        run_digest: str,
        experiment: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        spool: Path,
        uri: str | None = None,
        wait: float = 5.0,
        pause: float = 30.0,
        parent: dict[str, Any] | None = None,
    ) -> None:
        self._header = _Header(run_name, run_digest, experiment, dict(params), dict(tags), parent)
        self._folder, self.uri, self.wait, self.pause = Path(spool), uri or tracking_uri(), wait, pause
        self.run_id: str | None = None
        self._file: IO[str] | None = None
        self._pending: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._family = _Family()

    def __reduce__(self) -> tuple[Any, ...]:
        head = self._header
        plain = (head.run_name, head.run_digest, head.experiment, head.params, head.tags)
        return (Curves, (*plain, self._folder, self.uri, self.wait, self.pause, head.parent))

    def child(self, run_name: str, run_digest: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Curves:
        """The curves of a run that MLflow nests under this one. While the tracker fails, all of them wait together."""
        head, folder = self._header, self._folder
        made = Curves(
            run_name, run_digest, head.experiment, params, tags, folder, self.uri, self.wait, self.pause, asdict(head)
        )
        made._family = self._family
        return made

    def log(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Logs values at a step; what the run holds already (a resumed training repeats steps) is left out.

        Returns:
            True when everything is in MLflow now, False when it waits in the spool.
        """
        numbers = {}
        for name, value in metrics.items():
            try:
                numbers[str(name)] = float(value)
            except (TypeError, ValueError):
                log.debug("metric %s is no number", name)
        return self._put({"step": int(step), "time": time.time(), "metrics": numbers}) and self._try()

    def finish(self, status: str = "FINISHED", tags: Mapping[str, str] | None = None) -> bool:
        """Ends the run as FINISHED, FAILED or KILLED, with these tags, and tries once more to send what waits.

        Returns:
            True when everything is in MLflow; otherwise the spool keeps it for `replay` or the next start.
        """
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"status: {status!r} is none of FINISHED, FAILED, KILLED")
        self._put(_end(status, tags))
        if self._thread:
            self._thread.join(self.wait)
        if self._header.parent is None:  # of a whole family, one may cost a wait beyond the pause
            self._family.until = -math.inf
        sent = self._try()
        self.close()
        return sent

    @property
    def run_digest(self) -> str:
        return self._header.run_digest

    def complete(
        self, rows: Sequence[Mapping[str, Any]], status: str | None = None, tags: Mapping[str, str] | None = None
    ) -> bool:
        """Sends what of these rows the run lacks: a worker that dies right after a report takes the report along.

        Args:
            rows: {"step": int, "metrics": {name: value}} of the whole training.
            status, tags: with which the run ends; None leaves it open.

        Returns:
            False when the tracker did not take them.
        """
        try:
            mlflow = client(self.uri)
            run_id = _start(mlflow, self._header, self._family.run_ids)
            for path in _spooled(self._folder, self.run_digest):
                _replay_file(mlflow, path)
            _send_lines(mlflow, run_id, [*rows, *([_end(status, tags)] if status else [])], gaps=True)
        except Exception as error:  # the registration sends them again
            self._fail(f"{self.uri} does not take the curves: {type(error).__name__}: {error}")
            return False
        return True

    def end_strays(self, known: Collection[str]) -> None:
        """Marks as KILLED the nested runs that have none of these digests: nothing of them is in the result."""
        try:
            mlflow = client(self.uri)
            place = experiment_id(mlflow, self._header.experiment)
            run_id = _start(mlflow, self._header, self._family.run_ids)
            for run in mlflow.search_runs([place], f"tags.`{PARENT}` = '{run_id}'"):
                if run.info.status != "KILLED" and run.data.tags.get(RUN_DIGEST) not in known:
                    mlflow.set_terminated(run.info.run_id, "KILLED")
        except Exception as error:
            self._fail(f"{self.uri} does not end runs: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Lets the spool file go, so that another process may replay it; an empty one is removed."""
        with self._lock:
            if self._file is not None:
                if not self._pending:
                    Path(self._file.name).unlink(missing_ok=True)
                file, self._file = self._file, None
                try:
                    file.close()
                except OSError as error:
                    self._warn(f"the spool {self._folder} cannot be written: {error}")

    def _put(self, row: dict[str, Any]) -> bool:
        with self._lock:
            self._pending.append(row)
            try:
                if self._file is None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    name = f"{self._header.run_digest}-{uuid.uuid4().hex[:8]}.jsonl"
                    self._file = open(self._folder / name, "a", encoding="utf-8")  # noqa: SIM115 (held until close)
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ours while this process lives
                rows = [row] if self._file.tell() else [asdict(self._header), *self._pending]
                self._file.write("".join(json.dumps(each, default=str) + "\n" for each in rows))
                self._file.flush()
            except OSError as error:  # a full disk must not stop a training either; the rows stay in memory
                self._warn(f"the spool {self._folder} cannot be written: {error}")
        return True

    def _try(self) -> bool:
        if time.monotonic() < self._family.until or (self._thread and self._thread.is_alive()):
            return False
        self._thread = threading.Thread(target=self._send, name="dgm-curves", daemon=True)
        self._thread.start()
        self._thread.join(self.wait)
        if self._thread.is_alive():
            self._fail(f"{self.uri} has not answered within {self.wait:g} s")
            return False
        return not self._pending

    def _send(self) -> None:
        try:
            with self._lock:
                rows = list(self._pending)
            mlflow = client(self.uri)
            if self.run_id is None:
                run_id = _start(mlflow, self._header, self._family.run_ids)
                for path in _spooled(self._folder, self._header.run_digest):
                    _replay_file(mlflow, path)  # what an earlier process could not send comes first
                if mlflow.get_run(run_id).info.status != "RUNNING":
                    mlflow.update_run(run_id, status="RUNNING")
                self.run_id = run_id
            _send_lines(mlflow, self.run_id, rows, gaps=False)
            with self._lock:
                del self._pending[: len(rows)]
                if not self._pending and self._file is not None:
                    self._file.seek(0)
                    self._file.truncate()
            self._family.until = -math.inf
        except Exception as error:  # whatever the tracker does, the training goes on
            self._fail(f"{self.uri} does not take the curves: {type(error).__name__}: {error}")

    def _fail(self, text: str) -> None:
        self._family.until = time.monotonic() + self.pause
        self._warn(text)

    def _warn(self, text: str) -> None:
        log.warning("%s (%d rows wait in %s)", text.split("\n")[0][:300], len(self._pending), self._folder)


def replay(spool: Path, uri: str | None = None) -> list[str]:
    """Sends every spool file of a folder that no living process writes, and removes it.

    Returns:
        one line for each file sent.

    Raises:
        mlflow.exceptions.MlflowException: the tracker is down; the files stay.
    """
    files = _spooled(Path(spool), "")
    if not files:
        return []
    mlflow = client(uri)
    return [line for line in (_replay_file(mlflow, file) for file in files) if line]


def _spooled(folder: Path, run_digest: str) -> list[Path]:
    if not folder.is_dir():
        return []
    pattern = f"{run_digest}-*.jsonl" if run_digest else "*.jsonl"
    return sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def _replay_file(mlflow: MlflowClient, path: Path) -> str | None:
    try:
        file = open(path, encoding="utf-8")  # noqa: SIM115 (closed just below)
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None  # a living process writes it and will send it
        lines = _read_lines(file)
        if not lines:
            path.unlink(missing_ok=True)
            return None
        if "run_digest" not in lines[0]:
            path.rename(path.with_suffix(".unreadable"))
            return f"{path.name}: its first line is broken; kept as {path.stem}.unreadable"
        header = _Header(**lines[0])
        sent = _send_lines(mlflow, _start(mlflow, header), lines[1:], gaps=True)
        path.unlink(missing_ok=True)
    return f"{header.run_name}: {sent} values from the spool"


def _read_lines(file: Iterable[str]) -> list[dict[str, Any]]:
    lines = []
    for text in file:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # the process was killed, or the disk was full, while it wrote this line
    return lines


def _start(mlflow: MlflowClient, header: _Header, known: dict[str, str] | None = None) -> str:
    """The id of a run that is there from now on; `known`: digest -> id of those that are."""
    known = {} if known is None else known
    if header.run_digest not in known:
        above = {PARENT: _start(mlflow, _Header(**header.parent), known)} if header.parent else {}
        run = digest_run(mlflow, header.experiment, header.run_digest, header.run_name, {**header.tags, **above})
        send_params(mlflow, run.info.run_id, header.params)
        known[header.run_digest] = str(run.info.run_id)
    return known[header.run_digest]


def _end(status: str, tags: Mapping[str, str] | None) -> dict[str, Any]:
    return {"finish": status, "tags": dict(tags or {})}


def _send_lines(mlflow: MlflowClient, run_id: str, lines: Sequence[Mapping[str, Any]], gaps: bool) -> int:
    sent = send_rows(mlflow, run_id, [line for line in lines if "finish" not in line], gaps)
    ends = [line for line in lines if "finish" in line]
    if ends:
        for name, value in ends[-1].get("tags", {}).items():
            mlflow.set_tag(run_id, name, value)
        mlflow.set_terminated(run_id, ends[-1]["finish"])
    return sent
