"""A search whose driver is killed goes on where it stood, its choice is on the valid split with fresh seeds, and in
MLflow every trial and finalist is there once."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from pipelines import tracking
from tests.support import project

SEARCH = """
searches:
  latent:
    run: vae
    trials: 4
    rungs: 2
    grace: 0.5
    seeds: [11, 12]
    objective: {fid: 1.0, bits_per_dim: 2.0}
    also: [recall]
    space:
      method.latent_dim: {choice: [2, 4, 8]}
      network.activation: {choice: [leaky_relu, silu]}
      optim.betas: {choice: [[0.9, 0.999], [0.5, 0.9]]}
      optim.lr: {log_uniform: [1.0e-4, 1.0e-2]}
tuned:
  vae_tuned: {search: latent, dataset: digits}
"""


def uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def runs(folder: Path) -> dict[str, Any]:
    mlflow = tracking.client(uri(folder))
    found = mlflow.search_runs([tracking.experiment_id(mlflow, "digits")])
    return {run.info.run_id: run for run in found if "search-" in run.data.tags[tracking.RUN_DIGEST]}


def test_killed_search_is_restored_and_chooses_on_valid(tmp_path: Path) -> None:
    text = project.PARAMS.replace("searches: {}\ntuned: {}\n", SEARCH).replace("steps: 300", "steps: 400")
    folder = project.make(tmp_path, text)
    project.dgm(folder, "prepare", "digits")
    project.dgm(folder, "extractor", "digits")
    command = [sys.executable, "-m", "pipelines", "tune", "latent"]
    process = subprocess.Popen(
        command, cwd=folder, env=project.environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    store, end = folder / ".dgm" / "store", time.monotonic() + 120
    while len(list(store.glob("*/artifact-*"))) < 2:  # the extractor's, and the first finished trial's
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no trial finished"
        time.sleep(0.05)
    time.sleep(1.0)  # Tune writes its state at intervals
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children, timeout=30)
    assert not (folder / "searches" / "latent").exists(), "nothing half-written stays"
    before = {path.parent.name: path.stat().st_mtime_ns for path in store.glob("*/artifact-*")}

    project.dgm(folder, "tune", "latent")
    after = {path.parent.name: path.stat().st_mtime_ns for path in store.glob("*/artifact-*")}
    assert {digest: after[digest] for digest in before} == before, "a finished trial was trained again"
    best = json.loads((folder / "searches" / "latent" / "best.json").read_text())
    rows = list(csv.DictReader((folder / "searches" / "latent" / "trials.csv").open()))
    assert len(rows) == 4 and {row["state"] for row in rows} <= {"finished", "stopped"}
    for row in rows:
        weighed = float(row["fid"]) + 2 * float(row["bits_per_dim"])
        assert abs(float(row["objective"]) - weighed) < 1e-9 and 0 <= float(row["recall"]) <= 1
    assert rows[0]["state"] == "finished" and json.loads(rows[0]["optim.betas"]) in ([0.9, 0.999], [0.5, 0.9])
    names = [candidate["name"] for candidate in best["candidates"]]
    assert names[0] == "as written" and best["chosen"] in names
    assert best["chosen"] == min(best["candidates"], key=lambda each: each["mean"])["name"]
    assert all(set(candidate["seeds"]) == {"11", "12"} for candidate in best["candidates"])
    for name in ("parallel.png", "pareto.png"):
        assert (folder / "searches" / "latent" / name).read_bytes().startswith(b"\x89PNG")
    told = runs(folder)
    assert len([run for run in told.values() if run.info.status == "FINISHED"]) == 1 + 4 + 2 * len(names)
    assert {run.info.status for run in told.values()} <= {"FINISHED", "KILLED"}  # a trial that was proposed anew
    parent = next(run for run in told.values() if run.info.run_name == "search latent")
    for run in told.values():
        assert run is parent or run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    trials = (json.loads(line) for line in (folder / "searches" / "latent" / "trials.jsonl").read_text().splitlines())
    for trial in trials:
        name = f"trial {trial['trial']}"
        found = [run for run in told.values() if (run.info.run_name, run.info.status) == (name, "FINISHED")]
        history = tracking.client(uri(folder)).get_metric_history(found[0].info.run_id, "fid")
        steps = [item.step for item in history]
        assert steps == sorted(set(steps)), "every rung once"
        # a trial that had ended before the kill, and was proposed anew, tells its end alone
        assert {rung["step"] for rung in trial["rungs"]} <= set(steps) and max(steps) == trial["step"]
    project.dgm(folder, "tune", "latent")  # nothing to search, and nothing to add
    assert set(runs(folder)) == set(told)

    project.dgm(folder, "train", "vae_tuned")
    spec = json.loads((folder / "artifacts" / "vae_tuned" / "spec.json").read_text())
    for dotted, value in best["parameters"].items():
        if dotted.startswith("method."):
            assert spec["params"][dotted.removeprefix("method.")] == value
