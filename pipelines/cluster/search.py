"""The search driver: Ray Tune proposes and stops, trials train through the same trainer in their own processes.

A trial's checkpoints lie in the run store under the digest of its own params, so a restored search goes on where its
trials stood, and a parameter set that was trained before is not trained again.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

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
from pipelines.params import METRICS, Cluster, Evaluation, Run, Search, canonical_digest, with_values, written
from pipelines.storage import place

if TYPE_CHECKING:
    from pipelines.tracking import Curves

log = logging.getLogger("dgm.search")

Row = dict[str, Any]
UNUSABLE = 1e30  # what Tune hears of an infinite objective: its percentiles cannot subtract infinities


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
        evaluation: how trials are measured.
    """

    search: Search
    base: Run
    datasets: tuple[str, ...]
    root: str
    data: str
    storage: str
    data_digest: str
    git: Mapping[str, Any]
    evaluation: Evaluation

    def run(self, values: Mapping[str, Any], seed: int | None = None) -> Run:
        return with_values(self.base, values, self.base.key, self.datasets, seed)

    def job(self, run: Run) -> Job:
        from pipelines.stages import train

        return train.job(run, self.data, self.data_digest, self.storage, self.git)

    def own(self) -> dict[str, Any] | None:
        """The run's own values in the search's space, defaults filled; None where the space does not contain them."""
        section, values = written(self.base), {}
        for dotted, space in self.search.space.items():
            names = dotted.split(".")
            found, value = _lookup(section, names)
            if not found and names[0] == "optim":  # of a player without settings of its own
                found, value = _lookup(section, ["optim", names[-1]])
            if not found or not space.holds(value):
                return None
            values[dotted] = value
        return values

    @property
    def grace(self) -> float:
        """The steps that every trial is given."""
        return max(self.search.grace * self.base.train.steps, 1.0)

    def rung_steps(self) -> list[int]:
        """The steps at which a trial is measured: evenly from the grace period to the end, each at the next report."""
        steps, every = self.base.train.steps, self.base.train.report_every
        apart = (steps - self.grace) / max(self.search.rungs - 1, 1)
        wanted = (round((self.grace + apart * i) / every, 6) for i in range(self.search.rungs))
        return sorted({min(math.ceil(report) * every, steps) for report in wanted} | {steps})


@dataclass(frozen=True)
class Measured:
    """What a trained model reached on valid.

    Attributes:
        metrics: every metric of the search; the worst there is where one was refused or is not finite.
        note: the reasons, "" without any.
    """

    metrics: dict[str, float]
    note: str = ""


def measure(plan: Plan, method: Any) -> Measured:
    """The search's metrics of a trained model on the valid split, by the evaluation's own estimators."""
    from pipelines.data.fetch import cache_folder
    from pipelines.data.stage import fetch_dataset
    from pipelines.stages.evaluate import drawn, evaluate

    dataset, settings = plan.base.dataset, plan.evaluation
    wanted = frozenset(METRICS[name].attempt for name in plan.search.metrics)
    splits = ("valid", "train") if "copies" in wanted else ("valid",)
    data = fetch_dataset(plan.data, cache_folder() / "data", splits)
    try:
        fake = drawn(method, dataset, settings, "valid", data)
        rows, _ = evaluate(method, fake, dataset, settings, "valid", data, wanted)
    except (ValueError, torch.linalg.LinAlgError) as error:  # samples that nothing can be computed from
        return unusable(plan.search, str(error))
    return of_rows(plan.search, rows.rows, rows.refused)


