"""What happens at every report of a training: curves to MLflow, progress to the run store. Runs in Ray's controller.

One process, so a single writer by construction. Nothing in here may stop a training.
"""

from __future__ import annotations

import logging
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

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        try:
            values = dict(metrics[0])
            step = int(values.pop("step"))
            if time.monotonic() - self.told > 0.5:  # a report may come every few milliseconds
                progress.tell(place(self.where), step, values)
                self.told = time.monotonic()
            if self.curves:
                self.curves.log(step, values)
        except Exception:  # a tracker, a bucket or a full disk is no reason to stop a training
            log.exception("a report could not be passed on")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in worker_exceptions.items():
            log.warning("worker %d: %s", rank, str(error).strip().splitlines()[-1][:300])
