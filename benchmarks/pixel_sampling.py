"""Sampling of pixel models at 28 x 28, with what is kept between pixels, against a plain sampler of the same network.

The plain sampler runs the whole network once for every pixel and reads that pixel's outputs. Both draw from the same
generator in the same order, in one process, one after the other; the images must be equal, bit for bit, before a ratio
is printed. Seconds of CPU stand beside those of the clock: whoever else computes on the machine slows the clock alone.

    PYTHONPATH=. python benchmarks/pixel_sampling.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dgm_models.method import build
from dgm_models.nn.autoregression import Autoregressive
from dgm_models.protocols import DataSpec

MODELS: dict[str, dict[str, Any]] = {
    "pixel_cnn": {"width": 32, "blocks": 5},
    "gated_pixel_cnn": {"width": 32, "blocks": 5},
    "pixel_cnn_pp": {"width": 24, "blocks": 2, "components": 5},
    "pixel_rnn": {"width": 16, "blocks": 3},
}
SHARPER = 2.0  # what initial weights are multiplied by: outputs that differ between pixels, as after training


@torch.no_grad()
def plain(model: Autoregressive, n: int, rng: torch.Generator) -> Tensor:
    """[n, *event]: ancestral sampling with nothing kept: the whole network for every place."""
    x = torch.zeros(n, model.data.dims, dtype=torch.int64)
    for place, at in enumerate(model.places):
        params = model.conditionals(x.reshape(n, *model.data.shape), None)[:, place]
        x[:, at] = model.likelihood.sample(params[..., None], rng)
    return x.reshape(n, *model.data.shape)


def timed(draw: Callable[[torch.Generator], Tensor], seed: int) -> tuple[Tensor, float, float]:
    """What is drawn, and the seconds that it took by the clock and of CPU."""
    rng = torch.Generator().manual_seed(seed)
    start, cpu = time.perf_counter(), time.process_time()
    drawn = draw(rng)
    return drawn, time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int, default=16, help="images that are drawn at a time")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--levels", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, batch {args.batch}, {args.size} x {args.size}", end="")
    print(f", {args.levels} levels, float32\n")
    print("| model | parameters | cached, s (CPU) | plain, s (CPU) | plain / cached (CPU) |\n|---|---|---|---|---|")
    data = DataSpec("image", (1, args.size, args.size), args.levels)
    for name in args.models:
        model = build(f"autoregressive/{name}", data, seed=args.seed, **MODELS[name]).model.eval()
        assert isinstance(model, Autoregressive)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(SHARPER)
        model.sample(args.batch, torch.Generator())  # warm
        ours, fast, fast_cpu = timed(lambda rng, model=model: model.sample(args.batch, rng), args.seed)
        theirs, slow, slow_cpu = timed(lambda rng, model=model: plain(model, args.batch, rng), args.seed)
        assert torch.equal(ours, theirs), f"{name}: {int((ours != theirs).sum())} values differ"
        assert 0 < float((ours > 0).float().mean()) < 1, f"{name}: all values are alike"
        size = sum(p.numel() for p in model.parameters())
        print(f"| {name} {MODELS[name]} | {size:,} | {fast:.2f} ({fast_cpu:.2f}) | {slow:.2f} ({slow_cpu:.2f})", end="")
        print(f" | {slow / fast:.1f} ({slow_cpu / fast_cpu:.1f}) |", flush=True)


if __name__ == "__main__":
    main()
