"""Does the beta-VAE tell the factors of `shapes` apart better than the VAE? Both of zoo/params.yaml, over seeds.

`vae_shapes` and `beta_vae_shapes` differ in beta alone, which stands in that file before any seed is run. Every seed
draws other weights, another order of the rows and other noise; the data are the same. The mutual information gaps are
those of the evaluation, on test; nothing starts Ray. The claim is tested by ranks: p is the chance that the beta-VAE is
higher in so many pairs (one training of either) when all orders are equally likely.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dgm_models
from pipelines import params as p
from pipelines import paths
from pipelines.data import shards
from pipelines.data.prepare import prepare
from pipelines.stages.evaluate import Rows, disentangled

RUNS = ("zoo/vae_shapes", "zoo/beta_vae_shapes")
METRICS = ("mig/histogram", "mig/sampled", "dci/disentanglement")
DECIDES = "mig/histogram"


def train(run: p.Run, data: Path, seed: int, steps: int | None) -> dict[str, Any]:
    """One training and its gaps on test."""
    manifest = shards.read_manifest(data)
    method = dgm_models.build(run.method, manifest.spec(), seed=seed, **run.arguments)
    settings = dict(run.section["train"]) | ({"steps": steps} if steps else {})
    started = time.perf_counter()
    dgm_models.fit(method, shards.load(data, "train").x, optim=run.section["optim"], seed=seed, **settings)
    trained = time.perf_counter()
    rows = Rows(None, "test", seed)
    disentangled(rows, method, shards.load(data, "test"), manifest)
    found = {row["metric"]: row["value"] for row in rows.rows}
    if set(found) < set(METRICS):
        raise SystemExit(f"{run.key}, seed {seed}: {rows.refused}")
    return found | {"train_s": trained - started, "measure_s": time.perf_counter() - trained}


def rank_test(low: list[float], high: list[float]) -> tuple[float, float]:
    """U, the pairs (one of either) in which `high` is greater, and P(U or more) when all orders are equally likely.

    Source: Mann and Whitney 1947, the exact distribution. A tie counts as no win, so p is rather too large.
    """
    wins = sum(b > a for a in low for b in high)

    @cache
    def ways(m: int, n: int, u: int) -> int:
        """Orders of m low and n high numbers with exactly u wins of the high ones; the greatest is low or high."""
        if u < 0 or u > m * n:
            return 0
        if m == 0 or n == 0:
            return 1
        return ways(m - 1, n, u) + ways(m, n - 1, u - m)

    m, n = len(low), len(high)
    counts = [ways(m, n, u) for u in range(m * n + 1)]
    return wins, sum(counts[wins:]) / sum(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, help="a trial: other steps than those of zoo/params.yaml")
    parser.add_argument("--json", type=Path, help="also write every number here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = p.load()
    vae, beta_vae = (loaded.runs[key] for key in RUNS)
    beta = dgm_models.build(beta_vae.method, dgm_models.DataSpec("image", (1, 32, 32), 2), **beta_vae.arguments).params[
        "beta"
    ]
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in RUNS}
    with tempfile.TemporaryDirectory(prefix="dgm-bench-") as folder:
        data = Path(folder) / "shapes"
        manifest = prepare(loaded.datasets[vae.dataset], data)
        steps = options.steps or vae.train.steps
        print(f"shapes: {manifest.rows}, {', '.join(f'{f.name} {f.size}' for f in manifest.factors)}; beta {beta:g}; "
              f"{steps} steps of {vae.train.batch_size}")  # fmt: skip
        print(
            f"{'seed':>4}  {'':15}" + "".join(f"{name:>22}" for name in METRICS) + f"{'train s':>10}{'measure s':>11}"
        )
        for seed in range(options.first, options.first + options.seeds):
            for run in (vae, beta_vae):
                row = train(run, data, seed, options.steps)
                found[run.key].append({"seed": seed} | row)
                numbers = "".join(f"{row[name]:>22.4f}" for name in METRICS)
                print(f"{seed:>4}  {run.key.removeprefix(paths.ZOO):15}{numbers}{row['train_s']:>10.1f}"
                      f"{row['measure_s']:>11.1f}", flush=True)  # fmt: skip
    for name in METRICS:
        low, high = ([row[name] for row in found[key]] for key in RUNS)
        wins, chance = rank_test(low, high)
        print(f"{name}: median {statistics.median(low):.4f} (VAE), {statistics.median(high):.4f} (beta-VAE); "
              f"the beta-VAE is higher in {wins} of {len(low) * len(high)} pairs, one-sided p = {chance:.2g}"
              f"{' <- decides' if name == DECIDES else ''}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"beta": beta, "steps": steps, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
