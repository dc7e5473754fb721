"""Streams: one order for any number of workers, resumable anywhere, verified, bounded; staged and fetched copies."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer

from dgm_models.construct import ConfigError
from dgm_models.protocols import Batch
from dgm_models.training.runtime import Runtime
from dgm_models.training.source import ArraySource
from pipelines.data import shards
from pipelines.data import stage as staging
from pipelines.data import stream as streaming
from pipelines.data.order import Order
from pipelines.data.prepare import Settings, prepare, write
from pipelines.data.raw import Raw, Source
from pipelines.data.source import source_of
from pipelines.data.stage import fetch_dataset, stage
from pipelines.data.stream import StreamSource
from pipelines.params import Stream, identity, parse

ROWS, SHARD, BATCH, BUFFER, LANES = 997, 60, 24, 96, 8  # 997: five rows too many for 8 lanes
SPLITS = {"train": (0, 997), "valid": (997, 1122), "test": (1122, 1246)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "numbers"
    x = np.arange(1246, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    raw = Raw(x, "vector", "free", Source("here"), labels=np.arange(1246) % 7, classes=7, splits=SPLITS)
    write("numbers", raw, Settings(rows_per_shard=SHARD), out)
    return out


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


def stream_of(data: Path | str, **changes: Any) -> StreamSource:
    settings = {"seed": 3, "batch_size": BATCH, "buffer": BUFFER, "lanes": LANES} | changes
    return StreamSource(data, "train", **settings)


def equal(a: Batch, b: Batch) -> bool:
    assert a.cond is not None
    assert b.cond is not None
    return all(torch.equal(*pair) for pair in ((a.x, b.x), (a.id, b.id), (a.key, b.key), (a.cond, b.cond)))


def test_stream_rows_are_those_of_the_split(folder: Path) -> None:
    rows, batch = shards.load(folder, "train"), stream_of(folder).batch(0, 5 * BATCH)
    assert rows.cond is not None
    assert batch.cond is not None
    where = {int(row): at for at, row in enumerate(rows.id)}
    at = [where[int(row)] for row in batch.id]
    assert torch.equal(batch.x, rows.x[at])
    assert torch.equal(batch.cond, rows.cond[at])
    assert torch.equal(batch.key, torch.arange(5 * BATCH))
    assert stream_of(folder).spec == shards.read_manifest(folder).spec()


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_stream_order_is_the_same_for_any_number_of_workers(folder: Path, world: int) -> None:
    alone, workers = stream_of(folder), [stream_of(folder) for _ in range(world)]
    for step in range(50):  # past the end of an epoch
        parts = []
        for rank, worker in enumerate(workers):
            first, last = Runtime(rank=rank, world=world).share(BATCH)
            parts.append(worker.batch(step * BATCH + first, step * BATCH + last))
        whole = alone.batch(step * BATCH, (step + 1) * BATCH)
        assert torch.equal(torch.cat([part.id for part in parts]), whole.id)
        assert torch.equal(torch.cat([part.x for part in parts]), whole.x)


def test_stream_gives_every_row_at_most_once_an_epoch(folder: Path) -> None:
    source = stream_of(folder)
    assert len(source) == ROWS - ROWS % LANES == 992
    known = set(shards.load(folder, "train").id.tolist())
    lane, left = len(source) // LANES, []
    ids = source.batch(0, 3 * 1008).id.numpy().reshape(-1, LANES, BATCH // LANES)  # [batch, lane, slot]
    per_lane = ids.transpose(1, 0, 2).reshape(LANES, -1)
    for epoch in range(3):
        seen = per_lane[:, epoch * lane : (epoch + 1) * lane].reshape(-1).tolist()
        assert len(set(seen)) == len(seen) == 992
        left.append(known - set(seen))
    assert all(len(each) == ROWS % LANES for each in left)
    assert left[0] != left[1]  # the remainder is another one


def test_stream_goes_on_at_any_position(folder: Path) -> None:
    straight = stream_of(folder)
    batches = [straight.batch(step * BATCH, (step + 1) * BATCH) for step in range(90)]
    for step in (0, 1, 17, 41, 42, 89):
        assert equal(stream_of(folder).batch(step * BATCH, (step + 1) * BATCH), batches[step])
    jumping = stream_of(folder)
    for step in (50, 3, 4, 88, 0):
        assert equal(jumping.batch(step * BATCH, (step + 1) * BATCH), batches[step])


def test_stream_order_depends_on_seed_and_epoch_and_is_shuffled(folder: Path) -> None:
    first, other = (stream_of(folder, seed=seed).batch(0, 2 * 1008).id for seed in (3, 4))
    assert not torch.equal(first, other)
    assert not torch.equal(first[:992], first[992:1984])
    stored = shards.load(folder, "train").id.tolist()
    at = np.array([stored.index(int(row)) for row in first[: 10 * BATCH : BATCH // LANES]])
    assert abs(np.diff(at)).min() > 1  # neighbours of the stored order are not neighbours of a batch


def test_order_of_one_lane_shuffles_within_its_window() -> None:
    order = Order((10, 10, 10), 0, 5, 10, 1)
    spans = [list(order.spans(0, window)) for window in ((0, 0), (0, 1), (0, 2))]
    assert sorted(span for window in spans for span in window) == [(0, 0, 10), (1, 0, 10), (2, 0, 10)]
    assert (order.after((0, 1)), order.after((0, 2))) == ((0, 2), (1, 0))
    assert sorted(order.places(0, (0, 0)).tolist()) == list(range(10))
    places = [order.places(*where).tolist() for where in ((0, (0, 0)), (0, (0, 1)), (0, (1, 0)), (1, (0, 0)))]
    assert len({str(each) for each in [*places, list(range(10))]}) == 5  # by lane, epoch and window


def test_stream_reads_the_shards_of_its_own_lanes_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def read_part(data: Any, manifest: Any, part: shards.Part) -> shards.Rows:
        read.append(part.path)
        return shards.read_part(data, manifest, part)

    monkeypatch.setattr(streaming, "read_part", read_part)
    source = stream_of(folder, lanes=4)
    for step in range(41):
        source.batch(step * BATCH, step * BATCH + BATCH // 4)  # one of four workers
    assert len(set(read)) <= 17 // 4 + 2 + 2  # its quarter of 17 shards, cut at both ends, and what was read ahead


def test_stream_memory_is_bounded_by_the_buffer_and_a_shard_a_lane(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def read_part(data: Any, manifest: Any, part: shards.Part) -> shards.Rows:
        nonlocal most
        rows = shards.read_part(data, manifest, part)
        alive.add(rows.x)
        most = max(most, len(alive))
        return rows

    monkeypatch.setattr(streaming, "read_part", read_part)
    for batch_size in (BATCH, 8):
        source, rows = stream_of(folder, batch_size=batch_size), []
        for step in range(1000 // batch_size):
            source.batch(step * batch_size, (step + 1) * batch_size)
            rows.append(source.held())
        assert 0 < max(rows) <= 2 * BUFFER + LANES * SHARD
        del source
        gc.collect()
        assert not alive
    assert 1 < most <= LANES


def test_stream_lets_go_of_the_lanes_of_other_workers(folder: Path) -> None:
    source = stream_of(folder)
    source.batch(0, BATCH)  # initialisation reads a whole batch on every worker
    for step in range(3):
        source.batch(step * BATCH, step * BATCH + BATCH // 4)
    assert source.held() <= (2 * BUFFER) // 4 + LANES // 4 * SHARD


def test_stream_refuses_a_changed_byte_and_a_missing_shard_by_name(tmp_path: Path) -> None:
    prepare({"name": "moons", "rows": 500, "rows_per_shard": 50}, tmp_path / "moons")
    path = tmp_path / "moons" / "train" / "part-00003.parquet"
    content = path.read_bytes()
    for damage in (lambda: path.write_bytes(content[:-1] + bytes([content[-1] ^ 1])), path.unlink):
        damage()
        source = StreamSource(tmp_path / "moons", "train", 0, 8, 64, 4)
        with pytest.raises(ValueError, match=r"moons/train/part-00003\.parquet: .*dvc repro -f prepare@moons"):
            source.batch(0, len(source))
        with pytest.raises(ValueError, match=r"part-00003\.parquet"):  # and again, not a wrong row
            source.batch(0, len(source))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lanes": 7}, "stream.lanes: 7 does not divide train.batch_size: 24; give lanes: 6"),
        ({"lanes": 48}, "stream.lanes: 48 does not divide train.batch_size: 24; give lanes: 24"),
        ({"buffer": 23}, "stream.buffer: 23 rows .*train.batch_size: 24; give buffer: 24 or more"),
        ({"batch_size": 2000, "lanes": 1000, "buffer": 2000}, "stream.lanes: 1000 of 997 rows"),
    ],
)
def test_stream_refuses_numbers_that_do_not_fit(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stream_of(folder, **changes)


RUN = {
    "dataset": "digits",
    "method": {"name": "vae/vae"},
    "network": {"name": "mlp"},
    "train": {"steps": 1, "batch_size": 24},
}


def run_of(**changes: Any) -> Any:
    return parse({"datasets": {"digits": {"name": "digits"}}, "runs": {"vae": RUN | changes}}).runs["vae"]


def test_params_stream_enters_the_identity_when_given() -> None:
    assert run_of().stream is None
    assert "stream" not in identity(run_of())
    assert run_of(stream={"lanes": 4}).stream == Stream(8192, 4)
    assert identity(run_of(stream={"lanes": 4})) == identity(run_of()) | {"stream": {"buffer": 8192, "lanes": 4}}


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ({"lanes": 7}, r"^runs\.vae\.stream\.lanes: 7 does not divide train\.batch_size: 24; give lanes: 6"),
        ({"buffer": 8}, r"^runs\.vae\.stream\.buffer: 8 rows"),
        ({"bufer": 8}, r'^runs\.vae\.stream\.bufer: unknown key; did you mean "buffer"'),
        ({"lanes": 0}, r"^runs\.vae\.stream\.lanes: 0"),
    ],
)
def test_params_stream_refuses_by_path(stream: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_of(stream=stream)


def test_source_of_is_in_memory_or_streamed(folder: Path) -> None:
    held = source_of(folder, "valid", None)
    assert isinstance(held, ArraySource)
    assert torch.equal(held.batch(0, 9).id, shards.load(folder, "valid").id[:9])
    streamed = source_of(folder, "train", 3, Stream(BUFFER, LANES), BATCH)
    assert equal(streamed.batch(0, BATCH), stream_of(folder).batch(0, BATCH))
    with pytest.raises(ValueError, match="a stream is shuffled and needs a seed"):
        source_of(folder, "valid", None, Stream(), BATCH)


def test_stage_to_a_local_storage_copies_nothing(folder: Path, tmp_path: Path) -> None:
    assert stage(folder, str(tmp_path)) == str(folder)
    assert stage(folder, f"file://{tmp_path}") == str(folder)
    assert list(tmp_path.iterdir()) == []


def test_stage_copies_once_and_the_manifest_last(folder: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    kind = type(staging.place(bucket))
    for verb in ("put", "write"):
        original = getattr(kind, verb)

        def spy(self: Any, first: Any, second: Any, original: Any = original, verb: str = verb) -> Any:
            sent.append(str(second if verb == "put" else first))
            return original(self, first, second)

        monkeypatch.setattr(kind, verb, spy)
    manifest = shards.read_manifest(folder)
    uri = stage(folder, f"{bucket}/once")
    assert uri == f"{bucket}/once/data/{manifest.digest}"
    assert sorted(sent[:-1]) == sorted(part.path for part in manifest.parts)
    assert sent[-1] == "manifest.json"
    assert stage(folder, f"{bucket}/once") == uri
    assert len(sent) == len(manifest.parts) + 1  # nothing more
    assert stage(uri, f"{bucket}/twice") == uri
    target = staging.place(uri)
    target.delete("manifest.json")  # as a stage that was killed leaves it
    target.delete(manifest.parts[2].path)
    stage(folder, f"{bucket}/once")
    assert sent[-2:] == [manifest.parts[2].path, "manifest.json"]
    assert shards.read_manifest(uri) == manifest


def test_stage_copies_nothing_damaged(bucket: str, tmp_path: Path) -> None:
    prepare({"name": "moons", "rows": 100}, tmp_path / "moons")
    part = tmp_path / "moons" / "test" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"moons/test/part-00000\.parquet: .*the manifest expects"):
        stage(tmp_path / "moons", f"{bucket}/damaged")
    assert not [e for e in staging.place(f"{bucket}/damaged").list() if e.name.endswith("manifest.json")]


def test_stream_from_s3_gives_the_batches_of_the_folder(folder: Path, bucket: str, tmp_path: Path) -> None:
    uri = stage(folder, bucket)
    local, remote = stream_of(folder), stream_of(uri)
    for step in range(45):
        assert equal(remote.batch(step * BATCH, (step + 1) * BATCH), local.batch(step * BATCH, (step + 1) * BATCH))
    assert torch.equal(shards.load(uri, "test").x, shards.load(folder, "test").x)


def test_stream_from_s3_refuses_a_changed_byte(folder: Path, bucket: str) -> None:
    uri = stage(folder, f"{bucket}/changed")
    part = shards.read_manifest(folder).parts[0]
    content = bytearray((folder / part.path).read_bytes())
    content[40] ^= 1
    staging.place(uri).write(part.path, bytes(content))
    with pytest.raises(ValueError, match=rf"{part.path}: .*delete s3://dgm/changed/data/.* and repeat the command"):
        stream_of(uri).batch(0, 992)


def test_fetch_keeps_one_verified_copy_a_node(folder: Path, bucket: str, tmp_path: Path, monkeypatch: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    uri, got = stage(folder, f"{bucket}/fetch"), []
    kind = type(staging.place(uri))
    original = kind.get
    monkeypatch.setattr(kind, "get", lambda self, name, target: (got.append(name), original(self, name, target)))
    with ThreadPoolExecutor(3) as workers:
        folders = list(workers.map(lambda _: fetch_dataset(uri, tmp_path), range(3)))
    manifest = shards.read_manifest(folder)
    assert set(folders) == {tmp_path / manifest.digest}
    assert sorted(got) == sorted(part.path for part in manifest.parts)  # one copied, two waited
    assert shards.read_manifest(folders[0]) == manifest
    assert torch.equal(shards.load(folders[0], "train").x, shards.load(folder, "train").x)
    assert sorted(os.listdir(folders[0])) == ["manifest.json", "test", "train", "valid"]
    assert fetch_dataset(str(folder), tmp_path) == folder


def test_fetch_takes_a_split_alone_and_nothing_damaged(folder: Path, bucket: str, tmp_path: Path) -> None:
    uri = stage(folder, f"{bucket}/split")
    part = next(part for part in shards.read_manifest(folder).parts if part.split == "test")
    staging.place(uri).write(part.path, (folder / part.path).read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{part.path}: .*the manifest expects"):
        fetch_dataset(uri, tmp_path)
    found = tmp_path / shards.read_manifest(folder).digest
    assert not (found / "test").exists()
    assert len(shards.load(fetch_dataset(uri, tmp_path, ("valid",)), "valid")) == 125
