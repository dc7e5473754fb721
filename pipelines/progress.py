"""Progress bars on long work: on a terminal a bar, elsewhere a line at the end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bar(title: str, total: int, file: Path) -> Iterator[None]:
    """A bar that follows the `step` in a JSON file, with the metrics beside it, for the time of the block."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    file.unlink(missing_ok=True)
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"), console=console) as progress:
        task = progress.add_task(title, total=total, metrics="starting Ray")
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(0.3):
                update()

        def update() -> None:
            try:
                found = json.loads(file.read_text())
            except (OSError, ValueError):
                return
            words = " ".join(f"{name} {value:.4g}" for name, value in list(found["metrics"].items())[:3])
            progress.update(task, completed=found["step"], metrics=words)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            update()
