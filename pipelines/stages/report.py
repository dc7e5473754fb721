"""report: everything the other stages left -> one page without a network, and the leaderboard as JSON and CSV.

The page is a function of the files: the same files give the same bytes. Here a view-model of plain values is computed;
`templates/report.html` draws it.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import leaderboard, paths
from pipelines.views import game, latents, search
from pipelines.views.parts import Axis, View, flat, log_ticks, minus, naming, optional, png, short, ticks, words

if TYPE_CHECKING:
    from jinja2 import Template

Point = tuple[float, float]
TEMPLATES = Path(__file__).parents[1] / "templates"
WIDTH, HEIGHT = 200, 106  # of a panel of curves, in its own units
SHARP = 0.15  # a curve's first share of steps that may leave its panel, so that the rest has a shape
# base name -> heading, explanation, which direction is better
COLUMNS = {
    "fid": ("FID", "Fréchet distance of features", "lower"),
    "kid": ("KID", "kernel distance of features", "lower"),
    "precision": ("Precision", "share of samples within the data's support", "higher"),
    "recall": ("Recall", "share of data within the samples' support", "higher"),
    "bits_per_dim": ("Bits/dim", "negative log-likelihood of stored data", "lower"),
    "bits_per_dim/ode": ("Bits/dim by ODE", "of stored data, estimated by the probability-flow ODE", "lower"),
    "nll": ("NLL", "negative log-likelihood, nats an example", "lower"),
    "nll/ode": ("NLL by ODE", "nats an example, estimated by the probability-flow ODE", "lower"),
    "copies": ("Copies", "share of samples attached to training rows beyond chance", "lower"),
    "evaluations_per_sample": ("Evaluations", "of the network for one sample", "lower"),
}


def report(out: Path) -> Path:
    """Writes index.html, leaderboard.json, leaderboard.csv (for `dvc plots`) and metrics.json (for `dvc metrics`).

    Returns: the page's path.
    Raises: ValueError naming the file that is missing or damaged.
    """
    from pipelines import files

    rows = leaderboard.rows()
    page = render(view(rows))
    files.write_json(out / "leaderboard.json", rows)
    files.write_json(out / "metrics.json", values(rows))
    files.write_bytes(out / "leaderboard.csv", wide(rows).encode())
    files.write_bytes(out / "index.html", page.encode())
    return out / "index.html"


def render(model: View) -> str:
    return str(_template().render(model))


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("report.html")


def wide(rows: Sequence[leaderboard.Row]) -> str:
    """CSV of one line a run: for every metric value, interval, n and kind, without the extractor in the name."""
    told = [each for row in rows for each in row["metrics"].items()]
    bases = sorted({name.split("/")[0] if entry["extractor"] else name for name, entry in told})
    fields = {"": "value", "_low": "low", "_high": "high", "_n": "n", "_kind": "kind"}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    heads = ["dataset", "run", "family", "method", "champion"]
    writer.writerow(heads + [base + end for base in bases for end in fields])
    for row in rows:
        entries = [leaderboard.metric(row, base) or {} for base in bases]
        writer.writerow([row[key] for key in heads] + [entry.get(key) for entry in entries for key in fields.values()])
    return stream.getvalue()


def values(rows: Sequence[leaderboard.Row]) -> dict[str, dict[str, dict[str, float]]]:
    """{dataset: {run: {metric: value}}}."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["method"]:
            told = {name: entry["value"] for name, entry in row["metrics"].items()}
            found.setdefault(row["dataset"], {})[row["run"]] = told
    return found


# ---------------------------------------------------------------- the view-model


def view(rows: Sequence[leaderboard.Row]) -> View:
    """What the template draws: text, numbers in percent, data URIs."""
    names = sorted({row["dataset"] for row in rows})
    folder = paths.search("any").parent
    keys = sorted(path.parent.name for path in folder.glob("[!.]*/best.json"))
    return {
        "datasets": [_dataset(name, [row for row in rows if row["dataset"] == name]) for name in names],
        "searches": [search.view(key) for key in keys],
        "runs": sum(row["method"] is not None for row in rows),
        "vanished": f"{game.VANISHED:g}",
    }


def _dataset(name: str, rows: list[leaderboard.Row]) -> View:
    runs = [row["run"] for row in rows if row["method"]]
    specs = {run: leaderboard.spec(run) for run in runs}
    data = next(iter(specs.values()))["data"]
    return {
        "name": name,
        "data": data,
        "shape": " × ".join(str(size) for size in data["shape"]),
        **_table(rows),
        "extractor": _extractor(name, rows),
        "promotion": _promotion(name, rows),
        "refused": [refused for run in runs for refused in _refused(run)],
        "grids": [{"run": row["run"], "uri": png(paths.evaluation(row["run"]) / "grid.png"), "fid": _fid(row)}
                  for row in rows if row["method"]],
        "games": [found for row in rows if row["method"] and (found := _game(row))],
        "latents": [found for row in rows if row["method"] and (found := latents.view(row))],
        "curves": [{"run": run, "panels": panels(run)} for run in runs],
        "ran": [_ran(run, each) for run, each in specs.items()],
    }  # fmt: skip


