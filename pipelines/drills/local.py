"""Faults that need one machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from typing import Any

import psutil

from pipelines import paths
from pipelines.drills.bench import (
    CHECKPOINT_EVERY,
    PLAIN,
    Bench,
    Outcome,
    Project,
    command_of,
    must,
    same_result,
    start_here,
    train_workers,
)
from pipelines.drills.hosts import Task, until
from pipelines.drills.lab import BUCKET, PYTHON, tool
from pipelines.drills.proxy import flip

# ---- processes


def kill_worker(bench: Bench) -> Outcome:
    project, control = bench.here("kill-worker"), bench.control()
    task = project.start()
    project.between_checkpoints(2 * CHECKPOINT_EVERY, task)
    (worker,) = train_workers(task)
    before = project.moment()
    worker.kill()
    recovery = project.recovered(before, task)
    project.end(task)
    must(not worker.is_running(), "the worker lives")
    return project.check(control, before, recovery)


def kill_driver(bench: Bench) -> Outcome:
    project, control = bench.here("kill-driver"), bench.control()
    task = project.start()
    project.between_checkpoints(2 * CHECKPOINT_EVERY, task)
    children = task.process.children(recursive=True)
    before = project.moment()
    task.process.kill()
    must(task.wait(10) == -signal.SIGKILL, "the driver was not killed")
    _, alive = psutil.wait_procs(children, timeout=30)
    left = [command_of(each)[:80] for each in alive if "RayTrain" in command_of(each)]
    must(not left, f"the dead driver's workers go on: {left}")
    must(not project.artifact.exists(), "a killed training left an out")
    project.train()
    outcome = project.check(control, before)
    must("nothing to train" in project.train(), "a finished training was trained again")
    return outcome


def notice_driver(bench: Bench) -> Outcome:
    project, control = bench.here("notice-driver", max_failures=0), bench.control()
    task = project.start()
    project.between_checkpoints(2 * CHECKPOINT_EVERY, task)
    before = project.moment()
    task.process.send_signal(signal.SIGTERM)
    status = task.wait(25)
    must(status == 143, f"the driver ended with {status} on SIGTERM\n{task.text()[-2000:]}")
    saved = project.moment()
    must(saved.acknowledged >= before.seen, f"step {before.seen} was reported, {saved.acknowledged} saved on notice")
    must(saved.acknowledged % CHECKPOINT_EVERY, "the checkpoint is an ordinary one: the notice made none")
    project.train()
    outcome = project.check(control, saved)
    must(project.lineage()["resumed_at"] == saved.acknowledged, "not resumed at the step that was saved on notice")
    return Outcome(outcome.recovery_s, max(0, before.seen - saved.acknowledged))


# ---- checkpoints


def _damaged(bench: Bench, name: str, damage: Any) -> Outcome:
    """Ends a training, damages its newest checkpoint, and starts it again: the one before is used."""
    project, control = bench.here(name, "short"), bench.control("short")
    task = project.start_plain()
    project.at_checkpoint(3 * CHECKPOINT_EVERY, task)
    task.kill()
    older, newest = project.head()["checkpoints"][-2:]
    folder = project.folder / ".dgm" / "store" / project.digest / newest["folder"]
    file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    before = file.read_bytes()
    file.write_bytes(damage(before))
    must(file.read_bytes() != before, "nothing was damaged")
    again = project.start_plain()
    project.end(again)
    must("passing over a damaged checkpoint" in again.text(), f"the damage was not named\n{again.text()[-2000:]}")
    artifact = project.published()
    same_result(artifact, control)
    resumed = json.loads((artifact / "spec.json").read_text())["lineage"]["resumed_at"]
    must(resumed == older["step"], f"resumed at {resumed}, the newest whole checkpoint was {older['step']}")
    return Outcome(lost_steps=newest["step"] - resumed)


def torn_checkpoint(bench: Bench) -> Outcome:
    return _damaged(bench, "torn", lambda content: content[: len(content) // 2])


def flipped_checkpoint(bench: Bench) -> Outcome:
    return _damaged(bench, "flipped", flip)


FULL = """
set -e
mkdir -p .dgm/store
mount -t tmpfs -o size=48m tmpfs .dgm/store
(until ls .dgm/store/*/step-*/manifest.json >/dev/null 2>&1; do sleep 0.02; done
 dd if=/dev/zero of=.dgm/store/filler bs=64k 2>/dev/null || touch filled) &
