"""tune: a search's params -> `searches/<key>/`: best.json, trials.csv, trials.png and the finalists' artifacts.

Selection is on the valid split alone; the finalists stand against the run as it is written, with the same fresh seeds.
"""

from __future__ import annotations

import csv
import io
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgm_models.construct import plain
from dgm_models.training import checkpoint
from pipelines import files, paths
from pipelines.cluster.store import RunStore
from pipelines.params import Params, canonical_digest
from pipelines.progress import bar

if TYPE_CHECKING:
    from pipelines.cluster.submission import Work

log = logging.getLogger("dgm.tune")

AS_WRITTEN = "as written"


def plan_of(key: str, params: Params) -> Any:
    from pipelines.cluster.search import Plan
    from pipelines.stages.train import job_of

    search = params.searches[key]
    base = params.run(search.run)
    job = job_of(base, params)
    git = {name: job.lineage[name] for name in ("git_commit", "git_dirty")}
    return Plan(
        search, base, tuple(params.datasets), "" if paths.ticket().is_file() else str(paths.root()), job.data,
        job.storage, job.lineage["data_digest"], git, params.evaluation.seed, params.evaluation.max_samples,
    )  # fmt: skip


def digest_of(key: str, plan: Any, params: Params) -> str:
    """The identity of a search: the run that it varies, its settings, and what measures its trials."""
    from pipelines.data import shards
    from pipelines.stages.evaluate import extractor_of
    from pipelines.stages.train import run_digest

    dataset = plan.base.dataset
    extractor = extractor_of(dataset, shards.read_manifest(paths.data(dataset)).spec().dims)
    if extractor is None:
        raise ValueError(f"searches.{key}: {dataset} has no extractor to compare samples by")
    parts = {"run": run_digest(plan.base, plan.data_digest), "search": plain(plan.search)}
    parts |= {"evaluation": plain(params.evaluation), "extractor": extractor.sha256}
    return "search-" + canonical_digest(parts)[:24]


def work_of(key: str, params: Params) -> Work:
    """A search as a cluster's work: its dataset's manifest and its extractor go along."""
    from pipelines.cluster.submission import Work
    from pipelines.data.manifest import FILE

    plan = plan_of(key, params)
    inputs = (paths.data(plan.base.dataset) / FILE, paths.extractor(plan.base.dataset))
    return Work("tune", key, digest_of(key, plan, params), inputs, plan.search.trials)


def ensure(key: str, params: Params) -> RunStore:
    """Sees to it that the run store holds the search's result: it is there, or is searched here or as a job."""
    from pipelines.cluster import session, submission

    plan = plan_of(key, params)
    digest = digest_of(key, plan, params)
    submission.check_digest(digest)
    store = RunStore(plan.storage, digest)
    if store.has_artifact():
        log.warning("searches.%s: %s is in the store already: nothing to search", key, digest)
    elif session.job_server(params.cluster):
        submission.call(work_of(key, params), params)
    else:
        search_here(key, plan, digest, params)
    return store


def tune_stage(key: str, out: Path, params: Params) -> dict[str, Any]:
    """The result of a search in `out`; it is searched first where the store does not hold it yet."""
    with ensure(key, params).fetched("artifact") as found, files.whole(out, seal=True) as folder:
        shutil.copytree(found, folder, dirs_exist_ok=True)
    best: dict[str, Any] = files.read_json(out / "best.json")
    return best


