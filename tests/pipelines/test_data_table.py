"""Tables: one dataset from every format, columns by themselves, and what is said of cells that are no numbers."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch

import dgm_models
from dgm_models.codecs import Standardized
from dgm_models.protocols import DataSpec
from pipelines.data import shards
from pipelines.data.datasets import uci_binary, uci_real
from pipelines.data.manifest import Manifest
from pipelines.data.prepare import prepare
from pipelines.data.raw import SPLITS

N = 60
NAMES = ["wide", "narrow", "y"]


def values(seed: int = 0) -> np.ndarray[Any, Any]:
    """[N, 3]: columns of very different spread, and a label."""
    rng = np.random.default_rng(seed)
    return np.stack([5e4 + 1e3 * rng.normal(size=N), 0.01 * rng.normal(size=N), np.arange(N) % 3], 1)


def as_csv(path: Path, table: Any, names: list[str] | None = NAMES) -> str:
    lines = [",".join(names)] if names else []
    path.write_text("\n".join([*lines, *(",".join(map(repr, map(float, row))) for row in table)]) + "\n")
    return str(path)


def csv_of(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_table_is_the_same_dataset_from_every_format(tmp_path: Path) -> None:
    x = values()
    as_csv(tmp_path / "t.csv", x)
    np.save(tmp_path / "t.npy", x)
    pq.write_table(pa.table(dict(zip(NAMES, x.T, strict=True))), tmp_path / "t.parquet")
    as_csv(tmp_path / "bare.csv", x, None)
    found = {}
    for file in ("t.csv", "t.parquet", "t.npy", "bare.csv"):
        named = file in ("t.csv", "t.parquet")
        settings = {"columns": ["narrow", "wide"], "label": "y"} if named else {"columns": [1, 0], "label": 2}
        more = {"header": False} if file == "bare.csv" else {}
        section = {"name": "table", "path": str(tmp_path / file), **settings, **more}
        found[file] = prepare(section, tmp_path / "out" / file)
        assert found[file].columns == (("narrow", "wide") if named else ("1", "0"))
        assert str(tmp_path) not in found[file].to_json()
    first = found["t.csv"]
    for manifest in found.values():
        assert (manifest.kind, manifest.shape, manifest.levels, manifest.classes) == ("vector", (2,), None, 3)
        assert manifest.parts == first.parts and (manifest.location, manifest.scale) == (first.location, first.scale)
    rows = shards.load(tmp_path / "out" / "t.csv", "test")
    assert torch.equal(rows.x, torch.from_numpy(x[rows.id][:, [1, 0]].astype(np.float32)))
    assert rows.cond is not None and torch.equal(rows.cond, rows.id % 3)


def test_table_standardises_every_column_by_train_alone(tmp_path: Path) -> None:
    section = {"name": "table", "path": as_csv(tmp_path / "t.csv", values()), "label": "y", "rows_per_shard": 7}
    manifest = prepare(section, tmp_path / "out")
    train = shards.load(tmp_path / "out", "train").x
    assert manifest.location == pytest.approx(train.double().mean(0).tolist())
    assert manifest.scale == pytest.approx(train.double().std(0, correction=0).tolist())
    assert Manifest.from_json(manifest.to_json()) == manifest
    y, log_det = Standardized(manifest.spec()).encode(train, torch.arange(len(train)))
    assert torch.allclose(y.mean(0), torch.zeros(2), atol=1e-4)  # 5e4 in float32 is known to 4e-3 of 1e3
    assert torch.allclose(y.std(0, correction=0), torch.ones(2), atol=1e-4)
    assert torch.allclose(log_det, -torch.tensor(manifest.scale).log().sum())


def test_codec_of_columns_has_the_jacobian_of_its_map() -> None:
    data = DataSpec("vector", (3,), location=(1.0, -5.0, 0.0), scale=(0.5, 20.0, 1e-3))
    codec, x = Standardized(data), torch.randn(3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda row: codec.encode(row[None], torch.arange(1))[0][0], x)
    _, log_det = codec.encode(x[None], torch.arange(1))
    assert float(log_det) == pytest.approx(float(torch.linalg.slogdet(jacobian).logabsdet), abs=1e-6)  # float32
    assert torch.allclose(codec.decode(codec.encode(x[None], torch.arange(1))[0]), x[None])
    one = DataSpec("vector", (3,), location=(2.0,) * 3, scale=(4.0,) * 3)
    same = DataSpec("vector", (3,), location=2.0, scale=4.0)
    for mine, theirs in zip(
        *(Standardized(each).encode(x[None], torch.arange(1)) for each in (one, same)), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("location", "scale", "words"),
    [
        ((0.0, 0.0), 1.0, r"data\.location: 2 numbers for values of shape \(3,\)"),
        (0.0, (1.0, 0.0, 1.0), "is not above 0"),
    ],
)
def test_spec_refuses_columns_that_do_not_fit(location: Any, scale: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataSpec("vector", (3,), location=location, scale=scale)


def test_artifact_keeps_the_columns(tmp_path: Path) -> None:
    data = DataSpec("vector", (2,), location=(1.0, 2.0), scale=(3.0, 4.0))
    dgm_models.save(dgm_models.build("vae/vae", data, network={"name": "mlp", "width": 4, "depth": 1}), tmp_path / "a")
    assert dgm_models.load(tmp_path / "a").data == data


def test_table_of_levels_is_whole_numbers(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 2, (N, 4))
    np.save(tmp_path / "t.npy", x.astype(bool))
    manifest = prepare({"name": "table", "path": str(tmp_path / "t.npy"), "levels": 2}, tmp_path / "out")
    assert (manifest.levels, manifest.dtype, manifest.location, manifest.scale) == (2, "uint8", 0.0, 1.0)
    rows = shards.load(tmp_path / "out", "train")
    assert np.array_equal(rows.x.numpy(), x[rows.id.numpy()])


GOOD = "a,b,y\n1,2,0\n2,3,1\n3,5,0\n"


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        (GOOD.replace("2,3,1", "2,,1"), {}, r"t\.csv: line 3, column 'b' holds ''; expected a number: mend it or drop"),
        (GOOD.replace("2,3,1", "2,x,1"), {}, r"line 3, column 'b' holds 'x'; expected a number"),
        (GOOD.replace("2,3,1", "2,3"), {}, r"t\.csv: line 3 has 2 cells; expected 3, as line 1 has"),
        (GOOD.replace("2,3,1", '"1,500",3,1'), {}, r"line 3, column 'a' holds '1,500'"),
        (GOOD.replace("2,3,1", "1,500,3,1"), {}, r"line 3 has 4 cells; expected 3"),
        (GOOD.replace("3,1", "nan,1"), {}, r"line 3, column 'b' holds nan; expected a finite number"),
        (GOOD.replace("5,0", "-inf,0"), {}, r"line 4, column 'b' holds -inf; expected a finite number"),
        (GOOD.replace("2,3,1", ""), {}, r"line 3 has 0 cells"),
        (GOOD, {"columns": ["a", "bb"]}, r't\.csv: no column .bb.; did you mean "b"'),
        (GOOD, {"label": "lable"}, r"no column 'lable'"),
        (GOOD.replace("3,1\n", "2,1\n").replace("5", "2"), {}, r"column 'b' is 2 in every row; leave it out"),
        (GOOD.replace("3,1", "3,0.5"), {"label": "y"}, r"line 3, column 'y' holds 0\.5; expected whole numbers from 0"),
        (GOOD, {"levels": 2}, r"line 2, column 'b' holds 2\.0; expected whole numbers 0\.\.1"),
        ("1,2\n3,4\n", {}, r"line 1 holds numbers alone; .* give header: false"),
        (GOOD.replace("a,b", "a,a"), {}, r"two columns are called 'a'"),
        ("a,b\n", {}, r"no rows"),
        (GOOD, {"columns": []}, r"columns: \[\]; expected at least one"),
        (GOOD, {"levels": 1}, r"levels: 1; expected 2 or more"),
    ],
)  # fmt: skip
def test_table_names_the_cell_that_cannot_be_taken(text: str, settings: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        prepare({"name": "table", "path": csv_of(tmp_path / "t.csv", text), **settings}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_table_refuses_files_that_are_none(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros((3, 2, 2)))
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    for file, words in {
        "t.npy": r"holds float64 \(3, 2, 2\); expected one array of numbers \[N, D\]",
        "t.parquet": r"t\.parquet: .*; expected a parquet file",
        "t.xlsx": r"expected a table in a file ending in \.csv, \.npy, \.parquet",
        "none.csv": r"none\.csv: .*; expected a table in a \.csv file",
    }.items():
        with pytest.raises(ValueError, match=words):
            prepare({"name": "table", "path": str(tmp_path / file)}, tmp_path / "out")


def test_column_that_is_constant_in_train_is_named(tmp_path: Path) -> None:
    x = np.stack([np.arange(20.0), np.zeros(20)], 1)
    section = {"name": "table", "path": str(tmp_path / "t.npy"), "split": [0.8, 0.1, 0.1]}
    np.save(tmp_path / "t.npy", np.stack([x[:, 0], np.arange(20.0)], 1))
    prepare(section, tmp_path / "first")
    x[shards.load(tmp_path / "first", "test").id[0], 1] = 1.0
    np.save(tmp_path / "t.npy", x)
    with pytest.raises(ValueError, match=r"table: column '1' of train is 0; leave it out"):
        prepare(section, tmp_path / "out")


# ---- the published tables, by files of their formats


def test_uci_binary_reads_libsvm_and_keeps_the_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(uci_binary.SETS, "adult", uci_binary.Published("adult", "a5a_{}.libsvm", 5, (2, 1, 1), (-1, 1)))
    folder = tmp_path / "mirror" / "uci-binary" / "adult"
    folder.mkdir(parents=True)
    for split, text in {"train": "-1 1:1 5:1 \n+1 2:1\n", "valid": "+1 3:1\n", "test": "-1\n"}.items():
        (folder / f"a5a_{split}.libsvm").write_text(text)
    section = {"name": "uci-binary", "which": "adult", "mirror": str(tmp_path / "mirror")}
    manifest = prepare(section, tmp_path / "out")
    assert (manifest.shape, manifest.levels, manifest.classes, dict(manifest.rows)) == (
        (5,), 2, 2, {"train": 2, "valid": 1, "test": 1},
    )  # fmt: skip
    rows = {split: shards.load(tmp_path / "out", split) for split in SPLITS}
    order = rows["train"].id.argsort()
    assert rows["train"].x[order].tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 0, 0]]
    assert rows["valid"].x.tolist() == [[0, 0, 1, 0, 0]] and rows["test"].x.tolist() == [[0, 0, 0, 0, 0]]
    labels = [part.cond for part in rows.values() if part.cond is not None]
    assert [labels[0][order].tolist(), *(each.tolist() for each in labels[1:])] == [[0, 1], [1], [0]]
    (folder / "a5a_test.libsvm").write_text("-1 6:1\n")
    (tmp_path / "cache" / "uci-binary" / "adult" / "a5a_test.libsvm.sha256").unlink()
    with pytest.raises(
        ValueError, match=r"a5a_test\.libsvm: line 1: 6:1; expected a target and index:1 with indices 1"
    ):
        prepare(section, tmp_path / "out")


def test_uci_sets_are_called_by_their_names() -> None:
    with pytest.raises(ValueError, match=r"""which: 'adlut' is not known; did you mean "adult\""""):
        uci_binary.UciBinary("adlut")
    with pytest.raises(ValueError, match="which: 'gas' is not known; allowed: miniboone, power"):
        uci_real.UciReal("gas")


