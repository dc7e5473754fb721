"""Two workers give the training of one, and an elastic range starts with what there is."""

from __future__ import annotations

from pathlib import Path

import torch

from dgm_models.training import checkpoint
from tests.support import project

SHORT = project.PARAMS.replace("steps: 300", "steps: 20").replace("average: 0.99, ", "")


def test_two_workers_equal_one(tmp_path: Path) -> None:
    weights, worlds = [], []
    for workers in ("1", "[1, 2]"):
        text = SHORT.replace("workers: 1", f"workers: {workers}")
        folder = project.make(tmp_path / f"workers-{len(worlds)}", text)
        project.dgm(folder, "prepare", "digits")
        project.dgm(folder, "train", "vae")
        weights.append(checkpoint.read_tensors(folder / "artifacts" / "vae", "weights"))
        worlds.append(checkpoint.read_document(folder / "artifacts" / "vae", "spec")["lineage"]["world"])
    assert worlds == [1, 2]
    for name, one in weights[0].items():
        # float32 sums in another order; 20 steps of Adam amplify the last bit, hundreds part the runs
        torch.testing.assert_close(weights[1][name], one, rtol=1e-4, atol=1e-5)
