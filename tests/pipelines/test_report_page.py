"""The report: one page that needs nothing else, says what the files say, and is the same for the same files."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_leaderboard_rows import entry, write, write_champion, write_run

from pipelines.stages.report import Axis, flat, panel, panels, report, short

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "link", "img", "br"}
TWICE = {**entry("fid/digits", 1.0), "side": "tuned", "seed": 0}


class Page(HTMLParser):
    """Every tag's attributes, the text, and the tags that are left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def write_project(root: Path) -> None:
    """Two datasets, four runs with everything that a page can show, a search."""
    write_run(root, "gan", [entry("fid/digits", 8.0), entry("recall/digits", 0.7, 0.03)], "gan/wgan_gp")
    fakes = [entry("fid/digits", 4.0), entry("copies", 0.9, 0.05, flag=True)]
    write_run(root, "thief", fakes, "gan/non_saturating")
    likelihood = [entry("nll", 120.0, kind="bound", n=100), entry("bits_per_dim", 2.7, 0.01, kind="bound", n=100)]
    write_run(root, "vae", [entry("fid/digits", 30.0), *likelihood])
    write_run(root, "flow", [entry("fid/raw", 0.01, 0.02)], "flows/nice", "moons")
    told = [{"run": "floor", **entry("fid/digits", 1.0)}, {"run": "ceiling", **entry("fid/digits", 400.0)}]
    write(root / "extractors/digits/reference.json", told)
    accuracy = {"accuracy": {"value": 0.97, "low": 0.95, "high": 0.99, "n": 360}, "feature_dim": 16}
    write(root / "extractors/digits/accuracy.json", accuracy)
    write(root / "evaluations/gan/refused.json", [{"metric": "nll", "reason": "gan/wgan_gp has no density"}])
    write(root / "evaluations/gan/timing.json", {"seconds": 3.21})
    write(root / "artifacts/gan/timing.json", {"seconds": 50.0, "train_seconds": 47.04})
    (root / "evaluations/gan/grid.png").write_bytes(PNG)
    metrics = [{"critic/loss": -1.0, "generator/loss": 1.0, "critic/gradient_norm": 2.0}, {"critic/loss": -0.5}]
    lines = [json.dumps({"step": step, "metrics": each}) for step, each in zip((50, 100), metrics, strict=True)]
    (root / "artifacts/gan/metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_champion(root, "gan")
    criterion = {"name": "fid better", "passed": True, "reason": "fid/digits of gan is lower", "numbers": {}}
    verdict = {"passed": True, "champion": None, "challenger": "version 2 (gan)", "criteria": [criterion],
               "others": ["version 3 (vae): its fid is no lower"]}  # fmt: skip
    write(root / "promotions/digits.verdict.json", verdict)
    found = {"method.beta": 0.123456789}
    candidates = [
        {"name": name, "parameters": values, "mean": sum(fids) / 2, "seeds": {
            seed: {"objective": fid, "fid": fid, "recall": 0.5} for seed, fid in zip(("9", "101"), fids, strict=True)}}
        for name, values, fids in (("as written", {}, (19.0, 21.0)), ("trial 3", found, (10.0, 12.0)))
    ]  # fmt: skip
    metrics = {"fid": "lower", "recall": "higher"}
    best = {"search": "s", "run": "vae", "chosen": "trial 3", "parameters": found,
            "metric": "fid on valid", "metrics": metrics, "candidates": candidates}  # fmt: skip
    write(root / "searches/s/best.json", best)
    told = "trial,method.beta,objective,fid,recall,state\n3,0.123456789,-11.5,11.5,0.5,finished\n"
    (root / "searches/s/trials.csv").write_text(told)
    (root / "searches/s/parallel.png").write_bytes(PNG)
    (root / "searches/s/pareto.png").write_bytes(PNG)
    sides = [("as-written", 9, 20.0, 0.5), ("as-written", 101, 22.0, 0.5),
             ("tuned", 9, 12.0, 0.75), ("tuned", 101, 23.0, 0.875)]  # fmt: skip
    rows = [{**entry(metric, value), "side": side, "seed": seed}
            for side, seed, *both in sides
            for metric, value in zip(("fid/digits", "recall/digits"), both, strict=True)]  # fmt: skip
    write(root / "comparisons/s.json", {"search": "s", "chosen": "trial 3", "metrics": metrics, "rows": rows})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    return tmp_path


def page_of(root: Path) -> Page:
    html = report(root / "report").read_text()
    page = Page(html)
    assert page.open == []
    return page


def test_report_needs_nothing_but_itself(root: Path) -> None:
    write_project(root)
    html = report(root / "report").read_text()
    for tag, attributes in Page(html).tags:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
        assert attributes.get("src", "data:").startswith("data:")
        assert re.fullmatch(r"#.+|data:,|leaderboard\.(json|csv)", attributes.get("href", "#top"))
        assert not any(name.startswith("on") or name == "srcset" for name in attributes)
    assert not re.search(r"https?:|url\(|@import|@font-face", html)


def test_report_bytes_are_a_function_of_the_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(root)
    page = report(root / "report")
    before = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    assert set(before) == {"index.html", "leaderboard.json", "leaderboard.csv", "metrics.json"}
    assert {path.name: path.read_bytes() for path in report(root / "report").parent.iterdir()} == before
    elsewhere = root / "elsewhere"
    shutil.copytree(root, elsewhere, ignore=shutil.ignore_patterns("elsewhere", "report"))
    monkeypatch.setenv("DGM_ROOT", str(elsewhere))
    assert report(elsewhere / "out").read_bytes() == before["index.html"]


def test_report_can_be_read_by_a_screen_reader(root: Path) -> None:
    write_project(root)
    page = page_of(root)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a" and attributes["href"][0] == "#"}
    targets |= {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert targets <= set(ids)
    for tag, attributes in page.tags:
        assert tag != "th" or attributes.get("scope") in {"row", "col"}
        assert tag != "img" or attributes.get("alt")
        assert tag != "html" or attributes.get("lang") == "en"
    named = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "img"]
    assert "gan, loss over steps 50 to 100: critic from -1 to -0.5; generator from 1 to 1" in named


def test_report_escapes_what_the_files_say(root: Path) -> None:
    attack = "<script>alert('x')</script>\"><img src=x onerror=y>"
    write_run(root, "a&b", [entry("fid/digits", 3.0)], method="vae/<b>")
    write(root / "evaluations/a&b/refused.json", [{"metric": attack, "reason": attack}])
    (root / "artifacts/a&b/metrics.jsonl").write_text(json.dumps({"step": 1, "metrics": {attack: 1.0}}))
    page = page_of(root)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b>", "img"})
    assert attack in page.text and "vae/<b>" in page.text and "a&b" in page.text


def test_report_says_what_was_measured_on_what(root: Path) -> None:
    write_project(root)
    text = page_of(root).text
    assert "4 runs on 2 datasets" in text
    assert "extractor digits (sha256 abababababab , 16 features, accuracy 0.970 [0.950, 0.990] on 360 held-out" in text
    assert "n = 360 samples against as many rows of test" in text
    assert "do not compare with the Inception FID of papers" in text
    assert "120.00 bound" in text and "n = 100" in text
    assert "0.900 ⚑ flagged" in text and text.count("⚑") == 1
    assert "gan nll gan/wgan_gp has no density" in text
    assert "critic −0.5 generator 1" in text
    assert "47.0" in text and "3.2" in text
    assert "digest-of-" in text and "cccccccccc +" in text and "2.13.0" in text and "beta 4" in text


@pytest.mark.parametrize("other", [{"n": 100}, {"extractor_sha256": "cd" * 32}])
def test_report_warns_of_rows_that_do_not_compare(root: Path, other: dict[str, Any]) -> None:
    write_run(root, "a", [entry("fid/digits", 3.0)])
    write_run(root, "b", [entry("fid/digits", 4.0)])
    assert "such rows do not compare" not in page_of(root).text
    write_run(root, "b", [entry("fid/digits", 4.0, **other)])
    assert "such rows do not compare" in page_of(root).text


def test_report_names_the_champion_and_why(root: Path) -> None:
    write_project(root)
    text = page_of(root).text
    assert "champion gan , FID 8.00 [7.50, 8.50]; 3 runs" in text
    assert text.count("gan champion gan/wgan_gp") == 1
    assert "gan serves as version 2 of digits" in text and "passed fid/digits of gan is lower" in text
    assert "version 3 (vae): its fid is no lower" in text
    assert "No row above has this digest" not in text
    assert "No promotion has run." in text  # of moons
    write_champion(root, "gan", digest="of an older training")
    assert "No row above has this digest" in page_of(root).text


def test_report_tells_a_refusal_and_a_lack_of_challengers(root: Path) -> None:
    write_run(root, "a", [entry("fid/digits", 300.0)])
    criterion = {"name": "below the ceiling", "passed": False, "reason": "a does not lie below 200", "numbers": {}}
    verdict = {"passed": False, "champion": None, "challenger": "version 1 (a)", "criteria": [criterion], "others": []}
    write(root / "promotions/digits.verdict.json", verdict)
    text = page_of(root).text
    assert "No model serves" in text and "version 1 (a) did not become champion" in text
    assert "failed a does not lie below 200" in text
    write(root / "promotions/digits.verdict.json", verdict | {"challenger": None})
    assert "no challenger was judged" in page_of(root).text


def test_report_of_one_run_and_nothing_else(root: Path) -> None:
    write_run(root, "alone", [entry("fid/digits", 3.0, low=None, high=None)])
    text = page_of(root).text
    assert "1 run on 1 dataset:" in text and "no picture" in text and "no curves" in text
    assert "Searches" not in text and "Refused" not in text and "floor" not in text
    write_run(root, "alone", [])  # not even a metric
    assert "alone" in page_of(root).text


def test_report_of_nothing_says_how_to_begin(root: Path) -> None:
    assert "No run is evaluated. dvc repro" in page_of(root).text


def test_report_compares_tuned_with_as_written_seed_by_seed(root: Path) -> None:
    write_project(root)
    text = page_of(root).text
    assert "Chosen: trial 3 with method.beta 0.123457" in text
    assert "fid/digits: means over 2 seeds: as written 21, tuned 17.5; tuned is better with 1 of 2." in text
    assert "recall/digits: means over 2 seeds: as written 0.5, tuned 0.8125; tuned is better with 2 of 2." in text
    assert "Measured: fid (lower is better), recall (higher is better)." in text
    assert "seed 9 seed 101 Mean ↓ fid ↓ recall ↑" in text  # by number
    assert "trial 3 chosen 10 12 11 11 0.5" in text
    assert "trial method.beta objective ↓ fid ↓ recall ↑ state" in text
    assert "3 0.1235 −11.5 11.5 0.5 finished" in text
    for name in ("best", "comparisons"):
        file = root / ("searches/s/best.json" if name == "best" else "comparisons/s.json")
        write(file, json.loads(file.read_text()) | {"chosen": "as written"})
    text = page_of(root).text
    assert "no parameters with a lower mean than the run as written" in text and "means over" not in text


def test_report_shows_a_search_without_finite_values(root: Path) -> None:
    write_project(root)
    best = json.loads((root / "searches/s/best.json").read_text())
    best["candidates"][0]["mean"] = best["candidates"][0]["seeds"]["9"]["fid"] = None
    best["candidates"][0]["seeds"]["9"]["objective"] = None
    write(root / "searches/s/best.json", best)
    compared = json.loads((root / "comparisons/s.json").read_text())
    for row in compared["rows"]:
        row["value"] = -row["value"]  # an ELBO, say: no logarithm, no bars
    write(root / "comparisons/s.json", compared | {"rows": compared["rows"][:-1]})
    text = page_of(root).text
    assert "as written no value 21 no value no value 0.5" in text
    assert "logarithmic axis. fid/digits" not in text and "means over 1 seed:" in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("searches/s/best.json", "{}"),
        ("comparisons/s.json", "{}"),
        ("comparisons/s.json", json.dumps({"chosen": "trial 3", "metrics": {"fid": "lower"}, "rows": [TWICE, TWICE]})),
        ("evaluations/gan/refused.json", "[1]"),
        ("extractors/digits/accuracy.json", "{}"),
        ("promotions/digits.verdict.json", "{}"),
        ("artifacts/gan/metrics.jsonl", '{"step": 1}\n'),
        ("artifacts/gan/metrics.jsonl", "{"),
        ("artifacts/gan/timing.json", "{"),
    ],
)
def test_report_damaged_file_is_named(root: Path, name: str, text: str) -> None:
    write_project(root)
    (root / name).write_text(text or "{}")
    with pytest.raises(ValueError, match=name):
        report(root / "report")
    assert not (root / "report").exists()


