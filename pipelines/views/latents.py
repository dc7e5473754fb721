"""A model's codes on the page: which are in use, what they do, what they tell; and what else steers its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines import leaderboard, paths
from pipelines.views.parts import View, naming, optional, png, short, words

ACTIVE = 0.01  # a code is in use where the variance of its mean is above this (Burda et al. 2016, section 3)
# metric -> its heading, and what it says; all of them are better higher
SCORES = {
    "mig/histogram": ("MIG, histogram", "gap of mutual information, posterior means in 20 bins"),
    "mig/sampled": ("MIG, sampled", "gap of mutual information, codes drawn from the posterior"),
    "dci/disentanglement": ("Disentanglement", "of DCI: a code matters for one factor alone"),
    "dci/completeness": ("Completeness", "of DCI: a factor is told by one code alone"),
    "dci/informativeness": ("Informativeness", "of DCI: R² of the factors on held-out rows"),
}


def view(row: leaderboard.Row) -> View | None:
    """What a run's codes and settings do to its samples, as plain values; None where nothing was drawn or told.

    Args:
        row: the run's row of the leaderboard.
    """
    folder = paths.evaluation(row["run"])
    path = folder / "latents.json"
    told = optional(path, None)
    names = ("traversal", "interpolation", "temperature", "conditions")
    found: View = {"run": row["run"], "codes": None, "scores": [], "factors": []}
    found |= {name: png(folder / f"{name}.png") for name in names}
    if told is None and not (found["temperature"] or found["conditions"]):
        return None
    data = leaderboard.spec(row["run"])["data"]
    found["plot"] = data["kind"] == "vector" and data["levels"] is None  # samples are points there, not pixels
    if told is None:
        return found
    with naming(path):
        shown = told["codes"][: told["shown"]]
        found |= {
            "rows": told["rows"],
            "given": told["given"],
            "count": len(told["codes"]),
            "active": sum(each["variance"] > ACTIVE for each in told["codes"]),
            "by_kl": all(each["kl"] is not None for each in told["codes"]),
            "codes": [{"code": each["code"], "text": _amount(each)} for each in shown],
            "rest": len(told["codes"]) - len(shown),
            "ends": [short(told["steps"][0]).replace("-", "−"), short(told["steps"][-1])],
        }
    with naming(folder / "evaluation.json"):
        scores = [_score(name, row["metrics"][name]) for name in SCORES if name in row["metrics"]]
    return found | {
        "scores": scores,
        "factors": next((list(score["each"]) for score in scores if score["each"]), []),
    }


def _amount(code: Mapping[str, Any]) -> str:
    return f"{code['variance']:.2f}" if code["kl"] is None else f"{code['kl']:.2f}"


def _score(name: str, entry: Mapping[str, Any]) -> View:
    label, text = SCORES[name]
    each = {factor: f"{value:.2f}".replace("-", "−") for factor, value in entry.get("factors", [])}
    return {"label": label, "text": text, "value": words(entry), "n": entry["n"], "each": each}
