"""train: a prepared dataset and a run's params -> `artifacts/<run>/`."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import files, paths
from pipelines.cluster.store import RunStore
from pipelines.cluster.worker import Job
from pipelines.data.manifest import FILE as MANIFEST
from pipelines.params import Params, Run, canonical_digest, identity, with_values
from pipelines.progress import bar

if TYPE_CHECKING:
    from pipelines.cluster.submission import Work

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
    """The identity of a training: params, data, code, seed and the torch that computes, whatever it was built for."""
    import torch

    version = torch.__version__.split("+")[0]  # a laptop's CPU build submits to a cluster's CUDA build
    parts = {"run": identity(run), "data": data_digest, "code": code_digest(run.method), "torch": version}
    return canonical_digest(parts)[:32]


def git_state() -> dict[str, Any]:
    """Commit and whether tracked files differ from it; a project without git says null; a job, its submitter's."""
    from pipelines.cluster import submission

    submitted = submission.ticket()
    if submitted:
        return dict(submitted["git"])

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=paths.root(), capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")  # `dvc repro` writes it
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if changes is None else bool(changes)}


def job_of(run: Run, params: Params) -> Job:
    """The training of a run, with its identity and lineage; the prepared dataset is staged where a cluster is set."""
    from pipelines.data import shards
    from pipelines.data.stage import stage

    folder, storage = paths.data(run.dataset), params.cluster.store
    data = stage(folder, storage) if params.cluster.where else str(folder.absolute())
    return job(run, data, shards.read_manifest(folder).digest, storage, git_state())


def job(run: Run, data: str, data_digest: str, storage: str, git: Mapping[str, Any]) -> Job:
    """A training on known data, a folder or a URI: its digest, and the lineage that its artifact will carry."""
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
    return Job(run, data, storage, digest, lineage)


def best_of(search: str) -> Path:
    """Where a search says what it chose."""
    return paths.search(search) / "best.json"


def tuned_run(key: str, params: Params) -> Run:
    """A tuned run: the run that its search varied, with the search's best parameters."""
    search = params.tuned[key]
    file = best_of(search)
    if not file.is_file():
        raise ValueError(f"tuned.{key}: {file.relative_to(paths.code())} is missing; run `dgm tune {search}` first")
    best = json.loads(file.read_text())
    return with_values(params.run(params.searches[search].run), best["parameters"], key, params.datasets)


def resolve(key: str, params: Params) -> Run:
    """The run called `key`, among `runs` or `tuned`."""
    return tuned_run(key, params) if key in params.tuned else params.run(key)


def work_of(run: Run, job: Job, verb: str, params: Params) -> Work:
    """A training as a cluster's work: its dataset's manifest goes along, and what a tuned run was chosen by."""
    from pipelines.cluster.submission import Work

    inputs = [paths.data(run.dataset) / MANIFEST]
    if run.key in params.tuned:
        inputs.append(best_of(params.tuned[run.key]))
    return Work(verb, run.dataset if verb == "extractor" else run.key, job.digest, tuple(inputs), run.train.steps)


def ensure(run: Run, params: Params, verb: str = "train") -> Job:
    """Sees to it that the run store holds the run's finished artifact: it is there, or is trained here or as a job."""
    from pipelines.cluster import session, submission

    job = job_of(run, params)
    submission.check_digest(job.digest)
    if RunStore(job.storage, job.digest).has_artifact():
        log.warning("runs.%s: digest %s is in the store already: nothing to train", run.key, job.digest[:12])
    elif session.job_server(params.cluster):
        submission.call(work_of(run, job, verb, params), params)
    else:
        train_here(job, params)
    return job


def train_here(job: Job, params: Params) -> None:
    """Trains through Ray Train on this machine's Ray, or on the cluster that this process is part of."""
    from pipelines.cluster import session
    from pipelines.storage import place

    where, curves = place(job.storage).at(job.digest), curves_of(job, params)
    with session.session(params.cluster), bar(f"train {job.run.key}", job.run.train.steps, where, "starting Ray"):
        from pipelines.cluster.callback import Watch

        session.fit(job, params.cluster, [Watch(curves, where.uri)])
    if curves:
        with RunStore(job.storage, job.digest).fetched("artifact") as folder:
            curves.complete([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        curves.finish("FINISHED")


def train(run: Run, out: Path, params: Params, verb: str = "train") -> Mapping[str, Any]:
    """Trains a run through Ray Train, or takes the finished artifact of the same digest from the store, into `out`.

    Returns: the artifact's lineage.
    """
    from dgm_models.training import checkpoint

    job = ensure(run, params, verb)
    with RunStore(job.storage, job.digest).fetched("artifact") as folder, files.whole(out, seal=True) as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        if run.dataset in params.codes:
            compose(copy, run.dataset)
        spec = checkpoint.read_document(copy, "spec")
        spec["lineage"]["run"] = run.key  # the same training may have been a search's trial
        files.write_json(copy / "spec.json", spec)
    found: Mapping[str, Any] = spec["lineage"]
    return found


def compose(artifact: Path, codes: str) -> None:
    """Makes a prior's artifact one of the data that its codes stand for: the decoder's weights are copied into it.

    Args:
        artifact: of a run on codes; its spec and weights are replaced.
        codes: the dataset that it was trained on, beside which lies what made it.
    Raises: ValueError when the decoder there is not the one by which the codes were made.
    """
    from dgm_models import method as library
    from pipelines.data.manifest import read_manifest

    prior, parent = library.load(artifact), library.load(paths.decoder(codes))
    made, found = read_manifest(paths.data(codes)).source.files["decoder"], library.fingerprint(parent)
    if made != found:
        raise ValueError(f"data/{codes}: made by the decoder {made[:12]}, beside it lies {found[:12]}; run `dvc repro`")
    origin = {name: prior.lineage[name] for name in ("dataset", "data_digest")}
    data = {name: parent.lineage[name] for name in ("dataset", "data_digest")}
    with tempfile.TemporaryDirectory(prefix="dgm-") as temporary:
        whole = library.save(
            library.compose(prior, parent), Path(temporary, "whole"), lineage={**prior.lineage, **data, "codes": origin}
        )
        for name in ("spec.json", "weights.safetensors"):
            shutil.copy(whole / name, artifact / name)


def curves_of(job: Job, params: Params) -> Any:
    """The MLflow run of a training's curves; constructing it touches nothing. None in a job that no tracker serves:
    the submitter's registration sends the artifact's curves."""
    from pipelines import tracking
    from pipelines.cluster import submission

    tags = {name: str(job.lineage[name]) for name in ("git_commit", "git_dirty", "data_digest", "seed")}
    if submission.ticket() and tracking.shared_uri(params.tracking.uri) is None:
        return None
    return tracking.Curves(
        job.run.key,
        job.digest,
        params.modelled(job.run.dataset),
        identity(job.run),
        tags,
        paths.scratch() / "spool",
        uri=params.tracking.where,
    )
