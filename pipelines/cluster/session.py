"""The Ray session and the training that runs on it. Ray is started at most once in a process."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines import paths
from pipelines.cluster.worker import Job, ray_worker
from pipelines.params import Cluster

log = logging.getLogger("dgm.cluster")

# before ray is imported, on every machine of a run
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # reports are collected when they come, not every two seconds
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "15",  # a worker that hangs is given up, not waited for ten minutes
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # progress bars are ours
    "OMP_NUM_THREADS": "1",
}
COLLECTIVE_TIMEOUT_S = 60  # a rank whose partner is gone gives up
GRACE_S = 20.0  # what a SIGTERM leaves for a last checkpoint


def job_server(cluster: Cluster) -> str | None:
    """The address of a cluster that takes jobs, None where the cluster is joined or started."""
    address = cluster.where
    return address if address and address.startswith(("http://", "https://")) else None


@contextmanager
def session(cluster: Cluster) -> Iterator[Any]:
    """`ray`, connected to the cluster's address or started on this machine."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    address = cluster.where
    options: dict[str, Any] = {}
    if not paths.ticket().is_file():  # a job's workers have its environment and its folder already
        environment = {name: os.environ[name] for name in SETTINGS}
        environment["PYTHONPATH"] = os.pathsep.join([str(paths.code()), *filter(None, [os.environ.get("PYTHONPATH")])])
        if address:
            options["runtime_env"] = {"env_vars": environment}
        else:
            os.environ["PYTHONPATH"] = environment["PYTHONPATH"]
    if not address:
        options |= {"include_dashboard": False, "object_store_memory": 256 * 2**20, "num_cpus": os.cpu_count()}
    verbose = bool(os.environ.get("DGM_VERBOSE"))
    ray.init(address=address or "local", log_to_driver=verbose, logging_level=logging.ERROR, **options)
    try:
        yield ray
    finally:
        ray.shutdown()


def scaling(cluster: Cluster) -> Any:
    import ray.train

    resources = {"CPU": cluster.cpus} | ({"GPU": 1} if cluster.gpu else {})
    return ray.train.ScalingConfig(
        num_workers=cluster.workers, use_gpu=cluster.gpu, resources_per_worker=resources,
        elastic_resize_monitor_interval_s=10.0,
    )  # fmt: skip


def fit(job: Job, cluster: Cluster, callbacks: list[Any]) -> None:
    """Runs one training to its end, resuming from the run store.

    Ray Train's own state lies in a folder of this machine that is new every time: nothing is resumed from it, and a
    bucket that does not answer cannot end the controller.

    Raises: RuntimeError with Ray's words when the training failed more often than `cluster.max_failures`.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # any other may die
    notice = ray.remote(num_cpus=0, scheduling_strategy=here)(_Notice).remote()
    with tempfile.TemporaryDirectory(prefix="dgm-ray-") as folder:
        trainer = TorchTrainer(
            ray_worker,
            train_loop_config={"job": job, "notice": notice, "cluster": cluster},
            scaling_config=scaling(cluster),
            torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
            run_config=ray.train.RunConfig(
                name=job.digest,
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
                callbacks=callbacks,
            ),
        )
        with _deadline(cluster.hours, job.run.key), _saving_on_sigterm(notice, job.run.key):
            trainer.fit()


class _Notice:
    """An actor: tells the workers that the driver is about to end, and the driver that they have saved."""

    def __init__(self) -> None:
        self.is_given, self.is_saved = False, False

    def give(self) -> None:
        self.is_given = True

    def given(self) -> bool:
        return self.is_given

    def saved(self) -> None:
        self.is_saved = True

    def done(self) -> bool:
        return self.is_saved


@contextmanager
def _saving_on_sigterm(notice: Any, key: str) -> Iterator[None]:
    """On SIGTERM the workers save a checkpoint, then this process ends: no step is lost, nothing goes on behind it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop() -> None:
        import time

        import ray

        end = time.monotonic() + GRACE_S
        saved = False
        try:
            ray.get(notice.give.remote(), timeout=GRACE_S)
            while not saved and time.monotonic() < end:
                saved = ray.get(notice.done.remote(), timeout=GRACE_S)
                time.sleep(0.05)
        finally:
            words = "saved a checkpoint" if saved else f"no checkpoint within {GRACE_S:g} s, the last one stands"
            print(f"runs.{key}: SIGTERM: {words}; the same command resumes it", file=sys.stderr, flush=True)
            ray.shutdown()
            os._exit(143)

    def on_signal(*_: Any) -> None:
        threading.Thread(target=stop, daemon=True).start()

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _deadline(hours: float, key: str) -> Iterator[None]:
    """Ends the process when a training hangs: Ray retries a group that cannot start for ever."""

    def end() -> None:
        words = f"runs.{key}: no end after cluster.hours = {hours:g}; stopped. The same command resumes it"
        print(words, file=sys.stderr)
        os._exit(1)

    timer = threading.Timer(hours * 3600, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
