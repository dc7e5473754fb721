"""A search in MLflow: one run, a nested run a trial and a finalist, nothing twice, and a tracker may be down."""

from __future__ import annotations

import copy
import json
import math
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_search_objective import SECTIONS

from pipelines import params as reader
from pipelines import tracking
from pipelines.cluster import search as driver
from pipelines.data.prepare import prepare
from pipelines.params import Params, Run
from pipelines.stages import tune
from pipelines.tracking import Curves, replay

DIGEST = "search-of-a-test"  # the real one follows the code
SEARCH = {
    "run": "real",
    "space": {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "method.latent_dim": {"choice": [2, 4]}},
    "objective": {"fid": 1.0},
    "also": ["nll"],
    "trials": 3,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with data and a tracker's empty database: making its tables costs 1.5 s, copying them nothing."""
    root = tmp_path_factory.mktemp("project")
    prepare(SECTIONS["datasets"]["moons"], root / "data" / "moons")
    tracking.client(f"sqlite:///{root / 'mlflow.db'}")
    return root


@pytest.fixture
def params(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return reader.parse({**SECTIONS, "searches": {"s": SEARCH}})


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts and never answers."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(8)
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


def rungs(*fids: float) -> list[dict[str, Any]]:
    return [{"step": 20 * i, "metrics": {"fid": fid, "nll": 3.0}} for i, fid in enumerate(fids, start=1)]


def row(plan: driver.Plan, trial: int, state: str, *fids: float) -> dict[str, Any]:
    told = rungs(*fids)
    metrics = told[-1]["metrics"] if told else {}
    return {
        "trial": trial, "values": {"optim.lr": 0.001 * (trial + 1), "method.latent_dim": 2}, "metrics": metrics,
        "objective": plan.search.score(metrics), "step": 20 * len(told), "seconds": 1.0, "state": state, "note": "",
        "rungs": told,
    }  # fmt: skip


def found_of(plan: driver.Plan) -> tuple[list[dict[str, Any]], dict[str, Any], Any]:
    rows = [row(plan, 0, "finished", 5.0, 4.0), row(plan, 1, "finished", 3.0, 2.0), row(plan, 2, "stopped", math.inf)]
    candidates = tune.candidates_of("s", plan, rows)
    results = {
        name: {
            seed: (driver.Measured({"fid": fid + seed / 1000, "nll": 3.0}), f"{name[0]}{seed}-training")
            for seed in plan.search.seeds
        }
        for name, fid in zip(candidates, (4.0, 2.0), strict=True)
    }
    return rows, candidates, results


def searched(params: Params, folder: Path) -> driver.Plan:
    """A search's out, without a search."""
    plan = tune.plan_of("s", params)
    tune.write(folder, "s", plan, *found_of(plan))
    return plan


def runs(params: Params) -> dict[str, Any]:
    mlflow = tracking.client(params.tracking.where)
    found = mlflow.search_runs([tracking.experiment_id(mlflow, "moons")])
    named = {run.info.run_name: run for run in found}
    assert len(named) == len(found), "a run twice"
    return named


def history(params: Params, run: Any, metric: str) -> list[tuple[int, float]]:
    told = tracking.client(params.tracking.where).get_metric_history(run.info.run_id, metric)
    return [(item.step, item.value) for item in told]


def test_search_is_one_run_with_its_trials_and_finalists_nested(params: Params, tmp_path: Path) -> None:
    plan = searched(params, tmp_path / "out")
    tune.record("s", plan, DIGEST, tmp_path / "out", params)
    found = runs(params)
    parent = found.pop("search s")
    assert parent.data.tags[tracking.RUN_DIGEST] == DIGEST
    assert parent.data.tags["dgm.chosen"] == "trial 1" and parent.info.status == "FINISHED"
    assert parent.data.params["objective.fid"] == "1.0" and parent.data.params["trials"] == "3"
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in found.values())
    assert sorted(found) == sorted(
        [f"trial {i}" for i in range(3)]
        + [f"{name}, seed {seed}" for name in ("as written", "trial 1") for seed in plan.search.seeds]
    )
    assert found["trial 1"].data.params == {"optim.lr": "0.002", "method.latent_dim": "2"}
    assert history(params, found["trial 1"], "fid") == [(20, 3.0), (40, 2.0)]
    assert history(params, found["trial 1"], "objective") == [(20, 3.0), (40, 2.0)]
    assert [found[f"trial {i}"].data.tags["dgm.state"] for i in range(3)] == ["finished", "finished", "stopped"]
    assert found["trial 2"].data.metrics == {"nll": 3.0}  # an infinite value has no place in a chart
    finalist = found["trial 1, seed 102"]
    assert finalist.data.params["seed"] == "102" and history(params, finalist, "fid") == [(40, 2.102)]


def test_recording_again_adds_nothing(params: Params, tmp_path: Path) -> None:
    plan = searched(params, tmp_path / "out")
    tune.record("s", plan, DIGEST, tmp_path / "out", params)
    before = {name: (run.data.params, run.data.metrics, run.info.status) for name, run in runs(params).items()}
    tune.record("s", plan, DIGEST, tmp_path / "out", params)
    again = runs(params)
    assert {name: (run.data.params, run.data.metrics, run.info.status) for name, run in again.items()} == before
    assert history(params, again["trial 0"], "fid") == [(20, 5.0), (40, 4.0)]


def fake(number: int, values: dict[str, Any], step: int) -> Any:
    config = {"optim.lr": values["optim.lr"], "method.latent_dim": json.dumps(values["method.latent_dim"])}
    return SimpleNamespace(
        trial_id=f"t{number}", config=config, last_result={"step": step}, is_finished=lambda: False
    )  # fmt: skip


def test_trials_are_followed_while_they_run_and_completed_afterwards(params: Params, tmp_path: Path) -> None:
    plan = searched(params, tmp_path / "out")
    curves = tune.curves_of("s", plan, DIGEST, params)
    assert curves is not None
    watch = driver.Trials(plan, DIGEST, str(tmp_path), curves)
    rows, _, _ = found_of(plan)
    trials = [fake(i, each["values"], each["step"]) for i, each in enumerate(rows)]
    for number in (0, 1):
        watch.on_trial_result(0, trials, trials[number], {**rows[number]["rungs"][0], "note": ""})
    live = runs(params)
    assert sorted(live) == ["search s", "trial 0", "trial 1"]
    assert {run.info.status for run in live.values()} == {"RUNNING"}
    watch.on_trial_result(0, trials, trials[0], {**rows[0]["rungs"][1], "note": ""})
    watch.on_trial_complete(0, trials, trials[0])
    ended = runs(params)["trial 0"]
    assert ended.info.status == "FINISHED" and ended.data.tags["dgm.state"] == "finished"
    told = json.loads((tmp_path / "progress.json").read_text())
    assert told["step"] == 1 and told["metrics"] == {"best": 3.0}

    # the driver is killed; a restored one proposes other values for a trial that had just begun
    strange = fake(2, {"optim.lr": 0.009, "method.latent_dim": 4}, 20)
    driver.Trials(plan, DIGEST, str(tmp_path), tune.curves_of("s", plan, DIGEST, params)).on_trial_result(
        0, [*trials[:2], strange], strange, {**rungs(9.0)[0], "note": ""}
    )
    tune.record("s", plan, DIGEST, tmp_path / "out", params)
    mlflow = tracking.client(params.tracking.where)
    every = mlflow.search_runs([tracking.experiment_id(mlflow, "moons")])
    assert len(every) == 1 + 3 + 6 + 1
    assert sorted(run.info.status for run in every) == ["FINISHED"] * 10 + ["KILLED"]
    named = {run.info.run_id: run for run in every if run.info.status == "FINISHED"}
    trial = next(run for run in named.values() if run.info.run_name == "trial 1")
    assert history(params, trial, "fid") == [(20, 3.0), (40, 2.0)]


def test_silent_tracker_costs_one_wait_for_the_whole_search(
    params: Params, tmp_path: Path, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = searched(params, tmp_path / "out")
    curves = Curves("search s", DIGEST, "moons", {}, {}, tmp_path / "spool", silent, wait=0.3, pause=60.0)
    watch = driver.Trials(plan, DIGEST, str(tmp_path), curves)
    rows, _, _ = found_of(plan)
    trials = [fake(i, each["values"], each["step"]) for i, each in enumerate(rows)]
    waits = []
    monkeypatch.setattr(curves._family, "until", -math.inf)
    for number, each in enumerate(rows):
        started = time.monotonic()
        watch.on_trial_result(0, trials, trials[number], {**each["rungs"][0], "note": ""})
        watch.on_trial_complete(0, trials, trials[number])
        waits.append(time.monotonic() - started >= 0.3)
    assert waits == [True, False, False], "one trial waited, the others knew"
    assert len(list((tmp_path / "spool").glob("*.jsonl"))) == 3
    replay(tmp_path / "spool", params.tracking.where)
    found = runs(params)
    assert sorted(found) == ["search s", "trial 0", "trial 1", "trial 2"]
    assert found["trial 0"].data.tags["mlflow.parentRunId"] == found["search s"].info.run_id
    assert found["trial 0"].data.tags["dgm.state"] == "finished"


def test_tracker_that_refuses_ends_no_search(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = searched(params, tmp_path / "out")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{holder.getsockname()[1]}")
        tune.record("s", plan, DIGEST, tmp_path / "out", params)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tune.record("s", plan, DIGEST, tmp_path / "out", params)
    assert len(runs(params)) == 1 + 3 + 6


def test_job_without_a_tracker_leaves_the_recording_to_its_submitter(params: Params, tmp_path: Path) -> None:
    plan = searched(params, tmp_path / "out")
    (tmp_path / "job.json").write_text(json.dumps({"digest": "x", "git": plan.git, "versions": {}}))
    assert tune.curves_of("s", plan, "d", params) is None


def test_callback_survives_a_restore_and_strange_trials(params: Params, tmp_path: Path) -> None:
    plan = searched(params, tmp_path / "out")
    curves = tune.curves_of("s", plan, "search-d", params)
    watch = driver.Trials(plan, "search-d", str(tmp_path), curves)
    trial = fake(0, {"optim.lr": 0.001, "method.latent_dim": 2}, 20)
    watch.on_trial_result(0, [trial], trial, {**rungs(1.0)[0], "note": ""})
    found = copy.deepcopy(watch)
    assert found.children == {} and found.best == 1.0
    child = copy.deepcopy(watch.children["t0"])
    assert child.run_digest == watch.children["t0"].run_digest and child._header.parent
    broken = SimpleNamespace(trial_id="t1", config={}, last_result={}, is_finished=lambda: False)
    watch.on_trial_result(0, [trial, broken], broken, {"step": 20, "metrics": {}})  # says so in the log, no more
    watch.on_trial_complete(0, [trial, broken], broken)


def test_out_of_a_search_says_what_was_chosen_and_by_what(params: Params, tmp_path: Path) -> None:
    plan = searched(params, tmp_path / "out")
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    assert best["chosen"] == "trial 1" and best["parameters"] == {"optim.lr": 0.002, "method.latent_dim": 2}
    assert best["metric"] == "fid on valid" and best["metrics"] == {"fid": "lower", "nll": "lower"}
    assert [each["name"] for each in best["candidates"]] == ["as written", "trial 1"]
    assert best["candidates"][1]["seeds"]["101"]["fid"] == 2.101
    told = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert told[2]["metrics"]["fid"] is None and told[2]["rungs"][0]["metrics"] == {"fid": None, "nll": 3.0}
    for name in ("parallel.png", "pareto.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert isinstance(plan.base, Run)