def _game(row: leaderboard.Row) -> View | None:
    with naming(paths.evaluation(row["run"]) / "evaluation.json"):
        return game.view(row["run"], curves(row["run"]), leaderboard.metric(row, "modes"), panel)


def _refused(run: str) -> list[View]:
    path = paths.evaluation(run) / "refused.json"
    with naming(path):
        return [{"run": run, "metric": each["metric"], "reason": each["reason"]} for each in optional(path, [])]


def _table(rows: list[leaderboard.Row]) -> View:
    """Columns, rows, and the axis that the intervals of FID share."""
    bases = leaderboard.shown(rows, COLUMNS)
    fids = {id(row): leaderboard.metric(row, "fid") for row in rows}
    axis = Axis([entry for entry in fids.values() if entry])
    columns: list[View] = []
    for base in bases:
        entries = [entry for row in rows if (entry := leaderboard.metric(row, base))]
        of_runs = [entry for row in rows if row["method"] and (entry := leaderboard.metric(row, base))] or entries
        sizes, units = {entry["n"] for entry in of_runs}, {entry["unit"] for entry in of_runs}
        label, text, better = COLUMNS[base]
        columns.append({
            "base": base, "label": label, "text": text, "better": better, "n": sizes.pop() if len(sizes) == 1 else None,
            "unit": units.pop() if len(units) == 1 else None,
        })  # fmt: skip
    shown = [
        {"run": row["run"], "family": row["family"], "method": row["method"], "champion": row["champion"],
         "cells": [_cell(leaderboard.metric(row, column["base"]), column) for column in columns],
         "bar": axis.bar(fids[id(row)])}
        for row in rows
    ]  # fmt: skip
    references = {row["run"]: axis.bar(fids[id(row)]) for row in rows if not row["method"]}
    return {"columns": columns, "rows": shown, "ticks": axis.ticks, "references": references}


def _cell(entry: Mapping[str, Any] | None, column: Mapping[str, Any]) -> View | None:
    if entry is None:
        return None
    value, interval = words(entry)
    kind = leaderboard.kind(column["base"], entry)
    own = None if entry["n"] == column["n"] else entry["n"]
    return {"value": value, "interval": interval, "kind": kind, "n": own, "flag": entry.get("flag")}


def _fid(row: leaderboard.Row) -> str | None:
    entry = leaderboard.metric(row, "fid")
    return words(entry)[0] if entry else None


def _extractor(dataset: str, rows: list[leaderboard.Row]) -> View | None:
    """Whose features are compared, how many, on what; several shas are all named."""
    entries = [entry for row in rows if row["method"] and (entry := leaderboard.metric(row, "fid"))]
    if not entries:
        return None
    path = paths.extractor(dataset) / "accuracy.json"
    told = optional(path, None)
    with naming(path):
        accuracy = None if told is None else {"n": told["accuracy"]["n"], "text": words(told["accuracy"])}
    shas = {str(entry["extractor_sha256"]) for row in rows if (entry := leaderboard.metric(row, "fid"))}
    return {
        "name": " and ".join(sorted({str(entry["extractor"]) for entry in entries})),
        "sha": " and ".join(sorted(sha[:12] for sha in shas)),
        "several": len(shas) > 1 or len({entry["n"] for entry in entries}) > 1,
        "n": " or ".join(str(n) for n in sorted({entry["n"] for entry in entries})),
        "split": " and ".join(sorted({entry["split"] for entry in entries})),
        "dim": (told or {}).get("feature_dim"),
        "accuracy": accuracy,
    }


def _promotion(dataset: str, rows: list[leaderboard.Row]) -> View:
    """The champion by the receipt, and the last verdict in its own words."""
    receipt = leaderboard.promotion(dataset) or {"champion": None, "history": []}
    path = paths.promotion(dataset).with_suffix(".verdict.json")
    verdict = optional(path, None)
    row = next((row for row in rows if row["champion"]), None)
    fid = row and leaderboard.metric(row, "fid")
    with naming(path):
        judged = None if verdict is None else _judged(verdict)
    with naming(paths.promotion(dataset)):
        history = [
            {"action": each["action"], "run": each["to"]["run"], "version": each["to"]["version"], "time": each["time"]}
            for each in receipt["history"]
        ]
        keys = ("run", "version", "run_digest")
        champion = receipt["champion"] and {key: receipt["champion"][key] for key in keys}
    return {"champion": champion, "row": row and row["run"], "fid": fid and words(fid), "history": history,
            "verdict": judged}  # fmt: skip


