"""Shapes: the pictures are what their factors say, and the factors find their way through prepare."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.data import shards
from pipelines.data.datasets.shapes import RADIUS, SPRITES, Shapes
from pipelines.data.manifest import Manifest
from pipelines.data.prepare import Settings, prepare, write
from pipelines.data.raw import SPLITS, Array, Factor, Raw, Source
from pipelines.data.source import source_of

SMALL = {"name": "shapes", "rows": 300, "size": 32, "scales": 3, "rotations": 8, "xs": 5, "ys": 4, "rows_per_shard": 60}
AREAS = {"square": 2.0, "ellipse": math.pi / 2, "heart": 0.8 * math.pi / 1.17**2}  # of sprites in the unit circle


def still(**changes: Any) -> Shapes:
    """Nothing varies but the shape and what is named."""
    settings: dict[str, Any] = {"rows": None, "scales": 1, "rotations": 1, "xs": 1, "ys": 1, "levels": 256}
    return Shapes(**settings | changes)


def edge(radius: float) -> float:
    """How much area points 1/8 of a pixel apart can miss: half their distance, all along an edge."""
    return 2 * math.pi * radius / 16


def picture(settings: Shapes, *factors: int) -> Array:
    ids = np.ravel_multi_index(factors, [factor.size for factor in settings.factors])
    found: Array = settings.render(np.array([ids]))[0, 0]
    return found


@pytest.mark.parametrize(("number", "shape"), enumerate(AREAS))
def test_sprite_has_the_area_of_its_curve(number: int, shape: str) -> None:
    settings = still(scales=3, rotations=5, xs=4, size=64)
    assert list(SPRITES) == list(AREAS)
    for scale, factor in enumerate((0.5, 0.75, 1.0)):
        for rotation in range(5):
            area = picture(settings, number, scale, rotation, 1, 0).sum() / 255
            radius = RADIUS * 32 * factor
            assert area == pytest.approx(AREAS[shape] * radius**2, abs=edge(radius))


@pytest.mark.parametrize("shape", SPRITES)
def test_sprite_fits_the_unit_circle_and_reaches_it(shape: str) -> None:
    u, v = np.meshgrid(np.linspace(-1.5, 1.5, 1001), np.linspace(-1.5, 1.5, 1001))
    radius = np.hypot(u, v)[SPRITES[shape](u, v)]
    assert 0.98 < radius.max() <= 1  # points are 0.003 apart; a corner can hide between them


def test_sprite_stands_where_its_factors_say() -> None:
    settings = still(xs=5, ys=3, size=64)
    for x in range(5):
        for y in range(3):
            mass = picture(settings, 0, 0, 0, x, y).astype(float)
            columns, rows = np.arange(64) + 0.5, np.arange(64) + 0.5
            centre = (mass.sum(0) @ columns / mass.sum(), mass.sum(1) @ rows / mass.sum())
            expected = (32 + 32 * (1 - RADIUS) * (x / 2 - 1), 32 + 32 * (1 - RADIUS) * (y - 1))
            assert centre == pytest.approx(expected, abs=1 / 16)  # half the distance of two points


def test_rotation_turns_counter_clockwise_and_symmetric_sprites_return() -> None:
    settings = still(rotations=4)
    square, ellipse, heart = ([picture(settings, shape, 0, turn, 0, 0) for turn in range(4)] for shape in range(3))
    for turned in (square, ellipse, heart):
        for turn in range(4):
            assert np.array_equal(turned[turn], np.rot90(turned[0], turn))  # numpy's quarter turns run the same way
    assert all(np.array_equal(square[0], each) for each in square)
    assert np.array_equal(ellipse[0], ellipse[2]) and not np.array_equal(ellipse[0], ellipse[1])
    assert len({each.tobytes() for each in heart}) == 4
    assert heart[0][:32].sum() > 1.2 * heart[0][32:].sum()  # its lobes are above its tip
    assert np.array_equal(heart[0], heart[0][:, ::-1])


@pytest.mark.parametrize("size", [32, 64])
def test_no_sprite_is_cut(size: int) -> None:
    settings = still(size=size, rotations=7, xs=2, ys=2)
    whole = still(size=size, rotations=7)
    for shape in range(3):
        for turn in range(7):
            area = picture(whole, shape, 0, turn, 0, 0).sum() / 255
            for corner in np.ndindex(2, 2):
                there = picture(settings, shape, 0, turn, *corner).sum() / 255
                assert there == pytest.approx(area, abs=edge(0.75 * RADIUS * size / 2))


def test_binary_pixels_are_on_where_their_centre_is_inside() -> None:
    grey, binary = (replace(still(rotations=9, xs=3), levels=levels).read(0).x / (levels - 1) for levels in (256, 2))
    assert set(np.unique(binary)) == {0, 1}
    assert (binary[grey == 1] == 1).all() and (binary[grey == 0] == 0).all()
    assert abs(binary.mean() / grey.mean() - 1) < 0.02
    assert len(np.unique(grey)) > 30


def test_label_is_the_shape_and_the_full_grid_stands_in_order() -> None:
    raw = Shapes(rows=None, size=32, scales=2, rotations=3, xs=2, ys=2).read(seed=5)
    assert raw.ids is not None and raw.labels is not None
    assert raw.ids.tolist() == list(range(3 * 2 * 3 * 2 * 2))
    assert raw.labels.tolist() == [0] * 24 + [1] * 24 + [2] * 24
    assert (raw.class_names, raw.classes) == (("square", "ellipse", "heart"), 3)
    assert Shapes(rows=None).grid == 3 * 6 * 40 * 32 * 32 == 737_280


def test_rows_begin_alike_never_repeat_and_differ_for_every_seed() -> None:
    few, many, other = (Shapes(rows=rows, size=32).read(seed) for rows, seed in ((10, 1), (400, 1), (400, 2)))
    assert few.ids is not None and many.ids is not None and other.ids is not None
    assert np.array_equal(few.x, many.x[:10]) and np.array_equal(few.ids, many.ids[:10])
    assert len(np.unique(many.ids)) == 400
    assert len(np.intersect1d(many.ids, other.ids)) < 10
    every = Shapes(rows=72, size=32, scales=2, rotations=3, xs=2, ys=2).read(0)
    assert every.ids is not None and sorted(every.ids) == list(range(72))


def test_sampled_factors_are_uniform() -> None:
    raw = Shapes(rows=6000, size=32).read(0)
    assert raw.ids is not None
    drawn = shards.factors_at(torch.from_numpy(raw.ids), raw.factors)
    for column, factor in zip(drawn.T, raw.factors, strict=True):
        counts = torch.bincount(column, minlength=factor.size).double()
        expected = 6000 / factor.size
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < factor.size - 1 + 4 * math.sqrt(2 * factor.size)  # seeded: 4 standard deviations


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    prepare(SMALL, out)
    return out


def test_factors_of_every_split_render_its_rows(prepared: Path) -> None:
    settings = Shapes(**{key: value for key, value in SMALL.items() if key not in ("name", "rows_per_shard")})
    ids = []
    for split in SPLITS:
        rows, factors = shards.load(prepared, split), shards.factors_of(prepared, split)
        assert factors.dtype == torch.int64 and factors.shape == (len(rows), 5)
        numbers = np.ravel_multi_index(factors.numpy().T, [factor.size for factor in settings.factors])
        assert np.array_equal(settings.render(numbers), rows.x.numpy())
        assert rows.cond is not None and torch.equal(rows.cond, factors[:, 0])
        ids += rows.id.tolist()
    assert len(set(ids)) == 300
    assert [(factor.name, factor.size) for factor in shards.read_manifest(prepared).factors] == [
        ("shape", 3), ("scale", 3), ("rotation", 8), ("x", 5), ("y", 4),
    ]  # fmt: skip


def test_factors_of_streamed_rows_follow_from_their_ids(prepared: Path) -> None:
    from pipelines.params import Stream

    batch = source_of(prepared, "train", 0, Stream(buffer=64, lanes=4), batch_size=32).batch(0, 32)
    rows, factors = shards.load(prepared, "train"), shards.factors_of(prepared, "train")
    place = {number: at for at, number in enumerate(rows.id.tolist())}
    expected = factors[[place[number] for number in batch.id.tolist()]]
    assert torch.equal(shards.factors_at(batch.id, shards.read_manifest(prepared).factors), expected)


def test_factors_of_a_dataset_without_them_are_refused(tmp_path: Path) -> None:
    prepare({"name": "moons", "rows": 20}, tmp_path / "moons")
    with pytest.raises(ValueError, match=r"moons: its manifest names no factors; `shapes`"):
        shards.factors_of(tmp_path / "moons", "train")


def test_manifest_without_factors_is_the_file_of_before(tmp_path: Path) -> None:
    manifest = prepare({"name": "moons", "rows": 20}, tmp_path / "moons")
    text = (tmp_path / "moons" / "manifest.json").read_text()
    keys = ["schema", "name", "kind", "shape", "dtype", "levels", "classes", "class_names", "location", "scale", "rows",
            "parts", "split", "split_seed", "licence", "source", "entropy_nats"]  # fmt: skip
    assert list(json.loads(text)) == keys
    canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert manifest.digest == hashlib.sha256(canonical.encode()).hexdigest()  # so that no run's identity changes
    assert Manifest.from_json(text) == manifest


def test_manifest_digest_changes_with_the_factors(prepared: Path) -> None:
    manifest = shards.read_manifest(prepared)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert replace(manifest, factors=manifest.factors[::-1]).digest != manifest.digest


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ([{"name": "shape"}], "factor has the keys .*'name'"),
        ([{"name": "shape", "size": 0}], "factor 'shape' of 0 values; expected at least 1"),
        (3, "not iterable"),
    ],
)
def test_manifest_refuses_damaged_factors(prepared: Path, factors: Any, words: str, tmp_path: Path) -> None:
    document = json.loads((prepared / "manifest.json").read_text()) | {"factors": factors}
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{words}.*dvc repro"):
        shards.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.arange(19), r"ids of shape \(19,\).*expected as many different integers as rows, 20"),
        (np.zeros(20, int), "expected as many different integers"),
        (np.arange(20.0), "dtype float64"),
        (np.arange(20) + 1, r"things: ids 1\.\.20; expected 0\.\.19"),
    ],
)
def test_ids_that_name_no_row_are_refused(ids: Array, words: str, tmp_path: Path) -> None:
    x, factors = np.arange(40.0).reshape(20, 2), (Factor("a", 4), Factor("b", 5))
    raw = Raw(x, "vector", "free", Source("here"), ids=ids, factors=factors)
    with pytest.raises(ValueError, match=words):
        write("things", raw, Settings(), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 0}, "rows: 0; expected 1 to 1440, the size of the grid, or null"),
        ({"rows": 1441}, "rows: 1441; expected 1 to 1440"),
        ({"scales": 0}, "scales: 0; expected at least 1"),
        ({"size": 28}, "dataset: size: 28; expected 16, 32 or 64"),
        ({"levels": 3}, "dataset: levels: 3; expected 2 or 256"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        prepare(SMALL | changes, tmp_path / "out")


def test_rows_null_is_the_whole_grid(tmp_path: Path) -> None:
    section = SMALL | {"rows": None, "rotations": 2, "ys": 1}
    assert sum(prepare(section, tmp_path / "out").rows.values()) == 3 * 3 * 2 * 5
