"""Steady-state cost of Ray Train with one worker over the same loop without Ray, in one run; start-up stated apart.

Both sides run `pipelines.cluster.worker.train` in processes of their own with one thread: same steps, reports and
checkpoints. Each side trains a short and a long run; the time of a step is the difference of their loops over the
difference of their steps, so that start-up and warm-up cancel. Sides alternate, the ratio is that of the medians, and
both sides' weights must be the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARAMS = """
datasets: {{digits: {{name: digits, split: [0.6, 0.2, 0.2]}}}}
runs:
  bench:
    dataset: digits
    method: {{name: {method}}}
    network: {{name: mlp, width: 256, depth: 2}}
    train: {{steps: {steps}, batch_size: 128, report_every: 100, checkpoint_every: 1000}}
    optim: {{lr: 1.0e-4}}
"""
CHILD = """
import sys, json
from pipelines import params as p, paths
from pipelines.cluster.store import RunStore
from pipelines.stages.train import job_of
from dgm_models.training import checkpoint
params = p.load()
job = job_of(params.runs["bench"], params)
if sys.argv[1] == "ray":
    from pipelines.cluster import session
    with session.session(params.cluster):
        session.fit(job, params.cluster, [])
else:
    import torch
    from dgm_models.training.runtime import Runtime
    from pipelines.cluster.worker import train
    torch.set_num_threads(1)
    train(job, Runtime(), lambda step, metrics: None)
with RunStore(job.storage, job.digest).fetched("artifact") as folder:
    weights = checkpoint.file_sha256(folder / "weights.safetensors")
    seconds = checkpoint.read_document(folder, "spec")["lineage"]["seconds"]
print(json.dumps({"loop": seconds, "weights": weights}))
"""


def measure(side: str, method: str, steps: int) -> dict[str, Any]:
    """One training in a process and a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="dgm-bench-") as folder:
        Path(folder, "params.yaml").write_text(PARAMS.format(method=method, steps=steps))
        environment = os.environ | {"DGM_ROOT": folder, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "pipelines", "prepare", "digits"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, side], env=environment, check=True, capture_output=True, text=True
        )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found | {"process": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="vae/vae")
    parser.add_argument("--steps", type=int, default=1000, help="of the short run; the long one has four times as many")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    step_times: dict[str, list[float]] = {"plain": [], "ray": []}
    startup: dict[str, list[float]] = {"plain": [], "ray": []}
    weights = set()
    for repeat in range(options.repeats):
        for side in ("plain", "ray") if repeat % 2 == 0 else ("ray", "plain"):
            short = measure(side, options.method, options.steps)
            long = measure(side, options.method, 4 * options.steps)
            step_times[side].append((long["loop"] - short["loop"]) / (3 * options.steps))
            startup[side].append(short["process"] - short["loop"])
            weights.add(long["weights"])
    if len(weights) != 1:
        raise SystemExit(f"the two sides trained different weights: {weights}")
    plain, ray = (statistics.median(step_times[side]) for side in ("plain", "ray"))
    print(f"{options.method}, MLP 256 x 2, batch 128, float32, 1 thread, {4 * options.steps} steps, weights equal")
    print(f"step: plain {plain * 1e3:.3f} ms, Ray Train {ray * 1e3:.3f} ms, ratio {ray / plain:.3f}")
    for side in ("plain", "ray"):
        print(f"start-up and end, {side}: {statistics.median(startup[side]):.1f} s")


if __name__ == "__main__":
    main()
