"""`dvc repro` on a small project: raw bytes to a promoted champion, and what runs again after an edit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import project

_HEAD, _REST = project.PARAMS.split("  gan:")
ONE_RUN = _HEAD + _REST[_REST.index("searches:") :]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = project.make_repository(tmp_path_factory.mktemp("repository"), ONE_RUN)
    project.run(folder, "dvc", "repro")
    return folder


def _would_run(folder: Path) -> set[str]:
    lines = project.run(folder, "dvc", "repro", "--dry").stdout.splitlines()
    return {line.split("'")[1] for line in lines if line.startswith("Running stage")}


def test_repro_promotes_a_champion(repository: Path) -> None:
    verdict = json.loads((repository / "promotions" / "digits.verdict.json").read_text())
    assert verdict["passed"], verdict
    (row,) = [row for row in _leaderboard(repository) if row["method"]]
    assert row["run"] == "vae" and row["champion"]
    fid = row["metrics"]["fid/digits"]
    assert fid["low"] <= fid["value"] <= fid["high"] and fid["n"] == 359


def _leaderboard(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(project.dgm(folder, "leaderboard", "--json").stdout)
    return rows


def test_champion_samples_are_the_same_bytes(repository: Path) -> None:
    for name in ("a.png", "b.png"):
        project.dgm(repository, "sample", "models:/digits@champion", "--n", "64", "--seed", "0", "--out", name)
    assert (repository / "a.png").read_bytes() == (repository / "b.png").read_bytes()
    project.dgm(repository, "sample", "models:/digits@champion", "--n", "64", "--seed", "1", "--out", "c.png")
    assert (repository / "a.png").read_bytes() != (repository / "c.png").read_bytes()


def test_repro_again_runs_nothing(repository: Path) -> None:
    assert _would_run(repository) == set()


def test_number_of_workers_reruns_nothing(repository: Path) -> None:
    _edit(repository, "workers: 1", "workers: 2")
    try:
        assert _would_run(repository) == set()
    finally:
        _edit(repository, "workers: 2", "workers: 1")


def test_learning_rate_reruns_that_run_alone(repository: Path) -> None:
    _edit(repository, "optim: {lr: 2.0e-3}", "optim: {lr: 2.5e-3}")
    try:
        assert {"train@vae"} <= _would_run(repository)
        assert not {"prepare@digits", "extractor@digits"} & _would_run(repository)
    finally:
        _edit(repository, "optim: {lr: 2.5e-3}", "optim: {lr: 2.0e-3}")


def _edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "params.yaml").read_text()
    assert old in text
    (folder / "params.yaml").write_text(text.replace(old, new))


def test_sync_rebuilds_a_lost_database(repository: Path) -> None:
    for name in ("mlflow.db", "mlflow.db-shm", "mlflow.db-wal"):
        (repository / name).unlink(missing_ok=True)
    assert "version" in project.dgm(repository, "sync").stdout
    project.dgm(repository, "sample", "models:/digits@champion", "--out", "d.png")
    assert "agrees" in project.dgm(repository, "sync").stdout


def test_wrong_param_stops_the_stage_before_ray(repository: Path) -> None:
    _edit(repository, "latent_dim: 8", "latent_dims: 8")
    try:
        done = project.dgm(repository, "train", "vae", check=False)
        assert done.returncode == 2
        assert 'runs.vae.method.latent_dims: unknown key; did you mean "latent_dim"?' in done.stderr
    finally:
        _edit(repository, "latent_dims: 8", "latent_dim: 8")
