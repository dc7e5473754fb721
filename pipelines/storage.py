"""One door to everything that is a path: a folder, file:// or s3://bucket/prefix.

Local files are written to a temporary name, flushed and renamed; on S3 a PUT is whole by itself. A folder counts once
its manifest is there, and `put_folder` brings the manifest last. Documents that several writers change are changed by
`write_new` (If-None-Match) and `swap` (If-Match) alone. What may pass (no connection, 5xx, a body cut short) is
tried again for `DGM_STORAGE_PATIENCE` seconds (120); what will not pass (403, no such bucket) is raised at once.
docs/storage.md says the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import re
import shutil
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

log = logging.getLogger("dgm.storage")
T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
PART_ATTEMPTS = 5  # of boto3, for a part of a file: a fault in one must not repeat the others
CORRUPT_ATTEMPTS = 3  # bytes that differ from their checksum: in transit it passes, at rest it does not
PATIENCE_S = 120.0
PART = 16 << 20  # bytes; a larger file goes in parts of this size
FILES_AT_ONCE = 4
PARTS_AT_ONCE = 4
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"  # stands in a folder on S3 from the first byte of `put_folder` until its manifest is there
WRITE_ID = "dgm-write"  # object metadata: which call wrote it

_OURS = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)|\..+\.lock|\.unfinished")
_LEFT = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)")


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
        return _sha256(self.tag) if isinstance(self.tag, Path) else self.tag


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


def place(uri: str | Path) -> Place:
    """The place behind a folder, file:///folder or s3://bucket/prefix.

    Raises: ValueError for any other address.
    """
    text = str(uri)
    if "://" not in text:
        return _Folder(Path(text).expanduser().absolute())
    parts = urlsplit(text)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return _Folder(Path(unquote(parts.path)))
    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    if parts.scheme == "s3" and bucket:
        return _Bucket(bucket, prefix.strip("/"))
    raise ValueError(f"{text!r} is neither a folder nor s3://bucket/prefix (nor file:///folder)")


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
        _each(names, lambda each: below.get(each, target / _clean(each)))

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


def _clean(name: str) -> str:
    """The name, refused when it leaves the place."""
    if not name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} is not a name below a place: expected parts without '.', '..' or an empty one")
    return name


def _each(names: Iterable[str], action: Callable[[str], None]) -> None:
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for _ in pool.map(action, names):
            pass  # the first exception is raised here


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ a folder


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hidden(path: Path, suffix: str) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.{suffix}"


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary beside `path`, flushed and renamed to it after the block, removed when the block raises."""
    temporary = _hidden(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            raise IsADirectoryError("a folder is there")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: could not be written ({error}); what was there before is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, over all processes that see the file system; the lock file goes with its last holder."""
    lock = path.parent / f".{path.name}.lock"
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise StorageError(f"{path}: could not be written ({error})") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                current = os.stat(lock).st_ino == os.fstat(handle).st_ino
            except FileNotFoundError:
                current = False  # its holder removed it while this one waited
            if current:
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return
        finally:
            os.close(handle)


class _Folder(Place):
    def __init__(self, folder: Path) -> None:
        self.local: Path = folder
        self.uri = str(folder)

    def _path(self, name: str) -> Path:
        return self.local / _clean(name)

    def at(self, name: str) -> Place:
        return _Folder(self._path(name))

    def list(self, prefix: str = "") -> list[Entry]:
        start = self.local / prefix.rpartition("/")[0]
        found = []
        for parent, folders, files in os.walk(start):
            folders[:] = [name for name in folders if not _OURS.fullmatch(name)]
            for file in files:
                path = Path(parent, file)
                name = path.relative_to(self.local).as_posix()
                if name.startswith(prefix) and not _OURS.fullmatch(file):
                    try:
                        facts = path.stat()
                    except FileNotFoundError:
                        continue  # removed while it was listed
                    found.append(Entry(name, facts.st_size, facts.st_mtime, path))
        return sorted(found, key=lambda entry: entry.name)

    def read_versioned(self, name: str) -> tuple[bytes, str]:
        path = self._path(name)
        try:
            content = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{path}: not there") from error
        except OSError as error:
            raise StorageError(f"{path}: could not be read ({error})") from error
        return content, hashlib.sha256(content).hexdigest()

    def _write(self, path: Path, content: bytes) -> str:
        with _whole(path) as temporary:
            temporary.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def write(self, name: str, content: bytes) -> str:
        path = self._path(name)
        with _locked(path):
            return self._write(path, content)

    def write_new(self, name: str, content: bytes) -> str:
        path = self._path(name)
        with _locked(path):
            if path.exists():
                raise FileExistsError(f"{path}: there already")
            return self._write(path, content)

    def swap(self, name: str, content: bytes, version: str) -> str:
        path = self._path(name)
        with _locked(path):
            if not path.is_file() or _sha256(path) != version:
                raise Changed(f"{path}: changed or removed by another writer since it was read; read it again")
            return self._write(path, content)

    def get(self, name: str, target: Path) -> None:
        _copy(self._path(name), target)

    def put(self, source: Path, name: str) -> None:
        _copy(source, self._path(name))

    def put_folder(self, folder: Path, name: str, last: str = MANIFEST) -> None:
        target = self._path(name)
        temporary, old = _hidden(target, "tmp"), _hidden(target, "old")
        try:
            shutil.copytree(folder, temporary)
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            if target.exists():
                os.rename(target, old)
            os.rename(temporary, target)
            sync(target.parent)
        except (OSError, shutil.Error) as error:
            raise StorageError(f"{target}: could not be written ({error})") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    def delete(self, name: str) -> None:
        path = self._path(name)
        gone = _hidden(path, "old")
        try:
            os.rename(path, gone)  # a folder disappears whole
        except (FileNotFoundError, NotADirectoryError):
            return
        _remove(gone)

    def leftovers(self) -> Sequence[Leftover]:
        found = []
        for parent, folders, files in os.walk(self.local):
            for name in [name for name in (*folders, *files) if _LEFT.fullmatch(name)]:
                path = Path(parent, name)
                try:
                    modified = max(each.stat().st_mtime for each in (path, *path.rglob("*")))
                except FileNotFoundError:
                    continue  # its writer has just finished
                found.append(Leftover(path.relative_to(self.local).as_posix(), "temporary", modified))
            folders[:] = [name for name in folders if not _LEFT.fullmatch(name)]
        return sorted(found, key=lambda leftover: leftover.name)

    def discard(self, leftover: Leftover) -> None:
        _remove(self._path(leftover.name))


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"{source}: not there")
    with _whole(target) as temporary:
        shutil.copyfile(source, temporary)
        if temporary.stat().st_size != source.stat().st_size:
            raise StorageError(f"{source}: its length changed while it was copied")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ S3


def endpoint() -> str | None:
    """The S3 endpoint that the environment names; None for AWS's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def client(attempts: int = 1) -> Any:
    """The boto3 client of this process for the environment's endpoint and credentials; the project's only one.

    Args:
        attempts: of boto3 for one request, the first included; 1 where the caller tries again itself.
    """
    settings = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
    with _making:
        return _client(os.getpid(), settings, attempts)


_making = threading.Lock()


@lru_cache(maxsize=8)
def _client(process: int, settings: tuple[tuple[str, str], ...], attempts: int) -> Any:
    # boto3 costs 0.3 s and only s3:// needs it
    import boto3  # type: ignore[import-untyped, unused-ignore]
    from botocore.config import Config  # type: ignore[import-untyped, unused-ignore]

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=FILES_AT_ONCE * PARTS_AT_ONCE,
        s3={"addressing_style": "path" if endpoint() else "auto"},
    )
    # a session of its own: boto3's default session keeps the credentials that it saw first
    return boto3.session.Session().client("s3", config=config, endpoint_url=endpoint())


