"""The attempts of drills as a table in a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

BEGIN, END = "<!-- drills: written from the log -->", "<!-- /drills -->"


def read(log: Path) -> list[dict[str, Any]]:
    """The attempts of a log of JSON lines, oldest first."""
    return [json.loads(line) for line in log.read_text().splitlines() if line.strip()]


def table(attempts: Sequence[dict[str, Any]]) -> str:
    """One row a drill, in the order of their first attempts."""
    lines = [
        "| drill | passed | recovery in s: median, longest | steps taken again, most | seconds: median |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(each["drill"] for each in attempts):
        mine = [each for each in attempts if each["drill"] == name]
        good = [each for each in mine if each["passed"]]
        recovery = [each["recovery_s"] for each in good if each["recovery_s"] is not None]
        lost = [each["lost_steps"] for each in good if each["lost_steps"] is not None]
        cells = [
            f"`{name}`",
            f"{len(good)} of {len(mine)}",
            f"{median(recovery):.1f}, {max(recovery):.1f}" if recovery else "",
            str(max(lost)) if lost else "",
            f"{median(each['seconds'] for each in mine):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def update(page: Path, log: Path) -> None:
    """Writes the table of a log between the marks of a page. Raises ValueError for a page without them."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page}: the marks {BEGIN} and {END} are missing; the table of the drills goes between them")
    before, after = text.split(BEGIN)[0], text.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n{table(read(log))}\n{END}{after}")
