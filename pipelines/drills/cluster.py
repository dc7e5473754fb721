"""Faults that need hosts: a head, two workers, a laptop, storage and a tracker, each with an address of its own."""

from __future__ import annotations

import signal
import time

from pipelines.drills.bench import CHECKPOINT_EVERY, Bench, Outcome, Project, must
from pipelines.drills.hosts import Host, Task, until
from pipelines.drills.lab import RAY_PORT, Lab, tool

WORKER = "RayTrainWorker"


def _training(bench: Bench, name: str, workers: int = 2, max_failures: int = 3) -> tuple[Lab, Project, Task]:
    """A training from the laptop that has made two checkpoints, and steps since."""
    here = bench.lab()
    here.wait_nodes(3)
    project = bench.there(name, workers=workers, max_failures=max_failures)
    task = project.start()
    project.between_checkpoints(2 * CHECKPOINT_EVERY, task)
    return here, project, task


def _host_of_training(here: Lab) -> Host:
    """A worker host on which the training runs."""
    found = [host for host in here.workers if host.processes(WORKER)]
    must(found, "no host trains")
    return found[0]


def _replace(here: Lab, host: Host) -> None:
    """Another machine under the same address, as a supervisor would start it."""
    host.kill()
    host.boot()
    here.start_worker(host)


def undisturbed(bench: Bench) -> Outcome:
    control, here = bench.control(workers=2), bench.lab()
    here.wait_nodes(3)
    project = bench.there("undisturbed")
    project.train()
    must(project.lineage()["world"] == 2, f"trained by {project.lineage()['world']} workers")
    must(project.lineage()["resumed_at"] == 0, "an undisturbed training was restarted")
    return project.check(control)


def kill_worker(bench: Bench) -> Outcome:
    control = bench.control(workers=2)
    here, project, task = _training(bench, "kill-worker")
    (worker, *_) = _host_of_training(here).processes(WORKER)
    before = project.moment()
    worker.kill()
    recovery = project.recovered(before, task)
    project.end(task)
    return project.check(control, before, recovery)


def kill_node(bench: Bench) -> Outcome:
    control = bench.control(workers=2)
    here, project, task = _training(bench, "kill-node")
    host = _host_of_training(here)
    before = project.moment()
    host.kill()
    must(not host.on, "the host is on")
    _replace(here, host)
    recovery = project.recovered(before, task)
    project.end(task)
    return project.check(control, before, recovery)


def kill_head(bench: Bench) -> Outcome:
    control = bench.control(workers=2)
    here, project, task = _training(bench, "kill-head")
    before = project.moment()
    here.head.kill()
    must(not here.head.on, "the head is on")
    task.kill()  # somebody at the laptop starts the same command again
    here.head.boot()
    here.start_head()
    for host in here.workers:
        _replace(here, host)
    here.wait_nodes(3)
    again = project.start()
    recovery = project.recovered(before, again)
    project.end(again)
    return project.check(control, before, recovery)


def partition(bench: Bench) -> Outcome:
    """One worker, cut off in the middle of a save; the training goes on on the other host. Then the first is back."""
    control = bench.control(workers=1)
    here, project, task = _training(bench, "partition", workers=1)
    stale = _host_of_training(here)
    (worker, *_) = stale.processes(WORKER)
    generation, busy = project.moment().generation, here.faults.counts.get("busy", 0)
    here.faults.arm("busy", times=10**6, method="PUT", path=f"{project.digest}/.*-g{generation}/")
    until(lambda: here.faults.counts.get("busy", 0) > busy, 60, "a save of the worker")
    before = project.moment()
    stale.cut()
    here.faults.disarm()
    recovery = project.recovered(before, task)
    must(worker.is_running(), "the stale worker ended by itself: nothing was tested")
    for process in stale.processes("raylet"):  # it would end the stale worker as soon as it meets the head
        process.suspend()

    def asked(words: str) -> int:
        return here.faults.counts.get(f"{words} from {stale.address}", 0)

    heads, deletions = asked("PUT head.json"), asked("POST")
    stale.mend()
    # its save goes through now; then it either names it in the head, or finds another owner there and removes it
    until(lambda: asked("POST") > deletions or asked("PUT head.json") > heads, 60, "the end of the stale worker's save")
    must(asked("PUT head.json") == heads, "the stale worker changed the head")
    project.end(task)
    must(project.head()["generation"] == generation + 1, "the stale worker took the run back")
    folder = project.head()["artifact"]["folder"]
    must(f"-g{generation + 1}" in folder, f"{folder} is the stale worker's")
    outcome = project.check(control, before, recovery)
    _replace(here, stale)
    here.wait_nodes(3)
    return outcome


def notice_node(bench: Bench) -> Outcome:
    """The node of a training is announced to go, and is gone at its deadline. No failure is allowed for."""
    control = bench.control(workers=2)
    here, project, task = _training(bench, "notice-node", max_failures=0)
    host, grace = _host_of_training(here), 5
    before = project.moment()
    words = ["drain-node", "--address", f"{here.head.address}:{RAY_PORT}", "--node-id", here.nodes()[host.address]]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "drill"]
    here.head.run([tool("ray"), *words, "--deadline-remaining-seconds", str(grace)])
    deadline = time.time() + grace

    def saved() -> bool:
        now = project.moment()
        return now.acknowledged > before.acknowledged and now.acknowledged % CHECKPOINT_EVERY != 0

    until(saved, grace, "a checkpoint on the notice", every=0.02)
    time.sleep(max(0.0, deadline - time.time()))
    gone = project.moment()
    _replace(here, host)
    recovery = project.recovered(gone, task)
    project.end(task)
    outcome = project.check(control, gone, recovery)
    must(not outcome.lost_steps, f"{outcome.lost_steps} steps were taken after the notice's checkpoint, and again")
    return outcome


def hang_worker(bench: Bench) -> Outcome:
    control = bench.control(workers=2)
    here, project, task = _training(bench, "hang-worker")
    (worker, *_) = _host_of_training(here).processes(WORKER)
    before = project.moment()
    worker.send_signal(signal.SIGSTOP)
    recovery = project.recovered(before, task)
    project.end(task)
    must(not worker.is_running(), "the stopped worker is still there")
    return project.check(control, before, recovery)


def hang_node(bench: Bench) -> Outcome:
    control = bench.control(workers=2)
    here, project, task = _training(bench, "hang-node")
    host = _host_of_training(here)
    before = project.moment()
    for process in host.processes():
        process.suspend()
    until(lambda: host.address not in here.nodes(), 60, "the end of the node that hangs")
    _replace(here, host)
    recovery = project.recovered(before, task)
    project.end(task)
    return project.check(control, before, recovery)


def tracker_down(bench: Bench) -> Outcome:
    control = bench.control(workers=2)
    here, project, task = _training(bench, "tracker-down")
    before = project.moment()
    here.tasks["mlflow"].kill()
    must(not here.answers(here.services, 5000, "/health"), "the tracker answers")
    until(lambda: project.moment().seen >= before.seen + 2 * CHECKPOINT_EVERY, 60, "steps without the tracker")
    recovery = round(time.time() - before.at, 1)
    here.start_mlflow()
    project.end(task)
    until(lambda: here.answers(here.services, 5000, "/health"), 60, "MLflow")
    must(project.lineage()["resumed_at"] == 0, "the tracker's end cost a restart")
    project.check(control)
    return Outcome(recovery, 0)
