"""What runs in a training worker: resume, step, report, checkpoint, and the artifact at the end."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.cluster.store import RunStore
from pipelines.params import Run

log = logging.getLogger("dgm.worker")


@dataclass(frozen=True)
class Job:
    """One training, as plain values that travel to any worker.

    Attributes:
        run: what is trained.
        data: folder of the prepared dataset.
        storage, digest: where its state lives.
        lineage: what the artifact says of its origin.
    """

    run: Run
    data: str
    storage: str
    digest: str
    lineage: Mapping[str, Any]


def source_of(data: str, split: str, seed: int | None) -> Any:
    """One split of a prepared dataset as a Source."""
    from dgm_models.training.source import ArraySource
    from pipelines.data import shards

    rows = shards.load(Path(data), split)
    return ArraySource(rows.x, shards.read_manifest(Path(data)).spec(), rows.cond, rows.id, seed)


def trainer_of(job: Job, runtime: Any) -> tuple[Any, Any]:
    """The untrained method of a job, and a trainer for it."""
    from dgm_models.training.trainer import Trainer
    from pipelines.params import build_method

    run = job.run
    source = source_of(job.data, "train", run.seed)
    valid = source_of(job.data, "valid", None) if run.train.validate_every else None
    method = build_method(run, source.spec)
    trainer = Trainer(method.model, method.objective, source, run.train, run.optim, run.seed, runtime, valid)
    return method, trainer


def train(job: Job, runtime: Any, report: Callable[[int, dict[str, float]], None]) -> None:
    """Trains to the end, from the newest intact checkpoint; every rank calls it alike.

    Args:
        job: what to train.
        runtime: this worker's place.
        report: called on every rank with (step, metrics) at every interval.
    """
    store = RunStore(job.storage, job.digest)
    method, trainer = trainer_of(job, runtime)
    with store.newest() as folder:
        if folder:
            trainer.load(folder)
    resumed = trainer.step_number
    runtime.barrier()  # no rank may write step N+1 while another still reads step N

    def save(trainer: Any) -> None:
        if runtime.chief:
            store.save(trainer.step_number, trainer.save)
        runtime.barrier()

    started = time.perf_counter()
    trainer.run(report, save)
    if runtime.chief:
        seconds = round(time.perf_counter() - started, 3)
        facts = {"world": runtime.world, "resumed_at": resumed, "seconds": seconds}
        publish_artifact(job, method, trainer, store, facts)
    runtime.barrier()


def publish_artifact(job: Job, method: Any, trainer: Any, store: RunStore, facts: Mapping[str, Any]) -> None:
    """The weights that the training hands on, with their curves, as a sealed folder in the store.

    Args:
        facts: what happened on the way, for the lineage: workers, the step of the last resume (0 for none), and
            the seconds of the loop since then.
    """
    import json

    from dgm_models import method as library
    from dgm_models.training import checkpoint

    method.model.load_state_dict(trainer.final().state_dict())
    with tempfile.TemporaryDirectory(prefix="dgm-") as folder:
        lineage = {**job.lineage, **facts, "steps": trainer.step_number}
        artifact = library.save(method, Path(folder, "artifact"), lineage=lineage)
        lines = (json.dumps({"step": step, "metrics": metrics}, sort_keys=True) for step, metrics in trainer.history)
        (artifact / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        checkpoint.seal(artifact)
        store.publish("artifact", artifact)
    store.drop_checkpoints()


def ray_worker(config: Mapping[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    import ray.train
    import ray.train.torch
    import torch.distributed as dist

    from dgm_models.training.runtime import Runtime

    job: Job = config["job"]
    torch.set_num_threads(job.run.train.threads)
    device = ray.train.torch.get_device()
    if dist.is_initialized() and dist.get_world_size() > 1:
        runtime = Runtime.of_process_group(device, job.run.train.precision)
    else:
        runtime = Runtime(device, precision=job.run.train.precision)

    def report(step: int, metrics: dict[str, float]) -> None:
        ray.train.report({"step": step, **metrics})

    train(job, runtime, report)