def of_rows(search: Search, rows: list[Row], refused: list[dict[str, str]]) -> Measured:
    """A search's metrics out of an evaluation's rows."""
    values = {name: value_of(name, rows) for name in search.metrics}
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    metrics = {name: METRICS[name].worst if name in bad else value for name, value in values.items()}
    reasons = {METRICS[name].attempt: f"{name} is missing or not finite" for name in bad}
    reasons |= {each["metric"]: each["reason"] for each in refused}
    return Measured(metrics, "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def unusable(search: Search, reason: str) -> Measured:
    """The worst there is, and why."""
    return Measured({name: METRICS[name].worst for name in search.metrics}, reason.split("\n")[0][:300])


def row_of(name: str, rows: list[Row]) -> Row | None:
    """The row of a metric: "fid" is "fid/<extractor>", "nll" of a model with a condition is "nll_given/<condition>".

    An estimate such as "nll/ode" stands for no other number.
    """
    names = (name, f"{name}_given")
    own = [row for row in rows if row["metric"].split("/")[0] in names and not row["metric"].endswith("/ode")]
    return next((row for row in rows if row["metric"] == name or row in own), None)


def value_of(name: str, rows: list[Row]) -> float:
    found = row_of(name, rows)
    return math.nan if found is None else float(found["value"])


def train_here(plan: Plan, run: Run, rung: Callable[[int, Measured], None] | None = None) -> tuple[Measured, str]:
    """Trains a run in this process, from its newest checkpoint; calls `rung(step, measured)` at every rung.

    Returns: what the final weights reach on valid, and the run's digest. A training that diverges has the worst there
        is, and no artifact.
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
        trainer.train = replace(trainer.train, checkpoint_every=run.train.steps)

        def tell(step: int, save: bool) -> None:
            if not rung or step not in rungs or step == run.train.steps:
                return
            if save:
                with suppress(Fenced):  # another trial trains the same params, and stores them
                    store.save(step, trainer.save)  # before the report: a stopped trial never returns from it
            rung(step, measure(plan, replace_model(method, trainer.final())))

        tell(trainer.step_number, save=False)  # the search may have been killed before it kept what was reported there
        started = time.perf_counter()
        try:
            trainer.run(lambda step, metrics: tell(step, save=True))
        except FloatingPointError as error:
            diverged = unusable(plan.search, str(error))
            if rung:
                rung(trainer.step_number, diverged)
            return diverged, job.digest
        facts = {"world": 1, "seconds": round(time.perf_counter() - started, 3)}
        with suppress(Fenced):
            publish_artifact(job, method, trainer.final_state(), trainer.history, store, facts)
        method = replace_model(method, trainer.final())
    else:
        with store.fetched("artifact") as folder:
            method = dgm_models.load(folder)
    found = measure(plan, method)
    if rung:
        rung(run.train.steps, found)
    return found, job.digest


def replace_model(method: Any, weights: Any) -> Any:
    """The method with other weights, in evaluation mode, the training's own untouched."""
    model = copy.deepcopy(weights).eval()
    return replace(method, model=model)


def trial(plan: Plan, proposed: dict[str, Any]) -> None:
    """One trial, in its own process."""

    def rung(step: int, found: Measured) -> None:
        score = min(plan.search.score(found.metrics), UNUSABLE)
        tune.report({"objective": score, "step": step, "note": found.note, "metrics": found.metrics})

    train_here(plan, plan.run(values_of(plan.search, proposed)), rung)


def finalist(plan: Plan, values: dict[str, Any], seed: int) -> tuple[Measured, str]:
    return train_here(plan, plan.run(values, seed))


# ---------------------------------------------------------------- the space


def _domain(space: Any) -> Any:
    if space.log_uniform:
        return tune.loguniform(*space.log_uniform)
    return tune.uniform(*space.uniform) if space.uniform else tune.choice(space.texts())


def sampler_of(search: Search, own: Mapping[str, Any] | None) -> OptunaSearch:
    """Proposes values of the space, the run's own before any other."""
    first = [proposal_of(search, own)] if own else None
    return OptunaSearch(metric="objective", mode="min", seed=search.seed, points_to_evaluate=first)


def values_of(search: Search, proposed: Mapping[str, Any]) -> dict[str, Any]:
    """What the sampler proposed, as values of the params: a choice is proposed as its JSON."""
    return {
        dotted: json.loads(proposed[dotted]) if space.choice is not None else proposed[dotted]
        for dotted, space in search.space.items()
    }


def proposal_of(search: Search, values: Mapping[str, Any]) -> dict[str, Any]:
    """The other way."""
    return {
        dotted: json.dumps(values[dotted]) if space.choice is not None else values[dotted]
        for dotted, space in search.space.items()
    }


def _lookup(section: Any, names: list[str]) -> tuple[bool, Any]:
    for name in names:
        if not isinstance(section, Mapping) or name not in section:
            return False, None
        section = section[name]
    return True, section


# ---------------------------------------------------------------- the driver


def search(plan: Plan, digest: str, cluster: Cluster, where: str, curves: Curves | None = None) -> list[Row]:
    """Runs, or restores, the search under its digest.

    Args:
        where: URI of the folder that says how far it is.
        curves: the search's run in MLflow, under which every trial gets one of its own; None without a tracker.
    Returns: one row a trial: {trial, values, metrics, objective, step, seconds, state, note, rungs}; `rungs` are
        {step, metrics}, and the rest is of the last one.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = plan.search
    folder, filesystem = ray_storage(f"{plan.storage}/tune")
    name = digest
    trainable = tune.with_resources(partial(trial, plan), {"cpu": cluster.cpus, "gpu": int(cluster.gpu)})
    if tune.Tuner.can_restore(f"{folder}/{name}", storage_filesystem=filesystem):
        tuner = tune.Tuner.restore(
            f"{folder}/{name}", trainable=trainable, resume_errored=True, resume_unfinished=True,
            storage_filesystem=filesystem,
        )  # fmt: skip
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={dotted: _domain(space) for dotted, space in settings.space.items()},
            tune_config=tune.TuneConfig(
                metric="objective", mode="min", num_samples=settings.trials, reuse_actors=True,
                search_alg=ConcurrencyLimiter(sampler_of(settings, plan.own()), settings.concurrent),
                scheduler=ASHAScheduler(
                    time_attr="step", max_t=plan.base.train.steps, grace_period=plan.grace,
                    reduction_factor=max(settings.reduction, 2),
                ),
            ),
            run_config=tune.RunConfig(
                name=name, storage_path=folder, storage_filesystem=filesystem, verbose=0,
                callbacks=[Trials(plan, digest, where, curves)],
            ),
        )  # fmt: skip
    return [row_of_result(plan, number, result) for number, result in enumerate(tuner.fit())]


def row_of_result(plan: Plan, number: int, result: Any) -> Row:
    """A trial's row out of what Tune kept of it."""
    last, search = result.metrics or {}, plan.search
    rungs = {}
    if result.metrics_dataframe is not None:
        for line in result.metrics_dataframe.to_dict("records"):  # a restored trial may have reported a step twice
            rungs[int(line["step"])] = {name: float(line[f"metrics/{name}"]) for name in search.metrics}
    error = str(result.error).strip().splitlines()[-1][:300] if result.error else ""
    metrics = dict(last.get("metrics") or {})
    finished = last.get("step") == plan.base.train.steps
    return {
        "trial": number, "values": values_of(search, result.config), "metrics": metrics,
        "objective": search.score(metrics), "step": last.get("step"), "seconds": last.get("time_total_s"),
        "state": "failed" if error else "finished" if finished else "stopped",
        "note": error or last.get("note", ""),
        "rungs": [{"step": step, "metrics": rungs[step]} for step in sorted(rungs)],
    }  # fmt: skip


class Trials(Callback):  # type: ignore[misc]
    """Follows the trials in the driver: curves to MLflow, and how many have ended for the progress bar.

    Nothing in here may stop a search.
    """

    def __init__(self, plan: Plan, digest: str, where: str, curves: Curves | None) -> None:
        self.plan, self.digest, self.where, self.curves, self.best = plan, digest, where, curves, math.inf
        self.children: dict[str, Curves] = {}
        self.ended: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:  # Tune keeps its callbacks for a restore
        return {**self.__dict__, "children": {}}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        try:
            score = self.plan.search.score(result["metrics"])
            self.best = min(self.best, score)
            child = self._child(trials, trial)
            if child:
                child.log(result["step"], finite({**result["metrics"], "objective": score}))
        except Exception:
            log.exception("a rung could not be passed on")

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        finished = trial.last_result.get("step") == self.plan.base.train.steps
        self._ended(trials, trial, "finished" if finished else "stopped")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._ended(trials, trial, "failed")

    def _ended(self, trials: Any, trial: Any, state: str) -> None:
        try:
            child = self._child(trials, trial)
            if child:
                child.finish(*ending(state))
                del self.children[trial.trial_id]
            earlier = {each.trial_id for each in trials if each.is_finished()}  # by a driver before this one
            self.ended |= earlier | {trial.trial_id}
            progress.tell(place(self.where), len(self.ended), finite({"best": self.best}))
        except Exception:
            log.exception("a trial's end could not be passed on")

    def _child(self, trials: Any, trial: Any) -> Curves | None:
        if self.curves and trial.trial_id not in self.children:
            number = [each.trial_id for each in trials].index(trial.trial_id)
            values = values_of(self.plan.search, trial.config)
            self.children[trial.trial_id] = child_of(self.curves, self.digest, number, values)
        return self.children.get(trial.trial_id)


def child_of(curves: Curves, digest: str, number: int, values: Mapping[str, Any]) -> Curves:
    """A trial's run in MLflow. Its identity contains the values: a trial that began just before the driver was killed
    may be proposed anew, with others."""
    own = f"{digest}.{number}.{canonical_digest(dict(values))[:12]}"
    return curves.child(f"trial {number}", own, values, {"dgm.trial": str(number)})


def ending(state: str) -> tuple[str, dict[str, str]]:
    """A trial's state as MLflow's status and a tag."""
    return "FAILED" if state == "failed" else "FINISHED", {"dgm.state": state}


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """What a chart can show."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


Finals = dict[str, dict[int, tuple[Measured, str]]]


def finals(ray: Any, plan: Plan, candidates: Mapping[str, dict[str, Any]]) -> Finals:
    """Retrains every candidate with every fresh seed: candidate -> seed -> (what it reaches on valid, digest)."""
    task = ray.remote(num_cpus=1)(finalist)
    waiting = {
        (name, seed): task.remote(plan, values, seed)
        for name, values in candidates.items()
        for seed in plan.search.seeds
    }
    found: Finals = {}
    for (name, seed), reference in waiting.items():
        found.setdefault(name, {})[seed] = ray.get(reference)
    return found
