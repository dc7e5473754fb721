"""The Ray session and the training that runs on it. Ray is started at most once in a process."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import paths
from pipelines.cluster.worker import Job, ray_worker
from pipelines.params import Cluster

log = logging.getLogger("dgm.cluster")

# before ray is imported: no telemetry; reports are collected when they come, not every two seconds
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # progress bars are ours
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def session(cluster: Cluster) -> Iterator[Any]:
    """`ray`, connected to the cluster's address or started on this machine."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    address = os.environ.get("RAY_ADDRESS") or cluster.address
    environment = {name: os.environ[name] for name in SETTINGS}
    environment["PYTHONPATH"] = os.pathsep.join([str(paths.code()), *filter(None, [os.environ.get("PYTHONPATH")])])
    options: dict[str, Any] = {"runtime_env": {"env_vars": environment}} if address else {}
    if not address:
        os.environ["PYTHONPATH"] = environment["PYTHONPATH"]
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
    return ray.train.ScalingConfig(num_workers=cluster.workers, use_gpu=cluster.gpu, resources_per_worker=resources)


def fit(job: Job, cluster: Cluster, callbacks: list[Any]) -> None:
    """Runs one training to its end. The name is the digest: same digest, resume; other digest, fresh.

    Raises: RuntimeError with Ray's words when the training failed more often than `cluster.max_failures`.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        ray_worker,
        train_loop_config={"job": job},
        scaling_config=scaling(cluster),
        torch_config=TorchConfig(timeout_s=300),
        run_config=ray.train.RunConfig(
            name=job.digest,
            storage_path=_ray_storage(job.storage),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            callbacks=callbacks,
        ),
    )
    with _deadline(cluster.hours, job.run.key):
        trainer.fit()


def _ray_storage(storage: str) -> str:
    """Ray's own bookkeeping stands beside the runs; nothing is resumed from it."""
    return f"{storage.rstrip('/')}/ray" if "://" in storage else str(Path(storage).absolute() / "ray")


@contextmanager
def _deadline(hours: float, key: str) -> Iterator[None]:
    """Ends the process when a training hangs: Ray retries a group that cannot start for ever."""
    import threading

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
