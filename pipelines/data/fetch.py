"""Raw files from a folder, file://, http(s):// or s3://, every one held to its published checksum.

Where no checksum is published, the sha256 of what came first is written to the cache, and the file is held to that.

Where a file is looked for: the cache `${DGM_CACHE:-~/.cache/dgm}`, then one place: `DGM_DATA_MIRROR`, else the
dataset's `mirror`, else the public home. A mirror has one subfolder a dataset (mnist/, fashion-mnist/, ...).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.data import remote

ATTEMPTS = 3
BACKOFF_S = 1.0


@dataclass(frozen=True)
class RawFile:
    """A file of a public dataset.

    Attributes:
        folder: the dataset's subfolder in a mirror and in the cache.
        names: the file's name; with several, the same content plain or as .gz, tried in this order.
        home: the public prefix, ending in a slash.
        checksum: "md5:..." or "sha256:..."; "" where none is published.
        unpacked: the checksum is that of the unpacked content, not of the .gz.
    """

    folder: str
    names: tuple[str, ...]
    home: str
    checksum: str
    unpacked: bool = False


@dataclass(frozen=True)
class Fetched:
    """A verified file: its label in messages, its unpacked content, the sha256 of what the checksum covers."""

    label: str
    content: bytes
    sha256: str


def fetch(file: RawFile, mirror: str | None = None) -> Fetched:
    """The verified content of `file`.

    Raises: ValueError that says what was tried and what came of it; a file that differs from its checksum is
    an error too, never skipped.
    """
    cache = cache_folder() / file.folder
    for name in file.names:
        try:
            return _verified(file, name, cache / name)
        except FileNotFoundError:
            continue
        except ValueError:
            (cache / name).unlink()  # damaged since it was verified: fetched again
    place = os.environ.get("DGM_DATA_MIRROR") or mirror
    prefix = f"{place.rstrip('/')}/{file.folder}/" if place else file.home
    tried = []
    for name in file.names:
        try:
            return _from(prefix + name, file, name, cache)
        except OSError as error:
            tried.append(f"{prefix + name} ({error})")
        except ValueError as error:
            raise ValueError(f"{error}, from {prefix + name}; {_advice(file)}") from error
    raise ValueError(f"{file.folder}: {file.names[0]} is not to be had; tried {', '.join(tried)}; {_advice(file)}")


def _advice(file: RawFile) -> str:
    place = f"{file.folder}/{' or '.join(file.names)}"
    return f"DGM_DATA_MIRROR can be set to a folder, file://, http(s):// or s3:// prefix that holds {place}"


def cache_folder() -> Path:
    """`${DGM_CACHE:-~/.cache/dgm}`."""
    return Path(os.environ.get("DGM_CACHE") or "~/.cache/dgm").expanduser()


def gunzip(data: bytes, label: str) -> bytes:
    """Raises: ValueError that names the file for a truncated or damaged .gz."""
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{label}: {len(data)} bytes of damaged gzip ({error}); expected a whole .gz") from error


def _from(location: str, file: RawFile, name: str, cache: Path) -> Fetched:
    """The verified file at `location`. Raises: OSError when it cannot be had, ValueError when it is wrong."""
    if "://" not in location:
        return _verified(file, name, Path(location).expanduser())
    parts = urlsplit(location)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return _verified(file, name, Path(unquote(parts.path)))
    if parts.scheme in remote.OPENERS:
        return _downloaded(location, file, name, cache)
    raise ValueError(f"{file.folder}: an unusable address; expected a folder, file:///..., http(s):// or s3://")


def _downloaded(location: str, file: RawFile, name: str, cache: Path) -> Fetched:
    """Downloads to a temporary file, verifies it and renames it into the cache, in at most ATTEMPTS attempts."""
    cache.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=cache)
        os.close(handle)
        try:
            remote.download(location, Path(temporary))
            fetched = _verified(file, name, Path(temporary))
            os.replace(temporary, cache / name)
            return fetched
        except FileNotFoundError:
            raise
        except (OSError, ValueError):
            if attempt == ATTEMPTS:
                raise
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        finally:
            Path(temporary).unlink(missing_ok=True)
    raise AssertionError("the last attempt returns or raises")


def _verified(file: RawFile, name: str, path: Path) -> Fetched:
    """Reads, verifies and unpacks `path`. Raises: OSError when there is no such file, ValueError when it is wrong."""
    data = path.read_bytes()
    label = f"{file.folder}: {name}"
    packed = name.endswith(".gz")
    covered = gunzip(data, label) if packed and file.unpacked else data
    record = cache_folder() / file.folder / f"{name}.sha256"
    first = record.read_text().strip() if not file.checksum and record.is_file() else ""
    kind, _, expected = (file.checksum or f"sha256:{first}").partition(":")
    found = hashlib.new(kind, covered, usedforsecurity=False).hexdigest()
    if expected and found != expected:
        what = "unpacked bytes" if packed and file.unpacked else "bytes"
        told = "" if file.checksum else f", as when it was first used; delete {record} if the change is meant"
        raise ValueError(f"{label}: {len(covered)} {what} with {kind} {found}; expected {kind} {expected}{told}")
    if not expected:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{found}\n")
    content = gunzip(data, label) if packed and not file.unpacked else covered
    return Fetched(label, content, hashlib.sha256(covered).hexdigest())
