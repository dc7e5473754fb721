"""Stages as jobs on a Ray cluster: a small copy of the project travels, the same verb runs there.

A job's working folder holds the code, the params and the stage's small inputs; datasets are staged to
`cluster.storage` before. The job runs the verb with `--store-only` and joins the cluster of the job server; what it
made lies in the run store under the digest that the submitter computed, and the submitter fetches it into its DVC
outs. The submission id is `dgm-<verb>-<digest>`: the same work submitted twice is one job; after one that has ended the
next is `dgm-<verb>-<digest>-2`, so that every attempt keeps its log.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import files, paths
from pipelines.cluster import JobFailed
from pipelines.cluster.session import SETTINGS, job_server
from pipelines.params import Cluster, Params
from pipelines.progress import bar
from pipelines.storage import place

log = logging.getLogger("dgm.submission")

RUNNING = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Work:
    """One stage's work on a cluster.

    Attributes:
        verb: "train", "extractor" or "tune".
        key: in params.yaml.
        digest: of the work's identity, in the run store too.
        inputs: files and folders of the project that the verb reads, datasets by their manifest alone.
        total: what the progress counts up to.
    """

    verb: str
    key: str
    digest: str
    inputs: tuple[Path, ...]
    total: int

    @property
    def id(self) -> str:
        return f"dgm-{self.verb}-{self.digest}"


PATIENCE_S = 60.0  # for how long a job server that cannot be reached or takes no job is asked again


def ticket() -> dict[str, Any] | None:
    """What the submitter wrote down for this job, None outside of one."""
    path = paths.ticket()
    return files.read_json(path) if path.is_file() else None


def check_digest(digest: str) -> None:
    """Raises ValueError inside a job whose code or libraries give other results than the submitter's."""
    found = ticket()
    if found and found["digest"] != digest:
        raise ValueError(
            f"this cluster computes the digest {digest}, the submitter {found['digest']} with {found['versions']}: "
            "install the versions of requirements.lock on the nodes (`dgm doctor` compares them)"
        )


def client(cluster: Cluster) -> Any:
    """Ray's job client. Raises ValueError when no job server is configured or it refuses; says what to do."""
    address = job_server(cluster)
    if address is None:
        raise ValueError(
            "cluster.address: no job server; set it, or RAY_ADDRESS, to the head's http://host:8265 to submit jobs"
        )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        words = str(error).strip().splitlines()[0][:300]
        raise ValueError(
            f"cluster.address: {address} does not take jobs ({words}); is the head up, and are RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH set as on the head? `dgm doctor` looks closer"
        ) from error


def submit(work: Work, params: Params) -> str:
    """Starts the work, or finds the job that is doing it.

    Returns: the submission id.
    Raises: ValueError when the run store is a folder of this machine, or the cluster cannot be reached.
    """
    if "://" not in params.cluster.storage:
        raise ValueError(
            f"cluster.storage: {params.cluster.storage!r} is a folder of this machine; a job on a cluster needs "
            "s3://bucket/prefix"
        )
    jobs = client(params.cluster)
    attempt, id = 1, work.id
    while state := status(jobs, id):
        if state in RUNNING:
            log.warning("%s %s: attached to the running job %s", work.verb, work.key, id)
            return id
        attempt += 1
        id = f"{work.id}-{attempt}"
    with tempfile.TemporaryDirectory(prefix="dgm-job-") as folder:
        project(work, params, Path(folder))
        try:
            _hand_over(
                jobs,
                submission_id=id,
                entrypoint=f"python -m pipelines {work.verb} {work.key} --store-only",
                runtime_env={"working_dir": folder, "env_vars": environment(params)},
                metadata={"stage": work.verb, "run": work.key, "digest": work.digest},
            )
        except RuntimeError as error:
            if status(jobs, id) not in RUNNING:  # otherwise somebody else submitted it meanwhile
                raise ValueError(f"{id}: not taken: {str(error).strip().splitlines()[-1][:300]}") from error
    return id


def _hand_over(jobs: Any, **given: Any) -> None:
    """Submits; asks again while the head, as when it has just come up, has no agent that takes jobs."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            jobs.submit_job(**given)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(1.0)


def environment(params: Params) -> dict[str, str]:
    """The job's variables. They are shown in the dashboard: keys and tokens belong to the nodes' own environment."""
    from pipelines import tracking

    found = {**SETTINGS, "DGM_VERBOSE": "1", "PYTHONUNBUFFERED": "1"}
    uri = tracking.shared_uri(params.tracking.uri)
    return found | ({"MLFLOW_TRACKING_URI": uri} if uri else {})


def project(work: Work, params: Params, folder: Path) -> None:
    """Writes the job's working folder: code, params, inputs and the ticket."""
    import torch

    from pipelines.stages.train import git_state

    for name in ("dgm_models", "pipelines"):
        shutil.copytree(paths.code() / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*paths.params_files(), *work.inputs):
        target = folder / path.relative_to(paths.root())
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    files.write_json(folder / paths.ticket().name, {"digest": work.digest, "git": git_state(), "versions": versions})


