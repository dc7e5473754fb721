"""A search on the page, and its pictures. What is read was written by the stages `tune` and `compare`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import leaderboard, paths
from pipelines.params import METRICS
from pipelines.views.parts import Axis, View, flat, log_ticks, minus, naming, optional, png, short, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipelines.params import Search, Space

Row = Mapping[str, Any]
AS_WRITTEN = "as-written"
ARROWS = {"lower": "↓", "higher": "↑"}
INK, ACCENT, GREY = "#16191d", "#1f5fa8", "#9aa3ad"


def view(key: str) -> View:
    """Trials, finalists on valid, and tuned against as written on test."""
    folder, file = paths.search(key), paths.comparison(key)
    best, compared = leaderboard.read(folder / "best.json"), optional(file, None)
    csv_file = folder / "trials.csv"
    told = list(csv.reader(csv_file.read_text(encoding="utf-8").splitlines())) if csv_file.is_file() else [[]]
    with naming(folder / "best.json"):
        found = _told(key, best, told)
    with naming(file):
        test = None if compared is None else _comparison(compared, file)
    return {**found, "parallel": png(folder / "parallel.png"), "pareto": png(folder / "pareto.png"), "test": test}


def _told(key: str, best: Any, told: list[list[str]]) -> View:
    better = {"objective": "lower", **best["metrics"]}
    return {
        "key": key,
        "run": best["run"],
        "metric": best["metric"],
        "metrics": [{"name": name, "better": each} for name, each in best["metrics"].items()],
        "chosen": best["chosen"],
        "parameters": flat(best["parameters"]),
        "seeds": sorted({seed for each in best["candidates"] for seed in each["seeds"]}, key=int),
        "candidates": [_candidate(each, list(best["metrics"]), best["chosen"]) for each in best["candidates"]],
        "heads": [{"name": name, "arrow": ARROWS.get(better.get(name, ""))} for name in told[0]],
        "trials": [[_minus(short(cell)) for cell in line] for line in told[1:]],
    }


def _candidate(each: Any, names: list[str], chosen: str) -> View:
    means = {}
    for name in names:
        values = [seed[name] for seed in each["seeds"].values() if seed[name] is not None]
        means[name] = _number(sum(values) / len(values) if len(values) == len(each["seeds"]) else None)
    return {
        "name": each["name"], "chosen": each["name"] == chosen, "mean": _number(each["mean"]), "means": means,
        "seeds": {seed: _number(told["objective"]) for seed, told in each["seeds"].items()},
    }  # fmt: skip


def _number(value: float | None) -> str:
    """Null stands for what is not finite."""
    return "no value" if value is None else _minus(short(value))


def _minus(text: str) -> str:
    return minus(text) if text[:1] == "-" else text


def _comparison(compared: Any, file: Path) -> View:
    """The same seeds with and without the search's parameters; nothing to compare when as written was chosen."""
    rows, better = compared["rows"], compared["metrics"]
    if len({(row["side"], row["seed"], row["metric"]) for row in rows}) < len(rows):
        raise ValueError(f"{file}: two rows of one side have the same seed; `dvc repro` makes it")
    names = list(dict.fromkeys(row["metric"] for row in rows))
    found = {(row["metric"], row["side"], row["seed"]): row for row in rows}
    sides = [AS_WRITTEN] if compared["chosen"].replace(" ", "-") == AS_WRITTEN else [AS_WRITTEN, "tuned"]
    seeds = sorted({row["seed"] for row in rows})
    first = [row for row in rows if names and row["metric"] == names[0]]
    axis = Axis(first, most=4) if all(row["value"] > 0 for row in first) else None  # no logarithm, no bars
    shown = [
        {"seed": seed, "side": side.replace("-", " "), "tuned": side == "tuned",
         "bar": axis and axis.bar(found.get((names[0], side, seed))),
         "texts": [words(row) if (row := found.get((name, side, seed))) else ("–", "") for name in names]}
        for seed in seeds for side in sides if any((name, side, seed) in found for name in names)
    ]  # fmt: skip
    heads = [{"name": name, "better": (way := _better(name, better)), "arrow": ARROWS[way]} for name in names]
    pairs = [_pairs(found, head, seeds) for head in heads] if len(sides) == 2 else []
    return {
        "rows": shown, "ticks": axis.ticks if axis else [], "heads": heads, "bars": axis is not None,
        "n": " or ".join(str(n) for n in sorted({row["n"] for row in rows})), "pairs": pairs,
    }  # fmt: skip