def test_report_csv_has_one_line_a_run(root: Path) -> None:
    write_project(root)
    report(root / "report")
    with (root / "report/leaderboard.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["run"] for row in rows] == ["floor", "thief", "gan", "vae", "ceiling", "flow"]
    assert (rows[2]["fid"], rows[2]["fid_low"], rows[2]["fid_n"], rows[2]["champion"]) == ("8.0", "7.5", "360", "True")
    assert (rows[3]["nll_kind"], rows[2]["nll"], rows[5]["fid"]) == ("bound", "", "0.01")
    metrics = json.loads((root / "report/metrics.json").read_text())
    assert metrics["digits"]["gan"] == {"fid/digits": 8.0, "recall/digits": 0.7}
    assert list(metrics) == ["digits", "moons"] and "floor" not in metrics["digits"]
    told = json.loads((root / "report/leaderboard.json").read_text())
    assert [row["run"] for row in told] == [row["run"] for row in rows]


def bar(value: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high}


def test_report_axis_keeps_order_and_stays_inside() -> None:
    axis = Axis([bar(1.0, 0.5, 1.5), bar(40.0, 30.0, 50.0), bar(-0.1, -0.3, 0.1)])
    places = [axis.at(value) for value in (-1.0, 0.0, 0.3, 1.0, 40.0, 50.0, 1e9)]
    assert places == sorted(places) and places[0] == 0 and places[-1] == 100
    assert axis.at(4.0) - axis.at(2.0) == pytest.approx(axis.at(40.0) - axis.at(20.0), abs=0.02)  # two decimals
    assert axis.bar(bar(1.0, -2.0, 3.0))["open"] and not axis.bar(bar(1.0, 0.5, 1.5))["open"]
    assert axis.bar(bar(1.0, None, None)) == {"value": axis.at(1), "low": axis.at(1), "high": axis.at(1), "open": False}
    assert axis.bar(None) is None
    assert [tick["text"] for tick in axis.ticks] == ["1", "3", "10", "30"] or len(axis.ticks) <= 6
    for nothing in ([], [bar(-1.0, -2.0, -0.5)], [bar(0.0, 0.0, 0.0)], [bar(5.0, 5.0, 5.0)]):
        assert 1 <= len(Axis(nothing).ticks) <= 6


def test_report_curves_are_grouped_by_metric_and_player(root: Path) -> None:
    write_run(root, "a", [])
    metrics = {"loss": 1.0, "valid/loss": 2.0, "kl": 0.1, "gradient_norm": 3.0, "bad": float("inf")}
    (root / "artifacts/a/metrics.jsonl").write_text(json.dumps({"step": 50, "metrics": metrics}) + "\n")
    found = panels("a")
    assert [each["name"] for each in found] == ["loss", "gradient norm", "kl"]
    assert [(line["label"], line["dash"]) for line in found[0]["lines"]] == [("train", False), ("valid", True)]
    assert found[1]["log"] and not found[0]["log"]


def test_report_panel_gives_the_rest_of_a_curve_a_shape() -> None:
    steep = [(float(step), 1e6 if step == 1 else 100.0 - step) for step in range(1, 51)]
    drawn = panel("loss", {"train": steep})
    assert drawn["cut"] and "from 1000000 to 50" in drawn["alt"]
    heights = [float(point.split(",")[1]) for point in drawn["lines"][0]["path"].split()]
    assert heights[0] < 0 and all(0 <= y <= 106 for y in heights[8:])
    assert not panel("loss", {"train": steep[1:]})["cut"]
    for points in ([(1.0, 5.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, -1e-9), (2.0, 1e9)]):
        assert all(0 <= tick["at"] <= 106 for tick in panel("loss", {"train": points})["y"])


def test_report_short_numbers_and_flat_sections() -> None:
    values = (1500.0, "0.0021983", "finished", None, 1e-9, 12345678.0, float("inf"))
    assert [short(value) for value in values] == [
        "1500", "0.002198", "finished", "None", "1e-09", "1.235e+07", "inf",
    ]  # fmt: skip
    section = {"beta": 4.0, "network": {"name": "mlp", "sizes": [1, 2]}, "auto": None, "on": True}
    assert flat(section) == [
        ("beta", "4"), ("network.name", "mlp"), ("network.sizes", "[1, 2]"), ("auto", "null"), ("on", "true"),
    ]  # fmt: skip
