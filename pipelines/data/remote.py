"""One download over http(s):// or s3://, with time limits, a length check and a progress bar."""

from __future__ import annotations

import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from pipelines.storage import READ_TIMEOUT_S, client

CHUNK = 1 << 18
TRANSIENT = (408, 425, 429)  # every other 4xx is an answer: asking again will not change it


class Stream(Protocol):
    """What a download is read from."""

    def read(self, size: int, /) -> bytes: ...


Opened = AbstractContextManager[tuple[Stream, int | None]]


def download(location: str, target: Path) -> None:
    """Writes the bytes behind `location` to `target`.

    Raises: FileNotFoundError when the other side says that it will not give the file (4xx); OSError for what may
    pass: no connection, a time limit, 5xx, fewer bytes than announced.
    """
    with OPENERS[urlsplit(location).scheme](location) as (stream, length), target.open("wb") as file:
        received = _copy(stream, file, length, location)
    if length is not None and received != length:
        raise OSError(f"{received} bytes arrived; the server announced {length}")


def _copy(stream: Stream, file: BinaryIO, length: int | None, location: str) -> int:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    received = 0
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(location, total=length)
        while chunk := stream.read(CHUNK):
            file.write(chunk)
            received += len(chunk)
            bar.update(task, completed=received)
    return received


def _refused(status: int, text: str) -> OSError:
    answer = 400 <= status < 500 and status not in TRANSIENT
    return FileNotFoundError(text) if answer else OSError(text)


@contextmanager
def _open_http(location: str) -> Iterator[tuple[Stream, int | None]]:
    request = urllib.request.Request(location, headers={"User-Agent": "dgm"})
    try:
        with urllib.request.urlopen(request, timeout=READ_TIMEOUT_S) as response:
            length = response.headers.get("Content-Length")
            yield response, None if length is None else int(length)
    except urllib.error.HTTPError as error:
        raise _refused(error.code, f"HTTP {error.code} {error.reason}") from error
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _open_s3(location: str) -> Iterator[tuple[Stream, int | None]]:
    # boto3 costs 0.3 s and only s3:// needs it
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped, unused-ignore]

    parts = urlsplit(location)
    try:
        answer = client().get_object(Bucket=parts.netloc, Key=parts.path.lstrip("/"))
        with closing(answer["Body"]) as body:  # as a context manager it would give a stream that checks nothing
            yield body, answer["ContentLength"]
    except ClientError as error:
        raise _refused(error.response["ResponseMetadata"]["HTTPStatusCode"], str(error)) from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error


OPENERS: dict[str, Callable[[str], Opened]] = {"http": _open_http, "https": _open_http, "s3": _open_s3}
