"""A search's objective: metrics by name with a known direction, measured by the evaluation's own estimators."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dgm_models
from dgm_models.construct import ConfigError
from pipelines import params as reader
from pipelines import paths
from pipelines.cluster import search as driver
from pipelines.data.prepare import prepare
from pipelines.params import METRICS, Params, Search, Space
from pipelines.stages import evaluate as stage
from pipelines.stages import tune

SECTIONS: dict[str, Any] = {
    "datasets": {"moons": {"name": "moons", "rows": 400, "split": [0.5, 0.25, 0.25]}, "digits": {"name": "digits"}},
    "runs": {
        "real": {
            "dataset": "moons",
            "method": {"name": "vae/vae", "latent_dim": 2},
            "network": {"name": "mlp", "width": 8, "depth": 1},
            "train": {"steps": 40, "batch_size": 16, "report_every": 10, "checkpoint_every": 10},
        },
        "discrete": {
            "dataset": "digits",
            "method": {"name": "vae/vae", "latent_dim": 2},
            "network": {"name": "mlp", "width": 8, "depth": 1},
            "train": {"steps": 20, "batch_size": 16, "report_every": 10},
        },
        "gan": {
            "dataset": "moons",
            "method": {"name": "gan/non_saturating", "latent_dim": 2},
            "network": {"name": "mlp", "width": 8, "depth": 1},
            "train": {"steps": 20, "batch_size": 16, "report_every": 10},
        },
    },
    "evaluation": {"importance": 2},
    "searches": {},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    for name, section in SECTIONS["datasets"].items():
        prepare(section, root / "data" / name)
    return root


@pytest.fixture
def root(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGM_ROOT", str(prepared))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return prepared


def params_of(run: str, **search: Any) -> Params:
    found = {"run": run, "space": {"optim.lr": {"log_uniform": [1e-4, 1e-2]}}, **search}
    return reader.parse({**SECTIONS, "searches": {"s": found}})


def plan_of(run: str, root: Path, **search: Any) -> driver.Plan:
    plan = tune.plan_of("s", params_of(run, **search))
    return driver.Plan(**{**vars(plan), "storage": str(root / "store")})


def test_objective_is_a_weighted_sum_in_which_higher_counts_negative() -> None:
    search = Search("r", {}, {"fid": 1.0, "recall": 2.0}, ["nll"])
    assert search.score({"fid": 3.0, "recall": 0.25, "nll": 9.0}) == 2.5
    assert search.formula == "fid - 2 recall" and search.metrics == ("fid", "recall", "nll")
    assert Search("r", {}).score({"fid": 7.0}) == 7.0
    for bad in ({"fid": 1.0}, {"fid": 1.0, "recall": math.nan}, {"fid": math.inf, "recall": math.inf}):
        assert search.score(bad) == math.inf


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        ("real", {"objective": {"fidd": 1.0}}, "searches.s.objective: 'fidd' is no metric; did you mean \"fid\"?"),
        ("real", {"also": ["recal"]}, "searches.s.also: 'recal' is no metric; did you mean \"recall\"?"),
        ("real", {"objective": {"fid": 0.0}}, "searches.s.objective.fid: 0.0 is not a number above 0"),
        ("real", {"objective": {}}, "searches.s: objective: empty"),
        ("real", {"also": ["fid"]}, "searches.s: also: 'fid' is named twice"),
        (
            "gan",
            {"objective": {"fid": 1.0, "nll": 1.0}},
            "searches.s.objective: gan/non_saturating has no 'nll'; allow",
        ),
        ("gan", {"also": ["elbo"]}, "searches.s.also: gan/non_saturating has no 'elbo'; allowed: fid, kid"),
    ],
)
def test_impossible_objective_is_refused_when_the_params_are_read(
    run: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        params_of(run, **settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("run", "name"),
    [("real", "bits_per_dim"), ("real", "mig/histogram"), ("real", "inception_score"), ("discrete", "inception_score")],
)
def test_metric_that_the_dataset_cannot_have_is_refused_before_any_trial(root: Path, run: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"searches\.s\.objective: \w+ has no '{name}'; allowed: fid"):
        tune.ensure("s", params_of(run, objective={name: 1.0}))
    assert not (root / ".dgm").exists()


def test_measured_is_what_the_evaluation_says_of_valid(root: Path) -> None:
    plan = plan_of("real", root, objective={"fid": 1.0, "nll": 1.0}, also=["elbo", "recall", "copies"])
    run = plan.base
    method = reader.build_method(run, tune_spec(root, "moons"))
    found = driver.measure(plan, method)
    fake = stage.drawn(method, "moons", plan.evaluation, "valid")
    rows, _ = stage.evaluate(method, fake, "moons", plan.evaluation, "valid")
    told = {row["metric"]: row["value"] for row in rows.rows}
    assert found.note == ""
    assert found.metrics == {
        "fid": told["fid/raw"], "nll": told["nll"], "elbo": told["elbo"], "recall": told["recall/raw"],
        "copies": told["copies"],
    }  # fmt: skip
    test, _ = stage.evaluate(method, fake, "moons", plan.evaluation)
    assert found.metrics["nll"] != next(row["value"] for row in test.rows if row["metric"] == "nll")


def tune_spec(root: Path, dataset: str) -> Any:
    from pipelines.data import shards

    return shards.read_manifest(paths.data(dataset)).spec()


def test_measuring_costs_no_estimator_that_nobody_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("real", root, objective={"nll": 1.0})

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed")

    for module, name in ((stage.frechet, "frechet"), (stage.kernel, "kernel_distance"), (stage.coverage, "copies")):
        monkeypatch.setattr(module, name, never)
    assert math.isfinite(driver.measure(plan, reader.build_method(plan.base, tune_spec(root, "moons"))).metrics["nll"])


def test_refused_metric_is_the_worst_and_says_why(root: Path) -> None:
    plan = plan_of("discrete", root, objective={"fid": 1.0}, also=["bits_per_dim", "coverage"])
    found = driver.measure(plan, reader.build_method(plan.base, tune_spec(root, "digits")))
    assert found.metrics["fid"] == math.inf and "fid: " in found.note  # too few rows for 64 raw coordinates
    assert math.isfinite(found.metrics["bits_per_dim"])
    assert plan.search.score(found.metrics) == math.inf


def test_samples_that_nothing_can_be_computed_from_are_the_worst(root: Path) -> None:
    plan = plan_of("real", root, objective={"fid": 1.0, "recall": 1.0})
    method = reader.build_method(plan.base, tune_spec(root, "moons"))
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.fill_(math.nan)
    found = driver.measure(plan, method)
    assert found.metrics == {"fid": math.inf, "recall": -math.inf} and found.note
    assert plan.search.score(found.metrics) == math.inf


def test_rows_are_found_under_the_name_that_a_search_uses() -> None:
    rows = [
        {"metric": "fid/digits", "value": 1.0}, {"metric": "nll_given/label", "value": 2.0},
        {"metric": "mig/entropy", "value": 3.0}, {"metric": "mig/maximum", "value": 4.0},
        {"metric": "bits_per_dim/ode", "value": 5.0},
    ]  # fmt: skip
    assert math.isnan(driver.value_of("bits_per_dim", rows))  # an estimate does not stand in for it
    found = {name: driver.value_of(name, rows) for name in ("fid", "nll", "mig/maximum")}
    assert found == {"fid": 1.0, "nll": 2.0, "mig/maximum": 4.0}
    assert math.isnan(driver.value_of("kid", rows))


def test_every_metric_names_an_attempt_and_capabilities_that_exist() -> None:
    from dgm_models.protocols import CAPABILITIES

    source = Path(stage.__file__).read_text()
    for name, metric in METRICS.items():
        assert set(metric.model) <= set(CAPABILITIES), name
        assert f'"{metric.attempt}"' in source, name


def test_rungs_lie_at_reports(root: Path) -> None:
    plan = plan_of("real", root, grace=0.3, rungs=3)
    assert plan.grace == 12 and plan.rung_steps() == [20, 30, 40]  # never before the grace is over
    assert plan_of("real", root, grace=0.0, rungs=1).rung_steps() == [10, 40]
    assert plan_of("real", root, grace=0.25, rungs=4).rung_steps() == [10, 20, 30, 40]


@pytest.mark.parametrize(("grace", "reduction", "rungs"), [(0.25, 3, 4), (0.5, 2, 2)])  # a VAE's, and a GAN's
def test_stopping_has_a_rung_wherever_it_decides(root: Path, grace: float, reduction: int, rungs: int) -> None:
    plan = plan_of("real", root, grace=grace, reduction=reduction, rungs=rungs)
    train = replace(plan.base.train, steps=1500, report_every=50)
    plan = replace(plan, base=replace(plan.base, train=train))
    milestones = [plan.grace * reduction**k for k in range(5) if plan.grace * reduction**k < 1500]
    assert milestones
    for milestone in milestones:
        assert any(milestone <= step < milestone + 50 for step in plan.rung_steps()), milestone


def test_trial_is_measured_at_every_rung_and_leaves_the_runs_own_artifact(root: Path) -> None:
    plan = plan_of("real", root, grace=0.5, rungs=2, objective={"nll": 1.0}, also=["fid"])
    heard: list[tuple[int, driver.Measured]] = []
    values = {"optim.lr": 0.002}
    found, digest = driver.train_here(plan, plan.run(values), lambda step, each: heard.append((step, each)))
    assert [step for step, _ in heard] == [20, 40] and heard[-1][1] == found
    assert all(set(each.metrics) == {"nll", "fid"} for _, each in heard)
    assert heard[0][1].metrics != heard[1][1].metrics
    with driver.RunStore(plan.storage, digest).fetched("artifact") as folder:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 4  # as the run itself reports: every ten steps
        assert driver.measure(plan, dgm_models.load(folder)) == found
    again = driver.train_here(plan, plan.run(values))
    assert again == (found, digest)


def test_training_that_diverges_is_the_worst_and_ends_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgm_models.training.trainer import Trainer

    def run(self: Any, report: Any) -> None:
        raise FloatingPointError("step 3: the gradient of 'model' is not finite")

    monkeypatch.setattr(Trainer, "run", run)
    plan = plan_of("real", root, seed=1)
    heard: list[Any] = []
    found, digest = driver.train_here(plan, plan.run({"optim.lr": 0.003}), lambda *each: heard.append(each))
    assert found.metrics == {"fid": math.inf} and "not finite" in found.note and heard == [(0, found)]
    assert not driver.RunStore(plan.storage, digest).has_artifact()


def test_choices_travel_as_text_and_come_back_as_values() -> None:
    choice = [True, False, None, "kl", 3, [0.0, 0.9], {"name": "mlp"}]
    space = Space(choice=choice)
    search = Search("r", {"a": space, "b": Space(uniform=(0.0, 1.0))})
    assert [driver.values_of(search, {"a": text, "b": 0.5})["a"] for text in space.texts()] == choice
    assert space.holds(True) and space.holds(None) and not space.holds(1) and not space.holds("true")
    with pytest.raises(ValueError, match="names a value twice"):
        Space(choice=[1, 1])
    assert Space(choice=[1, True]).choice == [1, True]


def test_run_as_written_is_the_first_proposal_with_its_defaults(root: Path) -> None:
    space = {
        "method.latent_dim": {"choice": [2, 4]},
        "optim.model.lr": {"log_uniform": [1e-4, 1e-2]},
        "optim.betas": {"choice": [[0.0, 0.9], [0.9, 0.999]]},
        "train.average": {"choice": [0.99, 0.0]},
        "network.activation": {"choice": ["relu", "leaky_relu", "silu"]},
    }
    plan = plan_of("real", root, space=space)
    own = reader.written(plan.base)
    values = plan.own()
    assert values is not None
    assert values["method.latent_dim"] == 2 and values["optim.model.lr"] == 1e-3
    assert values["optim.betas"] == [0.9, 0.999] and values["network.activation"] == own["network"]["activation"]
    assert plan_of("real", root, space={"method.latent_dim": {"choice": [4, 8]}}).own() is None


def row(trial: int, objective: float, values: dict[str, Any] | None = None, **other: Any) -> dict[str, Any]:
    found = {
        "trial": trial, "values": values or {"optim.lr": 10.0 ** -(trial % 3 + 2)}, "metrics": {"fid": objective},
        "objective": objective, "step": 40, "seconds": 1.0, "state": "finished", "note": "", "rungs": [],
    }  # fmt: skip
    return {**found, **other}


def test_sampler_begins_as_written_and_proposes_what_the_space_holds(root: Path) -> None:
    space = {"method.latent_dim": {"choice": [2, 4]}, "optim.betas": {"choice": [[0.0, 0.9], [0.9, 0.999]]},
             "train.compile": {"choice": [False, True]}, "optim.lr": {"log_uniform": [1e-4, 1e-2]}}  # fmt: skip
    plan = plan_of("real", root, space=space)
    sampler = driver.sampler_of(plan.search, plan.own())
    domains = {dotted: driver._domain(each) for dotted, each in plan.search.space.items()}
    assert sampler.set_search_properties("objective", "min", domains)
    assert driver.values_of(plan.search, sampler.suggest("0")) == plan.own()
    seen = set()
    for number in range(1, 30):
        values = driver.values_of(plan.search, sampler.suggest(str(number)))
        assert all(plan.search.space[name].holds(value) for name, value in values.items())
        plan.run(values)
        seen.add(repr(values["optim.betas"]) + repr(values["train.compile"]))
        worst = {"objective": driver.UNUSABLE, "training_iteration": 1, "step": 40}
        sampler.on_trial_result(str(number), worst)
        sampler.on_trial_complete(str(number), worst)
    assert len(seen) == 4


def test_row_of_a_result_keeps_every_rung_once_and_survives_an_empty_one(root: Path) -> None:
    from types import SimpleNamespace

    import pandas as pd  # type: ignore[import-untyped, unused-ignore]

    plan = plan_of("real", root, also=["recall"])
    told = [(10, 5.0, 0.1), (20, 4.0, 0.2), (20, 4.0, 0.2), (40, math.inf, -math.inf)]
    frame = pd.DataFrame([{"step": step, "metrics/fid": fid, "metrics/recall": recall} for step, fid, recall in told])
    last = {
        "step": 40,
        "metrics": {"fid": math.inf, "recall": -math.inf},
        "note": "fid: collapsed",
        "time_total_s": 2.0,
    }
    result = SimpleNamespace(metrics=last, metrics_dataframe=frame, config={"optim.lr": 0.001}, error=None)
    found = driver.row_of_result(plan, 3, result)
    assert [rung["step"] for rung in found["rungs"]] == [10, 20, 40]
    assert found["rungs"][1]["metrics"] == {"fid": 4.0, "recall": 0.2}
    assert (found["state"], found["note"], found["objective"]) == ("finished", "fid: collapsed", math.inf)
    result = SimpleNamespace(
        metrics=None, metrics_dataframe=pd.DataFrame(), config={"optim.lr": 0.001}, error=ValueError("a\nwrong seed")
    )
    found = driver.row_of_result(plan, 4, result)
    assert (found["state"], found["note"], found["metrics"], found["rungs"]) == ("failed", "wrong seed", {}, [])
    assert "4,0.001,inf,,,,,failed,wrong seed" in tune.table([found], plan.search)


def test_finalists_are_finished_finite_and_not_the_run_as_written(root: Path) -> None:
    plan = plan_of("real", root, finalists=2)
    rows = [
        row(0, 1.0, {"optim.lr": 1e-3}),  # as the run is written
        row(1, math.inf), row(2, 0.1, state="stopped"), row(3, 3.0, {"optim.lr": 5e-3}),
        row(4, 2.0, {"optim.lr": 2e-3}), row(5, 4.0, {"optim.lr": 4e-3}),
    ]  # fmt: skip
    found = tune.candidates_of("s", plan, rows)
    assert found == {"as written": {}, "trial 4": {"optim.lr": 2e-3}, "trial 3": {"optim.lr": 5e-3}}
    with pytest.raises(ValueError, match=r"searches\.s: no trial ended with fid: too few rows"):
        tune.candidates_of("s", plan, [row(1, math.inf, note="too few rows")])


def test_table_is_best_first_and_writes_any_value() -> None:
    space = {"a": Space(choice=[True, False]), "b": Space(choice=["kl", None])}
    search = Search("r", space, {"fid": 1.0, "recall": 1.0})
    rows = [
        row(0, math.inf, {"a": True, "b": None}, metrics={"fid": math.inf, "recall": -math.inf}, note="collapsed"),
        row(1, 2.0, {"a": False, "b": "kl"}, metrics={"fid": 2.5, "recall": 0.5}),
        row(2, 1.0, {"a": False, "b": "kl"}, state="stopped"),
        row(
            3, math.inf, {"a": True, "b": "kl"}, metrics={}, step=None, seconds=None, state="failed", note="no, memory"
        ),
    ]
    assert tune.table(rows, search).splitlines() == [
        "trial,a,b,objective,fid,recall,step,seconds,state,note",
        "1,false,kl,2.0,2.5,0.5,40,1.0,finished,",
        "2,false,kl,1.0,1.0,,40,1.0,stopped,",
        "0,true,null,inf,inf,-inf,40,1.0,finished,collapsed",
        '3,true,kl,inf,,,,,failed,"no, memory"',
    ]
