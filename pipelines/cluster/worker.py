"""What runs in a training worker: resume, step, report, checkpoint, and the artifact at the end."""

from __future__ import annotations

import logging
import math
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


def trainer_of(job: Job, runtime: Any) -> tuple[Any, Any]:
    """The untrained method of a job, and a trainer for it."""
    from dgm_models.training.trainer import Trainer
    from pipelines.data.source import source_of
    from pipelines.params import build_method

    run = job.run
    source = source_of(job.data, "train", run.seed, run.stream, run.train.batch_size)
    valid = source_of(job.data, "valid", None) if run.train.validate_every else None
    method = build_method(run, source.spec)
    trainer = Trainer(method.model, method.objective, source, run.train, run.optim, run.seed, runtime, valid)
    return method, trainer


class Notices:
    """Asks, about once a second and at the same step on every rank, whether this training is to lose its place soon.

    Args:
        runtime: this worker's place.
        nodes: the nodes that are about to go, "" for none, and the seconds that they have left, infinite when nobody
            says; called on every rank alike.
        stopping: whether the driver is about to end; asked on the chief alone.
    """

    INTERVAL_S = 1.0
    HOLD_S = 10.0  # before a node's end: what is trained after the last checkpoint is trained again

    def __init__(self, runtime: Any, nodes: Callable[[], tuple[str, float]], stopping: Callable[[], bool]) -> None:
        self.runtime, self.nodes, self.stopping = runtime, nodes, stopping
        self.asked_at, self.asked_step, self.span, self.known = time.monotonic(), 0, 1, ("", False, False)

    def __call__(self, step: int) -> float | None:
        """For a new notice, and again shortly before a node's end: the seconds to wait once all is saved; or None."""
        if step < self.asked_step + self.span:
            return None
        names, left = self.nodes()
        facts = torch.zeros(3, device=self.runtime.device)
        if self.runtime.chief:
            pace = (step - self.asked_step) / max(time.monotonic() - self.asked_at, 1e-6)
            span = max(1.0, min(pace * self.INTERVAL_S, 10.0 * self.span))
            facts += torch.tensor([span, self.stopping(), left < self.HOLD_S])
        self.runtime.sum([facts])  # every rank asks next at the step that the chief's clock says, and saves with it
        found = (names, bool(facts[1]), bool(names) and bool(facts[2]))
        new = found not in (self.known, ("", False, False))
        self.asked_at, self.asked_step, self.span, self.known = time.monotonic(), step, int(facts[0]), found
        return (max(left, 0.0) if found[2] else 0.0) if new else None


def train(
    job: Job,
    runtime: Any,
    report: Callable[[int, dict[str, float]], None],
    notices: Notices | None = None,
    on_notice: Callable[[], None] = lambda: None,
) -> None:
    """Trains to the end, from the newest intact checkpoint; every rank calls it alike.

    Args:
        job: what to train.
        runtime: this worker's place.
        report: called on every rank with (step, metrics) at every interval.
        notices: asked after every step; a new notice makes a checkpoint at once, and training goes on until shortly
            before the end that it names; what would come after the last checkpoint is not begun.
        on_notice: called on the chief when that checkpoint is stored.
    Raises: Fenced when another group of workers has taken this run over.
    """
    store = RunStore(job.storage, job.digest)
    method, trainer = trainer_of(job, runtime)
    if runtime.chief:
        store.claim()
    runtime.barrier()  # the newest checkpoint is the same for every rank once no earlier owner can add one
    with store.newest() as folder:
        if folder:
            trainer.load(folder)
    resumed = trainer.step_number
    runtime.barrier()  # no rank may write step N+1 while another still reads step N

    def save(trainer: Any) -> None:
        snapshot = trainer.snapshot()
        if runtime.chief:
            store.save(trainer.step_number, snapshot.write)
        runtime.barrier()

    def heed(step: int) -> None:
        wait = notices(step) if notices else None
        if wait is not None:
            save(trainer)
            if runtime.chief:
                log.warning("runs.%s: notice: step %d is saved", job.run.key, step)
                on_notice()
                time.sleep(wait)  # the other ranks wait for this one's gradients

    started = time.perf_counter()
    trainer.run(report, save, heed)
    weights = trainer.final_state()
    if runtime.chief:
        seconds = round(time.perf_counter() - started, 3)
        facts = {"world": runtime.world, "resumed_at": resumed, "seconds": seconds}
        publish_artifact(job, method, weights, trainer.history, store, facts)
    runtime.barrier()


def publish_artifact(
    job: Job, method: Any, weights: Mapping[str, Any], history: Any, store: RunStore, facts: Mapping[str, Any]
) -> None:
    """The weights that the training hands on, with their curves, as a sealed folder in the store.

    Args:
        weights: by name, as the method's model has them.
        history: (step, metrics) of every report.
        facts: what happened on the way, for the lineage: workers, the step of the last resume (0 for none), and
            the seconds of the loop since then.
    """
    import json

    from dgm_models import method as library
    from dgm_models.training import checkpoint

    method.model.load_state_dict(weights)
    with tempfile.TemporaryDirectory(prefix="dgm-") as folder:
        lineage = {**job.lineage, **facts, "steps": history[-1][0]}
        artifact = library.save(method, Path(folder, "artifact"), lineage=lineage)
        lines = (json.dumps({"step": step, "metrics": metrics}, sort_keys=True) for step, metrics in history)
        (artifact / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        checkpoint.seal(artifact)
        store.publish("artifact", artifact)
    store.drop_checkpoints()


def ray_worker(config: Mapping[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    import ray
    import ray.train
    import ray.train.torch
    import torch.distributed as dist

    from dgm_models.training.runtime import Runtime, keep_freed_memory

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it logs every report otherwise
    job: Job = config["job"]
    cluster, notice = config["cluster"], config["notice"]
    torch.set_num_threads(job.run.train.threads)
    keep_freed_memory()
    device = ray.train.torch.get_device()
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    runtime = Runtime(
        device, 0 if alone else dist.get_rank(), 1 if alone else dist.get_world_size(), job.run.train.precision,
        shard=cluster.shard, checkpoint_activations=cluster.checkpoint_activations,
    )  # fmt: skip

    def nodes() -> tuple[str, float]:
        found = ray.train.get_preemption_info()
        if found is None:
            return "", math.inf
        left = math.inf if found.deadline_ms is None else found.deadline_ms / 1000 - time.time()
        return ",".join(found.preempted_node_ids), left

    def report(step: int, metrics: dict[str, float]) -> None:
        ray.train.report({"step": step, **metrics})

    notices = Notices(runtime, nodes, lambda: ray.get(notice.given.remote()))
    train(job, runtime, report, notices, lambda: ray.get(notice.saved.remote()))
