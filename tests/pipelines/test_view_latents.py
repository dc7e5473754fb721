"""Codes on their way: into the rows of an evaluation, into pictures, and onto the report's page."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_leaderboard_rows import entry, write, write_run
from torch import Tensor

from dgm_models.codecs import continuous
from dgm_models.conditions import Label
from dgm_models.method import Method, build, save
from dgm_models.nn.flow import Chain, Flow
from dgm_models.nn.latent import LatentVariable
from dgm_models.nn.networks import Mlp
from dgm_models.nn.tempering import Tempering
from dgm_models.protocols import DataSpec, Model
from pipelines import leaderboard, paths, pictures
from pipelines.data import shards
from pipelines.data.prepare import prepare
from pipelines.params import Evaluation, parse
from pipelines.stages import evaluate as evaluating
from pipelines.stages.evaluate import LOOKED, STEPS, Rows, evaluate, latents, posteriors
from pipelines.stages.report import report
from pipelines.stages.sample import sample_stage
from pipelines.views import latents as page

SHAPES = {"name": "shapes", "rows": None, "size": 32, "scales": 1, "rotations": 1, "xs": 10, "ys": 10}
SMALL = {"network": {"name": "mlp", "width": 8, "depth": 1}, "latent_dim": 3}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def shapes(root: Path) -> shards.Rows:
    prepare(SHAPES | {"split": [0.1, 0.1, 0.8]}, root / "data" / "shapes")
    return shards.load(root / "data" / "shapes", "test")


class Eye(LatentVariable):
    """Its codes are the centre of mass: down, then from left to right, and one that is the prior."""

    def __init__(self, data: DataSpec) -> None:
        super().__init__(data, Mlp(width=8, depth=1), 3, "auto")

    def posterior(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mass, place = x.float()[:, 0], torch.arange(x.shape[-1]) / x.shape[-1]
        down, across = ((mass.sum(axis) * place).sum(1) / mass.sum((1, 2)) for axis in (2, 1))
        mean = torch.stack([down, 3 * across, torch.zeros(len(x))], 1)
        return mean, torch.tensor([-9.0, -9.0, 0.0]).expand_as(mean)


class Plain(Model):
    """Codes without a posterior."""

    def __init__(self, data: DataSpec, shape: tuple[int, ...] = (3,)) -> None:
        super().__init__(data, Eye(data).codec)
        self.shape = shape

    def encode(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return x.float().flatten(1)[:, :: x[0].numel() // 2].repeat(1, 6)[:, :6].reshape(len(x), *self.shape)

    def decode(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.zeros(len(z), *self.data.shape)


def with_model(model: Model) -> Method:
    return dataclasses.replace(build("vae/vae", model.data, **SMALL), model=model)


def measured(method: Method, **settings: Any) -> Rows:
    found, _ = evaluate(method, torch.zeros(0), "shapes", Evaluation(importance=1), **settings)
    return found


ROWS = ["mig/histogram", "mig/sampled", "dci/disentanglement", "dci/completeness", "dci/informativeness"]


def test_rows_tell_that_codes_are_factors(shapes: shards.Rows) -> None:
    found = {row["metric"]: row for row in measured(with_model(Eye(DataSpec("image", (1, 32, 32), 2, 3)))).rows}
    assert [name for name in found if name.split("/")[0] in ("mig", "dci")] == ROWS
    for name in ROWS:
        row = found[name]
        assert (row["n"], row["split"], row["kind"], row["extractor_sha256"]) == (240, "test", "estimate", None)
    for name in ("mig/histogram", "mig/sampled"):
        gaps = dict(found[name]["factors"])
        assert list(gaps) == ["shape", "x", "y"]  # scale and rotation do not vary
        assert gaps["x"] > 0.6 and gaps["y"] > 0.6 and gaps["shape"] < 0.2  # of 240 rows: the bias of the second code
    assert found["dci/disentanglement"]["value"] > 0.8
    told = dict(found["dci/informativeness"]["factors"])
    assert told["x"] > 0.95 and told["y"] > 0.95 and told["shape"] < 0.5


def test_rows_are_those_that_a_search_wants(shapes: shards.Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    method = with_model(Eye(DataSpec("image", (1, 32, 32), 2, 3)))
    found = measured(method, split="valid", wanted=frozenset({"mig/histogram"}))
    assert [(row["metric"], row["split"], row["n"]) for row in found.rows] == [("mig/histogram", "valid", 30)]


def test_rows_of_a_model_without_posterior_are_refused_where_they_need_one(shapes: shards.Rows) -> None:
    found = measured(with_model(Plain(DataSpec("image", (1, 32, 32), 2, 3), (6,))))
    assert "mig/histogram" in {row["metric"] for row in found.rows}
    refused = {each["metric"]: each["reason"] for each in found.refused}
    assert refused["mig/sampled"] == "vae/vae has no posterior to draw from"


def test_rows_of_codes_that_are_no_vectors_are_refused(shapes: shards.Rows) -> None:
    found = measured(with_model(Plain(DataSpec("image", (1, 32, 32), 2, 3), (2, 3))))
    refused = {each["metric"]: each["reason"] for each in found.refused}
    assert refused["mig/histogram"] == refused["dci"] == "vae/vae has codes of shape (2, 3); expected vectors"


def test_rows_of_a_dataset_without_factors_name_no_disentanglement(root: Path) -> None:
    prepare({"name": "moons", "rows": 300}, root / "data" / "moons")
    method = build("vae/vae", shards.read_manifest(root / "data" / "moons").spec(), **SMALL)
    found, _ = evaluate(method, torch.zeros(30, 2), "moons", Evaluation(importance=1))
    assert not {row["metric"] for row in found.rows} & set(ROWS)
    assert not {each["metric"] for each in found.refused} & {*ROWS, "dci"}


def test_codes_of_a_model_with_a_condition_are_given_each_examples_own(
    shapes: shards.Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "CHUNK", 100)
    spec = DataSpec("image", (1, 32, 32), 2, 3)
    method = build("vae/vae", spec, **SMALL, cond={"name": "edges"})
    codes, log_variances = posteriors(method, shapes.x, shapes.cond, 0)
    assert log_variances is not None and codes.shape == log_variances.shape == (240, 3)
    assert not codes.requires_grad
    encoded, _ = method.model.codec.encode(shapes.x[150:155], torch.arange(5))
    given = method.model.conditions(shapes.x[150:155], None, torch.arange(5))
    assert torch.allclose(codes[150:155], method.model.encode(encoded, given), atol=1e-6)  # type: ignore[operator]
    files = latents(method, shapes.x, shapes.cond, 0)
    assert json.loads(files["latents.json"])["given"] == "edges" and len(files) == 3


def test_latents_are_ordered_by_kl_and_move_one_code_at_a_time(
    shapes: shards.Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    eye, seen = Eye(DataSpec("image", (1, 32, 32), 2, 3)), []
    black = torch.zeros(1, 1, 32, 32, dtype=torch.long)
    monkeypatch.setattr(eye, "decode", lambda z, cond: seen.append(z) or black.expand(len(z), -1, -1, -1))
    files = latents(with_model(eye), shapes.x, shapes.cond, 0)
    told = json.loads(files["latents.json"])
    assert [each["code"] for each in told["codes"]] == [1, 0, 2]  # the larger mean, the smaller, the prior
    assert told["codes"][2] == {"code": 2, "kl": 0.0, "variance": 0.0}
    assert told["rows"] == min(LOOKED, 240) and told["steps"] == list(STEPS) and told["given"] is None
    codes, _ = posteriors(with_model(eye), shapes.x, None, 0)
    moved, between = seen[0].reshape(3, len(STEPS), 3), seen[1].reshape(6, len(STEPS), 3)
    for row, code in zip(moved, (1, 0, 2), strict=True):
        others = [other for other in range(3) if other != code]
        assert torch.equal(row[:, others], codes[:1, others].expand(len(STEPS), 2))
        assert row[4, code] == pytest.approx(float(codes[:, code].mean()))
        deviation = (
            float(codes[:, code].var(correction=0)) + float(torch.tensor([-9.0, -9.0, 0.0])[code].exp())
        ) ** 0.5
        assert float(row[8, code] - row[0, code]) == pytest.approx(4 * deviation)
    assert torch.allclose(between[:, 0], codes[:6]) and torch.allclose(between[:, -1], codes[6:12])
    assert torch.allclose(between[:, 4], (codes[:6] + codes[6:12]) / 2)


def test_latents_pictures_have_a_row_for_each_code_and_examples_at_their_sides(shapes: shards.Rows) -> None:
    method = build("vae/vae", DataSpec("image", (1, 32, 32), 2, 3), **SMALL | {"latent_dim": 15})
    files = latents(method, shapes.x, shapes.cond, 0)
    told = json.loads(files["latents.json"])
    assert len(told["codes"]) == 15 and told["shown"] == 12
    assert Image.open(io.BytesIO(files["traversal.png"])).size == (2 * (9 * 33 + 1), 2 * (12 * 33 + 1))
    line = Image.open(io.BytesIO(files["interpolation.png"])).convert("L")
    assert line.size == (11 * 33 + 1, 6 * 33 + 1)
    for row in range(6):
        for column, example in ((0, row), (10, row + 6)):
            corner = (column * 33 + 1, row * 33 + 1)
            tile = torch.tensor(list(line.crop((*corner, corner[0] + 32, corner[1] + 32)).getdata())).reshape(32, 32)
            assert torch.equal(tile == 255, shapes.x[example, 0] == 1)


def test_latents_of_examples_that_are_no_pictures_are_numbers_alone(root: Path) -> None:
    method = build("vae/vae", DataSpec("vector", (2,)), **SMALL)
    assert list(latents(method, torch.randn(20, 2), None, 0)) == ["latents.json"]
    with pytest.raises(ValueError, match=r"an example of kind vector and shape \(2,\) is no picture"):
        pictures.table(torch.zeros(4, 2), DataSpec("vector", (2,)), 2)


@pytest.mark.parametrize("asked", [False, True])
def test_latents_of_a_flow_are_pictures_too(shapes: shards.Rows, asked: bool) -> None:
    data = DataSpec("image", (1, 32, 32), 2, 3)
    flow = Flow(data, continuous(data), Chain(), condition=Label() if asked else None)  # the identity
    files = latents(with_model(flow), shapes.x, shapes.cond, 0)
    told = json.loads(files["latents.json"])
    assert len(told["codes"]) == 1024 and told["shown"] == 12 and told["codes"][0]["kl"] is None
    assert told["given"] == ("label" if asked else None)
    line = tiles(files["interpolation.png"], 6, 11)
    for row in range(6):
        for column in (0, 9):  # the example and what its latents decode to, at either end
            assert torch.equal(pixels(line, row, column), pixels(line, row, column + 1))


def test_evaluation_counts_and_draws_what_a_sampler_needs(root: Path) -> None:
    section = {"name": "digits", "split": [0.9, 0.05, 0.05]}
    spec = prepare(section, root / "data" / "digits").spec()
    method = build("autoregressive/made", spec, width=8)
    save(method, root / "artifacts" / "made", lineage={"dataset": "digits", "run_digest": "d" * 64})
    network = {"name": "mlp", "width": 8, "depth": 1}
    vae = build("vae/vae", spec, latent_dim=2, network=network, cond={"name": "edges"})
    save(vae, root / "artifacts" / "vae", lineage={"dataset": "digits", "run_digest": "e" * 64})
    runs = {"made": {"dataset": "digits", "method": {"name": "autoregressive/made", "width": 8}},
            "vae": {"dataset": "digits", "method": {"name": "vae/vae"}}}  # fmt: skip
    params = parse({"datasets": {"digits": section}, "runs": runs, "evaluation": {"importance": 1, "max_samples": 30}})
    for run, count, drawn in (("made", 64, "temperature"), ("vae", 1, "conditions")):
        sample_stage(run, paths.samples(run), params)
        rows = {row["metric"]: row for row in evaluating.evaluate_stage(run, paths.evaluation(run), params)}
        row = rows["evaluations_per_sample"]
        assert (row["value"], row["low"], row["high"], row["n"]) == (count, count, count, 30)
        assert (row["kind"], row["unit"]) == ("exact", "network evaluations")
        pictured = {path.stem for path in paths.evaluation(run).glob("*.png")}
        assert pictured == {"grid", drawn} | ({"traversal", "interpolation"} if run == "vae" else set())
    html = report(root / "report").read_text()
    assert "Evaluations" in html and "at four temperatures" in html and "Conditions of vae" in html


def made_by(method: Method, seed: int, data: shards.Rows) -> dict[str, bytes]:
    return evaluating.temperatures(method, data.x, data.cond, seed)


class Flip(Model):
    """Pixels that are white with the probability that the temperature says."""

    def __init__(self, data: DataSpec) -> None:
        super().__init__(data, Eye(data).codec)
        self.sampling = Tempering()

    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        return (torch.rand(n, *self.data.shape, generator=rng) < self.sampling.temperature).long()


def tiles(content: bytes, rows: int, columns: int) -> Image.Image:
    """A table of 32 x 32 pictures without its enlargement."""
    image = Image.open(io.BytesIO(content))
    zoom, rest = divmod(image.size[0], columns * 33 + 1)
    assert rest == 0 and image.size[1] == zoom * (rows * 33 + 1)
    return image.resize((image.size[0] // zoom, image.size[1] // zoom), Image.Resampling.NEAREST)


def pixels(image: Image.Image, row: int, column: int) -> Tensor:
    """[32, 32, 3]"""
    left, top = column * 33 + 1, row * 33 + 1
    return torch.tensor(list(image.crop((left, top, left + 32, top + 32)).getdata())).reshape(32, 32, 3)


def test_temperature_picture_is_a_row_for_each_with_one_seed(shapes: shards.Rows) -> None:
    flip = with_model(Flip(DataSpec("image", (1, 32, 32), 2, 3)))
    files = made_by(flip, 3, shapes)
    image = tiles(files["temperature.png"], 4, evaluating.ACROSS)
    cold, cool, warm, whole = (pixels(image, row, 2)[..., 0] == 255 for row in range(4))
    assert 0.3 < float(cold.float().mean()) < float(cool.float().mean()) < float(warm.float().mean()) < 1
    assert not (cold & ~cool).any() and not (cool & ~warm).any() and whole.all()  # the same draws, cut elsewhere
    assert files == made_by(flip, 3, shapes) != made_by(flip, 4, shapes)
    assert flip.model.sampling == Tempering()


def test_temperature_picture_needs_a_temperature_and_a_picture(shapes: shards.Rows) -> None:
    assert made_by(with_model(Eye(DataSpec("image", (1, 32, 32), 2, 3))), 0, shapes) == {}
    tokens = dataclasses.replace(build("vae/vae", DataSpec("vector", (2,)), **SMALL), data=DataSpec("tokens", (5,), 7))
    tokens.model.sampling = Tempering()
    assert made_by(tokens, 0, shapes) == {}


@pytest.mark.parametrize(("cond", "hides"), [({"name": "edges"}, False), ({"name": "masked", "share": 0.5}, True)])
def test_conditions_picture_stands_between_what_is_asked_and_the_example(
    shapes: shards.Rows, cond: dict[str, Any], hides: bool
) -> None:
    method = build("vae/vae", DataSpec("image", (1, 32, 32), 2, 3), **SMALL, cond=cond)
    files = evaluating.asked_for(method, shapes.x, shapes.cond, 0)
    image = tiles(files["conditions.png"], evaluating.ASKED, evaluating.DRAWS + 2)
    for row in range(evaluating.ASKED):
        assert torch.equal(pixels(image, row, evaluating.DRAWS + 1)[..., 0] == 255, shapes.x[row, 0] == 1)
        hidden = (pixels(image, row, 0) == torch.tensor(pictures.HIDDEN)).all(-1)
        assert int(hidden.sum()) == (16 * 16 if hides else 0)
    plain = build("vae/vae", DataSpec("image", (1, 32, 32), 2, 3), **SMALL, cond={"name": "label"})
    assert evaluating.asked_for(plain, shapes.x, shapes.cond, 0) == {}


def codes(count: int, kl: bool = True) -> dict[str, Any]:
    told = [{"code": n, "kl": 3.0 - n if kl else None, "variance": 0.9 if n < 2 else 0.001} for n in range(count)]
    return {"rows": 500, "codes": told, "shown": min(count, 12), "steps": [-2.0, 0.0, 2.0], "given": None}


def shown(root: Path, document: Any, rows: list[Any]) -> str:
    write_run(root, "vae", rows, dataset="shapes")
    write(root / "evaluations/vae/latents.json", document)
    html = report(root / "report").read_text()
    return " ".join(html.split())


def test_page_tells_which_codes_are_in_use_and_what_they_score(root: Path) -> None:
    gap = entry("mig/histogram", 0.25, 0.03) | {"extractor_sha256": None, "factors": [["shape", 0.5], ["x", -0.004]]}
    write(root / "evaluations/vae/traversal.png", {})
    html = shown(root, codes(14), [gap])
    assert "2 of 14 codes are in use on 500 test rows; the first 12 are shown." in html
    assert 'alt="One row a code of vae' in html and 'alt="Pairs of test' not in html
    assert "−2 to 2 deviations; beside each row the code’s KL in nats" in html
    assert '0.250</span> <small class="muted">[0.220, 0.280]' in html
    assert "<td>0.50</td><td>−0.00</td>" in html
    assert '<a href="#d1-latents">' in html
    csv = (root / "report/leaderboard.csv").read_text().splitlines()[0]
    assert "mig/histogram,mig/histogram_low" in csv  # both conventions have columns of their own


def test_page_without_pictures_lists_the_codes(root: Path) -> None:
    html = shown(root, codes(2, kl=False), [entry("nll", 3.0)])
    assert "2 of 2 codes are in use on 500 test rows. Variance, by code: 0&nbsp;0.90, 1&nbsp;0.90." in html
    assert "Score ↑" not in html


def test_page_shows_temperatures_and_conditions_with_or_without_codes(root: Path) -> None:
    write_run(root, "pixels", [entry("nll", 3.0)], dataset="shapes")
    for name in ("temperature", "conditions"):
        write(root / f"evaluations/pixels/{name}.png", {})
    html = " ".join(report(root / "report").read_text().split())
    assert 'alt="Samples of pixels at four temperatures"' in html and 'alt="Conditions of pixels' in html
    assert "codes are in use" not in html and "give every example a code" not in html
    write(root / "evaluations/vae/temperature.png", {})
    html = shown(root, codes(2), [entry("nll", 3.0)])
    assert 'alt="Samples of vae at four temperatures"' in html and "2 of 2 codes are in use" in html


def test_page_of_runs_without_codes_has_no_such_part(root: Path) -> None:
    write_run(root, "gan", [entry("fid/digits", 3.0)])
    assert page.view(leaderboard.rows()[0]) is None
    assert "-latents" not in report(root / "report").read_text()


@pytest.mark.parametrize("document", [{"rows": 1}, codes(2) | {"codes": [{}]}, []])
def test_page_names_a_file_that_is_not_what_its_stage_writes(root: Path, document: Any) -> None:
    with pytest.raises(ValueError, match=r"evaluations/vae/latents\.json: not what its stage writes"):
        shown(root, document, [entry("nll", 3.0)])
    assert paths.evaluation("vae").is_dir()
