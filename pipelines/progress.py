"""Progress bars on long work: on a terminal a bar, elsewhere a line at the end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.storage import Place

FILE = "progress.json"


def tell(where: Place, step: int, metrics: Mapping[str, Any], events: Sequence[str] = ()) -> None:
    """Writes how far the work is and what has happened on the way, for `bar` on any machine."""
    where.write(FILE, json.dumps({"step": step, "metrics": dict(metrics), "events": list(events)}).encode())


@contextmanager
def bar(title: str, total: int, where: Place, waiting: str) -> Iterator[Callable[[str], None]]:
    """A bar that follows what `tell` wrote, for the time of the block.

    Args:
        title: what is being done.
        total: the last step.
        where: the folder that `tell` writes to.
        waiting: what is said before the first step.
    Returns: a function that prints text above the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    columns = (TextColumn(title), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"), console=console) as progress:
        task = progress.add_task(title, total=total, metrics=waiting)
        stop = threading.Event()
        told = _read(where)["events"]  # of an earlier attempt

        def follow() -> None:
            while not stop.wait(0.3 if where.local else 1.0):
                update()

        def say(text: str) -> None:
            console.print(Text(text.rstrip("\n")), soft_wrap=True)

        def update() -> None:
            found = _read(where)
            for number, event in enumerate(found["events"]):
                if told[number : number + 1] != [event]:
                    say(event)
            told[:] = found["events"]
            if not found["metrics"]:
                return
            words = " ".join(f"{name} {value:.4g}" for name, value in list(found["metrics"].items())[:3])
            progress.update(task, completed=found["step"], metrics=words)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield say
        finally:
            stop.set()
            thread.join(5.0)
            update()


def _read(where: Place) -> dict[str, Any]:
    try:
        found = json.loads(where.read(FILE))
        return {"step": found["step"], "metrics": found["metrics"], "events": list(found["events"])}
    except (OSError, ValueError, KeyError):
        return {"step": 0, "metrics": {}, "events": []}
