"""The whole road from a laptop: `dvc repro` there, trainings across the lab's hosts, versions on the lab's tracker."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from pipelines import paths
from pipelines.drills.bench import CHECKPOINT_EVERY, Bench, Outcome, must, rows_of, start_here
from pipelines.drills.hosts import until
from pipelines.drills.lab import BUCKET, PYTHON, tool

RUNS = ("vae", "gan", "made")
PARAMS = """
datasets:
  digits: {{name: digits, seed: 0, split: [0.6, 0.2, 0.2]}}
extractors:
  digits:
    network: {{name: conv, channels: 8}}
    train: {{steps: 200, batch_size: 64}}
    optim: {{lr: 3.0e-3}}
runs:
  vae:
    dataset: digits
    method: {{name: vae/vae, latent_dim: 8}}
    network: {{name: mlp, width: 64, depth: 1}}
    train: {{steps: 200, batch_size: 64, average: 0.99, checkpoint_every: 100}}
    optim: {{lr: 2.0e-3}}
  gan:
    dataset: digits
    method: {{name: gan/wgan_gp, latent_dim: 8, critic_steps: 2}}
    network: {{name: mlp, width: 32, depth: 1}}
    train: {{steps: 100, batch_size: 32, average: 0.9, checkpoint_every: 50}}
    optim: {{lr: 1.0e-3, betas: [0.0, 0.9]}}
  made:
    dataset: digits
    method: {{name: autoregressive/made, width: 64}}
    train: {{steps: 200, batch_size: 64, average: 0.99, checkpoint_every: 100}}
    optim: {{lr: 1.0e-3}}
searches: {{}}
tuned: {{}}
evaluation: {{importance: 4}}
promotion: {{ceiling_fraction: 1.0}}
cluster: {{address: {address}, storage: "{storage}", workers: 2}}
"""


def laptop_to_registry(bench: Bench) -> Outcome:
    """`dvc repro` on the laptop; every artifact equals the training by two workers on this machine, bit for bit."""
    here = bench.lab()
    here.wait_nodes(3)
    started = time.monotonic()
    name = f"road-{len(list((here.laptop.folder / 'home').glob('road-*')))}"
    storage = f"s3://{BUCKET}/{name}"
    folder = here.project(PARAMS.format(address=here.address, storage=storage), name)
    for package in ("dgm_models", "pipelines"):
        shutil.copytree(paths.code() / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(paths.code() / "dvc.yaml", folder / "dvc.yaml")
    for empty in ("searches", "comparisons"):
        (folder / empty).mkdir()
    git = ["git", "-c", "user.email=drill@example.org", "-c", "user.name=drill"]
    for words in ([*git, "init", "-q"], [*git, "add", "-A"], [*git, "commit", "-qm", "start"],
                  [tool("dvc"), "init", "-q"], [tool("dvc"), "config", "core.analytics", "false"]):  # fmt: skip
        here.laptop.run(words, folder)
    environment = {"DGM_ROOT": str(folder), "PYTHONPATH": str(folder)}
    here.laptop.run([tool("dvc"), "repro"], folder, environment, seconds=900)
    seconds = time.monotonic() - started

    jobs = json.loads(here.dgm(folder, "jobs", "--json").stdout)
    ended = {(job["stage"], job["run"], job["state"]) for job in jobs if (folder / "artifacts" / job["run"]).is_dir()}
    must(ended >= {("train", run, "SUCCEEDED") for run in RUNS}, f"not trained as jobs: {jobs}")
    _versions(folder)
    control = _control(bench)
    for run in RUNS:
        spec = json.loads((folder / "artifacts" / run / "spec.json").read_text())
        must(spec["lineage"]["world"] == 2, f"{run} was trained by {spec['lineage']['world']} workers")
        for file in ("weights.safetensors", "metrics.jsonl"):
            ours, theirs = folder / "artifacts" / run / file, control / "artifacts" / run / file
            must(ours.read_bytes() == theirs.read_bytes(), f"{run}: {file} is not what two workers on one machine make")
    return Outcome(recovery_s=round(seconds, 1))


def _versions(folder: Path) -> None:
    """The laptop's outs and the tracker's registry are there: one version a run, and a decision with its reasons."""
    for run in RUNS:
        receipt = json.loads((folder / "receipts" / f"{run}.json").read_text())
        must(receipt["model"] == "digits", f"{run}: registered as {receipt['model']}")
    verdict = json.loads((folder / "promotions" / "digits.verdict.json").read_text())
    must(all(each["reason"] for each in verdict["criteria"]), "promoted, or not, without a reason")
    must((folder / "report" / "index.html").is_file(), "no report")


def _control(bench: Bench) -> Path:
    """The same runs on this machine by two workers; trained once a session."""
    folder = bench.folder / "road-control"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        (folder / "params.yaml").write_text(PARAMS.format(address="null", storage=".dgm/store"))
        for words in (["prepare", "digits"], *(["train", run] for run in RUNS)):
            task = start_here([PYTHON, "-m", "pipelines", *words], folder, "-".join(words),
                              {"PYTHONPATH": str(paths.code())})  # fmt: skip
            status = task.wait(300)
            must(status == 0, f"{words} ended with {status}\n{task.text()[-3000:]}")
    return folder


# lines for the worker, which is no part of a run's digest: the training lasts until a host has come
SLOW = """
def _slow():
    import time

    from dgm_models.training import trainer

    step = trainer.Trainer.step

    def slowed(self):
        time.sleep(0.1)
        step(self)

    trainer.Trainer.step = slowed


_slow()
"""


def elastic(bench: Bench) -> Outcome:
    """[1, 2] workers: a host is lost and not replaced, the other goes on alone; a host comes, and both train.

    The global batch stays, so every reported loss is the undisturbed run's up to rounding, which grows along a
    trajectory: within 2% here.
    """
    control, here = bench.control(workers=2), bench.lab()
    here.wait_nodes(3)
    project = bench.there("elastic", workers="[1, 2]")
    code = bench.faulty_code("slow", SLOW)
    task = project.start("train", project.run, environment={"PYTHONPATH": str(code)})
    project.between_checkpoints(2 * CHECKPOINT_EVERY, task)
    lost = here.workers[1] if here.workers[1].processes("RayTrainWorker") else here.workers[0]
    before = project.moment()
    lost.kill()
    recovery = project.recovered(before, task)
    alone = project.moment()
    lost.boot()
    here.start_worker(lost)
    until(lambda: project.head()["generation"] > alone.generation, 120, "the group's growth")
    project.end(task)
    must(project.lineage()["world"] == 2, "the training ended without the host that came")
    ours, theirs = rows_of(project.artifact), rows_of(control)
    must([row["step"] for row in ours] == [row["step"] for row in theirs], "steps are missing or were taken twice")
    for mine, expected in zip(ours, theirs, strict=True):
        apart = abs(mine["metrics"]["loss"] - expected["metrics"]["loss"])
        must(apart < 0.02 * abs(expected["metrics"]["loss"]), f"step {mine['step']}: the losses part by {apart:.3g}")
    project.check_tracker()
    return project.check_resume(project.lineage()["resumed_at"], before, recovery)