def _judged(verdict: Mapping[str, Any]) -> View:
    criteria = [{key: each[key] for key in ("name", "passed", "reason")} for each in verdict["criteria"]]
    return {**{key: verdict[key] for key in ("passed", "champion", "challenger", "others")}, "criteria": criteria}


def _ran(run: str, spec: Mapping[str, Any]) -> View:
    """What was trained and how long it took; None where it is not told."""
    lineage = spec["lineage"]
    trained = optional(paths.artifact(run) / "timing.json", {})
    return {
        "run": run,
        "method": spec["method"],
        "capabilities": spec["capabilities"],
        "params": flat(spec["params"]),
        "train": flat({key: value for key, value in (lineage.get("train") or {}).items() if key != "steps"}),
        "lineage": {key: lineage.get(key) for key in
                    ("run_digest", "data_digest", "seed", "steps", "git_commit", "git_dirty", "torch", "started")},
        "train_seconds": trained.get("train_seconds", trained.get("seconds")),
        "evaluate_seconds": optional(paths.evaluation(run) / "timing.json", {}).get("seconds"),
    }  # fmt: skip


# ---------------------------------------------------------------- curves


def curves(run: str) -> dict[str, list[Point]]:
    """A run's metrics over steps, those that are finite. {} without metrics.jsonl.

    Raises: ValueError naming the file and the line.
    """
    path = paths.artifact(run) / "metrics.jsonl"
    if not path.is_file():
        return {}
    found: dict[str, list[Point]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            told = json.loads(line)
            step, metrics = float(told["step"]), {name: float(value) for name, value in told["metrics"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: no step with metrics ({error!r}); `dvc repro` makes it") from error
        for name, value in metrics.items():
            if math.isfinite(value):
                found.setdefault(name, []).append((step, value))
    return found


def panels(run: str) -> list[View]:
    """A run's curves: one panel a metric, the players and validation in it as lines. Raises: as `curves`."""
    series: dict[str, dict[str, list[Point]]] = {}
    for name, points in curves(run).items():
        if not name.startswith(game.NASH):  # of one moment: `views/game.py` tells them
            player, _, last = name.rpartition("/")
            series.setdefault(last, {})[player or "train"] = points
    order = sorted(series, key=lambda name: ({"loss": 0, "gradient_norm": 1}.get(name, 2), name))
    return [panel(name, series[name]) for name in order]


def panel(name: str, lines: Mapping[str, Sequence[Point]]) -> View:
    """One panel: polylines in WIDTH x HEIGHT, ticks in the same units, and a sentence that says what they do."""
    steps = [x for points in lines.values() for x, _ in points]
    first, last = min(steps), max(steps)
    every = [y for points in lines.values() for _, y in points]
    late = [y for points in lines.values() for x, y in points if x >= first + SHARP * (last - first)]
    cut = max(every) - min(every) > 3 * (max(late) - min(late)) > 0
    logs = name == "gradient_norm" and min(every) > 0
    seen = late if cut and not logs else every
    low, high = min(seen), max(seen)
    scale: Callable[[float], float] = math.log if logs else float
    if logs:
        low, high = low / 1.1, high * 1.1
        marks = log_ticks(low, high, 4)
    else:
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - room, high + room
        marks = ticks(low, high)

    def x_at(x: float) -> float:
        return round(WIDTH * (x - first) / (last - first), 1) if last > first else WIDTH / 2

    def y_at(y: float) -> float:
        return round(HEIGHT * (1 - (scale(y) - scale(low)) / (scale(high) - scale(low))), 1)

    told = [f"{label} from {short(points[0][1])} to {short(points[-1][1])}" for label, points in lines.items()]
    return {
        "name": name.replace("_", " "),
        "log": logs,
        "cut": cut and not logs,
        "x": [{"at": x_at(tick), "text": short(tick)} for tick in (first, last)][: 2 if last > first else 1],
        "y": [{"at": y_at(tick), "text": minus(short(tick))} for tick in marks],
        "lines": [
            {"label": label, "last": minus(short(points[-1][1], 3)), "dash": label == "valid",
             "path": " ".join(f"{x_at(x)},{y_at(y)}" for x, y in points),
             "dot": (x_at(points[-1][0]), y_at(points[-1][1]))}
            for label, points in sorted(lines.items(), key=lambda item: (item[0] == "valid", item[0]))
        ],
        "alt": f"{name.replace('_', ' ')} over steps {short(first)} to {short(last)}: {'; '.join(sorted(told))}",
    }  # fmt: skip
