"""Eight Gaussians on a ring: who covers all modes, and what the watchers say of who does not.

Every method trains with the same two networks, steps and seeds. A mode counts as covered as `metrics/modes.py` says;
c2st is the accuracy of a classifier that tells samples from data (0.5: it cannot). The sentences are the report page's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dgm_models
from dgm_models.metrics.modes import modes
from dgm_models.metrics.two_sample import classifier_two_sample
from pipelines.data import shards
from pipelines.data.prepare import prepare
from pipelines.views import game

DATASET = {"name": "eight-gaussians", "rows": 20_000, "noise": 0.05, "seed": 0}
COMMON = {"latent_dim": 8, "network": {"name": "mlp", "width": 128, "depth": 3, "activation": "relu"}}
OPTIM = {"lr": 1e-3, "betas": (0.5, 0.9)}
R1 = {"r1": 1.0, "r1_every": 1}
METHODS: dict[str, dict[str, Any]] = {
    "minimax": {"name": "gan/minimax"},
    "wgan_gp": {"name": "gan/wgan_gp", "penalty": 1.0},
    "hinge": {"name": "gan/hinge", "tricks": R1},
    "f_gan_js": {"name": "gan/f_gan", "divergence": "jensen_shannon", "tricks": R1},
}
COMPARED = 2_000


def _no_panel(name: str, curves: Mapping[str, Sequence[game.Point]]) -> dict[str, Any]:
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--critic-steps", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path("data/ring"), help="prepared data; made if missing")
    parser.add_argument("--log", type=Path, help="gets one JSON line a training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (options.data / "manifest.json").is_file():
        prepare(dict(DATASET), options.data)
    train, test = (shards.load(options.data, split) for split in ("train", "test"))
    spec = shards.read_manifest(options.data).spec()
    assert test.cond is not None
    real, labels = test.x[:COMPARED], test.cond[:COMPARED]
    print(f"{COMMON}, critic steps {options.critic_steps}, adam {OPTIM}, {options.steps} steps of 256", flush=True)
    for name in options.methods:
        for seed in range(options.first, options.first + options.seeds):
            started = time.time()
            section = dict(METHODS[name])
            method = dgm_models.build(
                section.pop("name"), spec, seed=seed, **COMMON, **section, critic_steps=options.critic_steps
            )
            dgm_models.fit(
                method, train.x, seed=seed, optim=OPTIM, steps=options.steps, batch_size=256, average=0.99,
                report_every=options.steps // 5,
            )  # fmt: skip
            fake = dgm_models.sample(method, COMPARED, seed)
            found = modes(real, labels, fake)
            told = classifier_two_sample(real.double(), fake.double())
            curves: dict[str, list[tuple[float, float]]] = {}
            for step, metrics in method.history:
                for key, value in metrics.items():
                    curves.setdefault(key, []).append((step, value))
            page = game.view(name, curves, {"value": found.covered.value, "of": 8, **asdict(found.covered)}, _no_panel)
            assert page is not None
            said = [finding["text"] for finding in page["findings"]] + [page["nash"]["text"]]
            line = {"method": name, "seed": seed, "steps": options.steps, "covered": found.covered.value,
                    "quality": found.quality.value, "c2st": [told.value, told.low, told.high], "said": said,
                    "watched": method.history[-1][1], "seconds": round(time.time() - started)}  # fmt: skip
            if options.log:
                with options.log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            print(f"{name:<10} seed {seed}: {found.covered.value:.0f} of 8 modes, quality {found.quality.value:.2f}, "
                  f"c2st {told.value:.2f} [{told.low:.2f}, {told.high:.2f}], "
                  f"{line['seconds']} s; {'; '.join(said)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
