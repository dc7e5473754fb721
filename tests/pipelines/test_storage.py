"""Places: a folder and S3 alike, conditional writes, and every fault that may pass or will not."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.storage import Changed, Corrupted, Place, StorageError, abandoned, place, sweep
from pipelines.storage import bucket as buckets
from pipelines.storage.s3 import CORRUPT_ATTEMPTS
from tests.support import s3

AGES = 100 * 365 * 86400.0  # moto says of every upload that it began in 2010


@pytest.fixture(scope="module")
def behind() -> Iterator[str]:
    with s3.stand_in() as address:
        yield address


@pytest.fixture(scope="module")
def server(behind: str) -> Iterator[s3.Front]:
    with s3.front(behind) as server:
        yield server


@pytest.fixture
def front(server: s3.Front, monkeypatch: pytest.MonkeyPatch) -> s3.Front:
    server.faults, server.fired = [], []
    s3.environment(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    return server


@pytest.fixture
def bucket(front: s3.Front, tmp_path: Path) -> Place:
    return place(f"s3://{s3.BUCKET}/{tmp_path.name}/p")


@pytest.fixture(params=["folder", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    found = place(tmp_path / "place") if request.param == "folder" else request.getfixturevalue("bucket")
    assert isinstance(found, Place)
    return found


def make(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "manifest.json").write_text("{}")
    return folder


def names(where: Place, prefix: str = "") -> list[str]:
    return [entry.name for entry in where.list(prefix)]


# ---------------------------------------------------------------------------------- every method, local and s3 alike


def test_written_content_is_read_back_with_its_version(where: Place) -> None:
    assert names(where) == []
    version = where.write("a/x", b"one")
    assert where.read("a/x") == b"one"
    assert where.read_versioned("a/x") == (b"one", version)
    assert where.write("a/x", b"two") != version
    assert where.at("a").read("x") == b"two"
    assert where.read_versioned("a/x")[1] == where.list()[0].version


def test_list_is_recursive_sorted_and_below_its_prefix(where: Place) -> None:
    for name in ("b", "a/z", "a/c/d", "ab"):
        where.write(name, name.encode())
    assert names(where) == ["a/c/d", "a/z", "ab", "b"]
    assert names(where, "a/") == ["a/c/d", "a/z"]
    assert names(where, "a") == ["a/c/d", "a/z", "ab"]
    assert names(where.at("a/c")) == ["d"]
    assert names(where, "none/") == []
    (entry,) = where.list("ab")
    assert entry.bytes == 2 and abs(entry.modified - time.time()) < 3600


def test_missing_file_is_not_found(where: Place, tmp_path: Path) -> None:
    where.write("a/x", b"")
    for name in ("y", "a", "a/x/y"):
        with pytest.raises(FileNotFoundError, match="not there"):
            where.read(name)
        with pytest.raises(FileNotFoundError, match="not there"):
            where.get(name, tmp_path / "target")
    with pytest.raises(FileNotFoundError, match="not there"):
        where.get_folder("none", tmp_path / "target")
    with pytest.raises(FileNotFoundError, match="not there"):
        where.put(tmp_path / "none", "x")
    assert not (tmp_path / "target").exists()


def test_name_that_leaves_the_place_is_refused(where: Place) -> None:
    for name in ("../x", "a/../../x", "/x", "", "a//b", "."):
        with pytest.raises(ValueError, match="is not a name below a place"):
            where.write(name, b"")
        with pytest.raises(ValueError, match="is not a name below a place"):
            where.delete(name)


def test_file_in_parts_comes_back_whole(where: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "PART", 5 << 20)  # the least that S3 takes
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * (11 << 12))  # 11 MiB
    where.put(source, "big")
    where.get("big", tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == source.read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["back"]
    assert where.list()[0].bytes == 11 << 20


def test_folder_comes_back_whole_and_goes_whole(where: Place, tmp_path: Path) -> None:
    folder = make(tmp_path / "f", a=b"1", sub__b=b"2")
    where.put_folder(folder, "runs/one")
    where.write("runs/one-more", b"stays")
    assert names(where) == ["runs/one-more", "runs/one/a", "runs/one/manifest.json", "runs/one/sub/b"]
    where.get_folder("runs/one", tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "b").read_bytes() == b"2"
    where.delete("runs/one")
    where.delete("runs/one")
    assert names(where) == ["runs/one-more"]
    where.delete("runs/one-more")
    assert names(where) == [] and sweep(where, 0) == []


def test_write_new_refuses_what_is_there(where: Place) -> None:
    version = where.write_new("x", b"one")
    with pytest.raises(FileExistsError, match="there already"):
        where.write_new("x", b"two")
    assert where.read_versioned("x") == (b"one", version)


def test_swap_refuses_another_version_and_a_removed_file(where: Place) -> None:
    old = where.write("x", b"one")
    new = where.swap("x", b"two", old)
    assert where.read_versioned("x") == (b"two", new)
    with pytest.raises(Changed, match="another writer"):
        where.swap("x", b"three", old)
    assert where.read("x") == b"two"
    where.delete("x")
    with pytest.raises(Changed, match="removed"):
        where.swap("x", b"three", new)
    assert names(where) == []


def _race(write: Callable[[bytes], str], lost: type[Exception]) -> list[bytes]:
    """The contents that 16 writers at once believe to have written."""
    start = threading.Barrier(16)

    def one(number: int) -> bytes | None:
        content = b"%d" % number
        start.wait()
        try:
            write(content)
            return content
        except lost:
            return None

    with ThreadPoolExecutor(16) as pool:
        return [content for content in pool.map(one, range(16)) if content is not None]


def test_of_16_new_writers_one_wins(where: Place) -> None:
    assert _race(lambda content: where.write_new("x", content), FileExistsError) == [where.read("x")]
    assert names(where) == ["x"]


def test_of_16_swaps_one_wins(where: Place) -> None:
    version = where.write("x", b"before")
    assert _race(lambda content: where.swap("x", content, version), Changed) == [where.read("x")]


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "s3:///x", "file://other/x", "http://host/x"])
def test_unknown_address_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="neither a folder nor s3://"):
        place(uri)


def test_file_uri_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    place(f"file://{tmp_path}/a%20b").write("x", b"1")
    assert (tmp_path / "a b" / "x").read_bytes() == b"1"
    assert place(f"file://{tmp_path}").local == tmp_path
    assert place("s3://bucket/x/").uri == "s3://bucket/x" and place("s3://bucket").uri == "s3://bucket"


# ---------------------------------------------------------------------------------- faults that pass


@pytest.mark.parametrize("fault", ["busy", "lost", "reset"])
def test_write_survives_a_passing_fault(front: s3.Front, bucket: Place, fault: str) -> None:
    front.faults = [("PUT", "/x$", fault)] * 2
    bucket.write("x", b"content")
    assert front.fired == [fault, fault]
    assert bucket.read("x") == b"content"


@pytest.mark.parametrize("fault", ["busy", "reset", "cut"])
def test_read_survives_a_passing_fault(front: s3.Front, bucket: Place, tmp_path: Path, fault: str) -> None:
    bucket.write("x", b"content" * 1000)
    front.faults = [("GET", "/x$", fault)] * 2
    assert bucket.read("x") == b"content" * 1000
    assert front.fired == [fault, fault]
    front.faults = [("GET", "/x$", fault)] * 2
    bucket.get("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"content" * 1000
    assert front.fired == [fault] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_parts_survive_passing_faults(
    front: s3.Front, bucket: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "PART", 5 << 20)
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * (11 << 12))
    front.faults = [("PUT", "partNumber=2", "busy"), ("PUT", "partNumber=3", "reset"), ("POST", "uploadId", "lost")]
    bucket.put(source, "big")
    front.faults = [("GET", "/big$", "cut")] * 2
    bucket.get("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert front.faults == [] and len(front.fired) == 5


@pytest.mark.parametrize("fault", ["lost", "reset"])
def test_new_write_whose_answer_is_lost_is_still_ours(front: s3.Front, bucket: Place, fault: str) -> None:
    front.faults = [("PUT", "/x$", fault)]
    version = bucket.write_new("x", b"mine")  # the repetition gets 412
    assert front.fired == [fault]
    assert bucket.read_versioned("x") == (b"mine", version)
    front.faults = [("PUT", "/x$", fault)]
    version = bucket.swap("x", b"mine again", version)
    assert bucket.read_versioned("x") == (b"mine again", version)
    assert front.fired == [fault, fault]


def test_lost_answer_to_a_losing_write_is_no_victory(front: s3.Front, bucket: Place) -> None:
    """The same content, but of another writer: what was written by whom is told by the id, not by the bytes."""
    bucket.write_new("x", b"same")
    front.faults = [("PUT", "/x$", "lost")]
    with pytest.raises(FileExistsError):
        bucket.write_new("x", b"same")
    assert front.fired == ["lost"]


def test_flipped_bit_on_the_way_is_read_again(front: s3.Front, bucket: Place) -> None:
    bucket.write("x", b"content")
    front.faults = [("GET", "/x$", "flip")]
    assert bucket.read("x") == b"content"
    assert front.fired == ["flip"]


def test_content_that_never_matches_its_checksum_is_corrupted(front: s3.Front, bucket: Place, tmp_path: Path) -> None:
    bucket.write("x", b"content")
    front.faults = [("GET", "/x$", "flip")] * 9
    with pytest.raises(Corrupted, match=r"/x: get: .*checksum.* 3 times"):
        bucket.get("x", tmp_path / "x")
    assert len(front.fired) == CORRUPT_ATTEMPTS and not (tmp_path / "x").exists()


def test_endpoint_that_refuses_connections_for_a_while_costs_time_only(
    behind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    s3.environment(monkeypatch, f"http://127.0.0.1:{port}")
    done = threading.Event()

    def come_back() -> None:
        time.sleep(3.0)
        with s3.front(behind, port):
            done.wait(30)

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        place(f"s3://{s3.BUCKET}/{tmp_path.name}").write("x", b"1")
    finally:
        done.set()
        thread.join()
    assert "trying again for up to 20 s" in caplog.text


# ---------------------------------------------------------------------------------- faults that do not


def test_patience_ends_with_a_word_on_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    s3.environment(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("DGM_STORAGE_PATIENCE", "0.5")
    with pytest.raises(
        StorageError, match=r"s3://b-b/x: read failed \d times in 0.5 s at http://127.*AWS_ENDPOINT_URL"
    ):
        place("s3://b-b").read("x")


def test_refusal_is_raised_at_once(front: s3.Front, bucket: Place, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    attempts: dict[str, tuple[str, Callable[[], object]]] = {
        "read": ("GET", lambda: bucket.read("x")),
        "put": ("PUT", lambda: bucket.put(tmp_path / "x", "x")),
        "conditional write": ("PUT", lambda: bucket.write_new("x", b"1")),
        "list": ("GET", lambda: bucket.list()),
    }
    for operation, (method, attempt) in attempts.items():
        front.faults, front.fired = [(method, "", "denied")] * 9, []
        with pytest.raises(
            StorageError, match=rf"{operation} was refused by http.* \(403 AccessDenied: not yours\); check"
        ):
            attempt()
        assert front.fired == ["denied"]


def test_missing_bucket_is_named_with_the_way_out(front: s3.Front) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/p/x: write .*NoSuchBucket.*create the bucket"):
        place("s3://no-such-bucket/p").write("x", b"")


def test_missing_credentials_are_named(front: s3.Front, bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match=r"read was refused .*Unable to locate credentials.*set AWS_ACCESS_KEY_ID"):
        bucket.read("x")


def test_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = place(tmp_path)
    where.write("x", b"before")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"x: could not be written .*No space left.*untouched"):
        where.write("x", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and where.read("x") == b"before"


# ---------------------------------------------------------------------------------- the janitor


def test_sweep_aborts_abandoned_uploads_below_the_prefix_alone(front: s3.Front, bucket: Place, tmp_path: Path) -> None:
    def begin(key: str) -> None:
        upload = storage.client().create_multipart_upload(Bucket=s3.BUCKET, Key=key)["UploadId"]
        storage.client().upload_part(Bucket=s3.BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"1")

    begin(f"{tmp_path.name}/p/step/weights")
    begin(f"{tmp_path.name}/q/weights")
    assert abandoned(bucket, older_than_s=AGES) == []
    (found,) = abandoned(bucket, older_than_s=0)
    assert (found.name, found.kind) == ("step/weights", "upload")
    assert sweep(bucket, older_than_s=AGES) == [] and abandoned(bucket, 0) == [found]
    assert sweep(bucket, older_than_s=0) == [found]
    assert abandoned(bucket, 0) == []
    assert len(abandoned(place(f"s3://{s3.BUCKET}/{tmp_path.name}/q"), 0)) == 1


def test_sweep_removes_a_folder_that_never_got_its_manifest(front: s3.Front, bucket: Place, tmp_path: Path) -> None:
    folder = make(tmp_path / "f", a=b"1")
    bucket.put_folder(folder, "whole")
    bucket.write("foreign/data", b"of somebody who keeps no manifests")
    front.faults = [("PUT", "half/manifest.json", "denied")]
    with pytest.raises(StorageError):
        bucket.put_folder(folder, "half")
    assert names(bucket, "half/") == ["half/a"]
    assert [(left.name, left.kind) for left in abandoned(bucket, 0)] == [("half", "folder")]
    assert abandoned(bucket, 3600) == []
    sweep(bucket, 0)
    assert names(bucket) == ["foreign/data", "whole/a", "whole/manifest.json"]
    assert abandoned(bucket, 0) == []


def test_sweep_keeps_a_folder_that_lacks_only_its_last_request(front: s3.Front, bucket: Place, tmp_path: Path) -> None:
    bucket.put_folder(make(tmp_path / "f", a=b"1"), "whole")
    bucket.at("whole").write(buckets.UNFINISHED, b"")
    assert len(sweep(bucket, 0)) == 1
    assert names(bucket) == ["whole/a", "whole/manifest.json"] and abandoned(bucket, 0) == []


def test_sweep_removes_local_temporaries(tmp_path: Path) -> None:
    where = place(tmp_path)
    where.write("a/x", b"1")
    (tmp_path / "a" / ".x.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "a" / ".step.0123abcd.tmp").mkdir()
    (tmp_path / "a" / ".step.0123abcd.tmp" / "weights").write_bytes(b"half")
    (tmp_path / "a" / ".gitignore").write_bytes(b"a user's")
    assert names(where) == ["a/.gitignore", "a/x"]
    assert abandoned(where, 3600) == []
    assert [left.name for left in sweep(where, 0)] == ["a/.step.0123abcd.tmp", "a/.x.0123abcd.tmp"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".gitignore", "x"]
