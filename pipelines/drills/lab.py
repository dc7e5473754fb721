"""A cluster of hosts with everything that a training on it needs: storage behind a proxy, MLflow, Ray, a laptop.

    with lab() as here:
        project = here.project(PARAMS)                     # a folder on the laptop
        here.dgm(project, "train", "vae")

Hosts: `services` (S3 stand-in, its proxy, MLflow), `head`, `worker-1`, `worker-2` (Ray, one CPU each), `laptop`.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines import paths
from pipelines.drills.hosts import Host, Hosts, Task, until

BUCKET = "dgm"
STORAGE = f"s3://{BUCKET}/store"
S3_PORT, STAND_IN_PORT, MLFLOW_PORT, RAY_PORT, DASHBOARD_PORT = 9000, 9001, 5000, 6379, 8265
WORKERS = ("worker-1", "worker-2")
PYTHON = sys.executable

# a lost node is noticed after about four seconds (period 1 s, three misses of 0.5 s) instead of a minute
HEALTH = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}

# the stand-in compares no keys
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "dgm",
    "AWS_SECRET_ACCESS_KEY": "of-the-stand-in",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
KEY = "AWS dgm:of-the-stand-in"  # an Authorization header of the same


class Faults:
    """The proxy of the lab, by its orders: `proxy.Proxy` with the same names."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.popen = popen

    def _order(self, order: Mapping[str, Any]) -> dict[str, int]:
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.popen.stdin.write(json.dumps(order) + "\n")
        self.popen.stdin.flush()
        counts: dict[str, int] = json.loads(self.popen.stdout.readline())
        return counts

    def arm(self, kind: str, **options: Any) -> None:
        self._order({"arm": {"kind": kind, **options}})

    def disarm(self) -> None:
        self._order({"disarm": True})

    def refuse(self, seconds: float) -> None:
        self._order({"refuse": seconds})

    @property
    def counts(self) -> dict[str, int]:
        """How often each fault struck, "refused" connections, and all "requests"."""
        return self._order({})


