"""`dgm likelihood`: the evaluation's own numbers, ranks among held-out rows, and what it refuses."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dgm_models
from dgm_models.likelihood import log_prob
from dgm_models.method import Method
from pipelines.data.prepare import prepare
from pipelines.stages import likelihood as stage
from tests.laws import cases
from tests.laws.cases import Case

MADE, VAE = Case("autoregressive/made", "image:discrete"), Case("vae/vae", "image:discrete")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with digits and a MADE of it."""
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    prepare({"name": "digits"}, tmp_path / "data" / "digits")
    method = dgm_models.build("autoregressive/made", dgm_models.DataSpec("image", (1, 8, 8), 17, 10), width=16)
    dgm_models.save(method, tmp_path / "artifacts" / "made", lineage={"dataset": "digits"})
    return tmp_path


def test_log_prob_does_not_depend_on_what_else_is_asked() -> None:
    for case in (MADE, VAE):
        method, x = cases.made(case), cases.rows(case.spec, 300)
        whole, kind = log_prob(method, x, importance=3)
        assert kind == ("exact" if case is MADE else "bound")
        assert torch.equal(log_prob(method, x[:256], importance=3)[0], whole[:256])  # a chunk
        assert torch.isfinite(whole).all() and whole.dtype == torch.float64


def test_log_prob_of_a_bound_grows_with_its_draws() -> None:
    method, x = cases.made(VAE), cases.rows(VAE.spec, 64)
    one, many = (float(log_prob(method, x, importance=k)[0].mean()) for k in (1, 64))
    assert many > one


def test_log_prob_refuses_models_without_one() -> None:
    gan = cases.made(Case("gan/wgan_gp", "image:discrete"))
    with pytest.raises(ValueError, match="neither a density nor a bound"):
        log_prob(gan, cases.rows(gan.data, 2))
    with pytest.raises(ValueError, match="importance: 0"):
        log_prob(cases.made(VAE), cases.rows(VAE.spec, 2), importance=0)


def test_likelihood_of_a_split_is_the_mean_of_its_rows(project: Path, tmp_path: Path) -> None:
    found = stage.likelihood("made", "digits/test", 1, 0, tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert found["n"] == len(rows) and found["kind"] == "exact" and found["importance"] is None
    mean = sum(float(row["nats"]) for row in rows) / len(rows)
    assert math.isclose(found["nats"]["value"], mean, rel_tol=1e-9)
    assert math.isclose(found["bits_per_dim"], -mean / 64 / math.log(2), rel_tol=1e-9)
    assert all(0 <= float(row["rank"]) <= 1 for row in rows)


def test_likelihood_finds_rows_that_are_no_digits(project: Path, tmp_path: Path) -> None:
    method = dgm_models.load(project / "artifacts" / "made")
    from pipelines.data import shards

    dgm_models.fit(method, shards.load(project / "data" / "digits", "train").x, steps=60, batch_size=64)
    dgm_models.save(method, project / "artifacts" / "made", lineage={"dataset": "digits"})
    noise = np.random.default_rng(0).integers(0, 17, (20, 1, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "noise.npy", noise)
    assert stage.likelihood("made", str(tmp_path / "noise.npy"), 1, 0, None)["outliers"] == 1.0
    assert stage.likelihood("made", "digits/test", 1, 0, None)["outliers"] < 0.1


def test_likelihood_names_rows_that_cannot_be_read(project: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wrong.npy", np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"holds \(3, 4, 4\); expected \[N, \*\(1, 8, 8\)\]"):
        stage.likelihood("made", str(tmp_path / "wrong.npy"), 1, 0, None)
    with pytest.raises(ValueError, match="or <dataset>/<split>"):
        stage.likelihood("made", "digits/tset", 1, 0, None)


def test_rank_is_the_share_of_held_out_rows_below() -> None:
    among = torch.tensor([3.0, 1.0, 2.0, 2.0]).double()
    assert stage.rank(torch.tensor([0.0, 2.0, 2.5, 9.0]).double(), among).tolist() == [0.0, 0.5, 0.75, 1.0]


def test_weights_of_another_build_are_named(project: Path) -> None:
    from dgm_models.construct import ConfigError
    from dgm_models.training import checkpoint

    folder = project / "artifacts" / "made"
    method: Method = dgm_models.load(folder)
    spec = checkpoint.read_document(folder, "spec")
    checkpoint.write(folder, {"weights": {"other": torch.zeros(1)}}, {"spec": spec})
    with pytest.raises(ConfigError, match=f"the weights do not fit {method.name}"):
        dgm_models.load(folder)
