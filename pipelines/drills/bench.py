"""What the drills share: trainings on this machine or on the lab, undisturbed ones, and what must hold in the end."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dgm_models.training import checkpoint
from pipelines import paths
from pipelines.drills.hosts import Task, until
from pipelines.drills.lab import BUCKET, KEY, PYTHON, S3_KEYS, Lab, lab, tool
from pipelines.drills.proxy import Proxy

CHECKPOINT_EVERY = 50
PARAMS = """
datasets:
  {dataset}: {{name: digits, seed: 0, split: [0.6, 0.2, 0.2]}}
runs:
  long:
    dataset: {dataset}
    method: {{name: vae/vae, latent_dim: 8}}
    network: {{name: mlp, width: 128, depth: 2}}
    train: {{steps: 800, batch_size: 512, average: 0.99, report_every: 10, checkpoint_every: 50}}
    optim: {{lr: 1.0e-3}}
  short:
    dataset: {dataset}
    method: {{name: vae/vae, latent_dim: 8}}
    network: {{name: mlp, width: 64, depth: 1}}
    train: {{steps: 300, batch_size: 128, average: 0.99, report_every: 10, checkpoint_every: 50}}
    optim: {{lr: 1.0e-3}}
cluster: {{address: {address}, storage: "{storage}", workers: {workers}, max_failures: {max_failures}, hours: 0.1}}
"""
# one training in this process, without Ray: for what concerns the worker and its store alone
PLAIN = """
import sys
from dgm_models.training.runtime import Runtime
from pipelines import params as p
from pipelines.cluster.worker import train
from pipelines.stages.train import job_of
params = p.load()
train(job_of(params.run(sys.argv[1]), params), Runtime(), lambda step, metrics: None)
"""


class DrillFailed(AssertionError):
    """What must hold did not."""


def must(condition: object, words: str) -> None:
    if not condition:
        raise DrillFailed(words)


@dataclass(frozen=True)
class Moment:
    """What was known of a training when its fault struck.

    Attributes:
        at: seconds since 1970.
        seen: the last step that it had reported.
        acknowledged: the step of its newest checkpoint.
        generation: how often it had been taken over.
    """

    at: float
    seen: int
    acknowledged: int
    generation: int


@dataclass(frozen=True)
class Outcome:
    """Args: recovery_s: from the fault to the first new step; lost_steps: that had to be taken again."""

    recovery_s: float | None = None
    lost_steps: int | None = None


class Project:
    """A project with one training, and its run store seen from outside.

    Args:
        folder: with params.yaml and a prepared dataset.
        run: "long" or "short".
        dataset: the dataset's key, which is its MLflow experiment.
        digest: of the run.
        read: content of a file of the run store, None when it is not there.
        start: (words, name) -> the task of `python *words` in the project.
        tracker: calls a function with the URI of the tracker, on the tracker's network.
    """

    def __init__(
        self, folder: Path, run: str, dataset: str, digest: str, read: Callable[[str], bytes | None],
        start: Callable[[Sequence[str], str, Mapping[str, str]], Task], tracker: Callable[[Callable[[str], Any]], Any],
    ) -> None:  # fmt: skip
        self.folder, self.run, self.dataset, self.digest = folder, run, dataset, digest
        self._read, self._start, self._tracker = read, start, tracker

    # ---- commands

    def start(self, *words: str, environment: Mapping[str, str] | None = None) -> Task:
        """Starts a verb; "train" of the project's run without words."""
        words = words or ("train", self.run)
        return self._start([PYTHON, "-m", "pipelines", *words], "-".join(words), environment or {})

    def start_plain(self, environment: Mapping[str, str] | None = None) -> Task:
        """The training in one process, without Ray."""
        return self._start([PYTHON, "-c", PLAIN, self.run], "plain", environment or {})

    def train(self, seconds: float = 240) -> str:
        """Trains to the end. Returns: what was printed."""
        return self.end(self.start(), seconds)

    def end(self, task: Task, seconds: float = 240) -> str:
        status = task.wait(seconds)
        must(status == 0, f"the training ended with {status}\n{task.text()[-3000:]}")
        return task.text()

    # ---- the run store

    def _document(self, name: str) -> Any:
        content = self._read(f"{self.digest}/{name}")
        try:
            return json.loads(content) if content else None
        except ValueError:
            return None

    def head(self) -> dict[str, Any]:
        return self._document("head.json") or {"generation": 0, "checkpoints": [], "artifact": None}

    def progress(self) -> dict[str, Any]:
        return self._document("progress.json") or {"step": 0}

    def moment(self) -> Moment:
        head, progress = self.head(), self.progress()
        steps = [each["step"] for each in head["checkpoints"]]
        return Moment(time.time(), progress["step"], max(steps, default=0), head["generation"])

    def at_checkpoint(self, step: int, task: Task, seconds: float = 120) -> Moment:
        """Waits until a checkpoint of that step or a later one is acknowledged."""

        def there() -> Moment | None:
            now = self.moment()
            must(task.alive(), f"the training ended before the fault\n{task.text()[-3000:]}")
            must(not self.head()["artifact"], "the training was finished before the fault")
            return now if now.acknowledged >= step else None

        return until(there, seconds, f"checkpoint of step {step}")

    def between_checkpoints(self, step: int, task: Task) -> Moment:
        """Waits until steps are reported that are in no checkpoint: a fault now costs work."""
        self.at_checkpoint(step, task)

        def beyond() -> Moment | None:
            must(task.alive() and not self.head()["artifact"], f"the training ended before the fault\n{task.text()}")
            now = self.moment()
            return now if now.seen > now.acknowledged else None

        return until(beyond, 60, "steps beyond the newest checkpoint", every=0.02)

    def recovered(self, before: Moment, task: Task, seconds: float = 150) -> float:
        """Seconds from the fault to the first step of the group of workers that took the run over."""

        taken_over: list[Any] = []

        def again() -> bool:
            must(task.alive() or self.head()["artifact"], f"the fault ended the training\n{task.text()[-3000:]}")
            progress = self.progress()
            if not taken_over and self.head()["generation"] > before.generation:
                taken_over.append(progress)
            return bool(taken_over) and progress != taken_over[0]

        until(again, seconds, "the first step after the fault")
        return round(time.time() - before.at, 1)

    # ---- the end

    @property
    def artifact(self) -> Path:
        return self.folder / "artifacts" / self.run

    def lineage(self) -> dict[str, Any]:
        found: dict[str, Any] = checkpoint.read_document(self.artifact, "spec")["lineage"]
        return found

    def check(self, control: Path, before: Moment | None = None, recovery_s: float | None = None) -> Outcome:
        """What must hold after every fault: the result of the undisturbed run, bit for bit; nothing acknowledged lost.

        Args:
            control: the undisturbed run's artifact.
            before: the moment of a fault after which the run was resumed.
            recovery_s: goes to the outcome.
        """
        same_result(self.artifact, control)
        self.check_tracker()
        return self.check_resume(self.lineage()["resumed_at"], before, recovery_s)

    def check_resume(self, resumed_at: int, before: Moment | None, recovery_s: float | None = None) -> Outcome:
        if before is None:
            return Outcome(recovery_s)
        must(resumed_at >= before.acknowledged, f"resumed at {resumed_at}, {before.acknowledged} was acknowledged")
        must(resumed_at > 0, "the run was not resumed: the fault did not strike")
        lost = max(0, before.seen - resumed_at)
        must(lost <= CHECKPOINT_EVERY, f"{lost} steps were lost, an interval is {CHECKPOINT_EVERY}")
        return Outcome(recovery_s, lost)

    def published(self) -> Path:
        """A copy of the artifact in the run store."""
        named = self.head()["artifact"]
        must(named, "nothing was published")
        folder = self.folder / "published"
        folder.mkdir()
        for name in ("manifest.json", *self._document(f"{named['folder']}/manifest.json")["files"]):
            content = self._read(f"{self.digest}/{named['folder']}/{name}")
            must(content is not None, f"{named['folder']}/{name}: not there")
            (folder / name).write_bytes(content or b"")
        return folder

    def check_tracker(self) -> None:
        """One MLflow run for the digest, finished, with every reported step of the artifact once."""
        expected = [row["step"] for row in rows_of(self.artifact)]

        def ask(uri: str) -> tuple[list[str], list[int]]:
            from pipelines import tracking

            mlflow = tracking.client(uri)
            experiment = mlflow.get_experiment_by_name(self.dataset)
            must(experiment, f"MLflow has no experiment {self.dataset!r}")
            found = mlflow.search_runs([experiment.experiment_id], f"tags.`{tracking.RUN_DIGEST}` = '{self.digest}'")
            must(len(found) == 1, f"{len(found)} MLflow runs of one digest")
            history = mlflow.get_metric_history(found[0].info.run_id, "loss")
            return [run.info.status for run in found], sorted(each.step for each in history)

        status, steps = self._tracker(ask)
        must(steps == expected, f"MLflow holds the steps {steps}, the training reported {expected}")
        must(status == ["FINISHED"], f"the MLflow run is {status}")


