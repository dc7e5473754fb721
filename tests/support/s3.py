"""An S3 stand-in for tests, and a server in front of it that does to chosen requests what networks do."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from moto.server import ThreadedMotoServer

BUCKET = "runs"
DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>not yours</Message></Error>"


class Front(ThreadingHTTPServer):
    """Passes requests on, one PUT at a time; `faults` holds (method, pattern of the path, fault) of the next ones.

    Faults: "busy" (503, nothing passed on), "lost" (passed on, answered 500), "reset" (passed on, no answer), "cut"
    (half of the body), "flip" (the last bit of the body), "denied" (403). `fired` holds those that happened.
    """

    daemon_threads = True

    def __init__(self, behind: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.behind = behind
        self.faults: list[tuple[str, str, str]] = []
        self.fired: list[str] = []
        self.writing = threading.Lock()  # moto itself does not promise that a condition and its PUT are one act

    def fault_of(self, method: str, path: str) -> str:
        for fault in self.faults:
            if fault[0] == method and re.search(fault[1], path):
                self.faults.remove(fault)
                self.fired.append(fault[2])
                return fault[2]
        return ""

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no event."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Front

    def handle_any(self) -> None:
        body = self.body()
        fault = self.server.fault_of(self.command, self.path)
        if fault == "busy":
            return self.answer(503, {}, b"")
        if fault == "denied":
            return self.answer(403, {}, DENIED)
        status, headers, content = self.pass_on(body)
        if fault == "lost":
            return self.answer(500, {}, b"")
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return None
        if fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        return self.answer(status, headers, content, len(content) // 2 if fault == "cut" else len(content))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(parts)

    def pass_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.behind, timeout=30)
        dropped = ("expect", "connection", "transfer-encoding", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        try:
            with self.server.writing:
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: dict[str, str], content: bytes, sent: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("content-length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
        self.close_connection = sent is not None and sent < len(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def front(behind: str, port: int = 0) -> Iterator[Front]:
    server = Front(behind, port)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def stand_in() -> Iterator[str]:
    """moto's server with an empty bucket; "host:port"."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    connection.close()
    try:
        yield f"{host}:{port}"
    finally:
        server.stop()


def environment(patch: pytest.MonkeyPatch, url: str) -> None:
    """Points this process at an endpoint, with credentials that mean nothing."""
    for name, value in {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}.items():
        patch.setenv(f"AWS_{name}", value)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    patch.setenv("DGM_STORAGE_PATIENCE", "20")
