"""report: everything the other stages left -> one page without a network, and the leaderboard as JSON and CSV.

The page is a function of the files: the same files give the same bytes. Here a view-model of plain values is computed;
`templates/report.html` draws it.
"""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import leaderboard, paths

if TYPE_CHECKING:
    from jinja2 import Template

View = dict[str, Any]
Point = tuple[float, float]
TEMPLATES = Path(__file__).parents[1] / "templates"
WIDTH, HEIGHT = 200, 106  # of a panel of curves, in its own units
SHARP = 0.15  # a curve's first share of steps that may leave its panel, so that the rest has a shape
AS_WRITTEN = "as-written"
# base name -> heading, explanation, which direction is better
COLUMNS = {
    "fid": ("FID", "Fréchet distance of features", "lower"),
    "kid": ("KID", "kernel distance of features", "lower"),
    "precision": ("Precision", "share of samples within the data's support", "higher"),
    "recall": ("Recall", "share of data within the samples' support", "higher"),
    "bits_per_dim": ("Bits/dim", "negative log-likelihood of stored data", "lower"),
    "nll": ("NLL", "negative log-likelihood, nats an example", "lower"),
    "copies": ("Copies", "share of samples attached to training rows beyond chance", "lower"),
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
    bases = sorted({name.split("/")[0] for row in rows for name in row["metrics"]})
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
        "searches": [_search(key) for key in keys],
        "runs": sum(row["method"] is not None for row in rows),
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
        "grids": [{"run": row["run"], "uri": _png(paths.evaluation(row["run"]) / "grid.png"), "fid": _fid(row)}
                  for row in rows if row["method"]],
        "curves": [{"run": run, "panels": panels(run)} for run in runs],
        "ran": [_ran(run, each) for run, each in specs.items()],
    }  # fmt: skip


def _refused(run: str) -> list[View]:
    path = paths.evaluation(run) / "refused.json"
    with _of(path):
        return [{"run": run, "metric": each["metric"], "reason": each["reason"]} for each in _optional(path, [])]


def _table(rows: list[leaderboard.Row]) -> View:
    """Columns, rows, and the axis that the intervals of FID share."""
    bases = [base for base in COLUMNS if any(leaderboard.metric(row, base) for row in rows)]
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
    value, interval = _text(entry)
    kind = entry["kind"] if entry["kind"] != "estimate" else None
    own = None if entry["n"] == column["n"] else entry["n"]
    return {"value": value, "interval": interval, "kind": kind, "n": own, "flag": entry.get("flag")}


def _fid(row: leaderboard.Row) -> str | None:
    entry = leaderboard.metric(row, "fid")
    return _text(entry)[0] if entry else None


def _extractor(dataset: str, rows: list[leaderboard.Row]) -> View | None:
    """Whose features are compared, how many, on what; several shas are all named."""
    entries = [entry for row in rows if row["method"] and (entry := leaderboard.metric(row, "fid"))]
    if not entries:
        return None
    path = paths.extractor(dataset) / "accuracy.json"
    told = _optional(path, None)
    with _of(path):
        accuracy = None if told is None else {"n": told["accuracy"]["n"], "text": _text(told["accuracy"])}
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
    verdict = _optional(path, None)
    row = next((row for row in rows if row["champion"]), None)
    fid = row and leaderboard.metric(row, "fid")
    with _of(path):
        judged = None if verdict is None else _judged(verdict)
    with _of(paths.promotion(dataset)):
        history = [
            {"action": each["action"], "run": each["to"]["run"], "version": each["to"]["version"], "time": each["time"]}
            for each in receipt["history"]
        ]
        keys = ("run", "version", "run_digest")
        champion = receipt["champion"] and {key: receipt["champion"][key] for key in keys}
    return {"champion": champion, "row": row and row["run"], "fid": fid and _text(fid), "history": history,
            "verdict": judged}  # fmt: skip


def _judged(verdict: Mapping[str, Any]) -> View:
    criteria = [{key: each[key] for key in ("name", "passed", "reason")} for each in verdict["criteria"]]
    return {**{key: verdict[key] for key in ("passed", "champion", "challenger", "others")}, "criteria": criteria}


