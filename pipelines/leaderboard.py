"""Every evaluated run, and the floor and the ceiling of its dataset, as rows of one table. Imports no torch.

Schema of a row, in `dgm leaderboard --json` and in report/leaderboard.json:

    run: str                    the run's key; "floor" (held-out data) and "ceiling" (noise) where method is null
    method: str | null          "family/method"
    family: str | null
    dataset: str
    capabilities: [str]         what the trained model can do; [] of floor and ceiling
    champion: bool              whether the dataset's promotion receipt names this run and this run's digest
    metrics: {name: {           as in evaluation.json; a metric that compares features is named "<metric>/<extractor>"
        value: float, low: float | null, high: float | null     the 95% interval
        n: int                  rows of the smaller sample
        unit: str, kind: "exact" | "bound" | "estimate", split: str, seed: int
        extractor: str | null, extractor_sha256: str | null     whose features were compared
        flag: bool              of "copies" alone: the test says that training rows are returned
        of: int                 of "modes" alone: how many there are
        chains, temperatures: int   of "log_z/*", "nll/lower", "nll/upper" and their bits per dimension alone
        factors: [[str, float]] of "mig/*" and "dci/informativeness": each factor's own gap, or R^2
    }}

Order: by dataset, then FID, lowest first; rows without FID follow by bits per dimension; the rest by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines import paths

Row = dict[str, Any]
REFERENCES = ("floor", "ceiling")
_NUMBER, _TEXT = (int, float), str
_FIELDS: dict[str, Any] = {
    "value": _NUMBER, "low": (*_NUMBER, type(None)), "high": (*_NUMBER, type(None)), "n": int, "unit": _TEXT,
    "kind": _TEXT, "split": _TEXT, "extractor_sha256": (_TEXT, type(None)),
}  # fmt: skip


def rows(dataset: str | None = None) -> list[Row]:
    """The table that the module's docstring describes.

    Args:
        dataset: only this one.
    Returns: [] when nothing is evaluated.
    Raises: ValueError naming the file that is missing or damaged, or the dataset on which no run is evaluated.
    """
    specs = {run: spec(run) for run in paths.runs()}
    datasets = sorted({each["lineage"]["dataset"] for each in specs.values()})
    if dataset is not None and dataset not in datasets:
        raise ValueError(f"{dataset}: no run of this dataset is evaluated; evaluated: {', '.join(datasets) or 'none'}")
    found = []
    for name in datasets if dataset is None else [dataset]:
        mine = {run: each for run, each in specs.items() if each["lineage"]["dataset"] == name}
        found += sorted(_dataset(name, mine), key=_order)
    return found


def _dataset(dataset: str, specs: Mapping[str, Any]) -> list[Row]:
    champion = (promotion(dataset) or {}).get("champion") or {}
    found, measured = [], {}
    for run, each in specs.items():
        path = paths.evaluation(run) / "evaluation.json"
        measured[run] = _metrics(path, read(path))
        serves = champion.get("run") == run and champion.get("run_digest") == each["lineage"]["run_digest"]
        own = {name: entry for name, entry in measured[run].items() if name.split("/")[-1] not in REFERENCES}
        found.append(_row(run, each["method"], dataset, each["capabilities"], serves, own))
    path = paths.extractor(dataset) / "reference.json"
    told = read(path) if path.is_file() else []
    for name in REFERENCES:
        reference = _metrics(path, [row for row in told if isinstance(row, dict) and row.get("run") == name])
        if not told:  # without a trained extractor the two stand in every evaluation
            first: Mapping[str, Any] = next(iter(measured.values()), {})
            reference = {
                metric.removesuffix(f"/{name}"): entry for metric, entry in first.items() if metric.endswith(f"/{name}")
            }
        if reference:
            found.append(_row(name, None, dataset, [], False, reference))
    return found


def _row(run: str, method: str | None, dataset: str, can: list[str], champion: bool, metrics: dict[str, Any]) -> Row:
    family = method and method.split("/")[0]
    return {"run": run, "method": method, "family": family, "dataset": dataset, "capabilities": can,
            "champion": champion, "metrics": metrics}  # fmt: skip


def _metrics(path: Path, told: Any) -> dict[str, dict[str, Any]]:
    """Rows of an evaluation by the name of their metric, checked."""
    if not isinstance(told, list):
        raise ValueError(f"{path}: a list of rows was expected; `dvc repro` makes it")
    found: dict[str, dict[str, Any]] = {}
    for row in told:
        if not isinstance(row, dict) or not isinstance(row.get("metric"), str):
            raise ValueError(f"{path}: {row!r} is no row of an evaluation; `dvc repro` makes it")
        name = row["metric"]
        wrong = [key for key, kind in _FIELDS.items() if key not in row or not isinstance(row[key], kind)]
        if wrong or not math.isfinite(row["value"]):
            raise ValueError(
                f"{path}: {name}: {', '.join(wrong) or 'value'} is missing or is no value; `dvc repro` makes it"
            )
        if name in found:
            raise ValueError(f"{path}: two rows of {name!r}")
        entry = {key: value for key, value in row.items() if key not in ("metric", "run")}
        found[name] = entry | {"extractor": name.split("/")[1] if "/" in name and row["extractor_sha256"] else None}
    return found


def _order(row: Row) -> tuple[Any, ...]:
    fid, bits = metric(row, "fid"), metric(row, "bits_per_dim")
    value = fid["value"] if fid else bits["value"] if bits else math.inf
    return fid is None, value, row["method"] is not None, row["run"]


def metric(row: Row, base: str) -> dict[str, Any] | None:
    """A row's entry of "fid" under whichever extractor it has, the dataset's own first; None without one.

    What else follows a slash makes another metric: "nll/ode" is no "nll".
    """
    compared = [name for name, entry in row["metrics"].items() if entry["extractor"] and name.startswith(f"{base}/")]
    names = [base, f"{base}/{row['dataset']}", *compared]
    return next((row["metrics"][name] for name in names if name in row["metrics"]), None)


# ---------------------------------------------------------------- files


def read(path: Path) -> Any:
    """JSON. Raises ValueError naming the file and the way out."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error}); `dvc pull` fetches it, `dvc repro` makes it") from error


