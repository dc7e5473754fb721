"""One trained network, sampled in many ways: FID, precision and recall for every combination of sampler settings.

The artifact is one of `dvc repro`; the test images, the extractor and the metrics are those of the evaluation. Every
combination is sampled with several seeds; the mean over them is printed with the range, and the interval of the first.

    python benchmarks/sampler_grid.py zoo/artifacts/ddpm \
        --grid '{"name": ["ddim"], "eta": [0.0, 0.2, 0.5, 1.0], "steps": [10, 20, 50, 100, 1000]}'
    python benchmarks/sampler_grid.py zoo/artifacts/ddpm_label --grid '{"guidance": [0.0, 1.0, 1.5, 2.0, 4.0]}'
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import dgm_models
from dgm_models.method import resampled
from dgm_models.metrics.coverage import precision_recall
from dgm_models.metrics.frechet import frechet
from pipelines import paths
from pipelines.data import shards
from pipelines.stages.evaluate import extractor_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--grid", type=json.loads, required=True, help="JSON: sampler setting -> list of values")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="test images, and samples; all of them by default")
    parser.add_argument("--log", type=Path, help="gets one JSON line a combination")
    options = parser.parse_args()
    method = dgm_models.load(options.artifact)
    dataset = str(method.lineage["dataset"])
    test = shards.load(paths.data(dataset), "test")
    n = min(options.rows or len(test.x), len(test.x))
    extractor = extractor_of(dataset, method.data.dims)
    if extractor is None:
        parser.error(f"{dataset} has no extractor; `dvc repro` makes those of params.yaml")
    real, _ = extractor(test.x[:n])
    labels = None if test.cond is None else test.cond[:n]
    print(f"{options.artifact}: {method.name}, {n} samples against {n} test rows, FID/{extractor.name}")
    for values in itertools.product(*options.grid.values()):
        settings = dict(zip(options.grid, values, strict=True))
        variant, begun = resampled(method, settings), time.process_time()
        distances, precisions, recalls = [], [], []
        for seed in range(options.seeds):
            cond = dgm_models.sampling.conditions(variant, test.x[:n], labels, seed)
            fake, _ = extractor(dgm_models.sample(variant, n, seed, cond=cond))
            distances.append(frechet(real, fake))
            found = precision_recall(real, fake)
            precisions.append(found.precision.value)
            recalls.append(found.recall.value)
        fids = [distance.value for distance in distances]
        line: dict[str, Any] = {
            **settings, "evaluations": variant.model.evaluations, "fid": statistics.mean(fids), "fids": fids,
            "low": distances[0].low, "high": distances[0].high, "precision": statistics.mean(precisions),
            "recall": statistics.mean(recalls), "cpu_seconds": round(time.process_time() - begun, 1),
        }  # fmt: skip
        if options.log:
            with options.log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        print(
            f"{', '.join(f'{key} {value}' for key, value in settings.items())}: FID {line['fid']:.2f} "
            f"({min(fids):.2f} to {max(fids):.2f}; seed 0 [{line['low']:.2f}, {line['high']:.2f}]), "
            f"precision {line['precision']:.2f}, recall {line['recall']:.2f}, {line['evaluations']} evaluations a "
            f"sample, {line['cpu_seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
