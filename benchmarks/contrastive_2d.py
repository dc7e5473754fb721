"""Flow contrastive estimation against noise contrastive estimation, on densities in the plane.

An energy is trained against three sorts of noise: a Gaussian fitted to the data, a flow trained by maximum likelihood,
and a flow that plays (flow contrastive estimation). The energy is the same, from the same initial weights, with as many
updates on as many rows of data and of noise.
The energy is normalised by summing exp(-E) over a grid, so that its log-likelihood is exact but for the grid; what
lies on the grid's border, and the integral of the flow's density over the grid, are printed as checks. `gap` is the
mean negative log-likelihood of fresh rows minus the entropy of the exact density. A line of JSON a training, then the
means over the seeds.

    python benchmarks/contrastive_2d.py --seeds 5 --log contrastive_2d.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dgm_models
from pipelines.data.datasets.checkerboard import Checkerboard
from pipelines.data.datasets.eight_gaussians import EightGaussians
from pipelines.data.datasets.moons import Moons
from pipelines.data.datasets.pinwheel import Pinwheel
from pipelines.data.toy import Toy

TOYS: dict[str, type[Toy]] = {
    "moons": Moons, "eight_gaussians": EightGaussians, "pinwheel": Pinwheel, "checkerboard": Checkerboard
}  # fmt: skip
ROWS, FRESH, FRESH_SEED = 200_000, 50_000, 1_000_003
SIDE, REACH = 800, 6.0  # of the grid: points along a side, and where it ends, in standard deviations of the data
NETWORK = {"name": "mlp", "width": 128, "depth": 3, "activation": "gelu"}
FLOW = {"name": "flows/neural_spline", "network": {"name": "mlp", "width": 64, "depth": 2, "activation": "silu"},
        "layers": 4, "bins": 12, "bound": 3.5}  # fmt: skip
STEPS = 1_500
TRAIN = {"steps": STEPS, "batch_size": 256, "average": 0.99}
ENERGY = {"network": NETWORK, "spread": 2.0}
OPTIM = {"lr": 5e-3, "schedule": "cosine", "clip": 5.0}
# what the noise is -> the method, its parameters and its optimizer
RECIPES: dict[str, dict[str, Any]] = {
    "gaussian": {"name": "energy/noise_contrastive", "method": ENERGY, "optim": OPTIM},
    "likelihood": {  # a flow that is trained by maximum likelihood all the while
        "name": "energy/flow_contrastive", "method": {**ENERGY, "flow": FLOW, "pretrain": STEPS}, "optim": OPTIM
    },
    "contrastive": {  # a flow that plays
        "name": "energy/flow_contrastive", "method": {**ENERGY, "flow": FLOW},
        "optim": {**OPTIM, "betas": [0.5, 0.99], "flow": {"lr": 2.5e-3}},
    },
}  # fmt: skip


def rows(toy: type[Toy], number: int, seed: int) -> Tensor:
    return torch.from_numpy(toy(number).read(seed).x)


def over_grid(log_p: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """The logarithm of the integral of exp(log_p) over the grid, and the share of it in the border's cells."""
    axis = torch.linspace(-REACH, REACH, SIDE)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        found = torch.cat([log_p(part).double() for part in points.split(20_000)])
    total = found.logsumexp(0)
    border = points.abs().amax(1) == REACH
    share = float((found[border].logsumexp(0) - total).exp())
    return float(total) + 2 * math.log(2 * REACH / (SIDE - 1)), share


def run(noise: str, toy: str, seed: int, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """One training and its measurement."""
    x, fresh = rows(TOYS[toy], ROWS, seed), rows(TOYS[toy], FRESH, FRESH_SEED)
    data = dgm_models.DataSpec("vector", (2,), None, location=float(x.mean()), scale=float(x.std()))
    trained = dgm_models.build(recipe["name"], data, seed=seed, **recipe["method"])
    begun = time.process_time()
    dgm_models.fit(trained, x, optim=recipe["optim"], seed=seed, **TRAIN)
    minutes = (time.process_time() - begun) / 60
    model = trained.model
    y, log_det = model.codec.encode(fresh, torch.arange(len(fresh)))
    log_z, border = over_grid(lambda points: -model.energy(points))
    entropy = TOYS[toy]().entropy()

    def gap(log_p: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return -float((log_p(y) + log_det).double().mean()) - entropy

    found = {
        "noise": noise, "data": toy, "seed": seed, "gap": gap(lambda y: -model.energy(y) - log_z), "log_z": log_z,
        "learned_log_z": learned_log_z(model), "border": border, "entropy": entropy, "cpu_minutes": minutes,
    }  # fmt: skip
    if noise != "gaussian":
        found |= {"flow_gap": gap(model.flow.log_prob), "flow_integral": math.exp(over_grid(model.flow.log_prob)[0])}
    return found


@torch.no_grad()
def learned_log_z(model: Any) -> float:
    """-log p - E at any point, in nats."""
    point = torch.zeros(1, 2)
    return float(-model.log_prob(point) - model.energy(point))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--data", nargs="+", default=list(TOYS), choices=list(TOYS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--change", type=json.loads, default={}, help='of the optimizer: {"lr": 0.001}')
    parser.add_argument("--log", type=Path, help="gets the JSON lines too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gaps: dict[tuple[str, str], list[float]] = {}
    for seed in range(options.first, options.first + options.seeds):
        for toy, noise in itertools.product(options.data, options.noise):
            recipe = {**RECIPES[noise], "optim": {**RECIPES[noise]["optim"], **options.change}}
            line = json.dumps(found := run(noise, toy, seed, recipe))
            print(line, flush=True)
            if options.log:
                with options.log.open("a") as file:
                    file.write(line + "\n")
            gaps.setdefault((toy, noise), []).append(found["gap"])
    for (toy, noise), values in gaps.items():
        spread = f", standard deviation {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{noise} on {toy}: {statistics.mean(values):.4f} nats above the entropy{spread}")


if __name__ == "__main__":
    main()
