"""Likelihoods of MNIST: test NLL in nats of autoregressive models on the fixed binarization, of NICE on grey levels.

The binary rows are those of Larochelle and Murray 2011 (50,000 training, 10,000 validation and 10,000 test rows,
binarized once), so the figures stand beside the published ones: FVSBN 97.45 and NADE 88.33 (Uria et al. 2016,
arXiv:1605.02226), MADE 88.40 with one mask and 86.64 with 32 masks of two layers of 8,000 units (Germain et al. 2015,
arXiv:1502.03509), PixelCNN 81.30 and the diagonal PixelRNN 79.20 (van den Oord et al. 2016, arXiv:1601.06759). NICE has
4.36 bits/dim on MNIST as it is (Dinh et al. 2015, arXiv:1410.8516): a bound, with uniform noise.

The sets are small for these models and they overfit them: the weights are averaged, those of the best validation loss
are kept, and a training stops when it has not improved for `PATIENCE` validations. Test rows are read once, at the end.
The log is the learning curve.

    python benchmarks/exact_mnist.py --log exact_mnist.jsonl
    python benchmarks/exact_mnist.py made --params '{"width": 8000}' --device cuda   # the paper's size
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dgm_models
from dgm_models.likelihood import log_prob
from dgm_models.metrics.likelihood import mean_estimate
from pipelines.data import shards
from pipelines.data.prepare import prepare

BATCH = 100
PATIENCE = 8


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    Attributes:
        method: its name in the registry.
        epochs: at most; the learning rate falls to 0 along a cosine over them.
        decay: of the averaged weights.
        every: epochs between validations, which for MADE read the rows once for every mask set.
        data: the dataset.
        params, optim: of the method and of the optimizer.
    """

    method: str
    epochs: float
    decay: float
    every: float = 1
    data: str = "binarized-mnist"
    params: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "fvsbn": Recipe("autoregressive/fvsbn", 16, 0.999, optim={"lr": 2e-2, "weight_decay": 1e-4}),
    "nade": Recipe("autoregressive/nade", 12, 0.9995, params={"width": 500}, optim={"lr": 3e-3, "weight_decay": 1e-5}),
    # a raster and its mirror: each has the weights that the other masks. Two sets of one order end 0.9 nats higher
    "made": Recipe(
        "autoregressive/made", 14, 0.999, optim={"lr": 3e-3, "clip": 100.0},
        params={"width": 1000, "depth": 2, "masks": 2, "mirrored": True, "direct": True, "base_rates": True},
    ),
    # the two below are sized for a processor: the papers' have up to 15 and 12 layers
    "pixel_cnn": Recipe(
        "autoregressive/pixel_cnn", 2, 0.99, 0.25, params={"width": 24, "blocks": 5}, optim={"lr": 3e-3, "clip": 100.0},
    ),
    "pixel_rnn": Recipe(
        "autoregressive/pixel_rnn", 1, 0.99, 0.25, params={"width": 16, "blocks": 2},
        optim={"lr": 3e-3, "clip": 100.0},
    ),
    "nice": Recipe("flows/nice", 8, 0.99, 1, "mnist", optim={"lr": 4e-3, "betas": (0.9, 0.99), "eps": 1e-4}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(RECIPES), metavar="name", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of prepared datasets; made if missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log", type=Path, help="gets a JSON line an epoch and one a result")
    parser.add_argument("--epochs", type=float, help="in place of the recipe's")
    parser.add_argument("--stop", type=float, help="epochs after which to stop all the same, the rate's course kept")
    parser.add_argument("--decay", type=float, help="in place of the recipe's")
    parser.add_argument("--lr", type=float, help="in place of the recipe's")
    parser.add_argument("--weight-decay", type=float, help="in place of the recipe's")
    parser.add_argument("--params", type=json.loads, default={}, help='over the recipe\'s, as JSON: {"width": 500}')
    options = parser.parse_args()
    if unknown := set(options.names) - RECIPES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(RECIPES)}")
    for name in options.names:
        train(name, options)


def train(name: str, options: argparse.Namespace) -> None:
    """Trains one model and prints its row."""
    recipe = RECIPES[name]
    data = options.data / recipe.data
    if not (data / "manifest.json").is_file():
        prepare({"name": recipe.data}, data)
    spec = shards.read_manifest(data).spec()
    rows = {split: shards.load(data, split).x for split in ("train", "valid", "test")}

    given = {key: getattr(options, key) for key in ("lr", "weight_decay") if getattr(options, key) is not None}
    params, optim = recipe.params | options.params, recipe.optim | {"schedule": "cosine"} | given
    epochs, steps = options.epochs or recipe.epochs, len(rows["train"]) // BATCH
    method = dgm_models.build(recipe.method, spec, seed=options.seed, **params)
    size = sum(p.numel() for p in method.model.parameters())
    said = {"name": name, "seed": options.seed, "parameters": size, "params": params, "optim": optim, "epochs": epochs}
    print(f"{name}: {params}, {size:,} parameters, adam {optim}, at most {epochs} epochs in batches of {BATCH}")
    started, used = time.time(), time.process_time()

    def tell(kind: str, line: dict[str, Any]) -> None:
        line |= {"seconds": round(time.time() - started, 1), "cpu_seconds": round(time.process_time() - used, 1)}
        if options.log:
            with options.log.open("a") as file:
                file.write(json.dumps({"kind": kind, **said, **line}) + "\n")

    def report(step: int, metrics: dict[str, float]) -> None:
        line = {"epoch": step / steps, "train_nats": metrics["loss"], "valid_nats": metrics["valid/loss"]}
        print(f"  epoch {step / steps:6.2f}: train {metrics['loss']:.3f}, valid {metrics['valid/loss']:.3f}, "
              f"{time.process_time() - used:.0f} s of CPU", flush=True)  # fmt: skip
        tell("epoch", line)
        if options.stop and step >= options.stop * steps:
            raise KeyboardInterrupt

    every = round(recipe.every * steps)
    try:
        dgm_models.fit(
            method, rows["train"], valid=rows["valid"], optim=optim, seed=options.seed, device=options.device,
            report=report, steps=round(epochs * steps), batch_size=BATCH, average=options.decay or recipe.decay,
            report_every=every, validate_every=every, keep="best", patience=PATIENCE, threads=options.threads,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("  stopped", flush=True)
        return
    nats, kind = log_prob(method, rows["test"], device=options.device)
    found = mean_estimate(-nats)
    best = min(metrics["valid/loss"] for _, metrics in method.history)
    tell("result", {"test_nats": found.value, "low": found.low, "high": found.high, "valid_nats": best,
                    "said": kind, "epochs_run": len(method.history) * recipe.every})  # fmt: skip
    bits = f", {found.value / spec.dims / math.log(2):.3f} bits/dim" if spec.levels != 2 else ""
    print(f"{name:<6} test {found.value:.2f} nats [{found.low:.2f}, {found.high:.2f}]{bits} ({kind}), "
          f"{size:,} parameters, {time.time() - started:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
