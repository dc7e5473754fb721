"""A small project in a folder of its own, for tests that run the real stages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PARAMS = """
datasets:
  digits: {name: digits, seed: 0, split: [0.6, 0.2, 0.2]}
extractors:
  digits:
    network: {name: conv, channels: 8}
    train: {steps: 200, batch_size: 64}
    optim: {lr: 3.0e-3}
runs:
  vae:
    dataset: digits
    method: {name: vae/vae, latent_dim: 8}
    network: {name: mlp, width: 64, depth: 1}
    train: {steps: 300, batch_size: 64, average: 0.99, report_every: 50, checkpoint_every: 50}
    optim: {lr: 2.0e-3}
  gan:
    dataset: digits
    method: {name: gan/wgan_gp, latent_dim: 8, critic_steps: 2}
    network: {name: mlp, width: 32, depth: 1}
    train: {steps: 150, batch_size: 32, average: 0.9, report_every: 50, checkpoint_every: 25}
    optim: {lr: 1.0e-3, betas: [0.0, 0.9]}
searches: {}
tuned: {}
evaluation: {importance: 4}
promotion: {ceiling_fraction: 0.5}
cluster: {storage: .dgm/store, workers: 1}
"""


def make(folder: Path, params: str = PARAMS) -> Path:
    """A project's params.yaml in a new folder; the code is the installed one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(params)
    return folder


def make_repository(folder: Path, params: str = PARAMS) -> Path:
    """A git and DVC repository with a copy of the code, for `dvc repro`."""
    make(folder, params)
    for name in ("dgm_models", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("searches", "comparisons"):
        shutil.copytree(ROOT / name, folder / name, ignore=lambda _, names: [n for n in names if n != ".gitkeep"])
    run(folder, "git", "init", "-q")
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.email=t@example.org", "-c", "user.name=t", "commit", "-qm", "start")
    run(folder, "dvc", "init", "-q")
    run(folder, "dvc", "config", "core.analytics", "false")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment of a project's commands: this interpreter's, without what would point elsewhere."""
    drop = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "DVC_STAGE", "DVC_ROOT", "PYTEST_CURRENT_TEST")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return kept | {"PATH": path, "DGM_ROOT": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def run(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def dgm(folder: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "-m", "pipelines", *words, check=check)
