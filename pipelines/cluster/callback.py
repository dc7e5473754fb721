"""What happens at every report of a training: curves to MLflow, progress to a file. Runs in Ray's controller process.

One process, so a single writer by construction. Nothing in here may stop a training.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from pipelines import files
from pipelines.tracking import Curves

log = logging.getLogger("dgm.callback")


class Watch(UserCallback):  # type: ignore[misc]
    """Sends each report's metrics on.

    Args:
        curves: the training's run in MLflow; travels here without its connection.
        progress: a file that always holds the last report as JSON.
    """

    def __init__(self, curves: Curves, progress: Path) -> None:
        self.curves, self.progress = curves, progress

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        try:
            values = dict(metrics[0])
            step = int(values.pop("step"))
            files.write_json(self.progress, {"step": step, "metrics": values})
            self.curves.log(step, values)
        except Exception:  # a tracker or a full disk is no reason to stop a training
            log.exception("a report could not be passed on")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in worker_exceptions.items():
            log.warning("worker %d: %s", rank, str(error).strip().splitlines()[-1][:300])
