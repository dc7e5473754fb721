"""A place that is a folder: files are written to a temporary name, flushed and renamed, one writer at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.storage.interface import MANIFEST, OURS, Changed, Entry, Leftover, Place, StorageError, clean, sha256

_LEFT = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)")


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
def whole(path: Path) -> Iterator[Path]:
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


class Folder(Place):
    """A place that is a folder of this machine's file system."""

    def __init__(self, folder: Path) -> None:
        self.local: Path = folder
        self.uri = str(folder)

    def _path(self, name: str) -> Path:
        return self.local / clean(name)

    def at(self, name: str) -> Place:
        return Folder(self._path(name))

    def list(self, prefix: str = "") -> list[Entry]:
        start = self.local / prefix.rpartition("/")[0]
        found = []
        for parent, folders, files in os.walk(start):
            folders[:] = [name for name in folders if not OURS.fullmatch(name)]
            for file in files:
                path = Path(parent, file)
                name = path.relative_to(self.local).as_posix()
                if name.startswith(prefix) and not OURS.fullmatch(file):
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
        with whole(path) as temporary:
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
            if not path.is_file() or sha256(path) != version:
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
    with whole(target) as temporary:
        shutil.copyfile(source, temporary)
        if temporary.stat().st_size != source.stat().st_size:
            raise StorageError(f"{source}: its length changed while it was copied")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
