"""Raw parquet, raw data on S3, and `prepare` on Ray Data: the bytes of one process, whatever the blocks."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from dgm_models.construct import ConfigError
from pipelines.data import shards
from pipelines.data.datasets import image_folder
from pipelines.data.datasets.image_folder import ImageFolder
from pipelines.data.datasets.npy import Npy
from pipelines.data.datasets.parquet import Parquet
from pipelines.data.prepare import Section, prepare
from pipelines.storage import place

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """s3://dgm on a server of its own, found through the environment."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="dgm")
        yield "s3://dgm"
    server.stop()


def contents(data: Path | str) -> dict[str, bytes]:
    return {entry.name: place(data).read(entry.name) for entry in place(data).list()}


def upload(folder: Path, uri: str) -> None:
    for entry in place(folder).list():
        place(uri).put(folder / entry.name, entry.name)


def png(size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def pictures(folder: Path, count: int) -> Path:
    """`count` images in three classes; their names are not in the order of their making."""
    for number in range(count):
        path = folder / ("cat", "ape", "bee")[number % 3] / f"{number * 7 % count}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    return folder


def tables(folder: Path, sizes: tuple[int, ...] = (120, 200, 180)) -> Path:
    """Parquet files with columns a, b (float64), y (int64)."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(sizes):
        columns = {"a": RNG.normal(5, 2, rows), "b": RNG.normal(size=rows), "y": RNG.integers(0, 4, rows)}
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")
    return folder


def one(path: Path, column: Any, **more: Any) -> str:
    pq.write_table(pa.table({"x": column, **more}), path)
    return str(path)


X = RNG.integers(0, 9, (6, 4))


@pytest.mark.parametrize(
    ("column", "settings", "expected"),
    [
        (pa.FixedSizeListArray.from_arrays(X.reshape(-1), 4), {"levels": 9}, X),
        (pa.array(X.tolist()), {"levels": 9, "kind": "tokens"}, X),
        (pa.array(X.astype(np.uint8).tobytes()[i : i + 4] for i in range(0, 24, 4)), {}, None),
        (pa.array([bytes(row) for row in X.tolist()], pa.binary(4)), {"levels": 9}, X),
        (pa.array([bytes(row) for row in X.tolist()], pa.binary(4)), {"kind": "image", "shape": (1, 2, 2)},
         X.reshape(6, 1, 2, 2)),
        (pa.array(X[:, 0] / 7), {}, X[:, :1] / 7),
        (pa.array((X / 7).astype(np.float32).tolist()), {"kind": "audio", "shape": (2, 2)},
         (X / 7).astype(np.float32).reshape(6, 2, 2)),
    ],
    ids=["fixed list", "list", "no image", "binary", "shape", "numbers", "floats"],
)  # fmt: skip
def test_parquet_reads_a_column(column: Any, settings: Any, expected: Any, tmp_path: Path) -> None:
    dataset = Parquet(one(tmp_path / "x.parquet", column, y=np.arange(6) % 2), column="x", label="y", **settings)
    if expected is None:  # bytes of any length are image files
        with pytest.raises(ValueError, match="column x holds image files; expected kind 'image'"):
            dataset.read(0)
        return
    raw = dataset.read(0)
    assert np.array_equal(raw.x, expected)
    assert raw.labels is not None
    assert (raw.labels.tolist(), raw.classes, raw.levels) == ([0, 1] * 3, 2, settings.get("levels"))


def test_parquet_reads_columns_in_the_order_of_the_files(tmp_path: Path) -> None:
    folder = tables(tmp_path / "t")
    every = pa.concat_tables([pq.read_table(folder / f"{n}.parquet") for n in range(3)])
    raw = Parquet(str(folder), columns=("b", "a"), label="y").read(0)
    assert np.array_equal(raw.x, np.stack([every["b"].to_numpy(), every["a"].to_numpy()], axis=1))
    assert (raw.classes, len(raw.source.files), raw.source.origin) == (4, 3, "a local parquet file")


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_decodes_image_files(struct: bool, tmp_path: Path) -> None:
    files = [png() for _ in range(3)]
    column = pa.array([{"bytes": file, "path": "a"} for file in files] if struct else files)
    raw = Parquet(one(tmp_path / "x.parquet", column), column="x", kind="image").read(0)
    assert (raw.x.shape, raw.levels) == ((3, 3, 4, 6), 256)
    assert np.array_equal(raw.x[1], np.asarray(Image.open(io.BytesIO(files[1]))).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("column", "settings", "words"),
    [
        (pa.array([[1.0, 2.0], [3.0]]), {}, r"x\.parquet: column x: lists of several lengths"),
        (pa.array([[1.0], None]), {}, "column x: row 1 is null"),
        (pa.array([[1.0], [None]]), {}, "column x: 1 nulls; expected numbers"),
        (pa.array([], pa.float64()), {}, r"x\.parquet: no rows"),
        (pa.array(["a", "b"]), {}, "column x: string; expected numbers"),
        (pa.array([1.0, 2.0]), {"column": "z"}, "no column 'z'; it has x"),
        (pa.array([1.0, 2.0]), {"shape": (2,)}, r"1 values a row; shape: \[2\] has others"),
        (pa.array([b"\x89PNG", b""]), {"kind": "image"}, "column x: row 0: unreadable image"),
    ],
)
def test_parquet_refuses_by_name(column: Any, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = one(tmp_path / "x.parquet", column)
    with pytest.raises(ValueError, match=rf"^parquet: .*{words}"):
        Parquet(path, **{"column": "x", **settings}).read(0)


def test_parquet_refuses_files_and_settings_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    for path in (tmp_path / "bad.parquet", tmp_path / "none.parquet", tmp_path / "empty"):
        with pytest.raises(ValueError, match=rf"parquet: .*{path.stem}.*expected a parquet file|no such file or"):
            Parquet(str(path), column="x").read(0)
    for settings in ({}, {"column": "x", "columns": ("a",)}, {"columns": ("a",), "kind": "image"}, {"levels": 1}):
        with pytest.raises(ValueError, match="expected"):
            Parquet("x", **({"column": "x"} if settings == {"levels": 1} else {}), **settings)  # type: ignore[arg-type]


def test_raw_data_on_s3_are_those_of_the_folder(bucket: str, tmp_path: Path) -> None:
    pictures(tmp_path / "i", 9)
    tables(tmp_path / "t", (20, 30))
    np.save(tmp_path / "x.npy", X)
    upload(tmp_path, f"{bucket}/raw")
    pairs: list[tuple[Any, Any]] = [
        (ImageFolder(f"{bucket}/raw/i"), ImageFolder(str(tmp_path / "i"))),
        (Parquet(f"{bucket}/raw/t", columns=("a", "b")), Parquet(str(tmp_path / "t"), columns=("a", "b"))),
        (Npy(f"{bucket}/raw/x.npy"), Npy(f"file://{tmp_path}/x.npy")),
    ]
    for remote, local in pairs:
        there, here = remote.read(0), local.read(0)
        assert np.array_equal(there.x, here.x)
        assert there.source.files == here.source.files
        assert there.source.origin.startswith(f"{bucket}/raw/")
        assert str(tmp_path) not in str(here.source)


def test_prepare_writes_to_s3_what_it_writes_to_a_folder(bucket: str, tmp_path: Path) -> None:
    section = {"name": "moons", "rows": 100, "rows_per_shard": 30}
    prepare(section, tmp_path / "moons")
    prepare(section | {"rows_per_shard": 10}, f"{bucket}/prepared/moons")
    assert prepare(section, f"{bucket}/prepared/moons") == shards.read_manifest(tmp_path / "moons")
    assert contents(f"{bucket}/prepared/moons") == contents(tmp_path / "moons")  # nothing of the earlier one is left


def test_section_refuses_parallel_for_what_is_read_at_once() -> None:
    with pytest.raises(ConfigError, match=r"datasets\.a\.parallel: moons is read at once; only image-folder, parquet"):
        Section.of({"name": "moons", "parallel": True}, "datasets.a")


@pytest.fixture(scope="module")
def ray(bucket: str) -> Iterator[None]:
    """Ray on this machine, with the bucket's address in its workers' environment."""
    from pipelines.cluster.session import session
    from pipelines.params import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "")
        patch.setattr(os, "cpu_count", lambda: 2)
        with session(Cluster()):
            yield


SMALL = {"rows_per_shard": 12, "split": [0.6, 0.2, 0.2], "seed": 5}


def test_prepare_on_ray_gives_the_bytes_of_one_process(
    ray: None, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = SMALL | {"name": "image-folder", "path": str(pictures(tmp_path / "i", 40)), "size": 4}
    prepare(images, tmp_path / "one")
    for block in (40, 7):
        monkeypatch.setattr(image_folder, "BLOCK", block)
        prepare(images | {"parallel": True}, tmp_path / f"ray-{block}")
        assert contents(tmp_path / f"ray-{block}") == contents(tmp_path / "one")
    rows = {"name": "parquet", "columns": ["a", "b"], "label": "y", "rows_per_shard": 200}
    here = rows | {"path": str(tables(tmp_path / "t"))}
    prepare(here, tmp_path / "rows")
    upload(tmp_path / "t", f"{bucket}/t")
    prepare(here | {"parallel": True}, f"{bucket}/rows")
    assert contents(f"{bucket}/rows") == contents(tmp_path / "rows")
    there = rows | {"path": f"{bucket}/t", "parallel": True}  # counted by the workers
    manifest = prepare(there, tmp_path / "from-s3")
    assert manifest.parts == shards.read_manifest(tmp_path / "rows").parts
    assert manifest.location == pytest.approx((5, 0), abs=0.5) and manifest.scale == pytest.approx((2, 1), abs=0.5)


def test_prepare_on_ray_names_the_first_error_and_leaves_nothing(ray: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(image_folder, "BLOCK", 4)
    folder = pictures(tmp_path / "i", 12)
    for name in ("ape", "cat"):
        sorted((folder / name).iterdir())[-1].write_bytes(b"no image")
    last = sorted((folder / "ape").iterdir())[-1].name
    section = SMALL | {"name": "image-folder", "path": str(folder)}
    for parallel in (False, True):
        with pytest.raises(ValueError, match=rf"^image-folder: .*/ape/{last}: unreadable image"):
            prepare(section | {"parallel": parallel}, tmp_path / "out")
    table = {"a": np.where(np.arange(60) == 50, np.nan, np.arange(60))}
    for number in range(2):
        (tmp_path / "t").mkdir(exist_ok=True)
        one = {name: column[number * 30 : number * 30 + 30] for name, column in table.items()}
        pq.write_table(pa.table(one), tmp_path / "t" / f"{number}.parquet")
    section = SMALL | {"name": "parquet", "path": str(tmp_path / "t"), "column": "a"}
    for parallel in (False, True):
        with pytest.raises(ValueError, match=r"^parquet: row 50 holds nan at \(0,\); expected finite float32"):
            prepare(section | {"parallel": parallel}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "t"]
