"""Hosts have a network and processes of their own, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from pipelines.drills import hosts as module
from pipelines.drills.hosts import Hosts, NoHosts, require, until


def _possible() -> bool:
    try:
        require()
    except NoHosts:
        return False
    return os.geteuid() == 0


needs_hosts = pytest.mark.skipif(not _possible(), reason="needs root, iproute2 and namespaces")


def test_missing_tool_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoHosts, match=r"`ip`: install iproute2.*without hosts still run"):
        require()
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with pytest.raises(NoHosts, match="darwin"):
        require()


@needs_hosts
def test_hosts_reach_each_other_until_they_are_cut(tmp_path: Path) -> None:
    def reaches(one: str, two: str) -> bool:
        script = f"import socket; socket.create_connection(({two!r}, 7000), timeout=1).close()"
        return hosts[one].run([sys.executable, "-c", script], check=False).returncode == 0

    serve = "import socket; s = socket.create_server(('', 7000)); [s.accept() for _ in iter(int, 1)]"
    with Hosts(["a", "b"], tmp_path / "lab", dict(os.environ)) as hosts:
        assert hosts["a"].run(["hostname"]).stdout.strip() == "a"
        task = hosts["b"].start([sys.executable, "-c", serve])
        until(lambda: reaches("a", "b"), 20, "the listening host")
        assert not reaches("b", "a"), "a host listens on another's address"
        hosts["b"].cut()
        assert not reaches("a", "b")
        hosts["b"].mend()
        until(lambda: reaches("a", "b"), 20, "the mended host")
        with hosts["a"].inside():
            assert sorted(os.listdir("/proc/thread-self/net/dev_snmp6")) == ["eth0", "lo"]
        assert [process.pid for process in hosts["b"].processes("socket")] == [task.process.pid]
        hosts["b"].kill()
        assert task.wait(10) != 0 and not hosts["b"].on and hosts["a"].on
        hosts["b"].boot()
        assert hosts["b"].run(["hostname"]).stdout.strip() == "b"
        assert not reaches("a", "b"), "the process of the host before its power loss still listens"


@needs_hosts
def test_host_that_hangs_can_lose_its_power(tmp_path: Path) -> None:
    with Hosts(["a"], tmp_path / "lab", dict(os.environ)) as hosts:
        task = hosts["a"].start(["sleep", "600"])
        task.process.suspend()
        until(lambda: psutil.Process(task.popen.pid).status() == psutil.STATUS_STOPPED, 10, "nsenter stops as well")
        hosts["a"].kill()
        assert not hosts["a"].on


@needs_hosts
def test_hosts_share_no_memory_and_no_ray_folder(tmp_path: Path) -> None:
    with Hosts(["a", "b"], tmp_path / "lab", dict(os.environ)) as hosts:
        hosts["a"].run(["touch", "/dev/shm/here", "/tmp/ray/here"])
        for path in ("/dev/shm/here", "/tmp/ray/here"):
            assert hosts["a"].run(["test", "-e", path], check=False).returncode == 0
            assert hosts["b"].run(["test", "-e", path], check=False).returncode != 0
            assert not Path(path).exists()


@needs_hosts
def test_killed_lab_leaves_no_process(tmp_path: Path) -> None:
    script = f"""
        import os, signal, sys
        from pathlib import Path
        from pipelines.drills.hosts import Hosts, until
        with Hosts(["a", "b"], Path({str(tmp_path / "lab")!r}), dict(os.environ)) as hosts:
            task = hosts["a"].start(["sleep", "600"])
            print(*[task.process.pid, hosts["a"].init, hosts["b"].init], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr

    def gone() -> bool:
        for pid in pids:
            try:
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    return False
            except psutil.NoSuchProcess:
                continue
        return True

    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 3
    until(gone, 10, f"the end of {pids}")
