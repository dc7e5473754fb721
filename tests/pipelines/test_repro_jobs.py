"""`dgm repro --jobs`: trainings overlap, what they need comes first, and a failure is named and stops nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import params as settings
from pipelines import repro
from pipelines.cluster import JobFailed
from tests.support import project

STAGES = """
stages:
  prepare:
    foreach: ${datasets}
    do: {cmd: "python stage.py prepare-${key} data.txt", outs: [data.txt]}
  extractor:
    foreach: ${extractors}
    do: {cmd: "python stage.py extractor-${key} extractor.txt", deps: [data.txt], outs: [extractor.txt]}
  train:
    foreach: ${runs}
    do:
      cmd: "python stage.py train-${key} ${key}.txt"
      deps: [data.txt]
      params: ["runs.${key}"]
      outs: ["${key}.txt"]
  report:
    cmd: "python stage.py report report.txt"
    deps: [vae.txt, gan.txt, extractor.txt]
    outs: [report.txt]
"""
STAGE = """
import pathlib, sys, time
begin = time.time()
time.sleep(1.5 if sys.argv[1].startswith("train") else 0)
if pathlib.Path(f"fail-{sys.argv[1]}").exists():
    sys.exit("told to fail")
pathlib.Path(sys.argv[2]).write_text(sys.argv[1])
pathlib.Path(f"log-{sys.argv[1]}").write_text(f"{begin} {time.time()}")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = project.make(tmp_path / "project")
    (found / "dvc.yaml").write_text(STAGES)
    (found / "stage.py").write_text(STAGE)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=found, check=True)
    monkeypatch.setenv("DGM_ROOT", str(found))
    return found


def _span(folder: Path, stage: str) -> tuple[float, float]:
    begin, end = (folder / f"log-{stage}").read_text().split()
    return float(begin), float(end)


def test_independent_trainings_overlap_between_their_data_and_the_rest(folder: Path) -> None:
    repro.repro(settings.load(), 3)
    vae, gan, report = (_span(folder, stage) for stage in ("train-vae", "train-gan", "report"))
    assert vae[0] < gan[1] and gan[0] < vae[1], "the trainings did not overlap"
    assert _span(folder, "prepare-digits")[1] <= min(vae[0], gan[0]) and max(vae[1], gan[1]) <= report[0]
    for log in folder.glob("log-*"):
        log.unlink()
    repro.repro(settings.load(), 3)
    assert not list(folder.glob("log-*")), "what was up to date ran again"


def test_failed_training_is_named_and_the_others_are_kept(folder: Path) -> None:
    (folder / "fail-train-gan").touch()
    with pytest.raises(JobFailed, match=r"train@gan; what the others made is kept"):
        repro.repro(settings.load(), 2)
    assert (folder / "vae.txt").is_file() and not (folder / "report.txt").exists()


def test_file_that_is_no_pipeline_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"zo/dvc.yaml: no dvc.yaml of this project"):
        repro.repro(settings.load(), 2, "zo/dvc.yaml")