def test_uci_binary_reads_digits_with_a_target_and_letters() -> None:
    x, targets = uci_binary.parse_amat("nips", b"0 1 1 0\n1 0 0 7\n", 3)
    assert x.tolist() == [[0, 1, 1], [1, 0, 0]] and targets.tolist() == [0, 7]
    with pytest.raises(ValueError, match=r"nips: line 2 has 3 cells; expected 3 of 0 and 1, and a target"):
        uci_binary.parse_amat("nips", b"0 1 1 0\n1 0 0\n", 3)
    x, targets = uci_binary.parse_letters("ocr", b"1\tc\t2\t1\t1\t0\t0\t1\t\n", 2)
    assert x.tolist() == [[0, 1]] and targets.tolist() == [2]
    with pytest.raises(ValueError, match="ocr: line 1 has 7 cells"):
        uci_binary.parse_letters("ocr", b"1\tc\t2\t1\t1\t0\t0\n", 2)
    assert sorted(uci_binary.shuffled(50)) == list(range(50)) != uci_binary.shuffled(50)


def test_uci_real_prepares_what_the_archive_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGM_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    power, miniboone = rng.normal(5, 3, (200, 8)), rng.normal(-2, 7, (100, 43))
    (tmp_path / "mirror" / "uci-real").mkdir(parents=True)
    with tarfile.open(tmp_path / "mirror" / "uci-real" / "data.tar.gz", "w:gz") as tar:
        for which, array in (("power", power), ("miniboone", miniboone)):
            stream = io.BytesIO()
            np.save(stream, array)
            info = tarfile.TarInfo(f"data/{which}/data.npy")
            info.size = len(stream.getvalue())
            tar.addfile(info, io.BytesIO(stream.getvalue()))
    monkeypatch.setenv("DGM_DATA_MIRROR", str(tmp_path / "mirror"))
    raw = uci_real.UciReal("miniboone").read(0)
    assert raw.splits == {"train": (0, 81), "valid": (81, 90), "test": (90, 100)}
    seen = miniboone[:90]
    assert np.allclose(raw.x, (miniboone - seen.mean(0)) / seen.std(0))
    raw = uci_real.UciReal("power").read(0)
    assert raw.x.shape == (200, 6) and np.allclose(raw.x[:180].mean(0), 0) and np.allclose(raw.x[:180].std(0), 1)
    bare = uci_real.noisy_power(power)
    last = np.sort(bare[:, 5])  # the one column without noise
    assert np.array_equal(last, np.sort(power[:, 7])) and not np.array_equal(bare[:, 5], power[:, 7])
    kept = power[np.argsort(power[:, 7])][:, [0, 2, 4, 5, 6]]
    noise, widest = bare[np.argsort(bare[:, 5])][:, :5] - kept, np.array([0.001, 0.01, 1, 1, 1])
    assert (noise >= 0).all() and (noise.max(0) <= widest + 1e-12).all() and (noise.max(0) > 0.9 * widest).all()
