"""The search driver: Ray Tune proposes and stops, trials train through the same trainer in their own processes.

A trial's checkpoints lie in the run store under the digest of its own params, so a restored search goes on where its
trials stood, and a parameter set that was trained before is not trained again.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import optuna
import torch
from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from pipelines import progress
from pipelines.cluster.store import Fenced, RunStore, ray_storage
from pipelines.cluster.worker import Job, publish_artifact, trainer_of
from pipelines.params import Cluster, Run, Search, with_values
from pipelines.storage import place


@dataclass(frozen=True)
class Plan:
    """What every trial knows, as plain values.

    Attributes:
        search: the settings.
        base: the run that is varied.
        datasets: names, for checking.
        root: the project's folder, "" on a cluster where every worker has the job's folder.
        data: folder or URI of the prepared dataset.
        storage: the run store.
        data_digest: of the dataset.
        git: commit and dirty flag, for the lineage.
        seed: of evaluation.
        max_samples: of evaluation.
    """

    search: Search
    base: Run
    datasets: tuple[str, ...]
    root: str
    data: str
    storage: str
    data_digest: str
    git: Mapping[str, Any]
    seed: int
    max_samples: int

    def run(self, values: Mapping[str, Any], seed: int | None = None) -> Run:
        return with_values(self.base, values, self.base.key, self.datasets, seed)

    def job(self, run: Run) -> Job:
        from pipelines.stages import train

        return train.job(run, self.data, self.data_digest, self.storage, self.git)

    def rung_steps(self) -> list[int]:
        """The steps at which a trial reports: evenly from the grace period to the end."""
        steps, grace = self.base.train.steps, max(1, round(self.search.grace * self.base.train.steps))
        count = max(self.search.rungs - 1, 1)
        return sorted({round(grace + (steps - grace) * i / count) for i in range(self.search.rungs)} | {steps})


def valid_fid(plan: Plan, method: Any) -> float:
    """The evaluation's Frechet estimator against the valid split; infinite when the samples collapse."""
    import dgm_models
    from dgm_models.metrics.frechet import frechet
    from pipelines.stages.evaluate import extractor_of

    valid = _valid(plan.data)
    n = min(len(valid), plan.max_samples)
    extractor = extractor_of(plan.base.dataset, method.data.dims)
    if extractor is None:
        raise ValueError(f"searches: {plan.base.dataset} has no extractor to compare samples by")
    fake = dgm_models.sample(method, n, plan.seed)
    try:
        return frechet(extractor(valid[:n])[0], extractor(fake)[0]).value
    except ValueError:  # constant or otherwise unusable samples: the worst there is
        return float("inf")


@lru_cache(maxsize=1)
def _valid(data: str) -> Any:
    from pipelines.data.source import source_of

    return source_of(data, "valid", None).x


def train_here(plan: Plan, run: Run, rung: Callable[[int, float], None] | None = None) -> tuple[float, str]:
    """Trains a run in this process, from its newest checkpoint; calls `rung(step, fid)` at every rung.

    Returns: the FID against valid of the final weights, and the run's digest.
    """
    import dgm_models
    from dgm_models.training.runtime import Runtime

    if plan.root:
        os.environ["DGM_ROOT"] = plan.root
    torch.set_num_threads(1)
    job = plan.job(run)
    store = RunStore(job.storage, job.digest)
    rungs = set(plan.rung_steps())
    if not store.has_artifact():
        method, trainer = trainer_of(job, Runtime(precision=run.train.precision))
        with store.newest() as folder:
            if folder:
                trainer.load(folder)
        trainer.train = replace(trainer.train, report_every=_divisor(rungs, run), checkpoint_every=run.train.steps)

        def report(step: int, metrics: Mapping[str, float]) -> None:
            if rung and step in rungs and step < run.train.steps:
                with suppress(Fenced):  # another trial trains the same params, and stores them
                    store.save(step, trainer.save)  # before the report: a stopped trial never returns from it
                weights = trainer.final()
                rung(step, valid_fid(plan, replace_model(method, weights)))

        started = time.perf_counter()
        trainer.run(report)
        facts = {"world": 1, "seconds": round(time.perf_counter() - started, 3)}
        with suppress(Fenced):
            publish_artifact(job, method, trainer.final_state(), trainer.history, store, facts)
        method = replace_model(method, trainer.final())
    else:
        with store.fetched("artifact") as folder:
            method = dgm_models.load(folder)
    value = valid_fid(plan, method)
    if rung:
        rung(run.train.steps, value)
    return value, job.digest


def replace_model(method: Any, weights: Any) -> Any:
    """The method with other weights, in evaluation mode, the training's own untouched."""
    model = copy.deepcopy(weights).eval()
    return replace(method, model=model)


