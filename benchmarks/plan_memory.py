"""`dgm plan`'s memory against the peak that trainings on this CPU really have: three models, and one of them sharded.

Each measurement is a process of its own. It trains a small run of the same method first, so that libraries are loaded
and their pools are filled; then it reads its resident memory, resets the kernel's record of the peak, builds the model
and takes three steps. Measured is the peak less what was resident before the model was made.

The C library is told to hold one arena and to take blocks of 64 KiB and more from the system and give them back at
once, so that resident memory follows the tensors; MKL is told not to keep buffers between calls.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MKL_DISABLE_FAST_MM": "1",
    "PYTHONPATH": str(ROOT),
}
IMAGE = {"kind": "image", "shape": [1, 28, 28], "levels": 256}
BINARY = {"kind": "image", "shape": [1, 28, 28], "levels": 2}
VAE = {
    "method": {"name": "vae/vae", "latent_dim": 64}, "network": {"name": "mlp", "width": 2048, "depth": 3},
    "train": {"batch_size": 1024, "average": 0.999}, "optim": {"clip": 1.0},
}  # fmt: skip
SHARDED = "vae/vae, the same, two shards"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> (data, a run's section)
    "vae/vae, MLP 2048 x 3": (IMAGE, VAE),
    "gan/wgan_gp, conv 64 x 2": (IMAGE, {
        "method": {"name": "gan/wgan_gp", "critic_steps": 2}, "network": {"name": "conv", "channels": 64, "stages": 2},
        "train": {"batch_size": 512, "average": 0.99}, "optim": {"lr": 1e-4, "betas": [0.0, 0.9]},
    }),
    "autoregressive/made, 4096 x 2": (BINARY, {
        "method": {"name": "autoregressive/made", "width": 4096, "depth": 2},
        "train": {"batch_size": 512, "average": 0.999}, "optim": {"name": "adamw"},
    }),
    SHARDED: (IMAGE, VAE),
}  # fmt: skip
SMALL = {"width": 64, "channels": 8}


def run_of(section: dict[str, Any]) -> Any:
    from pipelines.params import parse_run

    return parse_run("bench", {"dataset": "bench", **section}, "runs.bench", ["bench"])


def small(section: dict[str, Any]) -> dict[str, Any]:
    """The same method with few units and few examples."""
    parts = {
        name: {key: SMALL.get(key, value) for key, value in section[name].items()}
        for name in ("method", "network")
        if name in section
    }
    return section | parts | {"train": section["train"] | {"batch_size": 16}}


def spec_of(data: dict[str, Any]) -> Any:
    from dgm_models.construct import construct
    from dgm_models.protocols import DataSpec

    return construct(DataSpec, data, "data")


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(case: str, steps: int, rank: int, meeting: str) -> dict[str, int]:
    """In a fresh process: the peak of a few steps above what was resident before the model."""
    import gc

    import torch
    import torch.distributed as dist

    from dgm_models.training.runtime import Runtime
    from dgm_models.training.source import ArraySource
    from dgm_models.training.trainer import Trainer
    from pipelines.params import build_method

    torch.set_num_threads(1)
    world = workers(case)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    data, section = CASES[case]
    spec = spec_of(data)
    rows = torch.randint(spec.levels, (4096, *spec.shape), dtype=torch.uint8)

    def train(section: dict[str, Any]) -> None:
        run = run_of(section)
        source = ArraySource(rows, spec, seed=0)
        source.batch(0, 1)  # the first epoch's order
        method = build_method(run, spec)
        runtime = Runtime(torch.device("cpu"), rank, world, run.train.precision, shard=world > 1)
        trainer = Trainer(method.model, method.objective, source, run.train, run.optim, 0, runtime)
        for _ in range(steps):
            trainer.step()

    train(small(section))
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    train(section)
    return {"before": before, "peak": resident("VmHWM") - before}


def workers(case: str) -> int:
    return 2 if case == SHARDED else 1


def measured(case: str, steps: int) -> int:
    """The peak of rank 0, in bytes."""
    with tempfile.TemporaryDirectory(prefix="dgm-bench-") as folder:
        command = [sys.executable, "-W", "ignore", __file__, "--measure", case, "--steps", str(steps),
                   "--meeting", f"{folder}/meeting"]  # fmt: skip
        started = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True
            )
            for rank in range(workers(case))
        ]
        said = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise SystemExit(f"{case}: a process failed")
    return int(json.loads(said[0])["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.steps, options.rank, options.meeting)))
        return
    sys.path.insert(0, str(ROOT))
    from pipelines.plan.dry import run_dry

    rows = []
    for case, (data, section) in CASES.items():
        found, world = measured(case, options.steps), workers(case)
        dry = run_dry(run_of(section), spec_of(data), world, shard=world > 1)
        predicted = max(sum(dry.peak.values()), dry.construction)  # a CPU has one memory
        rows.append({"case": case, "predicted": predicted, "measured": found, "ratio": predicted / found})
        if not options.json:
            print(
                f"{case:<32} predicted {predicted / 1e6:7.1f} MB  measured {found / 1e6:7.1f} MB  "
                f"ratio {predicted / found:.3f}",
                flush=True,
            )
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
