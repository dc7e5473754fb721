"""The evaluation of a model with an energy: log Z and likelihoods between two rows each, labelled by what they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dgm_models.likelihood import unnormalised_log_prob
from dgm_models.method import Method, build
from dgm_models.protocols import DataSpec
from dgm_models.sampling import sample
from pipelines.data.prepare import prepare
from pipelines.params import Evaluation
from pipelines.stages.evaluate import Rows, bracketed, evaluate
from tests.laws import cases

SETTINGS = Evaluation(chains=100, temperatures=60)


def machine() -> Method:
    method = build("energy/rbm", DataSpec("vector", (6,), 2), hidden=4, steps=30)
    with torch.no_grad():
        for p in (method.model.weight, method.model.visible, method.model.hidden):
            p.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    return method


def test_rows_hold_the_exact_numbers_between_them() -> None:
    method, x = machine(), cases.rows(DataSpec("vector", (6,), 2), 300)
    rows = Rows(None, "test", 0)
    bracketed(rows, method, x, SETTINGS)
    found = {row["metric"]: row for row in rows.rows}
    log_z = float(method.model.exact_log_z())
    nll = log_z - float(unnormalised_log_prob(method, x).mean())
    exact = {"log_z": log_z, "nll": nll, "bits_per_dim": nll / (6 * math.log(2))}
    assert found.keys() == {f"{name}/{side}" for name in exact for side in ("lower", "upper")}
    for name, value in exact.items():
        lower, upper = found[f"{name}/lower"], found[f"{name}/upper"]
        # the intervals are of 95%; the seed is held
        assert lower["low"] < value < upper["high"]
        assert upper["value"] - lower["value"] < 0.3
        assert (lower["kind"], upper["kind"]) == ("bound", "estimate")
        assert {row["chains"] for row in (lower, upper)} == {100} and lower["temperatures"] == 60
    assert found["log_z/lower"]["n"] == 100 and found["nll/upper"]["n"] == 300
    # of the likelihood, the error of the mean over the rows is a part
    assert (
        found["nll/lower"]["high"] - found["nll/lower"]["low"]
        > found["log_z/lower"]["high"] - found["log_z/lower"]["low"]
    )


def test_unnormalised_log_prob_is_in_the_space_of_the_stored_data() -> None:
    data = DataSpec("vector", (2,), location=1.0, scale=3.0)
    method = build("energy/contrastive_divergence", data, network={"name": "mlp", "width": 4})
    x = cases.rows(data, 5)
    expected = -method.model.energy((x - 1) / 3).double() - 2 * math.log(3)
    assert torch.allclose(unnormalised_log_prob(method, x), expected.detach(), atol=1e-5)  # float32
    gan = build("gan/wgan", data)
    with pytest.raises(ValueError, match="gan/wgan has no energy"):
        unnormalised_log_prob(gan, x)


@pytest.mark.parametrize(
    ("name", "shown"), [("energy/persistent_cd", True), ("energy/noise_contrastive", True), ("flows/nice", False)]
)
def test_evaluation_encloses_what_has_no_exact_density(name: str, shown: bool, tmp_path: Path) -> None:
    prepare({"name": "moons", "rows": 300}, tmp_path / "moons")
    params = {"chain": {"name": "langevin", "steps": 3}} if shown else {}
    method = build(name, DataSpec("vector", (2,)), network={"name": "mlp", "width": 4}, **params)
    settings = Evaluation(chains=20, temperatures=3)
    rows, _ = evaluate(
        method, sample(method, 9), "moons", settings, data=tmp_path / "moons", wanted=frozenset({"log_z"})
    )
    names = {"log_z/lower", "log_z/upper", "nll/lower", "nll/upper"} if shown else set()
    assert {row["metric"] for row in rows.rows} == names
    assert rows.refused == []
    odd = Evaluation(chains=30, temperatures=3)
    rows, _ = evaluate(method, sample(method, 9), "moons", odd, data=tmp_path / "moons", wanted=frozenset({"log_z"}))
    assert [each["metric"] for each in rows.refused] == (["log_z"] if shown else [])