class Lab:
    """The running services; made by `lab()`."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.folder, self.hosts = folder, hosts
        self.services, self.head, self.laptop = hosts["services"], hosts["head"], hosts["laptop"]
        self.workers = [hosts[name] for name in WORKERS]
        self.tasks: dict[str, Task] = {}
        self.faults: Faults
        self._projects = 0

    # ---- up

    def start(self) -> None:
        """Starts everything and waits until all of it answers."""
        self.start_storage()
        self.start_mlflow()
        self.start_head()
        for host in self.workers:
            self.start_worker(host)
        until(lambda: self.answers(self.services, STAND_IN_PORT, "/"), 60, "S3 stand-in")
        self.services.run([PYTHON, "-c", f"import boto3; boto3.client('s3').create_bucket(Bucket={BUCKET!r})"])
        self.wait_nodes(1 + len(self.workers))
        until(lambda: self.answers(self.services, MLFLOW_PORT, "/health"), 90, "MLflow")

    def start_storage(self) -> None:
        # where the stand-in listens nobody but the proxy looks
        words = [tool("moto_server"), "-H", "0.0.0.0", "-p", str(STAND_IN_PORT)]
        self.tasks["s3"] = self.services.start(words, name="s3")
        words = [PYTHON, "-m", "pipelines.drills.proxy", str(S3_PORT), f"127.0.0.1:{STAND_IN_PORT}"]
        popen = subprocess.Popen(
            self.services.command(words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=(self.services.folder / "log" / "proxy.log").open("w"), env=self.services.environment,
        )  # fmt: skip
        self.faults = Faults(popen)

    def start_mlflow(self) -> None:
        """Starts the MLflow server, on the database of the one before it."""
        database, files = self.services.folder / "mlflow.db", self.services.folder / "mlartifacts"
        words = [
            tool("mlflow"), "server", "--host", "0.0.0.0", "--port", str(MLFLOW_PORT), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{database}", "--serve-artifacts", "--artifacts-destination", str(files),
            "--allowed-hosts", f"{self.services.address}:{MLFLOW_PORT},127.0.0.1:{MLFLOW_PORT}",
        ]  # fmt: skip
        more = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.tasks["mlflow"] = self.services.start(words, environment=more, name="mlflow")

    def start_head(self) -> None:
        words = [
            "--head",
            f"--port={RAY_PORT}",
            f"--dashboard-host={self.head.address}",
            "--num-cpus=0",
            "--temp-dir=/tmp/ray",
        ]
        self.tasks["head"] = self._ray(self.head, f"--dashboard-port={DASHBOARD_PORT}", *words)
        until(lambda: self._open(self.head, RAY_PORT), 60, "Ray head")

    def start_worker(self, host: Host) -> None:
        self.tasks[host.name] = self._ray(host, f"--address={self.head.address}:{RAY_PORT}", "--num-cpus=1")

    def _ray(self, host: Host, *words: str) -> Task:
        common = [f"--node-ip-address={host.address}", "--object-store-memory=134217728", "--disable-usage-stats"]
        return host.start([tool("ray"), "start", *common, *words, "--block"], name="ray")

    # ---- what is there

    def answers(self, host: Host, port: int, path: str) -> bool:
        """Whether a GET on the host's port is answered with 200."""
        return self.get(host, port, path)[0] == 200

    def get(self, host: Host, port: int, path: str, rights: str = "") -> tuple[int, bytes]:
        """(status, content) of a GET as the laptop; (0, b"") when nothing answers.

        Args:
            rights: the Authorization header, Ray's token by default.
        """
        rights = rights or f"Bearer {(self.folder / 'token').read_text().strip()}"
        with self.laptop.inside():
            connection = http.client.HTTPConnection(host.address, port, timeout=10)
            try:
                connection.request("GET", path, headers={"Authorization": rights})
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                return 0, b""
            finally:
                connection.close()

    def stored(self, name: str) -> bytes | None:
        """An object of the bucket, past the proxy; None when it is not there."""
        status, content = self.get(self.services, STAND_IN_PORT, f"/{BUCKET}/{name}", KEY)
        return content if status == 200 else None

    def _open(self, host: Host, port: int) -> bool:
        import socket

        with self.laptop.inside(), suppress(OSError), socket.create_connection((host.address, port), timeout=1):
            return True
        return False

    def nodes(self) -> dict[str, str]:
        """Address -> node id of the nodes that Ray holds for alive."""
        status, content = self.get(self.head, DASHBOARD_PORT, "/api/v0/nodes?filter_keys=state&filter_predicates=%3D"
                                   "&filter_values=ALIVE")  # fmt: skip
        if status != 200:
            return {}
        found = json.loads(content)["data"]["result"]["result"]
        return {node["node_ip"]: node["node_id"] for node in found if node["state"] == "ALIVE"}

    def wait_nodes(self, count: int, seconds: float = 90) -> None:
        until(lambda: len(self.nodes()) == count, seconds, f"{count} Ray nodes", every=0.2)

    # ---- the laptop's work

    def project(self, params: str, name: str = "") -> Path:
        """A new project folder on the laptop: params.yaml, and the installed code."""
        self._projects += 1
        folder = self.laptop.folder / "home" / (name or f"project-{self._projects}")
        folder.mkdir(parents=True)
        (folder / "params.yaml").write_text(params)
        return folder

    @property
    def address(self) -> str:
        """Of the cluster, as `cluster.address` in params.yaml."""
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    @property
    def tracker(self) -> str:
        """URI of the MLflow server."""
        return f"http://{self.services.address}:{MLFLOW_PORT}"

    def dgm(self, project: Path, *words: str, seconds: float = 300, check: bool = True) -> Any:
        """Runs a verb in a project on the laptop, to its end."""
        return self.laptop.run([PYTHON, "-m", "pipelines", *words], project, _here(project), seconds, check)

    def start_dgm(self, project: Path, *words: str) -> Task:
        return self.laptop.start([PYTHON, "-m", "pipelines", *words], project, _here(project), "-".join(words))


def _here(project: Path) -> dict[str, str]:
    return {"DGM_ROOT": str(project)}


def tool(name: str) -> str:
    """A command of this interpreter's environment."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ValueError(f"{name} is not installed: pip install -e '.[dev]'")
    return found


def environment(folder: Path, hosts: Mapping[str, str]) -> dict[str, str]:
    """What is exported on every host of the lab.

    Args:
        folder: where the token lies.
        hosts: name -> address.
    """
    drop = ("RAY_", "AWS_", "MLFLOW_", "DVC_", "DGM_", "PYTEST_", "SSH_")
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(drop) and "proxy" not in name.lower()
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return kept | HEALTH | S3_KEYS | {
        "PATH": path,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "AWS_ENDPOINT_URL": f"http://{hosts['services']}:{S3_PORT}",
        "MLFLOW_TRACKING_URI": f"http://{hosts['services']}:{MLFLOW_PORT}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip


@contextmanager
def lab(folder: Path | None = None) -> Iterator[Lab]:
    """The lab for the time of the block; every process of it ends with the block, or with this process.

    Args:
        folder: for files and logs; kept. By default a temporary folder that is removed.
    Raises: hosts.NoHosts where hosts cannot be made.
    """
    with tempfile.TemporaryDirectory(prefix="dgm-lab-") as temporary:
        home = (folder or Path(temporary)).absolute()
        names = ("services", "head", *WORKERS, "laptop")
        with Hosts(names, home, {}) as hosts:
            token = home / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            addresses = {name: hosts[name].address for name in names}
            for host in hosts.by_name.values():
                host.environment.update(environment(home, addresses))
            for name in ("services", "laptop"):  # the cluster has the code of its jobs
                hosts[name].environment["PYTHONPATH"] = str(paths.code())
            here = Lab(home, hosts)
            here.start()
            yield here
