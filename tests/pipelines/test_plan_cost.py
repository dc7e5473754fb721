"""What counts cost: the formulas, and the document of a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dgm_models.construct import ConfigError
from pipelines import params as params_module
from pipelines.data.manifest import Manifest, Part
from pipelines.data.raw import Source
from pipelines.params import Params
from pipelines.plan import cost
from pipelines.plan.devices import DEVICES, Assumptions, Device, device
from pipelines.plan.ledger import Counts
from pipelines.plan.plan import plan, words

TINY = Device(fp32=1e9, bf16=2e9, memory=1e6, bandwidth=1e9, intra=1e8, inter=1e7, per_node=4, source="a test")
EXACT = Assumptions(1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_wire_bytes_are_the_ring_s() -> None:
    assert cost.wire_bytes("all_reduce", 800, 8) == 2 * 7 / 8 * 800
    assert cost.wire_bytes("all_gather", 800, 8) == cost.wire_bytes("reduce_scatter", 800, 8) == 7 / 8 * 800
    assert cost.wire_bytes("all_reduce", 800, 1) == 0


def test_collective_seconds_are_the_ring_s_for_large_and_the_tree_s_for_small_tensors() -> None:
    link = cost.Link(alpha=1e-5, beta=1e-9)
    assert cost.collective_seconds("all_gather", 800, 8, link) == pytest.approx(7e-5 + 7e-7)
    large = cost.collective_seconds("all_reduce", 10**9, 4, link)
    assert large == pytest.approx(6 * 1e-5 + 1.5)
    small = cost.collective_seconds("all_reduce", 8, 1024, link)
    assert small == pytest.approx(2 * (10 * 1e-5 + 8e-9))
    assert cost.collective_seconds("all_reduce", 8, 1, link) == 0


def test_link_is_the_slowest_of_the_ring() -> None:
    inside, between = (cost.link(TINY, world, EXACT) for world in (4, 5))
    assert (inside.beta, between.beta) == (1e-8, 1e-7)


def test_compute_seconds_are_bound_by_flops_bytes_or_launches() -> None:
    counts = Counts()
    counts.operations[10**9, 8, False] += 2  # two of a second each
    counts.operations[2 * 10**9, 8, True] += 1  # a second at twice the peak
    counts.operations[0, 10**9, False] += 3  # three of a second each
    assert cost.compute_seconds(counts, TINY, EXACT) == pytest.approx(6.0)
    assert cost.compute_seconds(counts, TINY, replace(EXACT, launch=2.0)) == pytest.approx(12.0)
    assert cost.compute_seconds(counts, TINY, replace(EXACT, utilisation=0.5)) == pytest.approx(9.0)


@pytest.mark.parametrize(("overlap", "seconds"), [(0.0, 13.0), (0.5, 11.5), (1.0, 10.0)])
def test_step_seconds_hide_the_share_that_may_overlap(overlap: float, seconds: float) -> None:
    assert cost.step_seconds(10.0, 3.0, overlap) == seconds


def test_step_seconds_hide_no_more_than_the_computation_lasts() -> None:
    assert cost.step_seconds(1.0, 10.0, 1.0) == 10.0


@pytest.mark.parametrize("name", DEVICES)
def test_device_table_is_in_base_units_and_names_its_source(name: str) -> None:
    found = device(name)
    assert found.bf16 > found.fp32 > 1e12
    assert found.memory > 1e10
    assert found.bandwidth > found.intra > found.inter > 1e9
    assert "data sheet" in found.source


def test_device_of_a_file_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(TINY.__dict__))
    assert device(str(path)) == TINY
    path.write_text(json.dumps(TINY.__dict__ | {"fp8": 1.0}))
    with pytest.raises(ConfigError, match=r"mine\.yaml\.fp8: unknown key"):
        device(str(path))


def test_device_unknown_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'--device: \'h10\' is not known; did you mean "h100"\?'):
        device("h10")


# ---- the document

RUNS = {
    "vae": {"dataset": "toy", "method": {"name": "vae/vae"}, "network": {"name": "mlp", "width": 128, "depth": 2},
            "train": {"steps": 100, "batch_size": 128, "checkpoint_every": 30, "validate_every": 10}},
    "gan": {"dataset": "toy", "method": {"name": "gan/wgan_gp", "critic_steps": 2},
            "train": {"steps": 100, "batch_size": 128}},
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared dataset of 1000 rows of 64 bytes: its manifest, no file."""
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    parts = (
        Part("train/part-00000.parquet", 1000, 50_000, "0" * 64),
        Part("valid/part-00000.parquet", 300, 9, "0" * 64),
    )
    manifest = Manifest(
        1, "toy", "image", (1, 8, 8), "uint8", 17, 0, (), 0.0, 1.0, {"train": 1000, "valid": 300, "test": 0}, parts,
        (0.8, 0.1, 0.1), 0, "none", Source("a test"), None,
    )  # fmt: skip
    (tmp_path / "data" / "toy").mkdir(parents=True)
    (tmp_path / "data" / "toy" / "manifest.json").write_text(manifest.to_json())
    return tmp_path


