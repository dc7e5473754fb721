"""Captions: what a dataset calls its rows reaches a model in training and evaluation, and a user's words do too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dgm_models
from dgm_models.conditions import Caption
from dgm_models.method import Method, build
from dgm_models.sampling import conditions, labelled
from pipelines import cli
from pipelines.data import shards
from pipelines.data.datasets.shapes import COLUMNS, ROWS, SIZES, SPRITES, Shapes
from pipelines.data.prepare import prepare
from pipelines.data.source import source_of

SHAPES = {"name": "shapes", "rows": None, "size": 16, "levels": 256, "scales": 4, "rotations": 2, "xs": 6, "ys": 3,
          "captions": True, "seed": 0}  # fmt: skip
SMALL = {"network": {"name": "mlp", "width": 8, "depth": 1}, "sampler": {"name": "ddim", "steps": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "captions"
    prepare(SHAPES, out)
    return out


@pytest.fixture(scope="module")
def method(data: Path) -> Method:
    return build("diffusion/ddpm", shards.read_manifest(data).spec(), cond={"name": "caption"}, **SMALL)


def test_caption_of_a_row_says_its_factors_and_so_its_pixels(data: Path) -> None:
    rows, factors, manifest = shards.load(data, "train"), shards.factors_of(data, "train"), shards.read_manifest(data)
    assert rows.cond is not None and manifest.classes == 2 * 3 * 3 * 3
    for label, (shape, scale, _, x, y) in zip(rows.cond.tolist(), factors.tolist(), strict=True):
        said = [SIZES[scale // 2], list(SPRITES)[shape], COLUMNS[x // 2], ROWS[y]]
        assert manifest.class_names[label] == " ".join(said)
    mass, columns = rows.x[:, 0].double(), torch.arange(16).double()
    centre = (mass.sum(1) * columns).sum(1) / mass.sum((1, 2))
    said = [manifest.class_names[label].split() for label in rows.cond.tolist()]
    assert max(centre[["left" in words for words in said]]) < min(centre[["centre" in words for words in said]])
    assert max(centre[["centre" in words for words in said]]) < min(centre[["right" in words for words in said]])


def test_captions_say_nothing_of_what_does_not_vary_and_cut_a_factor_evenly() -> None:
    assert Shapes(scales=1, xs=1, rows=None, captions=True).class_names[:4] == (
        "square top", "square middle", "square bottom", "ellipse top",
    )  # fmt: skip
    ends = Shapes(rows=None, size=16, scales=2, rotations=1, xs=2, ys=1, captions=True).read(0)
    assert ends.labels is not None
    said = [ends.class_names[label] for label in ends.labels]
    assert said[:4] == ["small square left", "small square right", "large square left", "large square right"]


def test_captions_travel_as_labels_and_are_words_at_the_model(data: Path, method: Method) -> None:
    batch = source_of(data, "train", 0, None, batch_size=8).batch(0, 8)
    assert batch.cond is not None
    tokens = method.model.conditions(batch.x, batch.cond, batch.key)
    names = [method.data.class_names[label] for label in batch.cond.tolist()]
    assert tokens is not None and tokens.shape == (8, 4)
    assert torch.equal(tokens, torch.stack([Caption().read(method.data, name) for name in names]))
    rows = shards.load(data, "test")
    asked = conditions(method, rows.x, rows.cond)  # as the evaluation asks
    assert asked is not None and asked.shape == (len(rows), 4)
    every = labelled(method, 60)
    assert every is not None and torch.equal(every[0], every[54])
    assert torch.equal(every[7], Caption().read(method.data, method.data.class_names[7]))


def test_sample_takes_a_caption_and_names_a_word_that_it_does_not_know(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    dgm_models.save(method, tmp_path / "artifact")
    (tmp_path / "params.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    drawn = {}
    for caption in ("small heart left top", "Small  HEART left top", "small heart right top"):
        arguments = ["sample", "artifact", "--n", "3", "--out", "x.npy", "--caption", caption]
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        drawn[caption] = np.load("x.npy")
    one, same, other = drawn.values()
    assert one.shape == (3, 1, 16, 16) and np.array_equal(one, same) and not np.array_equal(one, other)
    for asked, words in {
        "small circle": r"caption: 'circle' is none of the words bottom, centre, ellipse, heart, .*, top",
        "small heart left top top": "5 words; 1 to 4, such as 'small square left top'",
        "": "0 words; 1 to 4",
    }.items():
        with pytest.raises(ValueError, match=words):
            labelled(method, 2, caption=asked)
    with pytest.raises(ValueError, match="asked by caption, with a label"):
        labelled(method, 2, 1, "small heart")
    plain = build("diffusion/ddpm", method.data, cond={"name": "label"}, **SMALL)
    with pytest.raises(ValueError, match="caption: 'small heart' for diffusion/ddpm, asked by label"):
        labelled(plain, 2, caption="small heart")
