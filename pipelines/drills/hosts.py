"""Several hosts on one machine: each a set of Linux namespaces with an address of its own, joined by a bridge.

A host has its own network, processes, hostname, /dev/shm and /tmp/ray; the file system is the machine's. Nothing has a
name outside: the bridge lives in a namespace too, and every host's first process ends with the pipe that this process
holds. So a lab leaves nothing behind however it ends, and two of them never meet.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import psutil

T = TypeVar("T")
NETWORK = "10.77.0"
# The first process of a host: says "ready", then waits for the end of its input and buries orphans meanwhile.
_WAIT = "exec 3<&0; echo ready; cat <&3 >/dev/null & wait $!"
_INIT = """
set -e
hostname "$1"
mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/$1/ray" /tmp/ray
ip link set lo up
""" + _WAIT  # fmt: skip


class NoHosts(OSError):
    """This machine or user cannot make hosts."""


def require() -> None:
    """Raises NoHosts, with the way out, where namespaces cannot be made."""
    if sys.platform != "linux":
        raise NoHosts(f"hosts are Linux namespaces, this is {sys.platform}: the drills without hosts still run")
    for tool, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(tool) is None:
            raise NoHosts(f"hosts need `{tool}`: install {package} (the drills without hosts still run)")
    done = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoHosts(
            f"hosts need the right to make namespaces ({done.stderr.strip()}): run as root, or under "
            "`unshare --user --map-root-user --mount` (the drills without hosts still run)"
        )


class Task:
    """A running command with its output in a file.

    Args:
        popen: the command, or the nsenter that waits for it on a host.
        log: where its output goes.
        entered: whether `popen` is such an nsenter.
    """

    def __init__(self, popen: subprocess.Popen[bytes], log: Path, entered: bool = False) -> None:
        self.popen, self.log, self.entered = popen, log, entered

    @property
    def process(self) -> psutil.Process:
        """The command itself."""
        process = psutil.Process(self.popen.pid)
        if not self.entered:
            return process
        (child,) = until(process.children, 10, f"start of {self.log.stem}")
        return child

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def alive(self) -> bool:
        return self.popen.poll() is None

    def wait(self, seconds: float) -> int:
        """The exit status. Raises TimeoutError."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{self.log.stem}: no end after {seconds:g} s\n{self.text()[-2000:]}") from error

    def kill(self) -> None:
        """SIGKILL to the command and what it started."""
        if self.alive():
            kill_tree(psutil.Process(self.popen.pid))
            self.popen.wait()


