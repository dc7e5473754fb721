"""What happens at every report of a training: curves to MLflow, progress to the run store. Runs in Ray's controller.

One process, so a single writer by construction. Nothing in here may stop a training.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Any

from ray.train import UserCallback

from pipelines import progress
from pipelines.storage import place
from pipelines.tracking import Curves

log = logging.getLogger("dgm.callback")


class Watch(UserCallback):  # type: ignore[misc]
    """Sends each report's metrics on.

    Args:
        curves: the training's run in MLflow, without its connection; None where no tracker can be reached.
        where: URI of the folder that holds the last report.
    """

    def __init__(self, curves: Curves | None, where: str) -> None:
        self.curves, self.where, self.told = curves, where, 0.0
        self.last: tuple[int, dict[str, Any]] = (0, {})
        self.events: list[str] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        try:
            values = dict(metrics[0])
            step = int(values.pop("step"))
            self.last = (step, values)
            if time.monotonic() - self.told > 0.5:  # a report may come every few milliseconds
                self.tell()
            if self.curves:
                self.curves.log(step, values)
        except Exception:  # a tracker, a bucket or a full disk is no reason to stop a training
            log.exception("a report could not be passed on")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Says on the submitter's terminal which workers failed; Ray Train then starts them again, or gives up."""
        try:
            for rank, error in worker_exceptions.items():
                self.events.append(f"worker {rank} after step {self.last[0]}: {_words(error)}")
            self.tell()
        except Exception:
            log.exception("a failure could not be passed on")

    def tell(self) -> None:
        progress.tell(place(self.where), *self.last, self.events)
        self.told = time.monotonic()


def _words(error: Exception) -> str:
    """The line of an error that names it: Ray puts the worker's whole traceback, or an explanation, into the text."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Fenced)\b", line)]
    return (named or lines or [type(error).__name__])[-1][:500]