def _patience() -> float:
    text = os.environ.get("DGM_STORAGE_PATIENCE", str(PATIENCE_S))
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"DGM_STORAGE_PATIENCE: {text!r} is not a number of seconds") from error


_PASSING = {
    "InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "BandwidthLimitExceeded",
    "ConditionalRequestConflict",  # two conditional writes met: asking again gives 412 or success
    "OperationAborted",
    "BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "IncompleteBody",  # bytes hurt on the way
    "NoSuchUpload",  # a completed upload whose answer was lost is done again
}  # fmt: skip
_ADVICE = {
    "NoSuchBucket": "create the bucket, or correct the address",
    "PermanentRedirect": "set AWS_DEFAULT_REGION to the bucket's region",
    "AuthorizationHeaderMalformed": "set AWS_DEFAULT_REGION to the bucket's region",
    "RequestTimeTooSkewed": "set this machine's clock",
    "ExpiredToken": "renew the credentials",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role",
}


def _advice(code: str, status: int) -> str:
    if status == 403 and code not in _ADVICE:
        return "check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE or the machine's role) and the bucket's policy"
    return _ADVICE.get(code, "check the address, AWS_ENDPOINT_URL and the credentials")


@dataclass(frozen=True)
class _Verdict:
    said: str
    passes: bool
    code: str = ""
    status: int = 0


