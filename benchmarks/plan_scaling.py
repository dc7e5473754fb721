"""`dgm plan`'s cost model against one and two workers on this machine, in one run.

The model's unknowns are measured first: the seconds of one worker's step on its share, and alpha and beta of gloo's
all-reduce between two processes. From these and the collectives that the plan counts, the step of two workers is
predicted, without overlap and with all of it; then it is measured. Two workers that do not speak to each other, at the
same time, are the control: what they lose against one is the machine's, not the communication's. The three take turns,
and each one's fastest round is taken: other work on the machine makes a round slower, never faster. Workers have one
thread; gloo goes over loopback.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
SHARE = 512  # examples of a worker
SIZES = (256, 64 * 2**10, 2**20, 4 * 2**20, 16 * 2**20)  # bytes of an all-reduce
IMAGE = {"kind": "image", "shape": [1, 28, 28], "levels": 256}
BINARY = {"kind": "image", "shape": [1, 28, 28], "levels": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vae/vae": (IMAGE, {"method": {"name": "vae/vae"}, "network": {"name": "mlp", "width": 512, "depth": 2}}),
    "gan/wgan_gp": (IMAGE, {"method": {"name": "gan/wgan_gp", "critic_steps": 2},
                            "network": {"name": "mlp", "width": 512, "depth": 2}}),
    "autoregressive/made": (BINARY, {"method": {"name": "autoregressive/made", "width": 1024}}),
}  # fmt: skip


def run_of(section: dict[str, Any], world: int) -> Any:
    from pipelines.params import parse_run

    train = {"batch_size": SHARE * world, "average": 0.99}
    return parse_run("bench", {"dataset": "bench", "train": train, **section}, "runs.bench", ["bench"])


def spec_of(data: dict[str, Any]) -> Any:
    from dgm_models.construct import construct
    from dgm_models.protocols import DataSpec

    return construct(DataSpec, data, "data")


def timed(action: Callable[[], Any], repeats: int) -> float:
    """The median of `repeats` after two for warming up."""
    seconds = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def work(rank: int, world: int, meeting: str, repeats: int) -> dict[str, Any]:
    """What a process measures: all-reduces where there are two, and a step of every case."""
    import torch
    import torch.distributed as dist

    from dgm_models.training.runtime import Runtime
    from dgm_models.training.source import ArraySource
    from dgm_models.training.trainer import Trainer
    from pipelines.params import build_method

    torch.set_num_threads(1)
    found: dict[str, Any] = {"reduce": {}, "step": {}}
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        for size in SIZES:
            tensor = torch.zeros(size // 4)

            spent = []
            for _ in range(2 + 4 * repeats):
                dist.barrier()  # both start together
                start = time.perf_counter()
                dist.all_reduce(tensor)
                spent.append(time.perf_counter() - start)
            found["reduce"][size] = statistics.median(spent[2:])
    for case, (data, section) in CASES.items():
        run, spec = run_of(section, world), spec_of(data)
        rows = torch.randint(spec.levels, (4096, *spec.shape), dtype=torch.uint8)
        method = build_method(run, spec)
        runtime = Runtime(torch.device("cpu"), rank, world)
        trainer = Trainer(
            method.model, method.objective, ArraySource(rows, spec), run.train, run.optim, 0, runtime
        )  # fmt: skip
        found["step"][case] = timed(trainer.step, repeats)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return found


def measure(world: int, groups: int, repeats: int) -> dict[str, Any]:
    """What the first process measured, of `groups` groups of `world` workers that work at the same time."""
    with tempfile.TemporaryDirectory(prefix="dgm-bench-") as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "--rank", str(rank), "--world", str(world),
                 "--meeting", f"{folder}/{group}", "--repeats", str(repeats)],
                env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True,
            )
            for group in range(groups) for rank in range(world)
        ]  # fmt: skip
        said = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise SystemExit("a worker failed")
    found: dict[str, Any] = json.loads(said[0])
    return found


def fastest(rounds: list[dict[str, Any]], kind: str, key: str) -> float:
    return min(float(found[kind][key]) for found in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9, help="steps that are timed in a round")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        print(json.dumps(work(options.rank, options.world, options.meeting, options.repeats)))
        return
    sys.path.insert(0, str(ROOT))
    from pipelines.plan import cost
    from pipelines.plan.dry import run_dry

    alone, control, together = [], [], []
    for _ in range(options.rounds):
        alone.append(measure(1, 1, options.repeats))
        control.append(measure(1, 2, options.repeats))
        together.append(measure(2, 1, options.repeats))
    reduce = {size: fastest(together, "reduce", str(size)) for size in SIZES}
    small, large = min(reduce), max(reduce)
    beta = (reduce[large] - reduce[small]) / (large - small)  # of two ranks each sends 2 (N-1)/N = all of the bytes
    link = cost.Link(reduce[small] / 2, beta)  # two messages one after another
    print(f"gloo, 2 processes: alpha {link.alpha * 1e6:.0f} us, {1 / beta / 1e9:.2f} GB/s")
    for size, seconds in reduce.items():
        predicted = cost.collective_seconds("all_reduce", size, 2, link)
        print(f"  all-reduce of {size:>9} bytes: {seconds * 1e3:8.3f} ms, by the formula {predicted * 1e3:8.3f} ms")
    for case, (data, section) in CASES.items():
        dry = run_dry(run_of(section, 2), spec_of(data), 2)
        waiting = sum(share * cost.communication_seconds(counts, 2, link) for share, counts in dry.steps)
        one, apart, both = (fastest(rounds, "step", case) for rounds in (alone, control, together))
        low, high = (2 * one / cost.step_seconds(one, waiting, overlap) for overlap in (0.0, 1.0))
        least, most = (2 * one / cost.step_seconds(apart, waiting, overlap) for overlap in (0.0, 1.0))
        print(
            f"{case}: a step {one * 1e3:.1f} ms alone, {apart * 1e3:.1f} ms beside another that is silent, "
            f"{both * 1e3:.1f} ms together; communication {waiting * 1e3:.2f} ms\n"
            f"  images/s of 2 over 1: measured {2 * one / both:.3f}; by the model {low:.3f} to {high:.3f}, "
            f"from the control's step {least:.3f} to {most:.3f}"
        )


if __name__ == "__main__":
    main()
