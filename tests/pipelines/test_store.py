"""The run store, folder and s3:// alike: whole folders, the newest intact checkpoint, and one owner at a time."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dgm_models.training import checkpoint
from pipelines.cluster.store import Fenced, RunStore, ray_storage
from pipelines.storage import StorageError, abandoned, sweep
from tests.support import s3

DIGEST = "abc"


@pytest.fixture(scope="module")
def server() -> Iterator[s3.Front]:
    with s3.stand_in() as behind, s3.front(behind) as server:
        yield server


@pytest.fixture
def front(server: s3.Front, monkeypatch: pytest.MonkeyPatch) -> s3.Front:
    server.faults, server.fired = [], []
    s3.environment(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    return server


@pytest.fixture
def bucket(front: s3.Front, tmp_path: Path) -> str:
    return f"s3://{s3.BUCKET}/{tmp_path.name}/store"


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "folder" else str(request.getfixturevalue("bucket"))


def _write(value: float) -> Callable[[Path], None]:
    return lambda folder: checkpoint.write(folder, {"weights": {"w": torch.full((3,), value)}}, {"state": {"v": value}})


def _artifact(tmp_path: Path, value: float = 1.0) -> Path:
    folder = tmp_path / f"made-{value}"
    _write(value)(folder)
    return folder


def _newest(store: RunStore) -> float | None:
    with store.newest() as folder:
        return None if folder is None else float(checkpoint.read_tensors(folder, "weights")["w"][0])


def _steps(store: RunStore) -> list[int]:
    head = store.head()
    return [each.step for each in head.checkpoints] if head else []


def _folders(store: RunStore) -> list[str]:
    return sorted({entry.name.split("/")[0] for entry in store.place.list() if "/" in entry.name})


def _flip(store: RunStore, name: str) -> None:
    content = bytearray(store.place.read(name))
    content[-1] ^= 1  # one bit: it still loads
    store.place.write(name, bytes(content))


def test_newest_checkpoint_is_found_and_old_ones_dropped(storage: str) -> None:
    store = RunStore(storage, DIGEST, keep=2)
    assert _newest(store) is None and store.head() is None
    for step in (10, 20, 30):
        store.save(step, _write(float(step)))
    assert _newest(RunStore(storage, DIGEST)) == 30.0
    assert _steps(store) == [20, 30]
    assert _folders(store) == ["step-00000020-g1", "step-00000030-g1"]
    assert _newest(RunStore(storage, "other")) is None


@pytest.mark.parametrize("hurt", ["flipped", "missing", "no manifest", "another manifest"])
def test_damaged_checkpoint_is_passed_over_and_named(storage: str, caplog: pytest.LogCaptureFixture, hurt: str) -> None:
    store = RunStore(storage, DIGEST)
    store.save(10, _write(1.0))
    store.save(20, _write(2.0))
    file = f"step-00000020-g1/{'weights.safetensors' if hurt in ('flipped', 'missing') else 'manifest.json'}"
    if hurt == "flipped":
        _flip(store, file)
    elif hurt == "another manifest":  # the folder agrees with itself, and is not what was acknowledged
        store.place.write(file, store.place.read(file) + b"\n")
    else:
        store.place.delete(file)
    assert _newest(store) == 1.0
    assert "passing over a damaged checkpoint" in caplog.text and f"{store.place.uri}/{file}" in caplog.text
    store.place.delete("step-00000010-g1")
    assert _newest(store) is None


def test_saving_at_a_step_forgets_what_lay_at_or_beyond_it(storage: str) -> None:
    """Two damaged checkpoints must not push out the one that was made after passing them over."""
    store = RunStore(storage, DIGEST, keep=2)
    for step in (20, 30):
        store.save(step, _write(float(step)))
        _flip(store, f"step-{step:08d}-g1/weights.safetensors")
    assert _newest(store) is None
    store.save(10, _write(10.0))
    assert (_newest(store), _steps(store), _folders(store)) == (10.0, [10], ["step-00000010-g1"])
    store.save(10, _write(11.0))
    assert (_newest(store), _folders(store)) == (11.0, ["step-00000010-g1.2"])


def test_folder_that_the_head_does_not_name_does_not_count(storage: str, tmp_path: Path) -> None:
    store = RunStore(storage, DIGEST)
    store.place.put_folder(_artifact(tmp_path), "step-00000090-g1")  # its writer died before it could name it
    store.place.put_folder(_artifact(tmp_path), "artifact-g1")
    store.place.write("progress.json", b"{}")  # others keep documents here
    assert _newest(store) is None and not store.has_artifact()
    store.save(10, _write(1.0))
    assert _newest(store) == 1.0
    assert _folders(store) == ["step-00000010-g1"] and store.place.read("progress.json") == b"{}"


def test_unreadable_head_is_an_error_with_the_way_out(storage: str) -> None:
    store = RunStore(storage, DIGEST)
    store.save(10, _write(1.0))
    store.place.write("head.json", b'{"generation": 1')
    for attempt in (store.head, store.has_artifact, store.claim, lambda: _newest(store)):
        with pytest.raises(ValueError, match=r"abc/head.json: not readable .*restore it .*or remove .*abc to train"):
            attempt()
    assert _folders(store) == ["step-00000010-g1"]


def test_published_artifact_is_fetched_whole(storage: str, tmp_path: Path) -> None:
    store = RunStore(storage, DIGEST)
    assert not store.has_artifact()
    with pytest.raises(checkpoint.Damaged, match="no artifact was published"), store.fetched("artifact"):
        pass
    store.save(10, _write(1.0))
    for value in (1.0, 2.0):
        store.publish("artifact", _artifact(tmp_path, value))
    with RunStore(storage, DIGEST).fetched("artifact") as found:
        assert sorted(path.name for path in found.iterdir()) == ["manifest.json", "state.json", "weights.safetensors"]
        assert checkpoint.read_document(found, "state") == {"v": 2.0}
    store.drop_checkpoints()
    assert _newest(store) is None and store.has_artifact()
    (folder,) = _folders(store)
    _flip(store, f"{folder}/weights.safetensors")
    assert not store.has_artifact()
    with pytest.raises(checkpoint.Damaged, match=r"weights\.safetensors: its content"), store.fetched("artifact"):
        pass


def test_folder_is_read_without_a_copy(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path), DIGEST)
    store.save(10, _write(1.0))
    with store.newest() as found:
        assert found == tmp_path / DIGEST / "step-00000010-g1"


# ---------------------------------------------------------------------------------- one owner at a time


def test_owner_before_is_fenced_and_leaves_nothing(storage: str, tmp_path: Path) -> None:
    first, second = RunStore(storage, DIGEST), RunStore(storage, DIGEST)
    assert first.claim() == 1
    first.save(10, _write(1.0))
    assert second.claim() == 2
    written = []
    for attempt in (
        lambda: first.save(20, lambda folder: written.append(folder)),
        lambda: first.publish("artifact", _artifact(tmp_path)),
        first.drop_checkpoints,
    ):
        with pytest.raises(Fenced, match="this process owned generation 1; generation 2 has taken over"):
            attempt()
    assert written == [], "nothing is written once it is known to be for nothing"
    assert _newest(second) == 1.0 and _folders(second) == ["step-00000010-g1"] and not second.has_artifact()
    second.save(20, _write(2.0))
    assert _newest(first) == 2.0 and _folders(second) == ["step-00000010-g1", "step-00000020-g2"]


def test_owner_that_is_fenced_while_it_writes_leaves_nothing(storage: str) -> None:
    first, second = RunStore(storage, DIGEST), RunStore(storage, DIGEST)
    first.save(10, _write(1.0))

    def taken_over_meanwhile(folder: Path) -> None:
        _write(2.0)(folder)
        second.claim()

    with pytest.raises(Fenced, match="generation 2 has taken over"):
        first.save(20, taken_over_meanwhile)
    assert _newest(second) == 1.0 and _folders(second) == ["step-00000010-g1"]
    assert abandoned(second.place, 0) == []


def test_claims_at_once_have_different_generations(storage: str) -> None:
    stores = [RunStore(storage, DIGEST) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        generations = list(pool.map(lambda store: store.claim(), stores))
    assert sorted(generations) == list(range(1, 9))
    owner = stores[generations.index(8)]
    for store in stores:
        if store is owner:
            store.save(10, _write(1.0))
        else:
            with pytest.raises(Fenced):
                store.save(10, _write(2.0))
    assert _newest(owner) == 1.0


def test_store_that_vanished_under_its_owner_is_not_begun_anew(storage: str) -> None:
    store = RunStore(storage, DIGEST)
    store.save(10, _write(1.0))
    store.place.delete("head.json")
    with pytest.raises(Fenced, match=r"head\.json is gone"):
        store.save(20, _write(2.0))
    assert RunStore(storage, DIGEST).claim() == 1


# ---------------------------------------------------------------------------------- faults


def test_full_disk_leaves_the_checkpoints_before(storage: str) -> None:
    store = RunStore(storage, DIGEST)
    store.save(10, _write(1.0))
    before = [entry.name for entry in store.place.list()]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # files end there, as on a full disk
    try:
        with pytest.raises(OSError, match="step-00000020-g1: could not be written"):
            store.save(20, lambda folder: checkpoint.write(folder, {"weights": {"w": torch.zeros(1 << 16)}}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in store.place.list()] == before and abandoned(store.place, 0) == []
    assert _newest(store) == 1.0
    store.save(20, _write(2.0))
    assert _newest(store) == 2.0


def test_head_that_cannot_be_written_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(str(tmp_path), DIGEST)
    store.save(10, _write(1.0))

    def full(*words: object) -> str:
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(type(store.place), "swap", full)
        with pytest.raises(StorageError, match="no space left"):
            store.save(20, _write(2.0))
    assert _folders(store) == ["step-00000010-g1"] and _newest(store) == 1.0


def test_head_whose_answer_is_lost_is_acknowledged_once(front: s3.Front, bucket: str) -> None:
    store = RunStore(bucket, DIGEST)
    front.faults = [("PUT", "head.json", "lost"), ("PUT", "head.json", "lost"), ("PUT", "head.json", "reset")]
    store.claim()
    store.save(10, _write(1.0))
    store.save(20, _write(2.0))
    assert front.fired == ["lost", "lost", "reset"]
    assert (_newest(store), _steps(store), store.generation) == (2.0, [10, 20], 1)


def test_upload_that_is_refused_leaves_the_checkpoints_before(front: s3.Front, bucket: str) -> None:
    store = RunStore(bucket, DIGEST)
    store.save(10, _write(1.0))
    front.faults = [("PUT", "g1/manifest.json", "denied")]
    with pytest.raises(StorageError, match=r"step-00000020-g1/manifest.json: put was refused .*403"):
        store.save(20, _write(2.0))
    assert _newest(store) == 1.0 and _folders(store) == ["step-00000010-g1"] and abandoned(store.place, 0) == []


def test_old_folder_that_cannot_be_removed_costs_no_checkpoint(
    front: s3.Front, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = RunStore(bucket, DIGEST, keep=1)
    store.save(10, _write(1.0))
    front.faults = [("POST", "delete", "denied")] * 2  # of the mark of an unfinished folder, and of the old one
    store.save(20, _write(2.0))
    assert front.fired == ["denied"] * 2 and "old folder could not be removed" in caplog.text
    assert (_newest(store), _folders(store)) == (2.0, ["step-00000010-g1", "step-00000020-g1"])
    assert [left.name for left in sweep(store.place, 0)] == ["step-00000020-g1"]  # the mark alone
    store.save(30, _write(3.0))
    assert (_newest(store), _folders(store)) == (3.0, ["step-00000030-g1"])


@pytest.mark.parametrize("times", [1, 3])
def test_bit_that_flips_on_the_way_is_read_again(front: s3.Front, bucket: str, times: int) -> None:
    """Once: the checkpoint is whole the second time. Every time: the one before is used."""
    store = RunStore(bucket, DIGEST)
    store.save(10, _write(1.0))
    store.save(20, _write(2.0))
    front.faults = [("GET", "step-00000020-g1/weights", "flip")] * times
    assert _newest(store) == (2.0 if times == 1 else 1.0)
    assert front.fired == ["flip"] * times


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a folder nor s3://"):
        RunStore("gs://bucket/x", DIGEST)


def test_ray_storage_of_an_endpoint_has_a_file_system(bucket: str, tmp_path: Path) -> None:
    folder, filesystem = ray_storage(f"{bucket}/tune")
    assert folder == f"{bucket.removeprefix('s3://')}/tune"
    with filesystem.open_output_stream(f"{folder}/state") as stream:
        stream.write(b"state" * 1000)
    assert RunStore(bucket, "tune").place.read("state") == b"state" * 1000
    assert ray_storage(str(tmp_path)) == (str(tmp_path), None)