set +e
"$1" -c "$2" "$3" > full.log 2>&1
echo $? > full.status
cp .dgm/store/*/head.json full.head
ls -A .dgm/store/* > full.left
set -e
rm .dgm/store/filler
"$1" -c "$2" "$3" > again.log 2>&1
mkdir result
cp -r .dgm/store/. result
"""


def disk_full(bench: Bench) -> Outcome:
    control = bench.control("short")
    project = bench.here("disk-full", "short")
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    words = [*unshare, "sh", "-c", FULL, "sh", PYTHON, PLAIN, project.run]
    task = start_here(words, project.folder, "disk-full", {"PYTHONPATH": str(paths.code())})
    status = task.wait(120)
    said = {name: (project.folder / name).read_text() for name in ("full.log", "full.status", "full.head", "full.left")}
    must(status == 0, f"{task.text()}\n{said}")
    must((project.folder / "filled").exists(), "the disk was not filled")
    must(said["full.status"].strip() != "0", "the training did not notice a full disk")
    must("No space left" in said["full.log"], f"the full disk is not named\n{said['full.log'][-2000:]}")
    left = [name for name in said["full.left"].split() if name.endswith((".tmp", ".old"))]
    must(not left, f"left behind: {left}")
    acknowledged = [each["step"] for each in json.loads(said["full.head"])["checkpoints"]]
    store = project.folder / "result" / project.digest
    artifact = store / json.loads((store / "head.json").read_text())["artifact"]["folder"]
    same_result(artifact, control)
    resumed = json.loads((artifact / "spec.json").read_text())["lineage"]["resumed_at"]
    must(resumed == max(acknowledged), f"resumed at {resumed}, acknowledged were {acknowledged}")
    return Outcome()


# ---- numbers and memory

NAN = """
def _hurt() -> None:
    from dgm_models.training import trainer

    step = trainer.Trainer.step

    def hurt(self):
        if self.runtime.rank == 1 and self.step_number == 120:
            with open({fired!r}, "a") as file:
                file.write("fired\\n")
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        step(self)

    trainer.Trainer.step = hurt


_hurt()
"""


def nan_on_one_rank(bench: Bench) -> Outcome:
    control = bench.control(workers=2)
    fired = bench.folder / "nan-fired"
    code = bench.faulty_code("nan", NAN.format(fired=str(fired)))
    project = bench.here("nan", workers=2, max_failures=1)
    task = project.start("train", project.run, environment={"PYTHONPATH": str(code)})
    status = task.wait(150)
    must(fired.exists(), f"the fault did not strike\n{task.text()[-2000:]}")
    must(status not in (0, None), "a training with NaN ended well")
    must("step 120" in task.text() and "not finite" in task.text(), f"the step is not named\n{task.text()[-3000:]}")
    attempts = len(fired.read_text().splitlines())
    must(attempts == 2, f"tried {attempts} times, max_failures is 1")
    must(not project.head()["artifact"] and not project.artifact.exists(), "something was published")
    before = project.moment()
    must(before.acknowledged == 100, f"the newest checkpoint is {before.acknowledged}, the last before the fault 100")
    project.train()
    return project.check(control, before)


OOM = """
def _hurt() -> None:
    import resource

    from dgm_models.training import trainer

    step = trainer.Trainer.step

    def hurt(self):
        if self.step_number == 120:
            try:
                open({fired!r}, "x").close()
            except FileExistsError:
                return step(self)  # the second life has memory
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
            torch.ones(2**28)
        step(self)

    trainer.Trainer.step = hurt


_hurt()
"""


def out_of_memory(bench: Bench) -> Outcome:
    control = bench.control()
    fired = bench.folder / "oom-fired"
    code = bench.faulty_code("oom", OOM.format(fired=str(fired)))
    project = bench.here("oom", max_failures=1)
    task = project.start("train", project.run, environment={"PYTHONPATH": str(code), "DGM_VERBOSE": "1"})
    until(lambda: fired.exists() or not task.alive(), 120, "the worker's end")
    before = project.moment()
    recovery = project.recovered(before, task)
    project.end(task)
    must("memory" in task.text(), f"the worker's end is not explained\n{task.text()[-2000:]}")
    return project.check(control, before, recovery)


# ---- storage


def _through(bench: Bench, name: str, writing: list[dict[str, Any]], reading: list[dict[str, Any]]) -> Outcome:
    """A training with its run store on S3: faults while it writes, a SIGKILL, faults while it resumes."""
    control, stand = bench.control("short"), bench.stand()
    project = bench.here(name, "short", storage=f"s3://{BUCKET}/{name}")
    before = dict(stand.proxy.counts)
    for fault in writing:
        stand.proxy.arm(path=f"{name}/{project.digest}/", **fault)
    task = project.start_plain(stand.environment)
    project.at_checkpoint(2 * CHECKPOINT_EVERY, task)
    task.kill()
    moment = project.moment()
    for fault in reading:
        stand.proxy.arm(path=f"{name}/{project.digest}/", **fault)
    project.end(project.start_plain(stand.environment))
    for fault in (*writing, *reading):
        struck = stand.proxy.counts[fault["kind"]] - before.get(fault["kind"], 0)
        expected = sum(each["times"] for each in (*writing, *reading) if each["kind"] == fault["kind"])
        must(struck == expected, f"{fault['kind']} struck {struck} times of {expected}")
    artifact = project.published()
    same_result(artifact, control)
    resumed = json.loads((artifact / "spec.json").read_text())["lineage"]["resumed_at"]
    return project.check_resume(resumed, moment)


def s3_busy(bench: Bench) -> Outcome:
    busy = {"kind": "busy", "times": 4}
    return _through(bench, "s3-busy", [{**busy, "method": "PUT"}], [{**busy, "method": "GET"}])


def s3_lost_answer(bench: Bench) -> Outcome:
    lost = {"kind": "lost-answer", "method": "PUT"}
    return _through(bench, "s3-lost-answer", [{**lost, "times": 8}], [{**lost, "times": 2}])


def s3_reset(bench: Bench) -> Outcome:
    reset = {"kind": "reset", "times": 3}
    return _through(bench, "s3-reset", [{**reset, "method": "PUT"}], [{**reset, "method": "GET"}])


def s3_trickle(bench: Bench) -> Outcome:
    return _through(bench, "s3-trickle", [], [{"kind": "trickle", "method": "GET", "times": 4, "seconds": 2.0}])


def s3_flipped(bench: Bench) -> Outcome:
    writing = [{"kind": "flip-write", "method": "PUT", "times": 2}]
    return _through(bench, "s3-flipped", writing, [{"kind": "flip-read", "method": "GET", "times": 1}])


def s3_refused(bench: Bench) -> Outcome:
    control, stand = bench.control(), bench.stand()
    project = bench.here("s3-refused", storage=f"s3://{BUCKET}/s3-refused", max_failures=0)
    task = project.start("train", project.run, environment=stand.environment)
    before = project.at_checkpoint(2 * CHECKPOINT_EVERY, task)
    refused = stand.proxy.counts["refused"]
    stand.proxy.refuse(15.0)

    def onward() -> bool:
        must(task.alive(), f"the outage ended the training\n{task.text()[-3000:]}")
        now = project.moment()
        return now.acknowledged > before.acknowledged + CHECKPOINT_EVERY or bool(project.head()["artifact"])

    until(onward, 60, "a checkpoint after the outage")
    recovery = round(time.time() - before.at, 1)
    project.end(task)
    must(stand.proxy.counts["refused"] > refused, "no connection was refused")
    must(project.lineage()["resumed_at"] == 0, "the outage cost a restart")
    project.check(control)
    return Outcome(recovery, 0)


# ---- dvc


def _repository(bench: Bench, name: str) -> Project:
    """The project as a git and DVC repository with a copy of the code."""
    if not (paths.code() / "dvc.yaml").is_file():
        raise ValueError(f"{paths.code()}: no dvc.yaml; this drill needs a checkout of the project")
    project = bench.here(name)
    folder = project.folder
    shutil.rmtree(folder / "data")  # `dvc repro` makes it
    for package in ("dgm_models", "pipelines"):
        shutil.copytree(paths.code() / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    stages = re.search(r"(?ms)^  prepare:.*?(?=^  \w)", (paths.code() / "dvc.yaml").read_text())
    train = re.search(r"(?ms)^  train:.*?(?=^  [#\w])", (paths.code() / "dvc.yaml").read_text())
    assert stages and train
    (folder / "dvc.yaml").write_text(f"stages:\n{stages[0]}{train[0]}")
    (folder / ".gitignore").write_text(".dgm\n*.log\nmlflow.db\nmlartifacts\n__pycache__\n")
    git = ["git", "-c", "user.email=drill@example.org", "-c", "user.name=drill"]
    for words in (["git", "init", "-q"], ["git", "add", "-A"], [*git, "commit", "-qm", "start"],
                  [tool("dvc"), "init", "-q"], [tool("dvc"), "config", "core.analytics", "false"]):  # fmt: skip
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return project


def _repro(bench: Bench, project: Project, *words: str) -> Task:
    code = {"PYTHONPATH": str(project.folder)}
    target = f"train@{project.run}"
    return bench.track(start_here([tool("dvc"), *words, "repro", target], project.folder, "repro", code))


def two_repros(bench: Bench) -> Outcome:
    control = bench.control()
    project = _repository(bench, "two-repros")
    first = _repro(bench, project)
    project.at_checkpoint(CHECKPOINT_EVERY, first)
    others = [_repro(bench, project), _repro(bench, project, "--wait-for-lock")]
    until(lambda: not others[0].alive(), 60, "the end of the second")
    must(first.alive(), "the first ended before the second was refused: nothing was tested")
    project.end(first)
    for other in others:
        refused = other.wait(120) != 0
        must(not refused or "lock" in other.text(), f"failed otherwise than by the lock\n{other.text()}")
        must("Running stage 'train@" not in other.text(), f"trained twice\n{other.text()}")
    must(others[0].popen.returncode != 0, "the second was not refused")
    again = _repro(bench, project)
    project.end(again)
    must("Running stage" not in again.text(), f"what the first had made was made again\n{again.text()}")
    return project.check(control)


def killed_repro(bench: Bench) -> Outcome:
    control = bench.control()
    project = _repository(bench, "killed-repro")
    struck = []

    def kill(point: str, there: Any) -> None:
        task = _repro(bench, project)
        until(lambda: there() or not task.alive(), 120, point, every=0.01)
        must(task.alive(), f"{point}: the pipeline ended before the fault\n{task.text()[-2000:]}")
        task.kill()
        struck.append(point)

    def work(words: str) -> bool:
        return any(words in command_of(each) for each in psutil.Process().children(recursive=True))

    kill("while the data is prepared", lambda: work("pipelines prepare"))
    kill("while Ray starts", lambda: work(f"pipelines train {project.run}"))
    kill("at a checkpoint", lambda: project.moment().acknowledged >= 2 * CHECKPOINT_EVERY)
    before = project.moment()
    kill("when the result is in the store", lambda: project.head()["artifact"])
    must(len(struck) == 4, f"struck only {struck}")
    task = _repro(bench, project)
    project.end(task)
    project.end(_repro(bench, project))
    lost = [path.name for path in (project.folder / "artifacts").glob(".*.tmp")]
    must(not lost, f"left behind: {lost}")
    status = subprocess.run([tool("dvc"), "status", f"train@{project.run}"], cwd=project.folder, capture_output=True,
                            text=True, check=False)  # fmt: skip
    must("up to date" in status.stdout, f"dvc status: {status.stdout}{status.stderr}")
    same_result(project.artifact, control)
    return project.check_resume(project.lineage()["resumed_at"], before)