def _ran(run: str, spec: Mapping[str, Any]) -> View:
    """What was trained and how long it took; None where it is not told."""
    lineage = spec["lineage"]
    trained = _optional(paths.artifact(run) / "timing.json", {})
    return {
        "run": run,
        "method": spec["method"],
        "capabilities": spec["capabilities"],
        "params": flat(spec["params"]),
        "train": flat({key: value for key, value in (lineage.get("train") or {}).items() if key != "steps"}),
        "lineage": {key: lineage.get(key) for key in
                    ("run_digest", "data_digest", "seed", "steps", "git_commit", "git_dirty", "torch", "started")},
        "train_seconds": trained.get("train_seconds", trained.get("seconds")),
        "evaluate_seconds": _optional(paths.evaluation(run) / "timing.json", {}).get("seconds"),
    }  # fmt: skip


def _search(key: str) -> View:
    """Trials, finalists on valid, and tuned against as written on test."""
    folder = paths.search(key)
    best = leaderboard.read(folder / "best.json")
    csv_file = folder / "trials.csv"
    told = list(csv.reader(csv_file.read_text(encoding="utf-8").splitlines())) if csv_file.is_file() else [[]]
    with _of(folder / "best.json"):
        found = _told(key, best, told)
    file = paths.root() / "comparisons" / f"{key}.json"
    compared = _optional(file, None)
    with _of(file):
        test = None if compared is None else _comparison(compared["rows"], found["chosen"], file)
    return {**found, "plot": _png(folder / "trials.png"), "test": test}


def _told(key: str, best: Any, told: list[list[str]]) -> View:
    return {
        "key": key,
        "run": best["run"],
        "metric": best["metric"],
        "chosen": best["chosen"],
        "parameters": flat(best["parameters"]),
        "seeds": sorted({seed for each in best["candidates"] for seed in each["seeds"]}, key=int),
        "candidates": [
            {"name": each["name"], "parameters": flat(each["parameters"]), "mean": short(each["mean"]),
             "chosen": each["name"] == best["chosen"],
             "seeds": {seed: short(value) for seed, value in each["seeds"].items()}}
            for each in best["candidates"]
        ],
        "heads": told[0],
        "trials": [[short(cell) for cell in line] for line in told[1:]],
    }  # fmt: skip


def _comparison(rows: list[dict[str, Any]], chosen: str, file: Path) -> View:
    """The same seeds with and without the search's parameters; nothing to compare when as written was chosen."""
    if len({(row["side"], row["seed"]) for row in rows}) < len(rows):
        raise ValueError(f"{file}: two rows of one side have the same seed; `dvc repro` makes it")
    sides = {side: {row["seed"]: row for row in rows if row["side"] == side} for side in (AS_WRITTEN, "tuned")}
    if chosen.replace(" ", "-") == AS_WRITTEN:
        sides.pop("tuned")
    axis = Axis(rows)
    shown = [
        {"seed": seed, "side": side.replace("-", " "), "bar": axis.bar(of[seed]), "tuned": side == "tuned",
         "text": _text(of[seed])}
        for seed in sorted({row["seed"] for row in rows}) for side, of in sides.items() if seed in of
    ]  # fmt: skip
    pairs = [(of_written["value"], sides["tuned"][seed]["value"]) for seed, of_written in sides[AS_WRITTEN].items()
             if seed in sides.get("tuned", {})]  # fmt: skip
    means = [_minus(short(sum(side) / len(pairs))) for side in zip(*pairs, strict=True)]
    return {
        "rows": shown, "ticks": axis.ticks, "metric": rows[0]["metric"] if rows else "", "pairs": len(pairs),
        "n": " or ".join(str(n) for n in sorted({row["n"] for row in rows})), "means": means,
        "lower": sum(tuned < written for written, tuned in pairs),
    }  # fmt: skip


# ---------------------------------------------------------------- axes and curves