class Host:
    """One host. `boot` makes it, `kill` is a power loss after which it can be booted again.

    Args:
        name: its hostname.
        address: its IPv4 address.
        folder: of the lab; the host's own files lie in `<folder>/<name>`.
        switch: pid of the process whose network namespace holds the bridge.
        environment: of its commands.
    """

    def __init__(self, name: str, address: str, folder: Path, switch: int, environment: Mapping[str, str]) -> None:
        self.name, self.address, self.lab, self.switch = name, address, folder, switch
        self.folder = folder / name
        self.environment = dict(environment)
        self._unshare: subprocess.Popen[str] | None = None
        self.init = 0
        self._entered: list[subprocess.Popen[bytes]] = []
        self._tasks = 0

    def boot(self) -> None:
        for name in ("ray", "home", "tmp", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)  # the place that every host mounts its own folder over
        flags = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc"]
        self._unshare = _first(["unshare", *flags, "sh", "-c", _INIT, "sh", self.name, str(self.lab)], self.name)
        self.init = psutil.Process(self._unshare.pid).children()[0].pid
        port = f"to-{self.name}"
        subprocess.run(["nsenter", "-t", str(self.switch), "-n", "ip", "link", "delete", port],
                       capture_output=True, check=False)  # fmt: skip
        _ip(self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(self.init))
        _ip(self.switch, "link", "set", port, "master", "bridge0", "up")
        _ip(self.init, "address", "add", f"{self.address}/24", "dev", "eth0")
        _ip(self.init, "link", "set", "eth0", "up")

    @property
    def on(self) -> bool:
        return self._unshare is not None and self._unshare.poll() is None

    def kill(self) -> None:
        """Power loss: every process of the host is killed at once, its shared memory is gone."""
        if self._unshare is not None and self.on:
            os.kill(self.init, signal.SIGKILL)
            for popen in self._entered:  # an nsenter that was stopped with its command would not bury it
                popen.kill()
                popen.wait()
            self._entered.clear()
            self._unshare.wait()

    def cut(self) -> None:
        """Pulls the network cable."""
        _ip(self.switch, "link", "set", f"to-{self.name}", "down")

    def mend(self) -> None:
        """Plugs it in again."""
        _ip(self.switch, "link", "set", f"to-{self.name}", "up")

    def processes(self, words: str = "") -> list[psutil.Process]:
        """The host's processes whose command line contains `words`, its first one excepted."""
        mine, found = os.readlink(f"/proc/{self.init}/ns/pid"), []
        for process in psutil.process_iter():
            try:
                here = os.readlink(f"/proc/{process.pid}/ns/pid") == mine
                if here and process.pid != self.init and words in " ".join(process.cmdline()):
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found

    def command(self, words: Sequence[str], cwd: Path | None = None) -> list[str]:
        """The command line that runs `words` on this host."""
        enter = ["nsenter", "-t", str(self.init), "--net", "--mount", "--uts", "--ipc", "--pid"]
        return [*enter, "env", f"--chdir={cwd or self.folder / 'home'}", *words]

    def start(
        self, words: Sequence[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None,
        name: str = "", stdin: int = subprocess.DEVNULL,
    ) -> Task:  # fmt: skip
        """Starts a command; its output goes to `<host>/log/<name>.log`."""
        self._tasks += 1
        log = self.folder / "log" / f"{name or Path(words[0]).name}-{self._tasks}.log"
        with log.open("wb") as file:
            popen = subprocess.Popen(
                self.command(words, cwd), stdin=stdin, stdout=file, stderr=subprocess.STDOUT,
                env=self._environment(environment), start_new_session=True,
            )  # fmt: skip
        self._entered.append(popen)
        return Task(popen, log, entered=True)

    def run(
        self, words: Sequence[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None,
        seconds: float = 120, check: bool = True,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Runs a command to its end. Raises RuntimeError with its output when it fails."""
        done = subprocess.run(
            self.command(words, cwd), env=self._environment(environment), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(words)} ended with {done.returncode}\n"
                               f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")  # fmt: skip
        return done

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        places = {"HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "tmp")}
        return {**self.environment, **places, **(more or {})}

    @contextmanager
    def inside(self) -> Iterator[None]:
        """For the time of the block, sockets that this thread opens are on the host's network."""
        with open(f"/proc/{threading.get_native_id()}/ns/net") as home, open(f"/proc/{self.init}/ns/net") as there:
            _setns(there.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())


class Hosts:
    """Hosts on one bridge, for the time of a `with` block.

    Args:
        names: of the hosts, in the order of their addresses: 10.77.0.2 and so on.
        folder: for their files.
        environment: of every host's commands.
    Raises: NoHosts where they cannot be made.
    """

    def __init__(self, names: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        require()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, start=2)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        self._switch = _first(["unshare", "--net", "sh", "-c", _WAIT], "the bridge")
        self.by_name = {
            name: Host(name, address, folder, self._switch.pid, environment) for name, address in addresses.items()
        }

    def __getitem__(self, name: str) -> Host:
        return self.by_name[name]

    def __enter__(self) -> Hosts:
        try:
            _ip(self._switch.pid, "link", "add", "bridge0", "type", "bridge")
            _ip(self._switch.pid, "link", "set", "bridge0", "up")
            for host in self.by_name.values():
                host.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for host in self.by_name.values():
            host.kill()
        self._switch.kill()
        self._switch.wait()


def until(found: Callable[[], T], seconds: float, what: str, every: float = 0.05) -> T:
    """Polls until `found()` is true and returns that. Raises TimeoutError naming what did not come."""
    end = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: nothing after {seconds:g} s")
        time.sleep(every)
    return value


def kill_tree(process: psutil.Process) -> None:
    """SIGKILL to a process and everything below it."""
    try:
        every = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in every:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(every, timeout=10)


def _first(words: list[str], name: str) -> subprocess.Popen[str]:
    """A namespace's first process, once it says that it is ready; it ends with the pipe that is kept here."""
    popen = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert popen.stdout is not None and popen.stderr is not None
    if popen.stdout.readline().strip() != "ready":
        raise NoHosts(f"{name} could not be made: {popen.stderr.read().strip()}")
    return popen


def _ip(where: int, *words: str) -> None:
    done = subprocess.run(
        ["nsenter", "-t", str(where), "-n", "ip", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise NoHosts(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _setns(handle: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(handle, 0x40000000):  # CLONE_NEWNET
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