def _judge(error: Exception) -> _Verdict:
    """What the other side said, and whether it may pass."""
    from boto3.exceptions import (  # type: ignore[import-untyped, unused-ignore]
        RetriesExceededError,
        S3UploadFailedError,
    )
    from botocore import exceptions as known  # type: ignore[import-untyped, unused-ignore]

    if isinstance(error, known.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        passes = (status >= 500 and status != 501) or status in (408, 425, 429) or code in _PASSING
        message = str(error.response.get("Error", {}).get("Message", "")).strip()
        return _Verdict(f"{status} {code}: {message}", passes, code, status)
    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, known.ClientError):
        return _judge(error.__context__)  # boto3's uploads wrap what they met
    said = f"{type(error).__name__}: {error}"
    untrusted = isinstance(error, known.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error)
    passing = (
        known.ConnectionError,
        known.HTTPClientError,
        known.IncompleteReadError,
        known.ResponseStreamingError,
        known.FlexibleChecksumError,
        RetriesExceededError,  # of a download in parts
        _Short,
    )
    return _Verdict(said, isinstance(error, passing) and not untrusted, type(error).__name__)


class _Short(Exception):
    """Fewer or more bytes than announced."""


def _persist(uri: str, operation: str, action: Callable[[], T]) -> T:
    """`action()`, again while what it meets may pass and patience lasts."""
    from boto3.exceptions import Boto3Error  # type: ignore[import-untyped, unused-ignore]
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped, unused-ignore]

    failed_at, tries, corrupt = 0.0, 0, 0
    while True:
        try:
            return action()
        except (BotoCoreError, ClientError, Boto3Error, _Short) as met:
            verdict = _judge(met)
        if verdict.code in ("NoSuchKey", "404"):
            raise FileNotFoundError(f"{uri}: not there")
        if not verdict.passes:
            advice = _advice(verdict.code, verdict.status)
            raise StorageError(f"{uri}: {operation} was refused by {_server()} ({verdict.said}); {advice}")
        tries += 1
        failed_at = failed_at or time.monotonic()
        corrupt += verdict.code == "FlexibleChecksumError"
        if corrupt >= CORRUPT_ATTEMPTS:
            raise Corrupted(f"{uri}: {operation}: {verdict.said}, {corrupt} times; the object is damaged")
        patience = _patience()
        left = patience - (time.monotonic() - failed_at)
        if left <= 0:
            raise StorageError(
                f"{uri}: {operation} failed {tries} times in {patience:g} s at {_server()} ({verdict.said}); "
                "is the endpoint (AWS_ENDPOINT_URL) right and up? DGM_STORAGE_PATIENCE (seconds) says how long to wait"
            )
        if tries == 1:
            log.warning("%s: %s: %s; trying again for up to %g s", uri, operation, verdict.said, patience)
        time.sleep(min(left, random.uniform(0.5, 1.0) * min(8.0, 0.1 * 2**tries)))