def loaded(**cluster: Any) -> Params:
    return params_module.parse({"datasets": {"toy": {"name": "digits"}}, "runs": RUNS, "cluster": cluster})


def test_plan_document_is_json_and_its_sums_are_right(project: Path) -> None:
    found = loaded()
    document = plan(found.runs["vae"], found, 64, device_name="h100", price=2.0)
    json.dumps(document, allow_nan=False)
    assert sum(document["memory"]["split"].values()) == document["memory"]["tensors"]
    assert document["nodes"] == 8
    assert document["data"]["epochs"] == 100 * 128 / 1000
    assert document["data"]["to_device"] == 100 * 128 * 64
    assert document["data"]["read_from_storage"] == 64 * 50_000
    assert document["checkpoints"]["count"] == 4
    time = document["time"]
    assert time["total"] == pytest.approx(100 * (time["step"] + time["validation"]))
    assert document["price"]["total"] == pytest.approx(2.0 * 64 * time["total"] / 3600)
    assert document["memory"]["fits"]
    assert "remedies" not in document["memory"]


@pytest.mark.parametrize(("workers", "times"), [(1, 8), (4, 8), (3, 10), (16, 16)])
def test_plan_of_a_stream_reads_a_lane_once_for_every_worker_on_it(workers: int, times: int, project: Path) -> None:
    run = replace(loaded().runs["vae"], stream=params_module.Stream(buffer=256, lanes=8))
    data = plan(run, loaded(), workers)["data"]
    assert data["read_from_storage"] == pytest.approx(data["epochs"] * 50_000 * times / 8)
    pairs = {(slot * workers // 240, slot * 8 // 240) for slot in range(240)}
    assert len(pairs) == times  # workers and lanes both hold contiguous slots of a batch


def test_plan_without_a_price_or_a_device_invents_neither(project: Path) -> None:
    found = loaded()
    assert plan(found.runs["vae"], found, 8, device_name="a100")["price"]["total"] is None
    bare = plan(found.runs["gan"], found, 8)
    assert (bare["time"], bare["price"], bare["device"]) == (None, None, None)
    assert any("no time" in line for line in bare["assumptions"])


def test_plan_of_a_game_counts_every_batch_that_it_draws(project: Path) -> None:
    found = loaded()
    assert plan(found.runs["gan"], found, 1)["data"]["epochs"] == 3 * 100 * 128 / 1000  # two critic updates and one


def test_plan_measures_steps_where_it_is_asked_to(project: Path) -> None:
    found = loaded()
    document = plan(found.runs["vae"], found, 8, measure=True)
    assert document["step"]["achieved_flops"] == document["step"]["flops"] / document["time"]["compute"]
    assert document["time"]["communication"] is None


def test_plan_that_does_not_fit_says_what_would_by_planning_it(project: Path, tmp_path: Path) -> None:
    found = loaded()
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(TINY.__dict__ | {"memory": 1.0}))
    document = plan(found.runs["vae"], found, 64, device_name=str(path))
    memory = document["memory"]
    assert not memory["fits"]
    changes = {json.dumps(tried["change"]): tried["needed"] for tried in memory["remedies"]}
    assert changes['{"shard": true}'] < memory["needed"]
    assert min(changes.values()) < memory["needed"]
    assert not any(tried["fits"] for tried in memory["remedies"])
    text = words(document)
    assert "DOES NOT FIT" in text
    assert "with shard: true" in text
    assert all(line in text for line in document["assumptions"])


def test_plan_of_a_game_that_does_not_fit_proposes_no_sharding(project: Path, tmp_path: Path) -> None:
    found = loaded()
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(TINY.__dict__ | {"memory": 1.0}))
    tried = plan(found.runs["gan"], found, 64, device_name=str(path))["memory"]["remedies"]
    assert tried
    assert not any("shard" in one["change"] for one in tried)


@pytest.mark.parametrize("gpus", [0, -1, 1.5, True])
def test_plan_for_no_number_of_workers_is_refused(gpus: Any, project: Path) -> None:
    found = loaded()
    with pytest.raises(ValueError, match=r"--gpus: .* is not a whole number above 0"):
        plan(found.runs["vae"], found, gpus)


def test_plan_of_a_batch_smaller_than_the_workers_is_refused(project: Path) -> None:
    found = loaded()
    with pytest.raises(ConfigError, match=r"runs\.vae\.train\.batch_size: 128 .* 1024 workers .* at most 128"):
        plan(found.runs["vae"], found, 1024)


def test_plan_of_a_sharded_game_is_refused(project: Path) -> None:
    found = loaded(shard=True)
    with pytest.raises(ConfigError, match=r"runs\.gan: cluster\.shard: .*critic, generator"):
        plan(found.runs["gan"], found, 8)


def test_plan_of_data_that_is_not_prepared_says_how_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    found = loaded()
    with pytest.raises(ValueError, match=r"manifest\.json: no such file; .*prepare"):
        plan(found.runs["vae"], found, 8)


def test_plan_measuring_another_device_is_refused(project: Path) -> None:
    found = loaded()
    with pytest.raises(ValueError, match="--measure"):
        plan(found.runs["vae"], found, 8, device_name="h100", measure=True)