def status(jobs: Any, id: str) -> str | None:
    """A job's state in Ray's words, None when there is no such job."""
    try:
        return str(jobs.get_job_status(id).value)
    except RuntimeError as error:
        if "does not exist" in str(error) or "404" in str(error):
            return None
        raise


def wait(id: str, work: Work, params: Params) -> None:
    """Streams a job's log and progress until it ends. This process may end before it: the job goes on.

    Raises: JobFailed with the log's last lines when the job failed or was stopped.
    """
    jobs = client(params.cluster)
    progress = place(params.cluster.storage).at(work.digest)
    lines: list[str] = []
    with bar(f"{work.verb} {work.key}", work.total, progress, "waiting for the cluster") as say:

        def show(text: str) -> None:
            lines.append(text)
            say(text)

        with _followed(jobs, id, show):
            state = _end_of(jobs, id)
    if state != "SUCCEEDED":
        tail = "\n".join("".join(lines[-200:]).strip().splitlines()[-12:])
        raise JobFailed(f"{id}: {state}\n{tail}\nThe same command resumes it; `dgm logs {id}` has the log")


def _end_of(jobs: Any, id: str) -> str:
    """The state in which a job ended. Raises JobFailed when the job server was gone for PATIENCE_S."""
    answered = time.monotonic()
    while True:
        try:
            state = status(jobs, id)
            answered = time.monotonic()
        except (OSError, RuntimeError) as error:
            if time.monotonic() - answered > PATIENCE_S:
                raise JobFailed(
                    f"{id}: the job server has not answered for {PATIENCE_S:g} s ({error}); the job's checkpoints are "
                    "in the run store, the same command resumes it"
                ) from error
            state = "RUNNING"
        if state is None:
            raise JobFailed(f"{id}: the cluster does not know this job any more; the same command resumes it")
        if state not in RUNNING:
            return state
        time.sleep(0.5)


@contextmanager
def _followed(jobs: Any, id: str, show: Any) -> Iterator[None]:
    """Passes the job's log on while the block runs; a broken connection is made again without repeating a line."""
    ended = threading.Event()

    async def follow() -> None:
        seen = 0
        while True:
            passed = 0
            try:
                async for chunk in jobs.tail_job_logs(id):
                    new = chunk[max(seen - passed, 0) :]
                    passed += len(chunk)
                    if new:
                        seen = passed
                        show(new)
                return
            except Exception as error:  # whatever the connection does, the job's state is asked elsewhere
                log.debug("log of %s: %s", id, error)
            if ended.is_set():
                return
            await asyncio.sleep(1.0)

    thread = threading.Thread(target=lambda: asyncio.run(follow()), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5.0)


def call(work: Work, params: Params) -> None:
    """Submits, or attaches to, the work and waits for its end."""
    wait(submit(work, params), work, params)


def listing(cluster: Cluster) -> list[dict[str, Any]]:
    """The cluster's jobs of this project, newest first: id, stage, run, state, seconds."""
    found = []
    for job in client(cluster).list_jobs():
        if (job.submission_id or "").startswith("dgm-"):
            end = job.end_time or time.time() * 1000
            seconds = None if job.start_time is None else round((end - job.start_time) / 1000, 1)
            found.append(
                {"id": job.submission_id, "stage": job.metadata.get("stage"), "run": job.metadata.get("run"),
                 "state": str(job.status.value), "started": job.start_time, "seconds": seconds}
            )  # fmt: skip
    return sorted(found, key=lambda row: -(row["started"] or 0))


def find(cluster: Cluster, words: str) -> str:
    """The one job that an id, its beginning, or a run's name means. Raises ValueError naming the jobs otherwise."""
    rows = listing(cluster)
    named = [row["id"] for row in rows if words in (row["id"], row["run"])]  # newest first
    found = named[:1] or [row["id"] for row in rows if row["id"].startswith(words)]
    if len(found) != 1:
        known = ", ".join(f"{row['id']} ({row['run']})" for row in rows) or "none"
        raise ValueError(f"{words!r}: {len(found)} jobs of that name; there are: {known}")
    return str(found[0])


def logs(cluster: Cluster, words: str, follow: bool, show: Any) -> None:
    jobs, id = client(cluster), find(cluster, words)
    if not follow:
        show(jobs.get_job_logs(id))
        return
    with _followed(jobs, id, show):
        _end_of(jobs, id)


def cancel(cluster: Cluster, words: str) -> str:
    """Stops a job: its training saves a checkpoint within the grace that Ray gives. Returns its id."""
    jobs, id = client(cluster), find(cluster, words)
    jobs.stop_job(id)
    state = _end_of(jobs, id)
    return f"{id}: {state}"