def _better(metric: str, told: Mapping[str, str]) -> str:
    """The direction of an evaluation's metric by its name in the search: "fid/digits" is "fid"."""
    base = metric.split("/")[0]
    return next(told[name] for name in (metric, base, base.removesuffix("_given")) if name in told)


def _pairs(found: Mapping[Any, Row], head: View, seeds: Sequence[int]) -> View:
    """Both sides of one metric over the seeds that both have."""
    name, sign = head["name"], 1 if head["better"] == "lower" else -1
    both = [
        (found[name, AS_WRITTEN, seed]["value"], found[name, "tuned", seed]["value"])
        for seed in seeds if (name, AS_WRITTEN, seed) in found and (name, "tuned", seed) in found
    ]  # fmt: skip
    means = [_minus(short(sum(side) / len(both))) for side in zip(*both, strict=True)]
    won = sum(sign * tuned < sign * written for written, tuned in both)
    return {"name": name, "seeds": len(both), "means": means, "won": won}


# ---------------------------------------------------------------- pictures


def pareto(rows: Sequence[Row], names: Sequence[str], marks: Mapping[int, str]) -> bytes:
    """A PNG of two metrics of every trial: the finished ones that no other beats in both are filled and joined.

    Args:
        rows: trials, with `metrics` and `state`; one without a finite value of both is left out.
        names: two metrics, across and up.
        marks: trial -> what it is, such as "chosen".
    """
    from matplotlib.ticker import NullLocator

    figure, panel = _figure(4.8, 3.8)
    every = {row["trial"]: tuple(row["metrics"].get(name, math.nan) for name in names) for row in rows}
    points = {trial: point for trial, point in every.items() if all(map(math.isfinite, point))}
    states = {row["trial"]: row["state"] for row in rows}
    ended = {trial: point for trial, point in points.items() if states[trial] == "finished"}
    stopped = [point for trial, point in points.items() if trial not in ended]
    best = front(ended, names)
    beaten = [point for trial, point in ended.items() if trial not in best]
    if stopped:
        panel.scatter(*_columns(stopped), s=12, color=GREY, linewidths=0, label="stopped, where it stood")
    if beaten:
        panel.scatter(*_columns(beaten), s=34, facecolors="none", edgecolors=ACCENT, label="beaten in both")
    if best:
        joined = sorted(ended[trial] for trial in best)
        panel.plot(*_columns(joined), color=ACCENT, linewidth=1, marker="o", markersize=6, label="front")
    for trial, text in sorted(marks.items()):
        if trial in points:
            panel.scatter(*_columns([points[trial]]), s=120, facecolors="none", edgecolors=INK, linewidths=1.2)
            panel.annotate(text, points[trial], (7, 7), textcoords="offset points", fontsize=8, color=INK)
    for values, name, axis in zip(_columns([*points.values()]), names, "xy", strict=True):
        better = METRICS[name].better
        panel.set(**{f"{axis}label": f"{name} on valid {ARROWS[better]} {better} is better"})
        if values and min(values) > 0 and max(values) > 10 * min(values):
            marked = log_ticks(min(values), max(values), 5)
            panel.set(**{f"{axis}scale": "log"})
            panel.set(**{f"{axis}ticks": marked, f"{axis}ticklabels": [short(tick) for tick in marked]})
            (panel.xaxis if axis == "x" else panel.yaxis).set_minor_locator(NullLocator())
    panel.margins(0.12)
    if points:
        panel.legend(frameon=False, fontsize=8)
    else:
        panel.text(0.5, 0.5, "no trial has a value of both", ha="center", transform=panel.transAxes)
    return _png_of(figure)