def _divisor(rungs: set[int], run: Run) -> int:
    """The largest interval that meets every rung."""
    return math.gcd(*rungs, run.train.steps)


def trial(plan: Plan, values: dict[str, Any]) -> None:
    """One trial, in its own process."""
    train_here(plan, plan.run(values), lambda step, fid: tune.report({"fid": fid, "step": step}))


def finalist(plan: Plan, values: dict[str, Any], seed: int) -> tuple[float, str]:
    return train_here(plan, plan.run(values, seed))


def as_written(plan: Plan) -> dict[str, Any] | None:
    """The run's own values in the search's space, or None when one is not written down."""
    values = {}
    for dotted in plan.search.space:
        value = _lookup(plan.base.section, dotted.split("."))
        if value is None and dotted.startswith("optim."):
            value = _lookup(plan.base.section, ["optim", dotted.split(".")[-1]])
        if value is None:
            return None
        values[dotted] = value
    return values


def _lookup(section: Any, names: list[str]) -> Any:
    for name in names:
        section = section.get(name) if isinstance(section, Mapping) else None
    return section


def search(ray: Any, plan: Plan, digest: str, cluster: Cluster, where: str) -> list[dict[str, Any]]:
    """Runs, or restores, the search under its digest.

    Args:
        where: URI of the folder that says how far it is.
    Returns: one row a trial: {trial, values, fid, step, seconds, state}.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    steps, settings = plan.base.train.steps, plan.search
    rungs = plan.rung_steps()
    folder, filesystem = ray_storage(f"{plan.storage}/tune")
    name = digest
    trainable = tune.with_resources(partial(trial, plan), {"cpu": cluster.cpus, "gpu": int(cluster.gpu)})
    if tune.Tuner.can_restore(f"{folder}/{name}", storage_filesystem=filesystem):
        tuner = tune.Tuner.restore(
            f"{folder}/{name}", trainable=trainable, resume_errored=True, resume_unfinished=True,
            storage_filesystem=filesystem,
        )  # fmt: skip
    else:
        own = as_written(plan)
        algorithm = OptunaSearch(
            metric="fid", mode="min", seed=settings.seed, points_to_evaluate=[own] if own else None
        )
        tuner = tune.Tuner(
            trainable,
            param_space={dotted: _domain(space) for dotted, space in settings.space.items()},
            tune_config=tune.TuneConfig(
                metric="fid", mode="min", num_samples=settings.trials, reuse_actors=True,
                search_alg=ConcurrencyLimiter(algorithm, settings.concurrent),
                scheduler=ASHAScheduler(
                    time_attr="step", max_t=steps, grace_period=rungs[0], reduction_factor=max(settings.reduction, 2)
                ),
            ),
            run_config=tune.RunConfig(
                name=name, storage_path=folder, storage_filesystem=filesystem, verbose=0,
                callbacks=[TrialProgress(where)],
            ),
        )  # fmt: skip
    results = tuner.fit()
    rows = []
    for number, result in enumerate(results):
        metrics = result.metrics or {}
        rows.append(
            {"trial": number, "values": dict(result.config or {}), "fid": metrics.get("fid"),
             "step": metrics.get("step"), "seconds": metrics.get("time_total_s"),
             "state": "failed" if result.error else "finished" if metrics.get("step") == steps else "stopped",
             "error": str(result.error).strip().splitlines()[-1] if result.error else None}
        )  # fmt: skip
    return rows


class TrialProgress(Callback):  # type: ignore[misc]
    """Writes the number of finished trials, and the best value so far, for the progress bar."""

    def __init__(self, where: str) -> None:
        self.where, self.done, self.best = where, 0, float("inf")

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        self.best = min(self.best, result["fid"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.done += 1
        progress.tell(place(self.where), self.done, {"best_fid": self.best})


def _domain(space: Any) -> Any:
    if space.log_uniform:
        return tune.loguniform(*space.log_uniform)
    return tune.uniform(*space.uniform) if space.uniform else tune.choice(list(space.choice))


def finals(ray: Any, plan: Plan, candidates: Mapping[str, dict[str, Any]]) -> dict[str, dict[int, tuple[float, str]]]:
    """Retrains every candidate with every fresh seed: candidate -> seed -> (fid on valid, digest)."""
    task = ray.remote(num_cpus=1)(finalist)
    waiting = {
        (name, seed): task.remote(plan, values, seed)
        for name, values in candidates.items()
        for seed in plan.search.seeds
    }
    found: dict[str, dict[int, tuple[float, str]]] = {}
    for (name, seed), reference in waiting.items():
        found.setdefault(name, {})[seed] = ray.get(reference)
    return found