def search_here(key: str, plan: Any, digest: str, params: Params) -> None:
    """Searches, retrains the finalists, and publishes what was found to the run store."""
    from pipelines.cluster import search as driver
    from pipelines.cluster import session
    from pipelines.storage import place

    settings, where = plan.search, place(plan.storage).at(digest)
    with session.session(params.cluster) as ray:
        with bar(f"tune {key}", settings.trials, where, "starting Ray"):
            rows = driver.search(ray, plan, digest, params.cluster, where.uri)
        finished = sorted(
            (row for row in rows if row["state"] == "finished" and row["fid"] < float("inf")),
            key=lambda row: row["fid"],
        )
        if not finished:
            errors = {row["error"] for row in rows if row["error"]}
            raise ValueError(
                f"searches.{key}: no trial ended with samples that have an FID; {'; '.join(errors) or 'see trials'}"
            )
        first = finished[: settings.finalists]
        candidates = {AS_WRITTEN: {}} | {f"trial {row['trial']}": row["values"] for row in first}
        results = driver.finals(ray, plan, candidates)
    means = {name: sum(fid for fid, _ in seeds.values()) / len(seeds) for name, seeds in results.items()}
    chosen = min(means, key=lambda name: means[name])
    best = {
        "search": key,
        "run": settings.run,
        "chosen": chosen,
        "parameters": candidates[chosen],
        "metric": "fid on valid",
        "candidates": [
            {"name": name, "parameters": candidates[name], "mean": means[name],
             "seeds": {str(seed): fid for seed, (fid, _) in seeds.items()}}
            for name, seeds in results.items()
        ],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="dgm-") as temporary:
        folder = Path(temporary, "search")
        files.write_json(folder / "best.json", best)
        (folder / "trials.csv").write_text(table(rows, list(settings.space)))
        (folder / "trials.png").write_bytes(plot(rows, list(settings.space)))
        for name in {AS_WRITTEN, chosen}:
            for seed, (_, run) in results[name].items():
                target = folder / "finalists" / ("as-written" if name == AS_WRITTEN else "tuned") / str(seed)
                with RunStore(plan.storage, run).fetched("artifact") as artifact:
                    shutil.copytree(artifact, target)
        checkpoint.seal(folder)
        RunStore(plan.storage, digest).publish("artifact", folder)


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """The trials as CSV, best first."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["trial", *names, "fid", "step", "seconds", "state"])
    order = sorted(rows, key=lambda row: (row["state"] != "finished", row["fid"] is None, row["fid"] or 0.0))
    for row in order:
        seconds = None if row["seconds"] is None else round(row["seconds"], 2)
        values = [row["values"].get(name) for name in names]
        writer.writerow([row["trial"], *values, row["fid"], row["step"], seconds, row["state"]])
    return stream.getvalue()


def plot(rows: list[dict[str, Any]], names: list[str]) -> bytes:
    """FID on valid against every parameter, one panel each; stopped trials hollow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(3.1 * len(names), 3.0), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    shown = [row for row in rows if row["fid"] is not None and row["fid"] < float("inf")]
    for panel, name in zip(panels, names, strict=True):
        for state, fill in (("finished", "#1f5fa8"), ("stopped", "none")):
            points = [(row["values"][name], row["fid"]) for row in shown if row["state"] == state]
            if points:
                panel.scatter(*zip(*points, strict=True), facecolors=fill, edgecolors="#1f5fa8", label=state)
        numbers = [row["values"][name] for row in shown]
        if numbers and min(numbers) > 0 and max(numbers) / min(numbers) > 10:
            panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(name)
    for panel in panels:
        panel.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("FID on valid (lower is better)")
    panels[0].legend(frameon=False, fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def compare_stage(key: str, out: Path, params: Params) -> dict[str, Any]:
    """Tuned against as written, seed by seed, on the test split: FID with its interval."""
    import dgm_models
    from pipelines.stages.evaluate import compared, evaluate

    best = files.read_json(paths.search(key) / "best.json")
    dataset = params.run(params.searches[key].run).dataset
    rows = []
    for side in ("as-written", "tuned"):
        source = side if best["chosen"] != AS_WRITTEN else "as-written"
        for folder in sorted((paths.search(key) / "finalists" / source).iterdir()):
            method = dgm_models.load(folder)
            fake = dgm_models.sample(method, compared(dataset, params.evaluation), params.evaluation.seed)
            found, _ = evaluate(method, fake, dataset, params.evaluation)
            fid = next(row for row in found.rows if row["metric"].startswith("fid/"))
            rows.append({**fid, "side": side, "seed": int(folder.name)})
    result = {"search": key, "chosen": best["chosen"], "rows": rows}
    files.write_json(out, result)
    return result
