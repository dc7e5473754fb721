"""The platform on loopback: an S3 stand-in, PostgreSQL, an MLflow server on both, a Ray head that asks for a token.

    python infra/local/local.py up        # start, wait until each answers, write .dgm/local/env.sh
    . .dgm/local/env.sh
    python infra/local/local.py status
    python infra/local/local.py down      # end what `up` started, and nothing else

For development and tests. The S3 stand-in (moto) keeps its objects in memory and checks no credentials: `down` loses
them, and deletes the database that refers to them. Logs stay under .dgm/local until the next `up`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"
PORTS = {"s3": 9000, "postgres": 15432, "mlflow": 5000, "ray": 6379, "dashboard": 8265, "agent": 52365}
SERVICES = ("s3", "postgres", "ray", "mlflow")  # in the order of starting; the reverse of ending
BUCKETS = ("dgm-data", "dgm-runs", "dgm-dvc", "dgm-mlflow")
MARK = "DGM_LOCAL_MARK"  # in the environment of every process that `up` starts, and of all that these start
SECONDS = 120


class LocalError(RuntimeError):
    """What went wrong, with the log to read."""


# ---------------------------------------------------------------- what is started


class Local:
    """One set of services.

    Args:
        home: where state, logs, token and env.sh lie.
        offset: added to every port, for a second set beside the first.
    """

    def __init__(self, home: Path, offset: int = 0) -> None:
        self.home = home.resolve()
        self.ports = {name: port + offset for name, port in PORTS.items()}
        # short, for Ray's sockets (107 bytes), and open to the user that PostgreSQL runs as
        key = hashlib.sha256(str(self.home).encode()).hexdigest()[:8]
        self.run = Path(tempfile.gettempdir()) / f"dgm-local-{key}"
        self.token = self.home / "ray.token"
        self.password = self.home / "postgres.password"

    def url(self, name: str) -> str:
        return f"http://{HOST}:{self.ports[name]}"

    def exports(self) -> dict[str, str]:
        """What a user's shell needs; it goes to the Ray head too, so that jobs find the same services."""
        return {
            "AWS_ENDPOINT_URL": self.url("s3"),
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "RAY_ADDRESS": self.url("dashboard"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def command(self, name: str) -> tuple[list[str], dict[str, str]]:
        """A service's command and what its environment needs besides `exports`."""
        ports = self.ports
        if name == "s3":
            return [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(ports["s3"])], {}
        if name == "postgres":
            # no unix socket: its folder would have to belong to another user
            settings = {"listen_addresses": HOST, "port": ports["postgres"], "unix_socket_directories": ""}
            options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
            return [postgres("postgres"), "-D", str(self.run / "postgres"), *options], {}
        if name == "mlflow":
            words = ["--host", HOST, "--port", str(ports["mlflow"]), "--workers", "1", "--serve-artifacts"]
            words += ["--artifacts-destination", "s3://dgm-mlflow/artifacts"]
            words += ["--backend-store-uri", f"postgresql+psycopg2://dgm@{HOST}:{ports['postgres']}/postgres"]
            words += ["--allowed-hosts", f"{HOST}:*,localhost:*"]
            extra = {"PGPASSFILE": str(self.password), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            return [sys.executable, "-m", "mlflow", "server", *words], extra
        words = ["--head", "--block", f"--node-ip-address={HOST}", f"--port={ports['ray']}"]
        words += [f"--dashboard-host={HOST}", f"--dashboard-port={ports['dashboard']}"]
        words += [f"--dashboard-agent-listen-port={ports['agent']}"]
        words += [f"--temp-dir={self.run / 'ray'}", f"--object-store-memory={256 * 2**20}"]
        # Ray takes the host's own address for a loopback one, and listens everywhere, unless it is told "one machine"
        one_machine = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        return [sys.executable, "-m", "ray.scripts.scripts", "start", *words], one_machine

    def healthy(self, name: str) -> bool:
        """Whether a service does its work; the Ray head must also refuse a request without the token."""
        if name == "postgres":
            words = [postgres("pg_isready"), "-q", "-h", HOST, "-p", str(self.ports["postgres"])]
            return subprocess.run(words, check=False).returncode == 0
        if name == "ray":
            url = f"{self.url('dashboard')}/api/version"
            return answer(url) == 401 and answer(url, self.token.read_text().strip()) == 200
        return answer(self.url(name) + {"s3": "/moto-api/", "mlflow": "/health"}[name]) == 200

    def log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    # ------------------------------------------------------------ up

    def up(self) -> None:
        """Starts every service and waits for it; what was started is ended again when one does not answer.

        Raises: LocalError naming the service and its log.
        """
        if self.state().get("processes"):
            if all(self.healthy(name) for name in SERVICES):
                return
            raise LocalError("a part of the services runs: `down` first")
        for name, port in self.ports.items():
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    raise LocalError(f"port {port} ({name}) is taken: end what listens there, or give --offset")
        self.home.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir(mode=0o711)
        self.write({"mark": secrets.token_hex(16), "run": str(self.run), "processes": {}, "ports": self.ports})
        private(self.token, secrets.token_urlsafe(48))
        try:
            self.make_database()
            for name in ("s3", "postgres", "ray"):
                self.start(name)
            self.wait("postgres")
            self.start("mlflow")
            self.wait("s3")
            self.make_buckets()
            for name in ("mlflow", "ray"):
                self.wait(name)
        except BaseException:
            self.down()
            raise
        private(self.home / "env.sh", "".join(f"export {name}='{value}'\n" for name, value in self.exports().items()))

    def start(self, name: str) -> None:
        words, extra = self.command(name)
        state = self.state()
        environment = os.environ | self.exports() | extra | {MARK: state["mark"]}
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment.pop("RAY_AUTH_TOKEN", None)  # it would take the place of the file
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                words, env=environment, cwd=self.home, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, **(unprivileged() if name == "postgres" else {}),
            )  # fmt: skip
        state["processes"][name] = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
        self.write(state)

    def wait(self, name: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.healthy(name):
            gone = not self.alive(name)
            if gone or time.monotonic() > deadline:
                what = "ended" if gone else f"did not answer within {SECONDS} s"
                last = "".join(f"\n  {line}" for line in self.log(name).read_text(errors="replace").splitlines()[-5:])
                raise LocalError(f"{name} {what}; its log is {self.log(name)}{last}")
            time.sleep(0.2)

    def make_database(self) -> None:
        """initdb, as a user that is not root: PostgreSQL refuses root."""
        secret = secrets.token_urlsafe(24)
        private(self.password, f"{HOST}:{self.ports['postgres']}:postgres:dgm:{secret}\n")
        folder, given = self.run / "postgres", self.run / "password"
        folder.mkdir(mode=0o700)
        private(given, secret)
        for path in (folder, given) if os.geteuid() == 0 else ():
            shutil.chown(path, unprivileged()["user"], unprivileged()["group"])
        words = [postgres("initdb"), "-D", str(folder), "-U", "dgm", "-A", "scram-sha-256", "--no-sync"]
        words += ["--encoding=UTF8", "--locale=C", f"--pwfile={given}"]
        with self.log("postgres").open("wb") as log:
            done = subprocess.run(words, cwd=self.run, stdout=log, stderr=log, check=False, **unprivileged())
        given.unlink()
        if done.returncode:
            raise LocalError(f"initdb ended with {done.returncode}; its log is {self.log('postgres')}")

    def make_buckets(self) -> None:
        import boto3

        given = {name.lower(): value for name, value in self.exports().items() if name.startswith("AWS_")}
        s3 = boto3.client(
            "s3", endpoint_url=given["aws_endpoint_url"], region_name=given["aws_default_region"],
            aws_access_key_id=given["aws_access_key_id"], aws_secret_access_key=given["aws_secret_access_key"],
        )  # fmt: skip
        for bucket in BUCKETS:
            s3.create_bucket(Bucket=bucket)

    # ------------------------------------------------------------ status and down

    def alive(self, name: str) -> bool:
        known = self.state().get("processes", {}).get(name)
        return known is not None and same(known) is not None

    def status(self) -> dict[str, str]:
        """Service -> "healthy", "does not answer" or "not running"."""
        words = {}
        for name in SERVICES:
            words[name] = "not running"
            if self.alive(name):
                words[name] = "healthy" if self.healthy(name) else f"does not answer; log: {self.log(name)}"
        return words

    def ours(self) -> list[psutil.Process]:
        """What `up` started and still runs: by pid and start time, their descendants, and whatever carries the mark."""
        state, found = self.state(), {}
        for known in reversed(state.get("processes", {}).values()):
            root = same(known)
            for process in [root, *root.children(recursive=True)] if root else []:
                found[process.pid] = process
        for process in psutil.process_iter():
            try:
                if state.get("mark") and process.environ().get(MARK) == state["mark"]:
                    found.setdefault(process.pid, process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                continue
        return list(found.values())

    def down(self) -> int:
        """Ends what `up` started. Returns: how many processes were ended."""
        state = self.state()
        found = self.ours()
        database = state.get("processes", {}).get("postgres", {}).get("pid")
        roots = {known["pid"] for known in state.get("processes", {}).values()}
        below = {child.pid for process in found if process.pid in roots for child in process.children(recursive=True)}
        for process in found:
            if process.pid not in below:  # Ray and PostgreSQL end their own; SIGINT is PostgreSQL's fast shutdown
                signal_to(process, "SIGINT" if process.pid == database else "SIGTERM")
        psutil.wait_procs(found, timeout=15)
        for process in (left := self.ours()):
            signal_to(process, "SIGKILL")
        psutil.wait_procs(left, timeout=5)
        if state:
            shutil.rmtree(state["run"], ignore_errors=True)
        for path in (self.home / "state.json", self.home / "env.sh", self.token, self.password):
            path.unlink(missing_ok=True)
        return len(found)

    # ------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        path = self.home / "state.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def write(self, state: dict[str, Any]) -> None:
        private(self.home / "state.new", json.dumps(state, indent=1))
        os.replace(self.home / "state.new", self.home / "state.json")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One `up` or `down` at a time."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


# ---------------------------------------------------------------- small parts


def private(path: Path, text: str) -> None:
    """A file that only its owner reads, from its first byte on."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def answer(url: str, token: str | None = None) -> int:
    """The HTTP status of a GET; 0 when nobody answers. Proxies are not asked: the address is this machine's."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def same(known: dict[str, Any]) -> psutil.Process | None:
    """The process of that pid, if it started when ours did: pids are used again."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(known["pid"])
        if abs(process.create_time() - known["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def signal_to(process: psutil.Process, name: str) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.Signals[name])  # psutil compares start times again


def postgres(program: str) -> str:
    """The path of a PostgreSQL program. Debian keeps the server's outside PATH."""
    folders = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which(program, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if found is None:
        ways = "`apt-get install postgresql`, `brew install postgresql`, or `conda install postgresql`"
        raise LocalError(f"{program} is not installed: {ways}")
    return found


def unprivileged() -> dict[str, Any]:
    """How PostgreSQL is started: as we are, or, when we are root, as `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("up", "status", "down"))
    parser.add_argument("--home", type=Path, default=Path(__file__).parents[2] / ".dgm" / "local")
    parser.add_argument("--offset", type=int, default=0, help="added to every port")
    given = parser.parse_args()
    local = Local(given.home, given.offset)
    if (ports := local.state().get("ports")) and given.verb != "up":
        local.ports = ports
    if given.verb == "status":
        words = local.status()
        print("\n".join(f"{name:<9} {text}" for name, text in words.items()))
        sys.exit(0 if set(words.values()) == {"healthy"} else 1)
    verbs: dict[str, Callable[[], Any]] = {"up": local.up, "down": local.down}
    try:
        with local.alone():
            done = verbs[given.verb]()
    except LocalError as error:
        sys.exit(f"error: {error}")
    if given.verb == "down":
        print(f"{done} processes ended")
        return
    print((local.home / "env.sh").read_text(), end="")
    print(f"\n. {local.home / 'env.sh'}")


if __name__ == "__main__":
    main()