def _server() -> str:
    return endpoint() or "AWS"


class _Bucket(Place):
    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self._root}{_clean(name)}"}

    @property
    def _root(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _do(self, name: str, operation: str, action: Callable[[], T]) -> T:
        return _persist(f"{self.uri}/{name}" if name else self.uri, operation, action)

    def at(self, name: str) -> Place:
        return _Bucket(self.bucket, f"{self._root}{_clean(name)}")

    def _objects(self, prefix: str) -> Sequence[Any]:
        def listed() -> Sequence[Any]:
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._root + prefix)
            return [each for page in pages for each in page.get("Contents", ())]

        return self._do(prefix, "list", listed)

    def list(self, prefix: str = "") -> list[Entry]:
        found = [
            Entry(each["Key"].removeprefix(self._root), each["Size"], each["LastModified"].timestamp(), each["ETag"])
            for each in self._objects(prefix)
            if not each["Key"].endswith("/")  # the folders that consoles make
        ]
        found = [entry for entry in found if not _OURS.fullmatch(entry.name.rpartition("/")[2])]
        return sorted(found, key=lambda entry: entry.name)

    def read_versioned(self, name: str) -> tuple[bytes, str]:
        def read() -> tuple[bytes, str]:
            answer = client().get_object(**self._key(name))
            with closing(answer["Body"]) as body:  # as a context manager it would give a stream that checks nothing
                content = body.read()  # botocore holds it to the checksum header when there is one
            if len(content) != answer["ContentLength"]:
                raise _Short(f"{len(content)} bytes arrived, {answer['ContentLength']} were announced")
            return content, str(answer["ETag"])

        return self._do(name, "read", read)

    def write(self, name: str, content: bytes) -> str:
        def write() -> str:
            return str(client().put_object(**self._key(name), Body=content, ChecksumAlgorithm="SHA256")["ETag"])

        return self._do(name, "write", write)

    def _write_if(self, name: str, content: bytes, condition: dict[str, str]) -> str | None:
        """The new version, or None when the condition did not hold.

        A PUT that was applied and answered 500 is repeated and gets 412. So every call signs its object with
        an id, and a 412 is a loss only when the object carries another's.
        """
        from botocore.exceptions import ClientError  # type: ignore[import-untyped, unused-ignore]

        mine = uuid.uuid4().hex

        def write() -> str | None:
            try:
                answer = client().put_object(
                    **self._key(name), Body=content, ChecksumAlgorithm="SHA256", Metadata={WRITE_ID: mine}, **condition
                )
                return str(answer["ETag"])
            except ClientError as error:
                verdict = _judge(error)
                gone = verdict.code == "NoSuchKey" and "IfMatch" in condition
                if verdict.status != 412 and not gone:
                    raise
            return written()

        def written() -> str | None:
            try:
                facts = client().head_object(**self._key(name))
            except ClientError as error:
                if _judge(error).status == 404:
                    return None
                raise
            return str(facts["ETag"]) if facts["Metadata"].get(WRITE_ID) == mine else None

        return self._do(name, "conditional write", write)

    def write_new(self, name: str, content: bytes) -> str:
        version = self._write_if(name, content, {"IfNoneMatch": "*"})
        if version is None:
            raise FileExistsError(f"{self.uri}/{name}: there already")
        return version

    def swap(self, name: str, content: bytes, version: str) -> str:
        new = self._write_if(name, content, {"IfMatch": version})
        if new is None:
            raise Changed(f"{self.uri}/{name}: changed or removed by another writer since it was read; read it again")
        return new

    def get(self, name: str, target: Path) -> None:
        def get() -> None:
            with _whole(target) as temporary:
                answer = client().get_object(**self._key(name))
                length = answer["ContentLength"]
                with closing(answer["Body"]) as body:  # as a context manager it would give a stream that checks nothing
                    if length <= PART:
                        with temporary.open("wb") as file:
                            for chunk in iter(lambda: body.read(1 << 20), b""):
                                file.write(chunk)
                if length > PART:  # in parts, several at once
                    client(PART_ATTEMPTS).download_file(**self._key(name), Filename=str(temporary), Config=_transfer())
                if temporary.stat().st_size != length:
                    raise _Short(f"{temporary.stat().st_size} bytes arrived, {length} were announced")

        self._do(name, "get", get)

    def put(self, source: Path, name: str) -> None:
        if not source.is_file():
            raise FileNotFoundError(f"{source}: not there")
        checked = {"ChecksumAlgorithm": "SHA256"}  # the server compares: every part, or the whole

        def put() -> None:
            client(PART_ATTEMPTS).upload_file(str(source), **self._key(name), ExtraArgs=checked, Config=_transfer())

        self._do(name, "put", put)

    def put_folder(self, folder: Path, name: str, last: str = MANIFEST) -> None:
        below = self.at(name)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if last not in names:
            raise FileNotFoundError(f"{folder / last}: not there, and it must arrive last in {below.uri}")
        names.remove(last)
        below.write(UNFINISHED, b"")
        _each(names, lambda each: below.put(folder / each, each))
        below.put(folder / last, last)
        try:
            below.delete(UNFINISHED)
        except StorageError as error:  # the folder is whole; `sweep` removes the mark
            log.warning("%s", error)

    def delete(self, name: str) -> None:
        own = f"{self._root}{_clean(name)}"
        keys = [each["Key"] for each in self._objects(name) if each["Key"] == own or each["Key"].startswith(f"{own}/")]
        seals = [key for key in keys if key.rpartition("/")[2] == MANIFEST]  # first: what is left never looks whole
        rest = [key for key in keys if key not in set(seals)]
        for some in (seals, rest):
            for start in range(0, len(some), 1000):
                self._delete(name, some[start : start + 1000])

    def _delete(self, name: str, keys: Sequence[str]) -> None:
        from botocore.exceptions import ClientError  # type: ignore[import-untyped, unused-ignore]

        def delete() -> None:
            wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
            for each in client().delete_objects(Bucket=self.bucket, Delete=wanted).get("Errors", ()):
                status = 403 if each.get("Code") == "AccessDenied" else 500
                raise ClientError({"Error": each, "ResponseMetadata": {"HTTPStatusCode": status}}, "DeleteObjects")

        self._do(name, "delete", delete)

    def leftovers(self) -> Sequence[Leftover]:
        def uploads() -> Sequence[Any]:
            pages = client().get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self._root)
            return [each for page in pages for each in page.get("Uploads", ())]

        found = [
            Leftover(each["Key"].removeprefix(self._root), "upload", each["Initiated"].timestamp(), each["UploadId"])
            for each in self._do("", "list uploads", uploads)
        ]
        objects = {each["Key"].removeprefix(self._root): each["LastModified"].timestamp() for each in self._objects("")}
        for name in objects:
            folder, _, file = name.rpartition("/")
            if file == UNFINISHED:
                modified = max(time for each, time in objects.items() if each.startswith(f"{folder}/"))
                found.append(Leftover(folder, "folder", modified))
        return sorted(found, key=lambda leftover: leftover.name)

    def discard(self, leftover: Leftover) -> None:
        if leftover.kind == "folder":
            whole = any(each["Key"].endswith(f"/{MANIFEST}") for each in self._objects(f"{leftover.name}/{MANIFEST}"))
            self.delete(f"{leftover.name}/{UNFINISHED}" if whole else leftover.name)
            return

        def abort() -> None:
            client().abort_multipart_upload(**self._key(leftover.name), UploadId=leftover.upload)

        self._do(leftover.name, "abort upload", abort)


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig  # type: ignore[import-untyped, unused-ignore]

    return TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=PARTS_AT_ONCE)
