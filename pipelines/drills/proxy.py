"""An HTTP proxy in front of the S3 stand-in that does, on order, what networks and overloaded servers do.

Every fault is counted when it strikes, so that a drill can assert that it did. Run as a program it takes its orders as
JSON lines on standard input and answers each with its counts: it needs no port of its own for that.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Kind = Literal["busy", "lost-answer", "reset", "trickle", "flip-read", "flip-write"]
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
_BAD_DIGEST = b"<Error><Code>BadDigest</Code><Message>The checksum did not match what was received.</Message></Error>"
_CHECKSUMS = re.compile(r"(?im)^(x-amz-checksum-(?!algorithm)|x-amz-trailer: *x-amz-checksum|content-md5)")
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass
class Fault:
    """What happens to the next requests that match.

    Args:
        kind: "busy" answers 503 and forwards nothing; "lost-answer" forwards and answers 500; "reset" ends the
            connection with a TCP reset in the middle of the body, nothing of a write is forwarded; "trickle" sends
            the answer's body in pieces over `seconds`; "flip-read" and "flip-write" change one bit of the body (a
            write that brings a checksum is then answered as S3 does: 400, nothing is stored).
        times: how many requests.
        method: a regular expression of the request's method.
        path: a regular expression that is searched in the request's path and query.
        seconds: of "trickle".
    """

    kind: Kind
    times: int = 1
    method: str = ".*"
    path: str = ""
    seconds: float = 5.0


class Proxy:
    """A proxy on `port` of every interface (0: a free one) in front of `upstream` ("host:port")."""

    def __init__(self, upstream: str, port: int = 0) -> None:
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listen(port)
        self.port = self._server.server_address[1]

    def _listen(self, port: int) -> None:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("0.0.0.0", port), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def arm(self, kind: Kind, **options: Any) -> None:
        """Adds a fault: see `Fault`."""
        with self._lock:
            self.faults.append(Fault(kind, **options))

    def disarm(self) -> None:
        with self._lock:
            self.faults.clear()

    def refuse(self, seconds: float) -> None:
        """Closes the port for that long: connections are refused, open ones are reset. Returns at once.

        What was refused is counted by the system alone, as resets that it sent: "refused" of the counts.
        """
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in list(self._open):
                reset(connection)
        before = _resets_sent()

        def again() -> None:
            time.sleep(seconds)
            self.counts["refused"] += _resets_sent() - before
            self._listen(self.port)

        threading.Thread(target=again, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def strike(self, method: str, path: str) -> Fault | None:
        """The fault for a request, which it uses up."""
        with self._lock:
            self.counts["requests"] += 1
            for fault in self.faults:
                if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def struck(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no event here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def setup(self) -> None:
        super().setup()
        self.proxy._open.add(self.connection)

    def finish(self) -> None:
        self.proxy._open.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *words: Any) -> None:
        """The stand-in has a log of its own."""

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        self._pass_on()

    def _pass_on(self) -> None:
        proxy, method = self.proxy, self.command
        fault = proxy.strike(method, self.path)
        kind = fault.kind if fault else None
        if kind == "reset" and method in ("PUT", "POST"):
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            proxy.struck("reset")
            return self._reset()
        body = self._body()
        if kind == "busy":
            proxy.struck("busy")
            return self._answer(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
        if kind == "flip-write" and body:
            proxy.struck("flip-write")
            body = flip(body)
            if _CHECKSUMS.search(str(self.headers)):  # S3 would compare; the stand-in does not
                return self._answer(400, [("Content-Type", "application/xml")], _BAD_DIGEST)
        status, headers, content = self._forward(body)
        file = self.path.partition("?")[0].rpartition("/")[2]
        for words in (method, f"{method} {file}"):
            proxy.struck(f"{words} from {self.client_address[0]}")
        if kind == "lost-answer":
            proxy.struck("lost-answer")
            return self._answer(500, [("Content-Type", "application/xml")], _INTERNAL)
        if kind == "flip-read" and content and status in (200, 206):
            proxy.struck("flip-read")
            content = flip(content)
        if kind == "reset":
            proxy.struck("reset")
            self._head(status, headers, len(content))
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self._reset()
        if fault and kind == "trickle" and content:
            proxy.struck("trickle")
            self._head(status, headers, len(content))
            pieces = 20
            for piece in range(pieces):
                self.wfile.write(content[len(content) * piece // pieces : len(content) * (piece + 1) // pieces])
                self.wfile.flush()
                time.sleep(fault.seconds / pieces)
            return None
        return self._answer(status, headers, content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"connection", "expect", "transfer-encoding", "content-length"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _head(self, status: int, headers: list[tuple[str, str]], size: int) -> None:
        self.send_response_only(status)
        length = {name.lower(): value for name, value in headers}.get("content-length")
        for name, value in headers:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        if status != 204:  # the answer to a HEAD has the length of what it does not bring
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(size))
        self.end_headers()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self._head(status, headers, len(content))
        if self.command != "HEAD" and status != 204:
            self.wfile.write(content)
        self.wfile.flush()

    def _reset(self) -> None:
        self.close_connection = True
        reset(self.connection)


def flip(content: bytes) -> bytes:
    """The content with one bit of its middle byte changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def reset(connection: socket.socket) -> None:
    """Ends a connection with a reset instead of a goodbye."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        os.close(connection.detach())  # close() would wait for the files made of it
    except OSError:
        return  # it is gone already


def _resets_sent() -> int:
    """TCP resets that this network namespace has sent: a refused connection is one."""
    with open("/proc/net/snmp") as file:
        names, values = [line.split() for line in file if line.startswith("Tcp:")]
    return int(values[names.index("OutRsts")])


def main() -> None:
    """`python -m pipelines.drills.proxy <port> <upstream>`."""
    proxy = Proxy(sys.argv[2], int(sys.argv[1]))
    for line in sys.stdin:
        order = json.loads(line)
        if "arm" in order:
            proxy.arm(**order["arm"])
        if "refuse" in order:
            proxy.refuse(order["refuse"])
        if "disarm" in order:
            proxy.disarm()
        print(json.dumps(dict(proxy.counts)), flush=True)


if __name__ == "__main__":
    main()
