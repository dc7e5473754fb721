"""What every part of the page shares: numbers as text, axes in percent, files that are named when they are damaged."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import leaderboard

View = dict[str, Any]


class Axis:
    """A log axis over entries with value, low and high; places are percent of its width, text is a label.

    Args: most: ticks, at most.
    """

    def __init__(self, entries: Iterable[Mapping[str, Any]], most: int = 6) -> None:
        entries = list(entries)
        values = [entry["value"] for entry in entries if entry["value"] > 0]
        ends = [entry[key] for entry in entries for key in ("low", "high") if entry[key] is not None and entry[key] > 0]
        if not values:
            values = ends or [1.0]
        floor = min(values) / 4  # an interval may reach to nothing; an axis of logarithms cannot
        low = max(min([*values, *ends]), floor) / 1.15
        high = max([*values, *ends]) * 1.15
        self._low, self._span = math.log(low), math.log(high / low)
        self.ticks = [{"at": self.at(tick), "text": short(tick)} for tick in log_ticks(low, high, most)]

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


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """1, 2, 5 x powers of ten within the ends, thinned until they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [float(f"{step}e{power}") for power in powers for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= most:
            break
    return found[:: math.ceil(len(found) / most)] or [low]


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers within the ends."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(value: Any, digits: int = 4) -> str:
    """A number, or text that is one, with a few digits; other text as it is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if math.isfinite(number) and number == int(number) and abs(number) < 1e7:
        return str(int(number))
    return f"{number:.{digits}g}"


def minus(text: str) -> str:
    return text.replace("-", "−")


def words(entry: Mapping[str, Any]) -> tuple[str, str]:
    """A value and its interval."""
    value, interval = leaderboard.number(entry)
    return minus(value), minus(interval)


def flat(values: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested sections as dotted names and text."""
    if isinstance(values, Mapping):
        return [pair for key, value in values.items() for pair in flat(value, f"{path}.{key}" if path else str(key))]
    text = short(values, 6) if isinstance(values, float) else json.dumps(values)
    return [(path, values if isinstance(values, str) else text)]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file whose content is not what its stage writes."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not what its stage writes ({error!r}); `dvc repro` makes it") from error


def optional(path: Path, default: Any) -> Any:
    return leaderboard.read(path) if path.is_file() else default


def png(path: Path) -> str | None:
    """A picture as a data URI; None where there is none."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else None
