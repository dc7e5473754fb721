"""The f-GAN paper's table: Parzen-window log-likelihoods of MNIST under generators trained with each divergence.

Nowozin et al. 2016, table 3, arXiv:1606.00709. As there: grey MNIST, a generator and a critic without convolutions,
16,000 samples, the kernel's width chosen on held-out training rows, all test rows. The networks, batch and number of
steps are this script's, printed with the result. The row "train" uses training images as samples: what a perfect
generator gets by this estimator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import dgm_models
from dgm_models.metrics.estimate import student_quantile
from dgm_models.metrics.parzen import parzen
from dgm_models.ops.divergences import DIVERGENCES
from pipelines.data import shards
from pipelines.data.prepare import prepare

SAMPLES = 16_000
WIDTHS = [0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.22, 0.25, 0.3, 0.4, 0.6, 1.0]
METHOD = {"network": {"name": "mlp", "width": 512, "depth": 2, "activation": "leaky_relu"}, "latent_dim": 100}
OPTIM = {"lr": 2e-4, "betas": (0.5, 0.999)}


def unit(x: Tensor) -> Tensor:
    """Stored grey levels as numbers in [0, 1], flat."""
    return x.flatten(1).double() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/mnist"), help="prepared MNIST; made if missing")
    parser.add_argument("--divergences", nargs="+", default=list(DIVERGENCES), choices=list(DIVERGENCES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--test", type=int, default=10_000, help="test rows")
    parser.add_argument("--log", type=Path, help="gets one JSON line a training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not (options.data / "manifest.json").is_file():
        prepare({"name": "mnist"}, options.data)
    train, valid, test = (shards.load(options.data, split).x for split in ("train", "valid", "test"))
    spec = shards.read_manifest(options.data).spec()
    held_out, rows = unit(valid[:2000]), unit(test[: options.test])
    print(f"{METHOD}, adam {OPTIM}, {options.steps} steps of {options.batch}, {SAMPLES} samples, {len(rows)} test rows")
    real = parzen(unit(train[:SAMPLES]), held_out, rows, WIDTHS)
    print(
        f"{'train':<16} {real.test.value:7.1f} [{real.test.low:.1f}, {real.test.high:.1f}], width {real.width:g}",
        flush=True,
    )
    for name in options.divergences:
        found = []
        for seed in range(options.first, options.first + options.seeds):
            started = time.time()
            method = dgm_models.build("gan/f_gan", spec, seed=seed, divergence=name, **METHOD)
            dgm_models.fit(
                method, train, seed=seed, optim=OPTIM, steps=options.steps, batch_size=options.batch, average=0.999,
                report_every=options.steps, threads=options.threads,
            )  # fmt: skip
            torch.set_num_threads(options.threads)
            result = parzen(unit(dgm_models.sample(method, SAMPLES, seed)), held_out, rows, WIDTHS)
            found.append(result.test.value)
            line = {"divergence": name, "seed": seed, "steps": options.steps, "batch": options.batch,
                    "nats": result.test.value, "low": result.test.low, "high": result.test.high, "width": result.width,
                    "seconds": round(time.time() - started)}  # fmt: skip
            if options.log:
                with options.log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            print(
                f"  {name:<16} seed {seed}: {result.test.value:7.1f}, width {result.width:g}, {line['seconds']} s",
                flush=True,
            )
        half = student_quantile(len(found) - 1) * statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
        print(
            f"{name:<16} {statistics.mean(found):7.1f} +- {half:.1f} (95% t interval over {len(found)} seeds)",
            flush=True,
        )


if __name__ == "__main__":
    main()