def _columns(points: Sequence[tuple[float, ...]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def front(points: Mapping[int, tuple[float, ...]], names: Sequence[str]) -> set[int]:
    """The trials that no other beats: at least as good in every metric and better in one."""
    signs = [1 if METRICS[name].better == "lower" else -1 for name in names]
    costs = {trial: [sign * value for sign, value in zip(signs, point, strict=True)] for trial, point in points.items()}

    def beats(a: list[float], b: list[float]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return {trial for trial, cost in costs.items() if not any(beats(other, cost) for other in costs.values())}


def parallel(rows: Sequence[Row], search: Search, marks: Mapping[int, str]) -> bytes:
    """A PNG of every trial as a line over one axis a parameter and, last, its objective.

    Args:
        rows: trials in the order of their rank, with `values`, `objective` and `state`.
        search: its space gives the axes.
        marks: trial -> what it is, such as "chosen".
    """
    from matplotlib import colormaps

    names = list(search.space)
    objective = _Scale.of([row["objective"] for row in rows])
    figure, panel = _figure(1.6 + 1.3 * len(names), 3.9)
    colours = colormaps["viridis"]
    for rank, row in reversed(list(enumerate(rows))):  # the best is drawn last
        share = rank / max(len(rows) - 1, 1)
        apart = 0.03 * (share - 0.5)  # lines through one choice stay apart
        heights = [_height(search.space[name], row["values"][name], apart) for name in names]
        heights.append(objective.at(row["objective"]))
        ended = row["state"] == "finished"
        panel.plot(
            heights, color=colours(0.9 * share), linewidth=1.8 if ended else 0.7, alpha=1.0 if ended else 0.75,
            solid_joinstyle="round",
        )  # fmt: skip
        if row["trial"] in marks:
            panel.annotate(marks[row["trial"]], (len(names), heights[-1]), (34, 0), textcoords="offset points",
                           va="center", fontsize=8, color=INK)  # fmt: skip
    scales = [_ticks_of(search.space[name]) for name in names] + [objective.ticks()]
    for x, told in enumerate(scales):
        panel.axvline(x, color=INK, linewidth=0.8, zorder=0)
        for height, text in told:
            panel.annotate(
                text, (x, height), (4, 0), textcoords="offset points", va="center", fontsize=7, color=INK,
                bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6},
            )  # fmt: skip
    heads = [name.removeprefix("method.") for name in names] + ["objective ↓"]
    panel.set_xticks(range(len(heads)), [head.replace(".", ".\n") for head in heads], fontsize=8)
    panel.xaxis.tick_top()
    panel.tick_params(length=0)
    panel.set(ylim=(-0.06, 1.06), xlim=(-0.15, len(names) + 0.75), yticks=[])
    for spine in panel.spines.values():
        spine.set_visible(False)
    return _png_of(figure)


def _height(space: Space, value: Any, apart: float) -> float:
    """Where a value stands on its axis, 0 to 1; choices are evenly spaced."""
    if space.choice is not None:
        count = len(space.choice)
        return (space.texts().index(json.dumps(value)) + 0.5) / count + apart
    low, high = space.ends()
    if space.log_uniform:
        return math.log(value / low) / math.log(high / low)
    return float((value - low) / (high - low))


def _ticks_of(space: Space) -> list[tuple[float, str]]:
    if space.choice is not None:
        return [(_height(space, value, 0.0), _name(value)) for value in space.choice]
    low, high = space.ends()
    middle = math.sqrt(low * high) if space.log_uniform else (low + high) / 2
    return [(_height(space, value, 0.0), short(value, 2)) for value in (low, middle, high)]


def _name(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 18 else text[:17] + "…"


class _Scale:
    """The axis of the objective: linear, or of logarithms; what is not finite stands at its upper end."""

    def __init__(self, low: float, high: float, log: bool) -> None:
        self.low, self.high, self.log = low, high, log

    @classmethod
    def of(cls, values: Sequence[float]) -> _Scale:
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        return cls(low, high if high > low else low + 1.0, low > 0 and high > 10 * low)

    def at(self, value: float) -> float:
        if not math.isfinite(value):
            return 1.04
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return [(self.at(value), minus(short(value, 3))) for value in (self.low, middle, self.high)]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _png_of(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
