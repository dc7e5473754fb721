"""What a place is: its files, its errors, what dead writers left in it, and what the places have in common."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

FILES_AT_ONCE = 4
MANIFEST = "manifest.json"
OURS = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)|\..+\.lock|\.unfinished")  # names that no list shows


class StorageError(OSError):
    """A place that could not be read or written: what was done where, what the other side said, and the way out."""


class Changed(StorageError):
    """Another writer was there: the version is no longer the one that was read."""


class Corrupted(StorageError):
    """Bytes that differ from the checksum that the server keeps with them, every time they are read."""


@dataclass(frozen=True)
class Entry:
    """A file of a place.

    Attributes:
        name: relative to the place, "/"-separated.
        bytes: length.
        modified: seconds since 1970.
        version: equal exactly when the content is: S3's ETag; the SHA-256 of a local file, computed when asked for.
    """

    name: str
    bytes: int
    modified: float
    tag: str | Path = field(repr=False)

    @property
    def version(self) -> str:
        return sha256(self.tag) if isinstance(self.tag, Path) else self.tag


@dataclass(frozen=True)
class Leftover:
    """What a writer that died has left.

    Attributes:
        name: relative to the place.
        kind: "temporary" (local), "upload" (multipart, never completed) or "folder" (never got its manifest).
        modified: seconds since 1970.
        upload: S3's id of a multipart upload.
    """

    name: str
    kind: str
    modified: float
    upload: str = ""


class Place(ABC):
    """A folder of files, here or on S3. Plain values only: it travels to any process.

    Attributes:
        uri: the address, without a slash at the end.
        local: the folder when it lies on this machine's file system, else None.
    """

    uri: str
    local: Path | None = None

    @abstractmethod
    def at(self, name: str) -> Place:
        """The place below."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[Entry]:
        """Every file whose name begins with `prefix`, recursively, sorted by name; [] when there is none."""

    @abstractmethod
    def read_versioned(self, name: str) -> tuple[bytes, str]:
        """Content and version. Raises: FileNotFoundError, StorageError."""

    def read(self, name: str) -> bytes:
        """The content. Raises: FileNotFoundError, StorageError."""
        return self.read_versioned(name)[0]

    @abstractmethod
    def write(self, name: str, content: bytes) -> str:
        """Writes whole or not at all. Returns: the version."""

    @abstractmethod
    def write_new(self, name: str, content: bytes) -> str:
        """Writes what is not there yet; of any number of writers one succeeds. Raises: FileExistsError."""

    @abstractmethod
    def swap(self, name: str, content: bytes, version: str) -> str:
        """Replaces exactly the version that was read; of any number of writers one succeeds. Raises: Changed."""

    @abstractmethod
    def get(self, name: str, target: Path) -> None:
        """Copies one file to `target`, whole or not at all. Raises: FileNotFoundError, StorageError."""

    @abstractmethod
    def put(self, source: Path, name: str) -> None:
        """Copies one local file here, whole or not at all."""

    def get_folder(self, name: str, target: Path) -> None:
        """Copies every file below `name` into `target`. Raises: FileNotFoundError when there is none."""
        below = self.at(name)
        names = [entry.name for entry in below.list()]
        if not names:
            raise FileNotFoundError(f"{below.uri}: not there")
        for_each(names, lambda each: below.get(each, target / clean(each)))

    @abstractmethod
    def put_folder(self, folder: Path, name: str, last: str = MANIFEST) -> None:
        """Copies a local folder here, `last` after everything else."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Removes a file, or everything below a folder's name; nothing happens when there is nothing."""

    @abstractmethod
    def leftovers(self) -> Sequence[Leftover]:
        """What writers that died, or still write, have left below here."""

    @abstractmethod
    def discard(self, leftover: Leftover) -> None:
        """Removes one of them."""

    def __repr__(self) -> str:
        return f"place({self.uri!r})"


def clean(name: str) -> str:
    """The name, refused when it leaves the place."""
    if not name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} is not a name below a place: expected parts without '.', '..' or an empty one")
    return name


def for_each(names: Iterable[str], action: Callable[[str], None]) -> None:
    """Several at once; raises what the first of them raised."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for _ in pool.map(action, names):
            pass  # the first exception is raised here


def sha256(path: Path) -> str:
    """The version of a local file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
