"""A search whose driver is killed goes on where it stood, and its choice is on the valid split with fresh seeds."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.support import project

SEARCH = """
searches:
  latent:
    run: vae
    trials: 4
    rungs: 2
    grace: 0.5
    seeds: [11, 12]
    space:
      method.latent_dim: {choice: [2, 4, 8]}
      optim.lr: {log_uniform: [1.0e-4, 1.0e-2]}
tuned:
  vae_tuned: {search: latent, dataset: digits}
"""


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
    names = [candidate["name"] for candidate in best["candidates"]]
    assert names[0] == "as written" and best["chosen"] in names
    assert best["chosen"] == min(best["candidates"], key=lambda each: each["mean"])["name"]
    assert all(set(candidate["seeds"]) == {"11", "12"} for candidate in best["candidates"])
    assert (folder / "searches" / "latent" / "trials.png").read_bytes().startswith(b"\x89PNG")

    project.dgm(folder, "train", "vae_tuned")
    spec = json.loads((folder / "artifacts" / "vae_tuned" / "spec.json").read_text())
    for dotted, value in best["parameters"].items():
        if dotted.startswith("method."):
            assert spec["params"][dotted.removeprefix("method.")] == value