def spec(run: str) -> Any:
    """artifacts/<run>/spec.json. Raises ValueError naming the file."""
    path = paths.artifact(run) / "spec.json"
    found = read(path)
    try:
        told = (found["method"], found["lineage"]["dataset"], found["lineage"]["run_digest"])
        good = all(isinstance(each, str) for each in told) and isinstance(found["capabilities"], list)
    except (KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{path}: method, capabilities or lineage is missing; `dvc repro` makes it")
    return found


def promotion(dataset: str) -> Any:
    """The promotion receipt, or None before the first promotion. Raises ValueError naming a damaged one."""
    path = paths.promotion(dataset)
    found = read(path) if path.is_file() else None
    if found is not None and not (isinstance(found, dict) and {"champion", "history"} <= found.keys()):
        raise ValueError(f"{path}: no promotion receipt; `dgm promote {dataset}` makes it")
    return found


# ---------------------------------------------------------------- text


def number(entry: Mapping[str, Any]) -> tuple[str, str]:
    """A value and its interval as text, with as many decimals as the interval's half width has two digits."""
    value, low, high = entry["value"], entry["low"], entry["high"]
    if low is None or high is None or not high > low:
        return f"{value:.4g}", ""
    decimals = 1 - math.floor(math.log10((high - low) / 2))
    form = f".{max(decimals, 0)}f" if decimals <= 5 else ".2e"
    return f"{value:{form}}", f"[{low:{form}}, {high:{form}}]"


COLUMNS = {"fid": "FID", "kid": "KID", "precision": "precision", "recall": "recall", "bits_per_dim": "bits/dim",
           "bits_per_dim/ode": "bits/dim by ODE", "nll": "nll", "nll/ode": "nll by ODE", "copies": "copies",
           "evaluations_per_sample": "evaluations"}  # fmt: skip
_LIKELIHOODS = ("nll", "bits_per_dim")


def shown(rows: Iterable[Row], bases: Iterable[str]) -> list[str]:
    """Those of the metrics that some row has; evaluations of the network only where some row needs several."""
    rows = list(rows)
    found = {base: [entry for row in rows if (entry := metric(row, base))] for base in bases}
    several = any(entry["value"] > 1 for entry in found.get("evaluations_per_sample", ()))
    return [base for base, entries in found.items() if entries and (several or base != "evaluations_per_sample")]


def kind(base: str, entry: Mapping[str, Any]) -> str | None:
    """What kind of number it is where that is worth saying: all but likelihoods are estimates, a count is a count."""
    told = base.split("/")[0] in _LIKELIHOODS or entry["kind"] != "estimate"
    return str(entry["kind"]) if told and base != "evaluations_per_sample" else None


def table(rows: Iterable[Row]) -> str:
    """The rows as text for a terminal: one block a dataset, the champion marked with *."""
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        blocks.setdefault(row["dataset"], []).append(row)
    return "\n\n".join(_block(dataset, mine) for dataset, mine in blocks.items()) or "no run is evaluated"


def _block(dataset: str, rows: list[Row]) -> str:
    bases = shown(rows, COLUMNS)
    lines = [["", "run", "method", *(COLUMNS[base] for base in bases)]]
    for row in rows:
        cells = [_cell(base, metric(row, base)) for base in bases]
        lines.append(["*" if row["champion"] else "", row["run"], row["method"] or "-", *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([dataset, *text, f"95% intervals; {_what(rows, bases)}"])


def _cell(base: str, entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    value, interval = number(entry)
    if base == "fid":
        return f"{value} {interval}".rstrip()
    return " ".join([value, *filter(None, ["flagged" if entry.get("flag") else kind(base, entry)])])


def _what(rows: list[Row], bases: Iterable[str]) -> str:
    """n, split and extractor of every column, once where they agree."""
    told: dict[str, list[str]] = {}
    for base in bases:
        entries = [entry for row in rows if (entry := metric(row, base))]
        which = {
            f"n = {entry['n']} of {entry['split']}"
            + (f", features of {entry['extractor']} ({entry['extractor_sha256'][:8]})" if entry["extractor"] else "")
            for entry in entries
        }
        told.setdefault(" and ".join(sorted(which)), []).append(COLUMNS[base])
    return "; ".join(f"{', '.join(labels)}: {which}" for which, labels in told.items())
