"""The VAE and IWAE-50 on the fixed binarization of MNIST, with the same network: nats by importance sampling on test.

One stochastic layer of 40 units, convolutions on either side, a Bernoulli likelihood; Adam with a cosine, averaged
weights, the step of the lowest validation loss. `--start` gives the weights of a trained artifact to begin with.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import dgm_models
from dgm_models.likelihood import log_prob
from dgm_models.metrics.likelihood import mean_estimate
from pipelines.data import shards
from pipelines.data.prepare import prepare

NETWORK = {"name": "conv", "channels": 32, "stages": 2, "activation": "silu"}
LATENT_DIM = 40
METHODS = {"vae": {"name": "vae/vae"}, "iwae": {"name": "vae/iwae", "importance": 50}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument(
        "--data", type=Path, default=Path("data/binarized-mnist"), help="prepared data; made if missing"
    )
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--validate-every", type=int, default=1_000)
    parser.add_argument("--importance", type=int, nargs="+", default=[200, 5000], help="draws of the estimates on test")
    parser.add_argument("--test", type=int, default=10_000, help="test rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", type=Path, help="an artifact of the same network")
    parser.add_argument("--save", type=Path, help="folder of the trained artifact")
    parser.add_argument("--log", type=Path, help="gets one JSON line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not (options.data / "manifest.json").is_file():
        prepare({"name": "binarized-mnist"}, options.data)
    train, valid, test = (shards.load(options.data, split).x for split in ("train", "valid", "test"))
    section = dict(METHODS[options.method])
    method = dgm_models.build(
        str(section.pop("name")), shards.read_manifest(options.data).spec(), seed=options.seed, network=NETWORK,
        latent_dim=LATENT_DIM, **section,
    )  # fmt: skip
    if options.start:
        method.model.load_state_dict(dgm_models.load(options.start).model.state_dict())
    print(method, flush=True)
    started = time.time()
    dgm_models.fit(
        method, train, valid=valid, seed=options.seed, optim={"lr": options.lr, "schedule": "cosine"},
        steps=options.steps, batch_size=options.batch, average=0.999, keep="best",
        validate_every=options.validate_every, report_every=options.validate_every, threads=options.threads,
        report=lambda step, metrics: print(step, {k: round(v, 3) for k, v in metrics.items()}, flush=True),
    )  # fmt: skip
    trained = time.time() - started
    if options.save:
        dgm_models.save(method, options.save)
    torch.set_num_threads(options.threads)
    line = {"method": options.method, "seed": options.seed, "steps": options.steps, "batch": options.batch,
            "lr": options.lr, "start": options.start and str(options.start), "train_s": round(trained),
            "test_rows": options.test}  # fmt: skip
    for draws in options.importance:
        found = mean_estimate(-log_prob(method, test[: options.test], importance=draws)[0])
        line[f"is_{draws}"] = [found.value, found.low, found.high]
        print(f"{options.method}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] nats by {draws} draws, "
              f"{options.test} test rows, {trained:.0f} s of training", flush=True)  # fmt: skip
    if options.log:
        with options.log.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
