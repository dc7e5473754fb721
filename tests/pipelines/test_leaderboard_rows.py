"""The leaderboard's rows: schema, order, champion, floor and ceiling, and errors that name a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import leaderboard

SHA = "ab" * 32


def entry(metric: str, value: float, half: float = 0.5, **more: Any) -> dict[str, Any]:
    """A row of evaluation.json."""
    features = "/" in metric
    return {
        "metric": metric, "value": value, "low": value - half, "high": value + half, "n": 360, "unit": "", "seed": 0,
        "kind": "estimate", "split": "test", "extractor_sha256": SHA if features else None, **more,
    }  # fmt: skip


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def write_run(root: Path, run: str, rows: list[Any], method: str = "vae/vae", dataset: str = "digits") -> None:
    """evaluations/<run> and artifacts/<run>, as the stages write them, small."""
    write(root / "evaluations" / run / "evaluation.json", rows)
    lineage = {
        "run": run, "run_digest": f"digest-of-{run}", "data_digest": "d" * 64, "dataset": dataset, "seed": 0,
        "git_commit": "c" * 40, "git_dirty": True, "train": {"steps": 100, "batch_size": 8}, "steps": 100,
        "started": "2026-01-01T00:00:00Z", "torch": "2.13.0",
    }  # fmt: skip
    data = {"kind": "image", "shape": [1, 8, 8], "levels": 17, "classes": 10, "location": 0.0, "scale": 1.0}
    spec = {"method": method, "data": data, "params": {"beta": 4.0}, "capabilities": ["samples"], "lineage": lineage}
    write(root / "artifacts" / run / "spec.json", spec)


def write_champion(root: Path, run: str, digest: str | None = None, dataset: str = "digits") -> None:
    place = {"version": "2", "run": run, "run_digest": digest or f"digest-of-{run}", "evaluation_sha256": "e" * 64}
    told = {"id": "1", "action": "promote", "from": None, "to": place, "by": "me", "time": "2026-01-02", "verdict": "v"}
    document = {"kind": "promotion", "model": dataset, "champion": place, "history": [told]}
    write(root / "promotions" / f"{dataset}.json", document)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    return tmp_path


def test_leaderboard_row_has_the_documented_schema(root: Path) -> None:
    write_run(root, "vae", [entry("fid/digits", 9.0), entry("copies", 0.1, flag=False)])
    (row,) = leaderboard.rows()
    assert set(row) == {"run", "method", "family", "dataset", "capabilities", "champion", "metrics"}
    assert (row["run"], row["method"], row["family"], row["dataset"]) == ("vae", "vae/vae", "vae", "digits")
    assert row["capabilities"] == ["samples"] and row["champion"] is False
    keys = {"value", "low", "high", "n", "unit", "kind", "split", "seed", "extractor", "extractor_sha256"}
    assert set(row["metrics"]["fid/digits"]) == keys
    assert set(row["metrics"]["copies"]) == keys | {"flag"}
    assert row["metrics"]["fid/digits"]["extractor"] == "digits" and row["metrics"]["copies"]["extractor"] is None
    for key in keys | {"run", "method", "family", "dataset", "capabilities", "champion", "metrics", "flag"}:
        assert f"{key}:" in (leaderboard.__doc__ or "") or f"{key}, " in (leaderboard.__doc__ or "")
    assert json.loads(json.dumps(leaderboard.rows())) == leaderboard.rows()


def test_leaderboard_order_is_dataset_then_fid_then_bits_per_dim(root: Path) -> None:
    write_run(root, "a", [entry("fid/digits", 30.0)])
    write_run(root, "b", [entry("fid/digits", 10.0)])
    write_run(root, "c", [entry("bits_per_dim", 3.0)])
    write_run(root, "d", [entry("bits_per_dim", 2.0)])
    write_run(root, "e", [])
    write_run(root, "z", [entry("fid/raw", 99.0)], dataset="a_first_dataset")
    told = [{"run": "floor", **entry("fid/digits", 1.0)}, {"run": "ceiling", **entry("fid/digits", 400.0)}]
    write(root / "extractors/digits/reference.json", told)
    assert [row["run"] for row in leaderboard.rows()] == ["z", "floor", "b", "a", "ceiling", "d", "c", "e"]
    assert [row["run"] for row in leaderboard.rows("a_first_dataset")] == ["z"]


def test_leaderboard_keeps_an_estimate_and_a_bound_in_columns_of_their_own(root: Path) -> None:
    by_ode = {"kind": "estimate", "extractor_sha256": None, "n": 64}
    write_run(root, "a", [entry("bits_per_dim", 3.0, kind="bound"), entry("bits_per_dim/ode", 2.5, **by_ode)])
    write_run(root, "b", [entry("bits_per_dim/ode", 1.0, **by_ode)])
    rows = leaderboard.rows()
    assert [row["run"] for row in rows] == ["a", "b"]  # b has no bits/dim: its estimate does not stand in for it
    assert leaderboard.metric(rows[1], "bits_per_dim") is None
    bound, estimate = (leaderboard.metric(rows[0], base) for base in ("bits_per_dim", "bits_per_dim/ode"))
    assert bound and estimate and (bound["value"], estimate["value"]) == (3.0, 2.5)
    text = leaderboard.table(rows)
    assert "bits/dim by ODE" in text and "3.00 bound" in text and "2.50 estimate" in text and "n = 64 of test" in text


def test_leaderboard_floor_and_ceiling_are_rows_without_a_method(root: Path) -> None:
    # without reference.json they come from the evaluations, and are no metric of a run
    write_run(root, "a", [entry("fid/raw", 3.0), entry("fid/raw/floor", -0.1), entry("fid/raw/ceiling", 50.0)])
    floor, run, ceiling = leaderboard.rows()
    assert [row["method"] for row in (floor, run, ceiling)] == [None, "vae/vae", None]
    assert list(run["metrics"]) == ["fid/raw"]
    assert floor["metrics"]["fid/raw"]["value"] == -0.1 and floor["metrics"]["fid/raw"]["extractor"] == "raw"
    write(root / "extractors/digits/reference.json", [{"run": "floor", **entry("fid/raw", 1.0)}])
    assert [row["run"] for row in leaderboard.rows()] == ["floor", "a"]  # the extractor's own word goes first


def test_leaderboard_champion_is_the_run_and_the_digest_of_the_receipt(root: Path) -> None:
    for run in ("a", "b"):
        write_run(root, run, [entry("fid/digits", 3.0)])
    assert not any(row["champion"] for row in leaderboard.rows())
    write_champion(root, "b")
    assert [row["run"] for row in leaderboard.rows() if row["champion"]] == ["b"]
    write_champion(root, "b", digest="of an older training")
    assert not any(row["champion"] for row in leaderboard.rows())


def test_leaderboard_without_evaluations_is_empty(root: Path) -> None:
    assert leaderboard.rows() == []
    assert leaderboard.table([]) == "no run is evaluated"
    (root / "evaluations" / ".a.1234.tmp").mkdir(parents=True)  # half-written
    assert leaderboard.rows() == []
    with pytest.raises(ValueError, match="nope: no run of this dataset"):
        leaderboard.rows("nope")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("evaluations/a/evaluation.json", None),
        ("evaluations/a/evaluation.json", "[{"),
        ("evaluations/a/evaluation.json", "{}"),
        ("evaluations/a/evaluation.json", "[1]"),
        ("evaluations/a/evaluation.json", '[{"metric": "fid/digits", "value": 1.0}]'),
        ("evaluations/a/evaluation.json", json.dumps([entry("nll", float("nan"))])),
        ("evaluations/a/evaluation.json", json.dumps([entry("nll", 1.0), entry("nll", 2.0)])),
        ("artifacts/a/spec.json", None),
        ("artifacts/a/spec.json", '{"method": "vae/vae"}'),
        ("artifacts/a/spec.json", "[]"),
        ("extractors/digits/reference.json", "no"),
        ("promotions/digits.json", "[]"),
        ("promotions/digits.json", "\x00"),
    ],
)
def test_leaderboard_damaged_file_is_named(root: Path, name: str, text: str | None) -> None:
    write_run(root, "a", [entry("fid/digits", 3.0)])
    path = root / name
    if text is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises(ValueError, match=name):
        leaderboard.rows()


def test_leaderboard_imports_no_torch() -> None:
    code = "import sys; from pipelines import leaderboard; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_leaderboard_table_marks_champion_kind_and_flag(root: Path) -> None:
    write_run(root, "a", [entry("fid/digits", 3.0), entry("copies", 0.9, flag=True)])
    write_run(root, "b", [entry("fid/digits", 5.0), entry("nll", 100.0, kind="bound")])
    write_champion(root, "b")
    lines = leaderboard.table(leaderboard.rows()).splitlines()
    assert lines[0] == "digits"
    assert "FID" in lines[1] and "nll" in lines[1]
    assert lines[2].split() == ["a", "vae/vae", "3.00", "[2.50,", "3.50]", "-", "0.90", "flagged"]
    assert lines[3].split() == ["*", "b", "vae/vae", "5.00", "[4.50,", "5.50]", "100.00", "bound", "-"]
    assert "FID: n = 360 of test, features of digits (abababab)" in lines[4]


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (12.344, 0.4, ("12.34", "[11.94, 12.74]")),
        (412.3, 31.0, ("412", "[381, 443]")),
        (0.5, 0.04, ("0.500", "[0.460, 0.540]")),
        (0.0000012, 0.0000004, ("1.20e-06", "[8.00e-07, 1.60e-06]")),
        (1.23456789, 0.0, ("1.235", "")),
    ],
)
def test_leaderboard_number_has_two_digits_of_its_interval(value: float, half: float, text: tuple[str, str]) -> None:
    assert leaderboard.number(entry("fid", value, half)) == text
    assert leaderboard.number({"value": value, "low": None, "high": None})[1] == ""


def test_evaluations_are_a_column_where_some_model_needs_several(root: Path) -> None:
    one, many = (entry("evaluations_per_sample", n, 0.0, unit="network evaluations", kind="exact") for n in (1, 784))
    write_run(root, "vae", [entry("fid/digits", 9.0), one])
    assert "evaluations" not in leaderboard.table(leaderboard.rows())
    write_run(root, "pixels", [entry("fid/digits", 8.0), many])
    lines = leaderboard.table(leaderboard.rows()).splitlines()
    assert lines[1].split()[-1] == "evaluations"
    assert [line.split()[-1] for line in lines[2:4]] == ["784", "1"]
