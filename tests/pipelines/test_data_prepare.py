"""prepare and load: shards, manifest, splits; whole or not at all; nothing damaged is read."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

from dgm_models.protocols import DataSpec
from pipelines.data import prepare as preparing
from pipelines.data import shards
from pipelines.data.datasets.moons import Moons
from pipelines.data.prepare import Section, Settings, prepare, write
from pipelines.data.raw import SPLITS, Array, Raw, Source
from pipelines.data.split import split_rows

DIGITS = {"name": "digits", "seed": 3, "split": [0.7, 0.2, 0.1], "rows_per_shard": 500}
MOONS = {"name": "moons", "rows": 100, "rows_per_shard": 30}


def raw_of(x: Array, **changes: Any) -> Raw:
    settings: dict[str, Any] = {"kind": "vector", "licence": "free", "source": Source("here")}
    return Raw(x, **settings | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(DIGITS, out)
    return out


@pytest.fixture
def moons(tmp_path: Path) -> Path:
    prepare(MOONS, tmp_path / "moons")
    return tmp_path / "moons"


def test_prepare_writes_the_files_that_the_manifest_names(digits: Path) -> None:
    manifest = shards.read_manifest(digits)
    assert sorted(contents(digits)) == sorted([part.path for part in manifest.parts] + ["manifest.json"])
    for part in manifest.parts:
        content = (digits / part.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (part.bytes, part.sha256)
        assert pq.read_metadata(digits / part.path).num_rows == part.rows
    assert [part.rows for part in manifest.parts if part.split == "train"] == [500, 500, 258]
    assert manifest.rows == {"train": 1258, "valid": 359, "test": 180}


def test_prepare_tells_what_the_data_are(digits: Path) -> None:
    manifest = shards.read_manifest(digits)
    assert manifest.spec() == DataSpec("image", (1, 8, 8), levels=17, classes=10, class_names=tuple("0123456789"))
    assert (manifest.schema, manifest.name, manifest.dtype, manifest.licence) == (1, "digits", "uint8", "CC BY 4.0")
    assert (manifest.split, manifest.split_seed, manifest.entropy_nats) == ((0.7, 0.2, 0.1), 3, None)
    assert all(len(each) == 64 for each in manifest.source.files.values())


def test_shard_columns_are_id_x_and_label(digits: Path, tmp_path: Path) -> None:
    schema = pq.read_schema(digits / "test" / "part-00000.parquet")
    assert [f"{field.name} {field.type}" for field in schema] == [
        "id int64", "x fixed_size_binary[64]", "label int32",
    ]  # fmt: skip
    prepare({"name": "checkerboard", "rows": 20}, tmp_path / "board")
    schema = pq.read_schema(tmp_path / "board" / "test" / "part-00000.parquet")
    assert [f"{field.name} {field.type}" for field in schema] == ["id int64", "x fixed_size_binary[8]"]


def test_load_gives_back_every_row_of_the_source(digits: Path) -> None:
    source = load_digits()
    ids = []
    for split in SPLITS:
        rows = shards.load(digits, split)
        assert (rows.x.dtype, rows.id.dtype) == (torch.uint8, torch.int64)
        assert rows.cond is not None and rows.cond.dtype == torch.int64
        assert len(rows) == shards.read_manifest(digits).rows[split]
        assert np.array_equal(rows.x[:, 0].numpy(), source.images[rows.id.numpy()])
        assert np.array_equal(rows.cond.numpy(), source.target[rows.id.numpy()])
        ids += rows.id.tolist()
    assert sorted(ids) == list(range(1797))  # disjoint, and none is lost


@pytest.mark.parametrize(
    ("raw", "dtype"),
    [
        (raw_of(np.arange(60, dtype=np.float32).reshape(20, 3) / 7), torch.float32),
        (raw_of(np.arange(60).reshape(20, 3) * 1000, kind="tokens", levels=60_000), torch.int32),
        (raw_of(np.arange(240).reshape(20, 3, 2, 2).astype(np.uint8), kind="image", levels=256), torch.uint8),
        (raw_of(np.asfortranarray(np.arange(240.0).reshape(20, 3, 4)), kind="audio"), torch.float32),
    ],
    ids=["float32", "int32", "uint8", "fortran order"],
)
def test_load_gives_back_what_was_written(raw: Raw, dtype: torch.dtype, tmp_path: Path) -> None:
    write("things", raw, Settings(rows_per_shard=7), tmp_path / "out")
    for split in SPLITS:
        rows = shards.load(tmp_path / "out", split)
        assert rows.x.dtype == dtype
        assert rows.cond is None
        assert np.array_equal(rows.x.numpy(), raw.x[rows.id.numpy()].astype(rows.x.numpy().dtype))


def test_prepare_gives_the_same_bytes_for_the_same_input(moons: Path, tmp_path: Path) -> None:
    again = prepare(MOONS, tmp_path / "elsewhere" / "other")
    assert contents(tmp_path / "elsewhere" / "other") == contents(moons)
    assert again.digest == shards.read_manifest(moons).digest
    assert prepare(MOONS | {"seed": 1}, tmp_path / "seed").digest != again.digest


def test_manifest_digest_changes_with_any_part(moons: Path) -> None:
    manifest = shards.read_manifest(moons)
    changed = dataclasses.replace(manifest.parts[0], sha256="0" * 64)
    assert dataclasses.replace(manifest, parts=(changed, *manifest.parts[1:])).digest != manifest.digest
    assert dataclasses.replace(manifest, licence="other").digest != manifest.digest


def test_manifest_holds_entropy_of_toys_and_location_and_scale_of_train(moons: Path) -> None:
    manifest = shards.read_manifest(moons)
    train = shards.load(moons, "train").x.double()
    assert manifest.location == pytest.approx(train.mean().item())
    assert manifest.scale == pytest.approx(train.std(correction=0).item())
    assert manifest.entropy_nats == pytest.approx(Moons().entropy())
    every = torch.cat([shards.load(moons, split).x for split in SPLITS]).double()
    assert manifest.location != pytest.approx(every.mean().item())


def test_manifest_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(40.0).reshape(20, 2))
    prepare({"name": "npy", "path": str(tmp_path / "x.npy")}, tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_split_keeps_what_the_source_fixes(tmp_path: Path) -> None:
    x = np.arange(40.0).reshape(20, 2)
    given = {"train": (0, 12), "valid": (12, 15), "test": (15, 20)}
    write("things", raw_of(x, splits=given), Settings(), tmp_path / "out")
    found = {split: sorted(shards.load(tmp_path / "out", split).id.tolist()) for split in SPLITS}
    assert found == {split: list(range(*span)) for split, span in given.items()}


def test_split_cuts_valid_from_the_sources_train() -> None:
    found = split_rows("things", 700, {"train": (0, 600), "test": (600, 700)}, (0.75, 0.15, 0.1), seed=0)
    assert {split: len(ids) for split, ids in found.items()} == {"train": 500, "valid": 100, "test": 100}
    assert sorted(found["test"]) == list(range(600, 700))
    assert sorted([*found["train"], *found["valid"]]) == list(range(600))


def test_split_is_seeded_and_its_order_is_shuffled() -> None:
    first, again, other = (split_rows("things", 1000, None, (0.8, 0.1, 0.1), seed) for seed in (0, 0, 1))
    for split in SPLITS:
        assert np.array_equal(first[split], again[split])
        assert not np.array_equal(first[split], other[split])
        assert abs(np.corrcoef(first[split], np.arange(len(first[split])))[0, 1]) < 0.25  # a prefix is a fair sample
    assert not np.array_equal(np.sort(first["test"]), np.sort(other["test"]))


def test_split_that_leaves_a_part_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"moons: split \(0\.98, 0\.01, 0\.01\) of 20 rows leaves valid empty"):
        prepare({"name": "moons", "rows": 20, "split": [0.98, 0.01, 0.01]}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": [0.8, 0.1, 0.2]}, r"dataset: split: \(0\.8, 0\.1, 0\.2\) sums to 1\.1; expected 1"),
        ({"split": [0.9, 0.1, 0.0]}, "split: .*expected three fractions above 0"),
        ({"split": [0.5, 0.5]}, "dataset.split: .*expected 3"),
        ({"rows_per_shard": 0}, "rows_per_shard: 0; expected at least 1"),
        ({"rows": 0}, "dataset: rows: 0; expected at least 1"),
        ({"rows": "100"}, r"dataset\.rows: '100' is not a whole number"),
        ({"nois": 0.1}, r'dataset\.nois: unknown key; did you mean "noise"'),
        ({"sed": 1}, r'dataset\.sed: unknown key; did you mean "seed"'),
        ({"name": "moon"}, r'dataset\.name: \'moon\' is not known; did you mean "moons"'),
    ],
)
def test_section_refuses_by_path(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Section.of(MOONS | changes)


def test_section_takes_objects_as_well_as_a_mapping(moons: Path, tmp_path: Path) -> None:
    section = Section("moons", Moons(100), Settings(rows_per_shard=30))
    assert Section.of(MOONS) == section
    assert prepare(section, tmp_path / "out").digest == shards.read_manifest(moons).digest


def test_section_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"datasets\.a\.name: missing; allowed: .*binarized-mnist"):
        Section.of({"rows": 3}, "datasets.a")


def test_constant_train_data_are_refused_by_name(tmp_path: Path) -> None:
    x = np.zeros((20, 2))
    x[15:] = 1.0
    given = {"train": (0, 10), "valid": (10, 15), "test": (15, 20)}
    with pytest.raises(ValueError, match=r"things: every value of train is 0; expected data that vary"):
        write("things", raw_of(x, splits=given), Settings(), tmp_path / "out")


class Full(OSError):
    """No space left on the device."""


def full_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    def write_synced(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) > count:
            raise Full
        shards.write_synced(path, content)

    monkeypatch.setattr(preparing, "write_synced", write_synced)


def test_prepare_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_after(2, monkeypatch)
    with pytest.raises(Full):
        prepare(MOONS, tmp_path / "moons")
    assert list(tmp_path.iterdir()) == []


def test_prepare_that_fails_leaves_the_earlier_one(moons: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(moons)
    full_after(2, monkeypatch)
    with pytest.raises(Full):
        prepare(MOONS | {"rows": 50}, moons)
    assert contents(moons) == before
    assert [path.name for path in moons.parent.iterdir()] == ["moons"]


def test_prepare_writes_the_manifest_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_after(5, monkeypatch)
    with pytest.raises(Full):
        prepare(MOONS, tmp_path / "moons")
    assert list(tmp_path.iterdir()) == []
    names: list[str] = []
    monkeypatch.setattr(preparing, "write_synced", lambda path, content: names.append(path.name))
    prepare(MOONS, tmp_path / "moons")
    assert names[-1] == "manifest.json" not in names[:-1]
    assert len(names) == 6


def test_prepare_replaces_an_earlier_one_wholly(moons: Path) -> None:
    prepare(MOONS | {"rows_per_shard": 100}, moons)
    assert sorted(contents(moons)) == ["manifest.json", *sorted(f"{split}/part-00000.parquet" for split in SPLITS)]
    assert [path.name for path in moons.parent.iterdir()] == ["moons"]


def test_prepare_replaces_no_folder_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("precious")
    with pytest.raises(ValueError, match=r"photos: exists and holds no manifest\.json, so it is not replaced"):
        prepare(MOONS, tmp_path / "photos")
    assert contents(tmp_path) == {"photos/a.png": b"precious"}
    (tmp_path / "empty").mkdir()
    prepare(MOONS, tmp_path / "empty")


def test_prepare_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path: Path) -> None:
    dead, living = tmp_path / ".moons.unfinished.dead", tmp_path / ".moons.unfinished.living"
    for folder in (dead, living):
        folder.mkdir()
        (folder / "part").write_text("half")
    lock = os.open(living, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    prepare(MOONS, tmp_path / "moons")
    os.close(lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "moons"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_load_refuses_a_damaged_shard_by_name(moons: Path, damage: Any) -> None:
    damage(moons / "train" / "part-00001.parquet")
    with pytest.raises(ValueError, match=r"moons/train/part-00001\.parquet: .*manifest.*dvc repro -f prepare@moons"):
        shards.load(moons, "train")
    assert len(shards.load(moons, "valid")) == 10


def change(**changes: Any) -> Any:
    def damage(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "no such file"),
        (lambda path: path.write_text(path.read_text()[:100]), "Unterminated|Expecting"),
        (change(schema=2), "schema 2; expected 1"),
        (change(more=2), r"manifest has the keys .*'more'.*expected"),
        (change(dtype="float64"), "dtype 'float64'; expected one of"),
        (change(kind="picture"), "data.kind: 'picture'"),
        (change(rows={"train": 79, "valid": 10, "test": 10}), "rows .*79.*expected the sums over the parts"),
        (change(parts=[{"path": "../x", "rows": 100, "bytes": 1, "sha256": ""}]), r"part '\.\./x'; expected a path"),
    ],
)  # fmt: skip
def test_manifest_refuses_damage_by_name(moons: Path, damage: Any, words: str) -> None:
    damage(moons / "manifest.json")
    with pytest.raises(ValueError, match=rf"moons/manifest\.json: .*({words}).*dvc repro -f prepare@moons"):
        shards.read_manifest(moons)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [3]}, "rows of 8 bytes; the manifest expects 12"),
        ({"classes": 0}, r"rows of \['id', 'x', 'label'\] contradict"),
    ],
)
def test_load_refuses_a_manifest_that_contradicts_the_files(moons: Path, changes: dict[str, Any], words: str) -> None:
    change(**changes)(moons / "manifest.json")
    with pytest.raises(ValueError, match=rf"train/part-00000\.parquet: .*{words}"):
        shards.load(moons, "train")


def test_load_refuses_an_unknown_split(moons: Path) -> None:
    with pytest.raises(ValueError, match="split 'val'; expected one of train, valid, test"):
        shards.load(moons, "val")
