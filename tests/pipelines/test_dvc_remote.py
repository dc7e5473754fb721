"""DVC's remote on S3: what one machine pushed another pulls, whatever the endpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import s3


def _dvc(folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "dvc", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"dvc {' '.join(words)}: {done.stdout}{done.stderr}"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3.stand_in() as address:
        s3.environment(monkeypatch, f"http://{address}")
        yield f"http://{address}"


def test_pushed_outs_are_pulled_by_another_clone(tmp_path: Path, endpoint: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    _dvc(first, "init", "-q", "--no-scm")
    _dvc(first, "config", "core.analytics", "false")
    _dvc(first, "remote", "add", "-d", "store", f"s3://{s3.BUCKET}/dvc")
    _dvc(first, "remote", "modify", "store", "endpointurl", endpoint)
    (first / "weights.bin").write_bytes(os.urandom(100_000))
    _dvc(first, "add", "-q", "weights.bin")
    _dvc(first, "push", "-q")
    shutil.copytree(first, second, ignore=shutil.ignore_patterns("weights.bin", "cache", "tmp"))
    assert not (second / "weights.bin").exists()
    _dvc(second, "pull", "-q")
    assert (second / "weights.bin").read_bytes() == (first / "weights.bin").read_bytes()
