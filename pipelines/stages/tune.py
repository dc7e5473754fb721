"""tune: a search's params -> `searches/<key>/`: best.json, trials.jsonl, trials.csv, pictures, finalists' artifacts.

Selection is on the valid split alone; the finalists stand against the run as it is written, with the same fresh seeds.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgm_models.construct import plain
from dgm_models.training import checkpoint
from pipelines import files, paths
from pipelines.cluster.store import RunStore
from pipelines.params import METRICS, Params, Search, canonical_digest, check_metrics
from pipelines.progress import bar

if TYPE_CHECKING:
    from pipelines.cluster.search import Finals, Plan, Row
    from pipelines.cluster.submission import Work
    from pipelines.tracking import Curves

log = logging.getLogger("dgm.tune")

AS_WRITTEN = "as written"


def plan_of(key: str, params: Params) -> Plan:
    from pipelines.cluster.search import Plan
    from pipelines.stages.train import job_of

    search = params.searches[key]
    base = params.run(search.run)
    check_data(key, base.dataset, search)
    job = job_of(base, params)
    git = {name: job.lineage[name] for name in ("git_commit", "git_dirty")}
    return Plan(
        search, base, tuple(params.datasets), "" if paths.ticket().is_file() else str(paths.root()), job.data,
        job.storage, job.lineage["data_digest"], git, params.evaluation,
    )  # fmt: skip


def check_data(key: str, dataset: str, search: Search) -> None:
    """Raises: ConfigError for the first metric of a search that its dataset cannot have."""
    from pipelines.data import shards
    from pipelines.stages.evaluate import extractor_of

    manifest = shards.read_manifest(paths.data(dataset))
    extractor = extractor_of(dataset, manifest.spec().dims)
    has = {
        "extractor": extractor is not None, "classifier": extractor is not None and extractor.method is not None,
        "labels": manifest.classes > 0, "levels": manifest.levels is not None, "factors": bool(manifest.factors),
    }  # fmt: skip
    check_metrics(search, f"searches.{key}", dataset, lambda metric: all(has[need] for need in metric.data))


def digest_of(plan: Plan) -> str:
    """The identity of a search: the run that it varies, its settings, and what measures its trials."""
    from pipelines.data import shards
    from pipelines.stages.evaluate import extractor_of
    from pipelines.stages.train import run_digest

    dataset = plan.base.dataset
    extractor = extractor_of(dataset, shards.read_manifest(paths.data(dataset)).spec().dims)
    parts = {"run": run_digest(plan.base, plan.data_digest), "search": plain(plan.search)}
    parts |= {"evaluation": plain(plan.evaluation), "extractor": extractor and extractor.sha256}
    return "search-" + canonical_digest(parts)[:24]


def work_of(key: str, params: Params) -> Work:
    """A search as a cluster's work: its dataset's manifest and its extractor go along."""
    from pipelines.cluster.submission import Work
    from pipelines.data.manifest import FILE

    plan = plan_of(key, params)
    inputs = [paths.data(plan.base.dataset) / FILE, paths.extractor(plan.base.dataset)]
    return Work("tune", key, digest_of(plan), tuple(path for path in inputs if path.exists()), plan.search.trials)


def ensure(key: str, params: Params) -> tuple[Plan, str]:
    """Sees to it that the run store holds the search's result: it is there, or is searched here or as a job.

    Returns: what was searched, and the digest under which it is stored.
    """
    from pipelines.cluster import session, submission

    plan = plan_of(key, params)
    digest = digest_of(plan)
    submission.check_digest(digest)
    if RunStore(plan.storage, digest).has_artifact():
        log.warning("searches.%s: %s is in the store already: nothing to search", key, digest)
    elif session.job_server(params.cluster):
        submission.call(work_of(key, params), params)
    else:
        search_here(key, plan, digest, params)
    return plan, digest


def tune_stage(key: str, out: Path, params: Params) -> dict[str, Any]:
    """The result of a search in `out`, and in MLflow; it is searched first where the store does not hold it yet."""
    plan, digest = ensure(key, params)
    with RunStore(plan.storage, digest).fetched("artifact") as found, files.whole(out, seal=True) as folder:
        shutil.copytree(found, folder, dirs_exist_ok=True)
    record(key, plan, digest, out, params)
    best: dict[str, Any] = files.read_json(out / "best.json")
    return best


def search_here(key: str, plan: Plan, digest: str, params: Params) -> None:
    """Searches, retrains the finalists, and publishes what was found to the run store."""
    from pipelines.cluster import search as driver
    from pipelines.cluster import session
    from pipelines.storage import place

    settings, where, curves = plan.search, place(plan.storage).at(digest), curves_of(key, plan, digest, params)
    with session.session(params.cluster) as ray:
        with bar(f"tune {key}", settings.trials, where, "starting Ray"):
            rows = driver.search(plan, digest, params.cluster, where.uri, curves)
        try:
            candidates = candidates_of(key, plan, rows)
        except ValueError:
            if curves:
                curves.finish("FAILED")
            raise
        results = driver.finals(ray, plan, candidates)
    with tempfile.TemporaryDirectory(prefix="dgm-") as temporary:
        folder = Path(temporary, "search")
        write(folder, key, plan, rows, candidates, results)
        checkpoint.seal(folder)
        RunStore(plan.storage, digest).publish("artifact", folder)


def candidates_of(key: str, plan: Plan, rows: list[Row]) -> dict[str, dict[str, Any]]:
    """The run as written and the finalists: name -> values. A trial that trained the run as written is no second one.

    Raises: ValueError with the trials' reasons when no trial has an objective.
    """
    finished = [row for row in ordered(rows) if row["state"] == "finished" and math.isfinite(row["objective"])]
    if not finished:
        notes = sorted({row["note"] for row in rows if row["note"]})
        raise ValueError(
            f"searches.{key}: no trial ended with {plan.search.formula}: {'; '.join(notes) or 'all were stopped'}"
        )
    own = plan.own()
    others = [row for row in finished if row["values"] != own]
    first = {f"trial {row['trial']}": row["values"] for row in others[: plan.search.finalists]}
    return {AS_WRITTEN: {}} | first


def write(folder: Path, key: str, plan: Plan, rows: list[Row], candidates: Mapping[str, Any], results: Finals) -> None:
    """The search's out."""
    from pipelines.views import search as views

    search = plan.search
    described = [candidate(search, name, candidates[name], seeds) for name, seeds in results.items()]
    chosen = min(described, key=lambda each: math.inf if each["mean"] is None else each["mean"])["name"]
    own = plan.own()
    marks = {row["trial"]: AS_WRITTEN for row in rows if row["values"] == own}
    marks |= {row["trial"]: "chosen" for row in rows if chosen in (f"trial {row['trial']}", marks.get(row["trial"]))}
    best = {
        "search": key,
        "run": search.run,
        "chosen": chosen,
        "parameters": candidates[chosen],
        "metric": f"{plan.search.formula} on valid",
        "metrics": {name: METRICS[name].better for name in search.metrics},
        "candidates": described,
    }
    files.write_json(folder / "best.json", best)
    lines = (json.dumps(jsonable(row), sort_keys=True) for row in rows)
    (folder / "trials.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "trials.csv").write_text(table(rows, search))
    (folder / "parallel.png").write_bytes(views.parallel(ordered(rows), search, marks))
    if len(search.metrics) > 1:
        (folder / "pareto.png").write_bytes(views.pareto(rows, search.metrics[:2], marks))
    for name in {AS_WRITTEN, chosen}:
        for seed, (_, run) in results[name].items():
            store = RunStore(plan.storage, run)
            if store.has_artifact():  # a training that diverged has none
                with store.fetched("artifact") as artifact:
                    side = "as-written" if name == AS_WRITTEN else "tuned"
                    shutil.copytree(artifact, folder / "finalists" / side / str(seed))


def candidate(search: Search, name: str, values: Any, seeds: Mapping[int, Any]) -> dict[str, Any]:
    """A finalist on valid: objective and metrics with every seed, and their means; null for what is not finite."""
    told = {str(seed): jsonable({"objective": search.score(found.metrics), **found.metrics, "run_digest": digest})
            for seed, (found, digest) in seeds.items()}  # fmt: skip
    scores = [search.score(found.metrics) for found, _ in seeds.values()]
    return {"name": name, "parameters": values, "mean": jsonable(sum(scores) / len(scores)), "seeds": told}


def jsonable(value: Any) -> Any:
    """Numbers that JSON does not know as null."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ordered(rows: list[Row]) -> list[Row]:
    """Finished trials by their objective, stopped ones by theirs, then those without a finite one."""

    def rank(row: Row) -> tuple[Any, ...]:
        return not math.isfinite(row["objective"]), row["state"] != "finished", row["objective"], row["trial"]

    return sorted(rows, key=rank)


def table(rows: list[Row], search: Search) -> str:
    """The trials as CSV, best first; a value that is no number is written as in params.yaml's JSON."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = list(search.space)
    writer.writerow(["trial", *names, "objective", *search.metrics, "step", "seconds", "state", "note"])
    for row in ordered(rows):
        values = [value if isinstance(value, str) else json.dumps(value) for value in map(row["values"].get, names)]
        seconds = None if row["seconds"] is None else round(row["seconds"], 2)
        metrics = [row["metrics"].get(name) for name in search.metrics]
        told = [row["trial"], *values, row["objective"], *metrics, row["step"], seconds, row["state"], row["note"]]
        writer.writerow(told)
    return stream.getvalue()


# ---------------------------------------------------------------- MLflow


def curves_of(key: str, plan: Plan, digest: str, params: Params) -> Curves | None:
    """The search's run in MLflow; constructing it touches nothing. None in a job that no tracker serves: the
    submitter records the search when it has fetched it."""
    from pipelines import tracking
    from pipelines.cluster import submission

    if submission.ticket() and tracking.shared_uri(params.tracking.uri) is None:
        return None
    tags = {**{name: str(value) for name, value in plan.git.items()}, "data_digest": plan.data_digest}
    return tracking.Curves(
        f"search {key}", digest, plan.base.dataset, plain(plan.search), tags, paths.scratch() / "spool",
        uri=params.tracking.where,
    )  # fmt: skip


def record(key: str, plan: Plan, digest: str, folder: Path, params: Params) -> None:
    """A finished search in MLflow: its run, one nested run a trial and one a finalist and seed. What is there stays."""
    from pipelines.cluster.search import child_of, ending, finite

    search, curves = plan.search, curves_of(key, plan, digest, params)
    if curves is None:
        return
    best = files.read_json(folder / "best.json")
    means = {each["name"]: each["mean"] for each in best["candidates"] if each["mean"] is not None}
    final = {"objective/chosen": means.get(best["chosen"]), "objective/as written": means.get(AS_WRITTEN)}
    known, steps = [], plan.base.train.steps
    reached = {"step": steps, "metrics": {name: value for name, value in final.items() if value is not None}}
    if not curves.complete([reached], "FINISHED", {"dgm.chosen": best["chosen"]}):
        return  # the same command tries again
    for line in (folder / "trials.jsonl").read_text().splitlines():
        row = json.loads(line)
        child = child_of(curves, digest, row["trial"], row["values"])
        known.append(child.run_digest)
        rungs = [
            {"step": rung["step"], "metrics": finite({**told, "objective": search.score(told)})}
            for rung in row["rungs"]
            if (told := {name: math.nan if value is None else value for name, value in rung["metrics"].items()})
        ]
        if not child.complete(rungs, *ending(row["state"])):
            return
    for each in best["candidates"]:
        for seed, told in each["seeds"].items():
            own = f"{digest}.final.{told['run_digest'][:12]}"
            child = curves.child(f"{each['name']}, seed {seed}", own, {**each["parameters"], "seed": int(seed)}, {})
            known.append(own)
            metrics = {name: value for name, value in told.items() if isinstance(value, float)}
            if not child.complete([{"step": steps, "metrics": metrics}], *ending("finalist")):
                return
    curves.end_strays(known)


# ---------------------------------------------------------------- test


def compare_stage(key: str, out: Path, params: Params) -> dict[str, Any]:
    """Tuned against as written, seed by seed, on the test split: the search's metrics with their intervals."""
    import dgm_models
    from pipelines.cluster.search import row_of
    from pipelines.stages.evaluate import drawn, evaluate

    best, search = files.read_json(paths.search(key) / "best.json"), params.searches[key]
    dataset, settings = params.run(search.run).dataset, params.evaluation
    wanted = frozenset(METRICS[name].attempt for name in search.metrics)
    rows = []
    for side in ("as-written", "tuned"):
        source = side if best["chosen"] != AS_WRITTEN else "as-written"
        for folder in sorted((paths.search(key) / "finalists" / source).glob("[!.]*")):
            method = dgm_models.load(folder)
            fake = drawn(method, dataset, settings)
            found, _ = evaluate(method, fake, dataset, settings, wanted=wanted)
            told = [row for name in search.metrics if (row := row_of(name, found.rows))]
            rows += [{**row, "side": side, "seed": int(folder.name)} for row in told]
    result = {"search": key, "chosen": best["chosen"], "metrics": best["metrics"], "rows": rows}
    files.write_json(out, result)
    return result