class Axis:
    """A log axis over entries with value, low and high; places are percent of its width, text is a label."""

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        entries = list(entries)
        values = [entry["value"] for entry in entries if entry["value"] > 0]
        ends = [entry[key] for entry in entries for key in ("low", "high") if entry[key] is not None and entry[key] > 0]
        if not values:
            values = ends or [1.0]
        floor = min(values) / 4  # an interval may reach to nothing; an axis of logarithms cannot
        low = max(min([*values, *ends]), floor) / 1.15
        high = max([*values, *ends]) * 1.15
        self._low, self._span = math.log(low), math.log(high / low)
        self.ticks = [{"at": self.at(tick), "text": short(tick)} for tick in _log_ticks(low, high)]

    def at(self, value: float | None) -> float:
        """Percent; 0 below the axis' lower end, and for what has no logarithm."""
        if value is None or value <= 0:
            return 0.0
        return round(min(max((math.log(value) - self._low) / self._span, 0.0), 1.0) * 100, 2)

    def bar(self, entry: Mapping[str, Any] | None) -> View | None:
        if entry is None:
            return None
        ends = [entry["value"] if entry[key] is None else entry[key] for key in ("low", "high")]
        low, high = (self.at(end) for end in ends)
        return {"value": self.at(entry["value"]), "low": low, "high": high, "open": low == 0.0}


def _log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """1, 2, 5 x powers of ten within the ends, thinned until they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [float(f"{step}e{power}") for power in powers for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= most:
            break
    return found[:: math.ceil(len(found) / most)] or [low]


def _ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers within the ends."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def panels(run: str) -> list[View]:
    """A run's curves: one panel a metric, the players and validation in it as lines. [] without metrics.jsonl.

    Raises: ValueError naming the file and the line.
    """
    path = paths.artifact(run) / "metrics.jsonl"
    if not path.is_file():
        return []
    series: dict[str, dict[str, list[Point]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            told = json.loads(line)
            step, metrics = float(told["step"]), {name: float(value) for name, value in told["metrics"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: no step with metrics ({error!r}); `dvc repro` makes it") from error
        for name, value in metrics.items():
            if math.isfinite(value):
                player, _, last = name.rpartition("/")
                series.setdefault(last, {}).setdefault(player or "train", []).append((step, value))
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
        marks = _log_ticks(low, high, 4)
    else:
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - room, high + room
        marks = _ticks(low, high)

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
        "y": [{"at": y_at(tick), "text": _minus(short(tick))} for tick in marks],
        "lines": [
            {"label": label, "last": _minus(short(points[-1][1], 3)), "dash": label == "valid",
             "path": " ".join(f"{x_at(x)},{y_at(y)}" for x, y in points),
             "dot": (x_at(points[-1][0]), y_at(points[-1][1]))}
            for label, points in sorted(lines.items(), key=lambda item: (item[0] == "valid", item[0]))
        ],
        "alt": f"{name.replace('_', ' ')} over steps {short(first)} to {short(last)}: {'; '.join(sorted(told))}",
    }  # fmt: skip


# ---------------------------------------------------------------- small things


def short(value: Any, digits: int = 4) -> str:
    """A number, or text that is one, with a few digits; other text as it is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if math.isfinite(number) and number == int(number) and abs(number) < 1e7:
        return str(int(number))
    return f"{number:.{digits}g}"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _text(entry: Mapping[str, Any]) -> tuple[str, str]:
    """A value and its interval."""
    value, interval = leaderboard.number(entry)
    return _minus(value), _minus(interval)


def flat(values: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested sections as dotted names and text."""
    if isinstance(values, Mapping):
        return [pair for key, value in values.items() for pair in flat(value, f"{path}.{key}" if path else str(key))]
    text = short(values, 6) if isinstance(values, float) else json.dumps(values)
    return [(path, values if isinstance(values, str) else text)]


@contextmanager
def _of(path: Path) -> Iterator[None]:
    """Names the file whose content is not what its stage writes."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not what its stage writes ({error!r}); `dvc repro` makes it") from error


def _optional(path: Path, default: Any) -> Any:
    return leaderboard.read(path) if path.is_file() else default


def _png(path: Path) -> str | None:
    """A picture as a data URI; None where there is none."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else None
