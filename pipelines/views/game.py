"""A game on the page: whether a gradient vanished, modes are missing, and what kind of point the training reached.

A run is a game when its metrics tell the gradient norms of more than one player.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.views.parts import View, minus, short, words

if TYPE_CHECKING:
    from dgm_models.ops.games import Verdict

Point = tuple[float, float]  # of a curve: step and value
VANISHED = 1e-3  # a gradient norm below this share of the first reported one
NASH = "nash/"  # begins the names of what is measured once, at the end
VERDICTS: dict[Verdict, str] = {
    "nash": "A differential Nash equilibrium: every gradient counts as zero, and every player's loss curves upwards.",
    "undecided": "Every gradient counts as zero, and so does some least curvature: whether it is a Nash equilibrium "
    "the second order does not tell.",
    "saddle": "No Nash equilibrium: every gradient counts as zero, but a player's loss falls along a direction of "
    "negative curvature.",
    "moving": "No equilibrium: a player's gradient is not zero.",
}


def view(
    run: str,
    curves: Mapping[str, Sequence[Point]],
    modes: Mapping[str, Any] | None,
    panel: Callable[[str, Mapping[str, Sequence[Point]]], View],
) -> View | None:
    """A run's game as plain values, or None where there is one player.

    Args:
        run: its key.
        curves: metric -> (step, value) of every report, as the trainer names them.
        modes: the evaluation's entry of modes covered, None where it has none.
        panel: draws (name, label -> curve).
    """
    norms = {name.rpartition("/")[0]: list(points) for name, points in curves.items() if _is(name, "gradient_norm")}
    if len(norms) < 2:
        return None
    gains = {name.rpartition("/")[0]: points for name, points in curves.items() if _is(name, "gain")}
    players = [name for name in norms if not gains or name in gains]  # a turn may have a name of its own, such as r1
    gap = curves.get("duality_gap")
    optimum = next((points for name, points in curves.items() if _is(name, "from_optimum")), None)
    drawn = [panel("gradient_norm", _above_zero(norms))]
    if gap:
        drawn.append(panel("duality_gap", {**gains, "sum": gap}))
    if optimum:
        drawn.append(panel("from_optimum", {"value": optimum}))
    told = [*_gradients({player: norms[player] for player in players}), _modes(modes), *_gap(gap, gains)]
    return {
        "run": run,
        "panels": drawn,
        "findings": [{"bad": bad, "text": minus(text)} for bad, text in told],
        "modes": modes and {"covered": round(modes["value"]), "of": modes["of"], "interval": words(modes)[1]},
        "nash": _nash(curves, players),
    }


def _is(name: str, last: str) -> bool:
    player, _, own = name.rpartition("/")
    return bool(player) and own == last


def _above_zero(norms: Mapping[str, Sequence[Point]]) -> dict[str, list[Point]]:
    """A logarithmic axis has no zero: it stands at a tenth of the least norm above it."""
    above = [y for points in norms.values() for _, y in points if y > 0]
    floor = min(above, default=1.0) / 10
    return {player: [(x, y or floor) for x, y in points] for player, points in norms.items()}


# ---- what is seen, in words: (whether it is a fault, a sentence)


def _gradients(norms: Mapping[str, Sequence[Point]]) -> list[tuple[bool, str]]:
    found = []
    for player, points in sorted(norms.items()):
        start, end = points[0][1], points[-1][1]
        bar = VANISHED * start
        if end < bar:
            step = next(x for i, (x, _) in enumerate(points) if all(y < bar for _, y in points[i:]))
            text = f"{player} gradient fell below {VANISHED:g} of its start at step {short(step)} and stayed there"
            found.append((True, text))
        else:
            share = f"{short(end / start, 2)} of its start" if start > 0 else "zero from the start"
            found.append((start == 0, f"{player} gradient ends at {share}"))
    return found


def _modes(modes: Mapping[str, Any] | None) -> tuple[bool, str]:
    if modes is None:
        return False, "modes are not measured: the data have no labels, or the evaluation refused"
    covered, interval = words(modes)
    return modes["value"] < modes["of"], f"{covered} of {modes['of']} modes covered {interval}".rstrip()


def _gap(gap: Sequence[Point] | None, gains: Mapping[str, Sequence[Point]]) -> list[tuple[bool, str]]:
    if not gap:
        return []
    parts = ", ".join(f"{player} {short(points[-1][1], 2)}" for player, points in sorted(gains.items()))
    return [(False, f"duality gap within reach ends at {short(gap[-1][1], 2)} nats ({parts})")]


def _nash(curves: Mapping[str, Sequence[Point]], players: Sequence[str]) -> View | None:
    """The verdict at the end, and for each player what it rests on; None where it was not tested."""
    names = ("gradient", "least_curvature", "greatest_curvature")
    if any(f"{NASH}{player}/{name}" not in curves for player in players for name in names):
        return None
    from dgm_models.ops import games  # torch: for games alone

    places = {
        player: games.Conditions(*(curves[f"{NASH}{player}/{name}"][-1][1] for name in names)) for player in players
    }
    rows = [
        {"player": player, "gradient": _number(place.gradient), "least": _number(place.least),
         "greatest": _number(place.greatest), "still": games.still(place), "curved": games.curved(place)}
        for player, place in sorted(places.items())
    ]  # fmt: skip
    verdict = games.verdict(places)
    return {"verdict": verdict, "text": VERDICTS[verdict], "rows": rows, "gradient": f"{games.GRADIENT:g}",
            "curvature": f"{games.CURVATURE:g}"}  # fmt: skip


def _number(value: float) -> str:
    return minus(short(value, 3))