def rows_of(artifact: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]


def same_result(artifact: Path, control: Path) -> None:
    """The artifact is intact and equals the undisturbed one: weights and values bit for bit, each step once."""
    checkpoint.verify(artifact)
    for name in ("weights.safetensors", "metrics.jsonl"):
        must(
            (artifact / name).read_bytes() == (control / name).read_bytes(),
            f"{name} differs from the undisturbed run's",
        )
    steps = [row["step"] for row in rows_of(artifact)]
    must(steps == sorted(set(steps)), f"steps were reported twice: {steps}")


class Bench:
    """A session of drills: its folder, the undisturbed runs, and the lab once a drill asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._tasks: list[Task] = []
        self._lab: Lab | None = None
        self._stand: Stand | None = None
        self._data: Path | None = None
        self._controls: dict[tuple[str, int], Path] = {}
        self._projects, self._labs = 0, 0

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()

    def reset(self) -> None:
        """Ends what a drill has left running, the lab and the stand-in too: the next drill makes its own."""
        for task in self._tasks:
            task.kill()
        self._tasks.clear()
        self._stack.close()
        self._lab, self._stand = None, None

    # ---- trainings

    @property
    def data(self) -> Path:
        """The dataset of every drill, prepared once."""
        if self._data is None:
            from pipelines import params
            from pipelines.data.prepare import prepare

            folder = self.folder / "prepared"
            folder.mkdir(parents=True)
            file = folder / "params.yaml"
            file.write_text(PARAMS.format(dataset="digits", address="null", storage="-", workers=1, max_failures=0))
            prepare(params.load([file]).datasets["digits"], folder / "digits")
            self._data = folder / "digits"
        return self._data

    def _project(self, folder: Path, run: str, dataset: str, **cluster: Any) -> str:
        """Fills a project's folder. Returns: the run's digest."""
        from pipelines import params
        from pipelines.data import shards
        from pipelines.stages.train import run_digest

        (folder / "params.yaml").write_text(PARAMS.format(dataset=dataset, **cluster))
        shutil.copytree(self.data, folder / "data" / dataset)
        return run_digest(params.load([folder / "params.yaml"]).run(run), shards.read_manifest(self.data).digest)

    def here(
        self, name: str, run: str = "long", workers: int = 1, max_failures: int = 3,
        storage: str = ".dgm/store", code: Path | None = None,
    ) -> Project:  # fmt: skip
        """A project on this machine.

        Args:
            storage: the run store: a folder in the project's, or s3://dgm/<name> on the stand-in of `stand`.
            code: the folder of the code, where it is not this one.
        """
        self._projects += 1
        folder = self.folder / f"{self._projects}-{name}"
        folder.mkdir(parents=True)
        digest = self._project(
            folder, run, "digits", address="null", storage=storage, workers=workers, max_failures=max_failures
        )

        def read(file: str) -> bytes | None:
            if storage.startswith("s3://"):
                return self.stand().stored(f"{name}/{file}")
            path = folder / storage / file
            return path.read_bytes() if path.is_file() else None

        def start(words: Sequence[str], name: str, more: Mapping[str, str]) -> Task:
            return self.track(start_here(words, folder, name, {"PYTHONPATH": str(code or paths.code()), **more}))

        def tracker(ask: Callable[[str], Any]) -> Any:
            return ask(f"sqlite:///{folder / 'mlflow.db'}")

        return Project(folder, run, "digits", digest, read, start, tracker)

    def there(self, name: str, run: str = "long", workers: int | str = 2, max_failures: int = 3) -> Project:
        """A project on the lab's laptop, which trains on the lab's cluster."""
        here = self.lab()
        self._projects += 1
        name = f"{name}-{self._projects}"  # an experiment and a run store of its own: the digest is every drill's
        folder = here.project("", name)
        digest = self._project(
            folder, run, name, address=here.address, storage=f"s3://{BUCKET}/{name}",
            workers=workers, max_failures=max_failures,
        )  # fmt: skip

        def start(words: Sequence[str], task: str, more: Mapping[str, str]) -> Task:
            return self.track(here.laptop.start(words, folder, {"DGM_ROOT": str(folder), **more}, task))

        def tracker(ask: Callable[[str], Any]) -> Any:
            with here.laptop.inside():
                return ask(here.tracker)

        return Project(folder, run, name, digest, lambda file: here.stored(f"{name}/{file}"), start, tracker)

    def track(self, task: Task) -> Task:
        """Remembers a task for `reset`."""
        self._tasks.append(task)
        return task

    def control(self, run: str = "long", workers: int = 1) -> Path:
        """The artifact of the same training on this machine without a fault; trained once a session."""
        if (run, workers) not in self._controls:
            project = self.here(f"undisturbed-{run}", run, workers)
            if run == "short":
                project.end(project.start_plain())
                self._controls[run, workers] = project.published()
            else:
                project.train()
                project.check_tracker()
                self._controls[run, workers] = project.artifact
        return self._controls[run, workers]

    # ---- places

    def lab(self) -> Lab:
        """The lab, started when it is first asked for."""
        if self._lab is None:
            self._labs += 1
            self._lab = self._stack.enter_context(lab(self.folder / f"lab-{self._labs}"))
        return self._lab

    def stand(self) -> Stand:
        """An S3 stand-in on this machine, started when it is first asked for."""
        if self._stand is None:
            self._stand = self._stack.enter_context(_stand(self.folder))
        return self._stand

    def faulty_code(self, name: str, patch: str) -> Path:
        """A copy of the code with lines added to the worker, which is no part of a run's digest."""
        folder = self.folder / f"code-{name}"
        for package in ("dgm_models", "pipelines"):
            shutil.copytree(paths.code() / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        with (folder / "pipelines" / "cluster" / "worker.py").open("a") as file:
            file.write("\n\n" + patch)
        return folder


@dataclass(frozen=True)
class Stand:
    """An S3 stand-in on this machine: `port` is its own, everybody else goes through the proxy."""

    port: int
    proxy: Proxy
    environment: Mapping[str, str]

    def stored(self, name: str) -> bytes | None:
        """An object of the bucket, past the proxy."""
        status, content = _ask(self.port, "GET", f"/{BUCKET}/{name}")
        return content if status == 200 else None


def _ask(port: int, method: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers={"Authorization": KEY})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


@contextmanager
def _stand(folder: Path) -> Iterator[Stand]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    task = start_here([tool("moto_server"), "-H", "127.0.0.1", "-p", str(port)], folder, "s3", {})
    proxy = Proxy(f"127.0.0.1:{port}")
    try:
        until(lambda: _ask(port, "PUT", f"/{BUCKET}")[0] == 200, 60, "S3 stand-in")
        yield Stand(port, proxy, {**S3_KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"})
    finally:
        proxy.close()
        task.kill()


def environment_here(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a command in a project on this machine, without what would point elsewhere."""
    drop = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "DVC_", "PYTEST_", "AWS_", "DGM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    plain = {"PATH": path, "DGM_ROOT": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    plain |= {"RAY_worker_niceness": "0"}  # Ray's 15 would leave a drill's time to whatever else runs here
    return kept | plain | {"DGM_STORAGE_PATIENCE": "60", **more}


def start_here(words: Sequence[str], folder: Path, name: str, more: Mapping[str, str]) -> Task:
    """Starts a command in a folder of this machine, in a process group of its own."""
    number = len(list(folder.glob("*.log")))
    log = folder / f"{number}-{name}.log"
    with log.open("wb") as file:
        popen = subprocess.Popen(
            list(words), cwd=folder, env=environment_here(folder, more), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return Task(popen, log)


def train_workers(task: Task) -> list[psutil.Process]:
    """The training's workers of a task on this machine."""
    return [each for each in task.process.children(recursive=True) if "RayTrainWorker" in command_of(each)]


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
