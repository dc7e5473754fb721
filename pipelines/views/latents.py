"""A model's codes on the page: which of them are in use, what they do to a picture, how far they tell known factors."""

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
    """A run's codes as plain values, or None where it has none.

    Args:
        row: the run's row of the leaderboard.
    """
    folder = paths.evaluation(row["run"])
    path = folder / "latents.json"
    told = optional(path, None)
    if told is None:
        return None
    with naming(path):
        shown = told["codes"][: told["shown"]]
        found = {
            "run": row["run"],
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
    return {
        **found,
        "traversal": png(folder / "traversal.png"),
        "interpolation": png(folder / "interpolation.png"),
        "scores": scores,
        "factors": next((list(score["each"]) for score in scores if score["each"]), []),
    }


def _amount(code: Mapping[str, Any]) -> str:
    return f"{code['variance']:.2f}" if code["kl"] is None else f"{code['kl']:.2f}"


def _score(name: str, entry: Mapping[str, Any]) -> View:
    label, text = SCORES[name]
    each = {factor: f"{value:.2f}".replace("-", "−") for factor, value in entry.get("factors", [])}
    return {"label": label, "text": text, "value": words(entry), "n": entry["n"], "each": each}
