"""Peak memory and speed of a stream, for a dataset and for one 100 times larger, beside the dataset held in memory.

Every side is a process of its own with one thread, which draws the same number of batches, an epoch of the larger
dataset, from prepared shards of one size; the two datasets differ in their number of shards alone. The peak is the
kernel's VmHWM, so it counts everything: libraries, parquet's buffers, threads. (`ru_maxrss` is not taken: a process
begins with that of the one that started it.) What a process weighs before it opens a dataset is printed beside it.
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
CHILD = """
import json, sys, time
import torch
from pipelines.data.source import source_of
from pipelines.params import Stream
torch.set_num_threads(1)
peak = lambda: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
folder, side, batch, buffer, lanes, rows = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
before, start = peak(), time.perf_counter()
source = source_of(folder, "train", 0, Stream(buffer, lanes) if side == "stream" else None, batch)
source.batch(0, batch)
opened = time.perf_counter()
steps = rows // batch
for step in range(1, steps):
    source.batch(step * batch, (step + 1) * batch)
seconds = time.perf_counter() - opened
print(json.dumps({"before": before, "peak": peak(), "opened": opened - start, "rate": (steps - 1) * batch / seconds}))
"""


def make(folder: Path, shards: int, rows: int, width: int) -> None:
    """A prepared dataset of random bytes: `shards` files of train, one of valid, one of test."""
    import numpy as np

    from pipelines.data.manifest import FILE, SCHEMA, Manifest
    from pipelines.data.raw import Source
    from pipelines.data.shards import write_part, write_synced

    rng = np.random.default_rng(0)
    names = [f"train/part-{number:05d}.parquet" for number in range(shards)]
    names += ["valid/part-00000.parquet", "test/part-00000.parquet"]
    parts = []
    folder.mkdir()
    for number, name in enumerate(names):
        x = rng.integers(0, 256, (rows, width), np.uint8)
        parts.append(write_part(folder, name, np.arange(number * rows, (number + 1) * rows), x, None))
    manifest = Manifest(
        schema=SCHEMA, name="bench", kind="vector", shape=(width,), dtype="uint8", levels=256, classes=0,
        class_names=(), location=0.0, scale=1.0, rows={"train": shards * rows, "valid": rows, "test": rows},
        parts=tuple(parts), split=(0.8, 0.1, 0.1), split_seed=0, licence="generated", source=Source("generated"),
        entropy_nats=None,
    )  # fmt: skip
    write_synced(folder / FILE, manifest.to_json().encode())


def measure(folder: Path, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own."""
    rows = options.shards * options.times * options.rows
    numbers = (options.batch, options.buffer, options.lanes, rows)
    command = [sys.executable, "-c", CHILD, str(folder), side, *map(str, numbers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=16, help="of the smaller dataset")
    parser.add_argument("--times", type=int, default=100, help="the larger one has so many times the shards")
    parser.add_argument("--rows", type=int, default=2000, help="of a shard")
    parser.add_argument("--width", type=int, default=784, help="bytes of a row")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--buffer", type=int, default=8192)
    parser.add_argument("--lanes", type=int, default=8)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="dgm-bench-") as folder:
        found = {}
        for name, shards in (("small", options.shards), ("large", options.shards * options.times)):
            make(Path(folder, name), shards, options.rows, options.width)
        for side, name in (("stream", "small"), ("stream", "large"), ("memory", "small")):
            found[side, name] = measure(Path(folder, name), side, options)
    size = options.shards * options.rows * options.width / 2**20
    print(f"{options.rows} rows of {options.width} bytes a shard, batch {options.batch}, ", end="")
    print(f"buffer {options.buffer}, {options.lanes} lanes, 1 thread and {min(options.lanes, 4)} readers")
    for (side, name), one in found.items():
        total = size * (options.times if name == "large" else 1)
        print(f"{side}, {total:.0f} MiB: peak {one['peak'] / 2**20:.0f} MiB ", end="")
        print(
            f"({one['before'] / 2**20:.0f} before the dataset is opened), first batch {one['opened']:.2f} s, ", end=""
        )
        print(f"then {one['rate']:.0f} rows/s")
    small, large = found["stream", "small"], found["stream", "large"]
    print(f"peak of the stream, {options.times} times the data: ratio {large['peak'] / small['peak']:.3f}, ", end="")
    print(f"of what the stream adds: {(large['peak'] - large['before']) / (small['peak'] - small['before']):.3f}")
    print(f"rows/s, stream over memory: {small['rate'] / found['memory', 'small']['rate']:.3f}")


if __name__ == "__main__":
    main()
