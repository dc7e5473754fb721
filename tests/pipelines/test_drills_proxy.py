"""The proxy passes everything on unchanged, except for what it is told to hurt, and counts what it hurt."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.drills.proxy import Proxy, flip

CONTENT = bytes(range(256)) * 400


class Store(BaseHTTPRequestHandler):
    """Keeps what is PUT, by its path."""

    protocol_version = "HTTP/1.1"
    kept: dict[str, bytes]

    def do_PUT(self) -> None:
        self.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._say(200, b"")

    def do_GET(self) -> None:
        self._say(200 if self.path in self.kept else 404, self.kept.get(self.path, b""))

    do_HEAD = do_GET

    def _say(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", "an-etag")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *words: object) -> None:
        """Silent."""


@pytest.fixture
def kept() -> Iterator[tuple[Proxy, dict[str, bytes]]]:
    """A proxy, and what the store behind it holds."""
    kept = {"/b/there": CONTENT}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Kept", (Store,), {"kept": kept}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    proxy = Proxy(f"127.0.0.1:{server.server_address[1]}")
    yield proxy, kept
    proxy.close()
    server.shutdown()
    server.server_close()


def ask(proxy: Proxy, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_proxy_passes_bytes_on_unchanged(kept: tuple[Proxy, dict[str, bytes]]) -> None:
    proxy, store = kept
    assert ask(proxy, "PUT", "/b/new?x=1", CONTENT) == (200, b"")
    assert store["/b/new?x=1"] == CONTENT
    assert ask(proxy, "GET", "/b/new?x=1") == (200, CONTENT)
    assert ask(proxy, "GET", "/b/absent") == (404, b"")
    assert ask(proxy, "HEAD", "/b/there") == (200, b"")
    chunks = iter([CONTENT[:1000], CONTENT[1000:]])  # without a length: chunked
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    connection.request("PUT", "/b/chunked", chunks, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()
    assert store["/b/chunked"] == CONTENT


def test_busy_strikes_as_often_as_ordered_where_it_matches(kept: tuple[Proxy, dict[str, bytes]]) -> None:
    proxy, store = kept
    proxy.arm("busy", times=2, method="PUT", path="/step-")
    assert ask(proxy, "GET", "/b/there")[0] == 200
    assert ask(proxy, "PUT", "/b/other", b"x")[0] == 200
    assert [ask(proxy, "PUT", "/b/step-1", b"x")[0] for _ in range(3)] == [503, 503, 200]
    assert proxy.counts["busy"] == 2 and store["/b/step-1"] == b"x"


def test_lost_answer_is_applied(kept: tuple[Proxy, dict[str, bytes]]) -> None:
    proxy, store = kept
    proxy.arm("lost-answer")
    assert ask(proxy, "PUT", "/b/new", CONTENT)[0] == 500
    assert store["/b/new"] == CONTENT and proxy.counts["lost-answer"] == 1


def test_reset_write_is_not_applied_and_reset_read_is_cut(kept: tuple[Proxy, dict[str, bytes]]) -> None:
    proxy, store = kept
    proxy.arm("reset", times=2)
    with pytest.raises(OSError):
        ask(proxy, "PUT", "/b/new", CONTENT)
    assert "/b/new" not in store
    with pytest.raises((OSError, http.client.IncompleteRead)):
        ask(proxy, "GET", "/b/there")
    assert proxy.counts["reset"] == 2


def test_flipped_read_differs_in_one_bit(kept: tuple[Proxy, dict[str, bytes]]) -> None:
    proxy, _ = kept
    proxy.arm("flip-read")
    _, found = ask(proxy, "GET", "/b/there")
    assert sum((a ^ b).bit_count() for a, b in zip(found, CONTENT, strict=True)) == 1
    assert found == flip(CONTENT)


@pytest.mark.parametrize(
    ("header", "refused"),
    [("x-amz-checksum-sha256", True), ("Content-MD5", True), ("x-amz-checksum-algorithm", False), ("x-other", False)],
)
def test_flipped_write_is_refused_where_it_brings_a_checksum(
    kept: tuple[Proxy, dict[str, bytes]], header: str, refused: bool
) -> None:
    proxy, store = kept
    proxy.arm("flip-write")
    status, content = ask(proxy, "PUT", "/b/new", CONTENT, **{header: "value"})
    assert proxy.counts["flip-write"] == 1
    if refused:
        assert status == 400 and b"BadDigest" in content and "/b/new" not in store
    else:
        assert status == 200 and store["/b/new"] == flip(CONTENT)


def test_trickled_body_arrives_whole(kept: tuple[Proxy, dict[str, bytes]]) -> None:
    proxy, _ = kept
    proxy.arm("trickle", seconds=0.2)
    assert ask(proxy, "GET", "/b/there") == (200, CONTENT)
    assert proxy.counts["trickle"] == 1


def test_refused_connections_are_counted_and_end(kept: tuple[Proxy, dict[str, bytes]]) -> None:
    proxy, _ = kept
    open_one = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    open_one.request("GET", "/b/there")
    open_one.getresponse().read()
    proxy.refuse(0.5)
    with pytest.raises(ConnectionRefusedError):
        ask(proxy, "GET", "/b/there")
    with pytest.raises((OSError, http.client.HTTPException)):
        open_one.request("GET", "/b/there")
        open_one.getresponse()
    end = time.monotonic() + 20
    while not proxy.counts["refused"]:
        assert time.monotonic() < end
        time.sleep(0.02)
    while True:  # the port opens right after the count
        try:
            assert ask(proxy, "GET", "/b/there") == (200, CONTENT)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < end
