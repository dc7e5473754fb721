"""Raw files: every place they come from, the checksum, the cache and what is said when they are not to be had."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import boto3  # type: ignore[import-untyped, unused-ignore]
import pytest
from moto.server import ThreadedMotoServer

from pipelines.data import fetch as fetching
from pipelines.data.fetch import RawFile, fetch

CONTENT = b"0 1 1 0\n" * 1000
PACKED = gzip.compress(CONTENT, mtime=0)
MD5 = "md5:" + hashlib.md5(PACKED).hexdigest()
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, no mirror, no waiting, no proxy."""
    monkeypatch.setenv("DGM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DGM_DATA_MIRROR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "BACKOFF_S", 0.0)


class Site(ThreadingHTTPServer):
    """Answers every path with the next scripted (status, body, announced length), the last one for ever."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, bytes, int]] = []
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        status, body, length = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for key, value in {"ENDPOINT_URL": s3_endpoint, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="mirror")
    return "mirror"


def a_file(home: str = "http://127.0.0.1:9/", checksum: str = MD5) -> RawFile:
    return RawFile("set", ("a.gz",), home, checksum)


def an_amat(home: str = "http://127.0.0.1:9/") -> RawFile:
    return RawFile("set", ("a.amat", "a.amat.gz"), home, SHA256, unpacked=True)


def put(folder: Path, name: str, content: bytes) -> Path:
    (folder / "set").mkdir(parents=True, exist_ok=True)
    (folder / "set" / name).write_bytes(content)
    return folder


def good(body: bytes = PACKED) -> tuple[int, bytes, int]:
    return 200, body, len(body)


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


@pytest.mark.parametrize("prefix", ["", "file://", "file://localhost"])
def test_fetch_reads_a_folder_without_a_copy(tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(put(tmp_path / "with space", "a.gz", PACKED))
    monkeypatch.setenv("DGM_DATA_MIRROR", prefix + quote(folder) if prefix else folder)
    got = fetch(a_file())
    assert got.content == CONTENT
    assert got.sha256 == hashlib.sha256(PACKED).hexdigest()
    assert cached(tmp_path) == []


def test_fetch_prefers_the_environment_to_the_parameter_to_the_home(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.script = [good()]
    right = str(put(tmp_path / "right", "a.gz", PACKED))
    wrong = str(put(tmp_path / "wrong", "a.gz", b"wrong"))
    assert fetch(a_file(site.url), right).content == CONTENT
    assert site.asked == []
    monkeypatch.setenv("DGM_DATA_MIRROR", right)
    assert fetch(a_file(site.url), wrong).content == CONTENT


def test_fetch_downloads_once_and_then_reads_the_cache(tmp_path: Path, site: Site) -> None:
    site.script = [good(), (500, b"", 0)]
    assert fetch(a_file(site.url)).content == CONTENT
    assert fetch(a_file(site.url)).content == CONTENT
    assert site.asked == ["/a.gz"]
    assert cached(tmp_path) == ["a.gz"]


def test_fetch_replaces_a_damaged_cache(tmp_path: Path, site: Site) -> None:
    put(tmp_path / "cache", "a.gz", PACKED[:-1])
    site.script = [good()]
    assert fetch(a_file(site.url)).content == CONTENT
    assert (tmp_path / "cache" / "set" / "a.gz").read_bytes() == PACKED


@pytest.mark.parametrize(
    "first",
    [(503, b"", 0), (200, PACKED[:50], len(PACKED)), good(PACKED[:-9] + b"\0" * 9)],
    ids=["503", "short", "bits"],
)
def test_fetch_tries_again_after_a_passing_fault(site: Site, first: tuple[int, bytes, int]) -> None:
    site.script = [first, first, good()]
    assert fetch(a_file(site.url)).content == CONTENT
    assert len(site.asked) == 3


def test_fetch_names_what_was_announced_when_a_body_stays_short(tmp_path: Path, site: Site) -> None:
    site.script = [(200, PACKED[:50], len(PACKED))]
    with pytest.raises(ValueError, match=rf"50 bytes arrived; the server announced {len(PACKED)}"):
        fetch(a_file(site.url))
    assert cached(tmp_path) == []


def test_fetch_asks_once_for_what_is_not_there_and_says_what_was_tried(tmp_path: Path, site: Site) -> None:
    site.script = [(404, b"", 0)]
    with pytest.raises(ValueError, match=r"set: a\.amat .*tried .*/a\.amat \(HTTP 404.*/a\.amat\.gz .*DGM_DATA_MIRROR"):
        fetch(an_amat(site.url))
    assert site.asked == ["/a.amat", "/a.amat.gz"]
    assert cached(tmp_path) == []


def test_fetch_without_a_connection_says_that_a_mirror_can_be_set() -> None:
    with pytest.raises(ValueError, match=r"tried http://127\.0\.0\.1:9/a\.gz .*refused.*DGM_DATA_MIRROR can be set"):
        fetch(a_file())


@pytest.mark.parametrize("place", ["folder", "http", "s3"])
def test_fetch_refuses_another_checksum(
    tmp_path: Path, site: Site, bucket: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = gzip.compress(b"other")
    site.script = [good(wrong)]
    boto3.client("s3").put_object(Bucket=bucket, Key="wrong/set/a.gz", Body=wrong)
    places = {"folder": str(put(tmp_path / "m", "a.gz", wrong)), "http": site.url, "s3": f"s3://{bucket}/wrong"}
    monkeypatch.setenv("DGM_DATA_MIRROR", places[place])
    found, expected = hashlib.md5(wrong).hexdigest(), MD5.removeprefix("md5:")
    with pytest.raises(ValueError, match=rf"set: a\.gz: \d+ bytes with md5 {found}; expected md5 {expected}"):
        fetch(a_file())
    assert cached(tmp_path) == []


@pytest.mark.parametrize(("name", "body"), [("a.amat", CONTENT), ("a.amat.gz", PACKED)], ids=["plain", "gz"])
@pytest.mark.parametrize("place", ["folder", "s3"])
def test_fetch_takes_a_text_plain_or_packed_with_one_sum(
    tmp_path: Path, bucket: str, place: str, name: str, body: bytes
) -> None:
    prefix = f"{place}-{name}"
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/set/{name}", Body=body)
    got = fetch(an_amat(), str(put(tmp_path / "m", name, body)) if place == "folder" else f"s3://{bucket}/{prefix}/")
    assert got.content == CONTENT
    assert got.sha256 == SHA256.removeprefix("sha256:")
    assert cached(tmp_path) == ([] if place == "folder" else [name])


def test_fetch_names_a_missing_s3_object(bucket: str) -> None:
    with pytest.raises(ValueError, match=rf"tried s3://{bucket}/no/set/a\.gz .*NoSuchKey"):
        fetch(a_file(), f"s3://{bucket}/no")


def test_fetch_names_an_unreachable_s3_endpoint(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"Could not connect to the endpoint.*DGM_DATA_MIRROR"):
        fetch(a_file(), f"s3://{bucket}/m")


@pytest.mark.parametrize("unpacked", [True, False])
def test_fetch_names_a_truncated_gz(tmp_path: Path, unpacked: bool) -> None:
    half = PACKED[: len(PACKED) // 2]
    sums = SHA256 if unpacked else "md5:" + hashlib.md5(half).hexdigest()
    file = RawFile("set", ("a.gz",), "http://127.0.0.1:9/", sums, unpacked)
    with pytest.raises(ValueError, match=rf"set: a\.gz: {len(half)} bytes of damaged gzip .*expected a whole \.gz"):
        fetch(file, str(put(tmp_path / "m", "a.gz", half)))


@pytest.mark.parametrize("place", ["ftp://host/data", "gs://bucket", "file://otherhost/data"])
def test_fetch_refuses_an_address_it_cannot_read(place: str) -> None:
    with pytest.raises(ValueError, match=r"set: an unusable address; expected a folder, file:///.*from " + place):
        fetch(a_file(), place)


def test_fetch_without_a_published_checksum_holds_a_file_to_its_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGM_DATA_MIRROR", str(put(tmp_path / "mirror", "a.gz", PACKED)))
    file = a_file(checksum="")
    assert fetch(file).content == fetch(file).content == CONTENT
    assert cached(tmp_path) == ["a.gz.sha256"]
    put(tmp_path / "mirror", "a.gz", gzip.compress(b"other"))
    with pytest.raises(ValueError, match=r"as when it was first used; delete .*a\.gz\.sha256 if the change is meant"):
        fetch(file)
    (tmp_path / "cache" / "set" / "a.gz.sha256").unlink()
    assert fetch(file).content == b"other"
