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
from dgm_models.protocols import Density
from pipelines.data.prepare import prepare
from pipelines.stages import likelihood as stage
from tests.laws import cases
from tests.laws.cases import Case

MADE, VAE = Case("autoregressive/made", "image:discrete"), Case("vae/vae", "image:discrete")
FLOW = Case("diffusion/flow_matching", "image:discrete")


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


def test_likelihood_by_the_ode_is_an_estimate_beside_the_bound(project: Path) -> None:
    data = dgm_models.DataSpec("image", (1, 8, 8), 17, 10)
    method = dgm_models.build("diffusion/flow_matching", data, network={"name": "mlp", "width": 8, "depth": 1})
    dgm_models.save(method, project / "artifacts" / "flow", lineage={"dataset": "other"})
    np.save(project / "rows.npy", np.zeros((3, 1, 8, 8), np.uint8))
    rows = str(project / "rows.npy")
    estimate, bound = (stage.likelihood("flow", rows, 4, 0, None, ode) for ode in (True, False))
    assert (estimate["kind"], estimate["importance"]) == ("estimate", None)
    assert (bound["kind"], bound["importance"]) == ("bound", 4)
    assert "(an estimate)" in stage.words(estimate) and "(a lower bound, 4 draws)" in stage.words(bound)
    with pytest.raises(ValueError, match="autoregressive/made has no probability-flow ODE"):
        stage.likelihood("made", "digits/test", 1, 0, None, True)


@pytest.mark.parametrize("asked", [False, True])
def test_evaluation_keeps_bound_and_estimate_apart(asked: bool) -> None:
    from pipelines.params import Evaluation
    from pipelines.stages.evaluate import Rows, likelihoods

    case = Case(FLOW.method, FLOW.sort, asked)
    method, x, given = cases.made(case), cases.rows(case.spec, 9), "_given/label" if asked else ""
    labels = cases.labels(case.spec, 9)
    rows = Rows(None, "test", 0)
    likelihoods(rows, method, x, labels, Evaluation(importance=2, ode_rows=5))
    told = {row["metric"]: (row["kind"], row["n"]) for row in rows.rows}
    assert told == {
        f"elbo{given}": ("bound", 9), f"nll{given}": ("bound", 9), f"bits_per_dim{given}": ("bound", 9),
        f"nll{given}/ode": ("estimate", 5), f"bits_per_dim{given}/ode": ("estimate", 5),
    } and not rows.refused  # fmt: skip
    for wanted, ode_rows in ((frozenset({"nll"}), 5), (None, 0)):  # a search asks for the bound alone
        rows = Rows(None, "valid", 0, wanted)
        likelihoods(rows, method, x, labels, Evaluation(importance=2, ode_rows=ode_rows))
        assert [row["metric"] for row in rows.rows] == [f"{name}{given}" for name in ("elbo", "nll", "bits_per_dim")]


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


def test_likelihood_of_a_user_s_table_is_in_nats_of_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    x = np.random.default_rng(0).normal(size=(60, 2)) * [100.0, 0.01] + [5.0, -3.0]
    np.savetxt(tmp_path / "t.csv", x, delimiter=",", header="a,b", comments="")
    spec = prepare({"name": "table", "path": str(tmp_path / "t.csv")}, tmp_path / "data" / "mine").spec()
    method = dgm_models.build("vae/ppca", spec, factors=1)
    dgm_models.save(method, tmp_path / "artifacts" / "run", lineage={"dataset": "mine"})
    (tmp_path / "mine.csv").write_text("b,a\n-3.0,5.0\n-3.01,105.0\n900.0,5.0\n")
    found = stage.likelihood("run", str(tmp_path / "mine.csv"), 1, 0, tmp_path / "out.csv")
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert (found["kind"], found["n"], found["bits_per_dim"]) == ("exact", 3, None)
    stored = torch.tensor([[5.0, -3.0], [105.0, -3.01], [5.0, 900.0]])
    y = (stored - torch.tensor(spec.location)) / torch.tensor(spec.scale)
    assert isinstance(method.model, Density)
    expected = method.model.log_prob(y).double() - sum(map(math.log, spec.scale))  # type: ignore[arg-type]
    for row, nats in zip(rows, expected.tolist(), strict=True):
        assert math.isclose(float(row["nats"]), nats, rel_tol=1e-5)  # float32
    assert float(rows[2]["rank"]) == 0.0 and found["outliers"] == pytest.approx(1 / 3)


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
