"""Images a second of two workers over one, at a constant batch a worker, and where a step's time goes.

Two processes with one thread each stay up for the whole run, joined by gloo. In turns, the first trains alone and
both train together; the figures are medians over the turns. The loader is `Source.batch` and the codec; the exposed
reduction is the time that the trainer waits for sums after its own backward pass is done, which includes waiting for
the other worker to come as far. Processor time, gloo's threads included, is stated beside wall time: other work on the
machine stretches the wall time of two workers more than that of one, and leaves processor time nearly as it is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dgm_models.method import build
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training import trainer as training
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.reduce import Reduction
from dgm_models.training.runtime import Runtime, keep_freed_memory
from dgm_models.training.source import ArraySource, Source
from dgm_models.training.trainer import Train, Trainer


@dataclass(frozen=True)
class Case:
    method: str
    data: DataSpec
    params: dict[str, Any]

    def __str__(self) -> str:
        channels, height, width = self.data.shape
        network = self.params.get("network", {})
        size = " ".join(f"{key} {value}" for key, value in (network or self.params).items())
        return f"{self.method}, {channels} x {height} x {width}, {self.data.levels} levels, {size}"


SMALL, LARGE = DataSpec("image", (1, 8, 8), 17), DataSpec("image", (1, 28, 28), 256)
MLP = {"name": "mlp", "width": 512, "depth": 2}
CONV = {"name": "conv", "channels": 32, "stages": 2}
CASES = [
    Case("vae/vae", SMALL, {"network": MLP}),
    Case("gan/wgan_gp", SMALL, {"network": MLP}),
    Case("autoregressive/made", SMALL, {"width": 512}),
    Case("vae/vae", LARGE, {"network": CONV}),
    Case("gan/wgan_gp", LARGE, {"network": CONV}),
    Case("autoregressive/made", replace(LARGE, levels=2), {"width": 1024}),
]
ROWS = 20_000  # of the dataset


class Timed(Trainer):
    """Keeps the seconds that went into drawing batches."""

    loading = 0.0

    def _fetch(self, source: Source, start: int, stop: int, *path: int | str) -> Batch:
        begun = time.perf_counter()
        batch = super()._fetch(source, start, stop, *path)
        self.loading += time.perf_counter() - begun
        return batch


class TimedReduction(Reduction):
    """Keeps the seconds that the trainer waited for sums."""

    waiting = 0.0

    def finish(self, scalars: Any) -> Any:
        begun = time.perf_counter()
        reached = super().finish(scalars)
        TimedReduction.waiting += time.perf_counter() - begun
        return reached


def trainer_of(case: Case, runtime: Runtime, each: int) -> Timed:
    method = build(case.method, case.data, **case.params)
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(case.data.levels or 2, (ROWS, *case.data.shape), generator=rng).to(torch.uint8)
    settings = Train(steps=10**9, batch_size=each * runtime.world)
    source = ArraySource(x, case.data)
    return Timed(method.model, method.objective, source, settings, Optims(Optim(lr=1e-4)), 0, runtime)


def measure(trainer: Timed, seconds: float) -> dict[str, float]:
    """Images a second of all workers, the loader's share and the reduction's exposed share of a step, on this worker.

    Every worker takes the number of steps that the first one finds to fill the time.
    """
    runtime = trainer.runtime
    steps = 2  # warm-up, and an estimate of the time of a step
    for measured in (False, True):
        trainer.loading = TimedReduction.waiting = 0.0
        first = trainer.position
        runtime.barrier()
        begun, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            trainer.step()
        runtime.barrier()
        spent, processor = time.perf_counter() - begun, time.process_time() - processor
        if not measured:
            chosen = torch.tensor([max(3.0, seconds * steps / spent) if runtime.chief else 0.0])
            runtime.sum([chosen])
            steps = int(chosen)
    return {
        "images": (trainer.position - first) / spent,
        "loader": trainer.loading / spent,
        "reduction": TimedReduction.waiting / spent,
        "step": spent / steps,
        "processor": processor / steps,
    }


def work(rank: int, meeting: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    training.Reduction = TimedReduction  # type: ignore[misc]
    both = Runtime.of_process_group(torch.device("cpu"))
    for case in CASES:
        if options.method and options.method not in str(case):
            continue
        sides = {1: trainer_of(case, Runtime(), options.batch), 2: trainer_of(case, both, options.batch)}
        found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for turn in range(options.turns):
            for world in (1, 2) if turn % 2 == 0 else (2, 1):
                dist.barrier()
                if rank == 0 or world == 2:
                    found[world].append(measure(sides[world], options.seconds))
        if rank == 0:
            report(case, found)
    dist.destroy_process_group()


def report(case: Case, found: dict[int, list[dict[str, float]]]) -> None:
    one, two = ({key: statistics.median(run[key] for run in runs) for key in runs[0]} for runs in found.values())
    ratios = [b["images"] / a["images"] for a, b in zip(found[1], found[2], strict=True)]
    print(str(case))
    print(
        f"  images/s {one['images']:.0f} -> {two['images']:.0f}, ratio {two['images'] / one['images']:.2f} "
        f"(turns {min(ratios):.2f} to {max(ratios):.2f}); step {one['step'] * 1e3:.1f} -> {two['step'] * 1e3:.1f} ms"
    )
    print(
        f"  processor time of a step {one['processor'] * 1e3:.1f} -> {two['processor'] * 1e3:.1f} ms a worker, "
        f"which bounds the ratio by {2 * one['processor'] / two['processor']:.2f}"
    )
    print(
        f"  loader {one['loader']:.1%} -> {two['loader']:.1%} of a step, "
        f"exposed reduction {one['reduction']:.1%} -> {two['reduction']:.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512, help="examples of a worker")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each side")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement")
    parser.add_argument("--method", default="", help="only the cases whose name contains this")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit(f"two workers need two cores; this process may use {len(cores)}")
    print(f"{options.batch} examples a worker, 1 thread each, float32; load average before: {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory(prefix="dgm-bench-") as folder:
        mp.spawn(work, (os.path.join(folder, "meeting"), options), nprocs=2)
    print(f"load average after: {os.getloadavg()[0]:.2f} (the benchmark itself is 1 to 2)")


if __name__ == "__main__":
    main()
