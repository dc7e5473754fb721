"""Two-dimensional densities whose entropy is known: how many nats a trained density stays above it.

Every method trains in this process with the recipe below, on rows of its seed, and is measured on fresh rows:
`gap` is the mean negative log-likelihood minus the entropy of the exact density, `kl` the mean of log p - log q over
the same rows, which has the same expectation and a smaller standard error (`kl_error`). A line of JSON a training, then
the means over the seeds.

    python benchmarks/density_2d.py --methods maf neural_spline --seeds 5 --log density_2d.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dgm_models
from dgm_models import registry
from pipelines.data.datasets.checkerboard import Checkerboard
from pipelines.data.datasets.eight_gaussians import EightGaussians
from pipelines.data.datasets.moons import Moons
from pipelines.data.datasets.pinwheel import Pinwheel
from pipelines.data.toy import Toy

TOYS: dict[str, type[Toy]] = {
    "moons": Moons, "eight_gaussians": EightGaussians, "pinwheel": Pinwheel, "checkerboard": Checkerboard
}  # fmt: skip
ROWS, FRESH, FRESH_SEED = 200_000, 100_000, 1_000_003
MLP = {"name": "mlp", "width": 64, "depth": 2, "activation": "silu"}
OPTIM = {"lr": 5e-3, "schedule": "cosine", "clip": 5.0}
TRAIN = {"steps": 2_000, "batch_size": 256, "average": 0.99}
# a method's parameters, and what it changes of OPTIM and TRAIN
RECIPES: dict[str, Mapping[str, Any]] = {
    "nice": {"method": {"network": MLP, "layers": 8, "base": "normal"}},
    "real_nvp": {
        "method": {"channels": 64, "blocks": 2, "layers": 16},
        "optim": {"lr": 2e-2},
        "train": {"steps": 1_500},
    },
    "neural_spline": {"method": {"network": MLP, "layers": 4, "bins": 16, "bound": 3.5}, "train": {"steps": 800}},
    "maf": {"method": {"network": MLP, "layers": 4, "components": 32}, "train": {"steps": 1_500}},
    "iaf": {"method": {"network": MLP, "layers": 10}},
    "i_resnet": {
        "method": {"width": 64, "layers": 1, "blocks": 24, "lipschitz": 0.99},
        "optim": {"lr": 2e-2},
        "train": {"steps": 1_000},
    },
    "mint_net": {
        "method": {"groups": 32, "layers": 8},
        "optim": {"lr": 3e-2},
        "train": {"steps": 1_000, "batch_size": 512},
    },
}


def recipe(method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """OPTIM and TRAIN, the method's own settings over them, and the command line's over these."""
    common: dict[str, Any] = {"method": {}, "optim": OPTIM, "train": TRAIN}
    return {
        name: {**section, **RECIPES[method].get(name, {}), **changes.get(name, {})} for name, section in common.items()
    }


def rows(toy: type[Toy], number: int, seed: int) -> Tensor:
    return torch.from_numpy(toy(number).read(seed).x)


def run(method: str, toy: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One training and its measurement."""
    x, fresh = rows(TOYS[toy], ROWS, seed), rows(TOYS[toy], FRESH, FRESH_SEED)
    data = dgm_models.DataSpec("vector", (2,), None, location=float(x.mean()), scale=float(x.std()))
    trained = dgm_models.build(f"flows/{method}", data, seed=seed, **settings["method"])
    begun = time.perf_counter(), time.process_time()
    dgm_models.fit(trained, x, optim=settings["optim"], seed=seed, **settings["train"])
    minutes = (time.perf_counter() - begun[0]) / 60
    processor = (time.process_time() - begun[1]) / 60
    found = []
    for part in fresh.split(10_000):
        y, log_det = trained.model.codec.encode(part, torch.arange(len(part)))
        with torch.no_grad():
            found.append((trained.model.log_prob(y) + log_det).double())
    log_q, log_p = torch.cat(found), TOYS[toy]().log_density(fresh)
    apart = log_p - log_q
    entropy = TOYS[toy]().entropy()
    return {
        "method": method, "data": toy, "seed": seed, "nll": -float(log_q.mean()), "entropy": entropy,
        "gap": -float(log_q.mean()) - entropy, "kl": float(apart.mean()),
        "kl_error": float(apart.std()) / math.sqrt(len(apart)), "minutes": minutes, "cpu_minutes": processor,
        "parameters": sum(p.numel() for p in trained.model.parameters()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name in RECIPES if f"flows/{name}" in registry.METHODS]
    asked = [name for name in known if name not in ("nice", "iaf")]  # volumes kept; the density of data D passes away
    parser.add_argument("--methods", nargs="+", default=asked, choices=known)
    parser.add_argument("--data", nargs="+", default=list(TOYS), choices=list(TOYS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--change", type=json.loads, default={}, help='settings as JSON: {"train": {"steps": 100}}')
    parser.add_argument("--log", type=Path, help="gets the JSON lines too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for method in options.methods:
        settings = recipe(method, options.change)
        print(f"{method}: {json.dumps(settings)}", flush=True)
        for toy in options.data:
            gaps = []
            for seed in range(options.first, options.first + options.seeds):
                line = json.dumps(found := run(method, toy, seed, settings))
                print(line, flush=True)
                if options.log:
                    with options.log.open("a") as file:
                        file.write(line + "\n")
                gaps.append(found["gap"])
            spread = f", standard deviation {statistics.stdev(gaps):.4f}" if len(gaps) > 1 else ""
            print(f"{method} on {toy}: {statistics.mean(gaps):.4f} nats above the entropy{spread}", flush=True)


if __name__ == "__main__":
    main()
