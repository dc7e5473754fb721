"""One door to everything that is a path: a folder, file:// or s3://bucket/prefix.

Local files are written to a temporary name, flushed and renamed; on S3 a PUT is whole by itself. A folder counts once
its manifest is there, and `put_folder` brings the manifest last. Documents that several writers change are changed by
`write_new` (If-None-Match) and `swap` (If-Match) alone. What may pass (no connection, 5xx, a body cut short) is
tried again for `DGM_STORAGE_PATIENCE` seconds (120); what will not pass (403, no such bucket) is raised at once.
docs/storage.md says the rest.
"""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.storage.bucket import Bucket
from pipelines.storage.folder import Folder, sync
from pipelines.storage.interface import Changed, Corrupted, Entry, Leftover, Place, StorageError
from pipelines.storage.s3 import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, client, endpoint

__all__ = (
    "CONNECT_TIMEOUT_S",
    "READ_TIMEOUT_S",
    "Changed",
    "Corrupted",
    "Entry",
    "Leftover",
    "Place",
    "StorageError",
    "abandoned",
    "client",
    "endpoint",
    "place",
    "sweep",
    "sync",
)


def place(uri: str | Path) -> Place:
    """The place behind a folder, file:///folder or s3://bucket/prefix.

    Raises: ValueError for any other address.
    """
    text = str(uri)
    if "://" not in text:
        return Folder(Path(text).expanduser().absolute())
    parts = urlsplit(text)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Folder(Path(unquote(parts.path)))
    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    if parts.scheme == "s3" and bucket:
        return Bucket(bucket, prefix.strip("/"))
    raise ValueError(f"{text!r} is neither a folder nor s3://bucket/prefix (nor file:///folder)")


def abandoned(where: Place, older_than_s: float) -> list[Leftover]:
    """Temporaries, multipart uploads and folders without their manifest that nobody has touched for so many seconds."""
    latest = time.time() - older_than_s
    return [leftover for leftover in where.leftovers() if leftover.modified <= latest]


def sweep(where: Place, older_than_s: float) -> list[Leftover]:
    """Removes what `abandoned` lists. Returns: what was removed.

    Args:
        where: the place.
        older_than_s: longer than the longest upload takes, or a living writer loses its work.
    """
    found = abandoned(where, older_than_s)
    for leftover in found:
        where.discard(leftover)
    return found
