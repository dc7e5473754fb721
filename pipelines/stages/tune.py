"""tune: a search's params -> `searches/<key>/`: best.json, trials.csv, trials.png and the finalists' artifacts.

Selection is on the valid split alone; the finalists stand against the run as it is written, with the same fresh seeds.
"""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

from dgm_models.construct import plain
from pipelines import files, paths
from pipelines.cluster.store import RunStore
from pipelines.params import Params, canonical_digest
from pipelines.progress import bar

AS_WRITTEN = "as written"


def plan_of(key: str, params: Params) -> Any:
    from pipelines.cluster.search import Plan
    from pipelines.data import shards
    from pipelines.stages.train import git_state, storage_of

    search = params.searches[key]
    base = params.run(search.run)
    data = paths.data(base.dataset)
    return Plan(
        search, base, tuple(params.datasets), str(paths.root()), str(data.absolute()), storage_of(params),
        shards.read_manifest(data).digest, git_state(), params.evaluation.seed, params.evaluation.max_samples,
    )  # fmt: skip


def tune_stage(key: str, out: Path, params: Params) -> dict[str, Any]:
    """Searches, retrains the finalists, and writes what was found."""
    from pipelines.cluster import search as driver
    from pipelines.cluster import session
    from pipelines.data import shards
    from pipelines.stages.evaluate import extractor_of
    from pipelines.stages.train import run_digest

    plan = plan_of(key, params)
    settings = plan.search
    base_digest = run_digest(plan.base, plan.data_digest)
    extractor = extractor_of(plan.base.dataset, shards.read_manifest(Path(plan.data)).spec().dims)
    if extractor is None:
        raise ValueError(f"searches.{key}: {plan.base.dataset} has no extractor to compare samples by")
    parts = {"run": base_digest, "search": plain(settings), "evaluation": plain(params.evaluation)}
    digest = canonical_digest(parts | {"extractor": extractor.sha256})[:24]
    progress = paths.scratch() / "progress" / f"{digest}.json"
    with session.session(params.cluster) as ray:
        with bar(f"tune {key}", settings.trials, progress):
            rows = driver.search(ray, plan, digest, params.cluster, progress)
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
    with files.whole(out) as folder:
        files.write_json(folder / "best.json", best)
        (folder / "trials.csv").write_text(table(rows, list(settings.space)))
        (folder / "trials.png").write_bytes(plot(rows, list(settings.space)))
        for name in {AS_WRITTEN, chosen}:
            for seed, (_, run) in results[name].items():
                target = folder / "finalists" / ("as-written" if name == AS_WRITTEN else "tuned") / str(seed)
                with RunStore(plan.storage, run).fetched("artifact") as artifact:
                    shutil.copytree(artifact, target)
    return best


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
