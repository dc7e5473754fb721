"""train: a prepared dataset and a run's params -> `artifacts/<run>/`."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import files, paths
from pipelines.cluster.store import RunStore
from pipelines.cluster.worker import Job
from pipelines.params import Params, Run, canonical_digest, identity, with_values
from pipelines.progress import bar

log = logging.getLogger("dgm.train")


def code_digest(method: str) -> str:
    """sha256 over the files that decide what a method's training does."""
    from dgm_models import registry

    total = hashlib.sha256()
    for name in paths.code_of(registry.row(method).file):
        path = paths.code() / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            total.update(file.relative_to(paths.code()).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def run_digest(run: Run, data_digest: str) -> str:
    """The identity of a training: params, data, code, seed and the torch that computes."""
    import torch

    parts = {"run": identity(run), "data": data_digest, "code": code_digest(run.method), "torch": torch.__version__}
    return canonical_digest(parts)[:32]


def git_state() -> dict[str, Any]:
    """Commit and whether tracked files differ from it; a project without git says null."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=paths.root(), capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")  # `dvc repro` writes it
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if changes is None else bool(changes)}


def job_of(run: Run, params: Params) -> Job:
    """The training of a run, with its identity and lineage; the dataset must be prepared."""
    from pipelines.data import shards

    folder = paths.data(run.dataset)
    return job(run, folder, shards.read_manifest(folder).digest, storage_of(params), git_state())


def storage_of(params: Params) -> str:
    """The run store as an absolute folder or a URI."""
    storage = params.cluster.storage
    return storage if "://" in storage else str((paths.root() / storage).absolute())


def job(run: Run, folder: Path, data_digest: str, storage: str, git: Mapping[str, Any]) -> Job:
    """A training on known data: its digest, and the lineage that its artifact will carry."""
    import torch

    digest = run_digest(run, data_digest)
    lineage = {
        "run": run.key,
        "run_digest": digest,
        "dataset": run.dataset,
        "data_digest": data_digest,
        "seed": run.seed,
        "train": dict(identity(run)["train"]),
        "torch": torch.__version__,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **git,
    }
    return Job(run, str(folder.absolute()), storage, digest, lineage)


def tuned_run(key: str, params: Params) -> Run:
    """A tuned run: the run that its search varied, with the search's best parameters."""
    import json

    search = params.tuned[key]
    file = paths.search(search) / "best.json"
    if not file.is_file():
        raise ValueError(f"tuned.{key}: {file.relative_to(paths.code())} is missing; run `dgm tune {search}` first")
    best = json.loads(file.read_text())
    return with_values(params.run(params.searches[search].run), best["parameters"], key, params.datasets)


def resolve(key: str, params: Params) -> Run:
    """The run called `key`, among `runs` or `tuned`."""
    return tuned_run(key, params) if key in params.tuned else params.run(key)


def train(run: Run, out: Path, params: Params) -> Mapping[str, Any]:
    """Trains a run through Ray Train, or takes the finished artifact of the same digest from the store.

    Returns: the artifact's lineage.
    """
    from dgm_models.training import checkpoint
    from pipelines.cluster import session

    job = job_of(run, params)
    store = RunStore(job.storage, job.digest)
    if store.has_artifact():
        log.warning("runs.%s: digest %s is in the store already: nothing to train", run.key, job.digest[:12])
    else:
        curves, progress = curves_of(job, params), paths.scratch() / "progress" / f"{job.digest}.json"
        with session.session(params.cluster), bar(f"train {run.key}", run.train.steps, progress):
            from pipelines.cluster.callback import Watch

            session.fit(job, params.cluster, [Watch(curves, progress)])
        curves.finish("FINISHED")
    with store.fetched("artifact") as folder, files.whole(out, seal=True) as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        spec = checkpoint.read_document(copy, "spec")
        spec["lineage"]["run"] = run.key  # the same training may have been a search's trial
        files.write_json(copy / "spec.json", spec)
    found: Mapping[str, Any] = spec["lineage"]
    return found


def curves_of(job: Job, params: Params) -> Any:
    """The MLflow run of a training's curves; constructing it touches nothing."""
    from pipelines.tracking import Curves

    tags = {name: str(job.lineage[name]) for name in ("git_commit", "git_dirty", "data_digest", "seed")}
    uri = os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri
    return Curves(job.run.key, job.digest, job.run.dataset, identity(job.run), tags, paths.scratch() / "spool", uri=uri)
