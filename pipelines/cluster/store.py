"""The run store: checkpoints and the finished artifact of every run, under the digest of its identity.

Layout: `<storage>/<digest>/head.json`, and beside it `step-00000500-g1/` and `artifact-g1/`. The head names the folders
that count, each with the SHA-256 of its manifest, and changes by compare-and-set alone; a folder that it does not name
was never acknowledged. `-g1` is the generation: every process that takes a run over raises it, and the ones before can
write no more. Ray's own checkpoints are not used: what is reported to Ray is not durable until its controller has
polled, and a repeated run name there resumes whatever it finds.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dgm_models.training import checkpoint
from pipelines import storage as storing
from pipelines.storage import Changed, Corrupted, StorageError, place

log = logging.getLogger("dgm.store")
HEAD = "head.json"
ARTIFACT = "artifact"
_FOLDER = re.compile(r"(?:step-\d{8}|artifact)-g(\d+)(?:\.\d+)?")


class Fenced(RuntimeError):
    """Another process has taken the run over; this one may write no more."""


@dataclass(frozen=True)
class Folder:
    """A folder that counts: its name, and the SHA-256 of its manifest."""

    folder: str
    manifest_sha256: str


@dataclass(frozen=True)
class Checkpoint(Folder):
    step: int


@dataclass(frozen=True)
class Head:
    """What is acknowledged of a run.

    Attributes:
        generation: how often the run was taken over.
        owner: a nonce of the process that may write.
        checkpoints: by step, the newest last.
        artifact: the finished artifact.
    """

    generation: int = 0
    owner: str = ""
    checkpoints: tuple[Checkpoint, ...] = ()
    artifact: Folder | None = None

    def names(self) -> set[str]:
        """The folders that it names."""
        return {each.folder for each in (*self.checkpoints, *([self.artifact] if self.artifact else []))}


class RunStore:
    """The state of one run.

    Args:
        storage: a folder, file:// or s3://bucket/prefix.
        digest: of the run's identity.
        keep: how many checkpoints stay.
    """

    def __init__(self, storage: str, digest: str, keep: int = 2) -> None:
        self.place = place(storage).at(digest)
        self.keep = keep
        self.owner = uuid.uuid4().hex
        self.generation: int | None = None

    # -------------------------------------------------------------------------------------------- the head

    def head(self) -> Head | None:
        """What is acknowledged; None for a run that nobody has begun. Raises: ValueError when it cannot be read."""
        found = self._read()
        return found[0] if found else None

    def _read(self) -> tuple[Head, str] | None:
        try:
            content, version = self.place.read_versioned(HEAD)
        except FileNotFoundError:
            return None
        try:
            document = json.loads(content)
            artifact = document["artifact"]
            head = Head(
                int(document["generation"]),
                str(document["owner"]),
                tuple(Checkpoint(**each) for each in document["checkpoints"]),
                Folder(**artifact) if artifact else None,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.place.uri}/{HEAD}: not readable as the head of a run ({error}); restore it from a backup, or "
                f"remove {self.place.uri} to train this run from its first step"
            ) from error
        return head, version

    def _change(self, change: Callable[[Head], Head]) -> tuple[Head, Head]:
        """Compare and set until it holds. Returns: the head before and after. Raises: whatever `change` raises."""
        while True:
            found = self._read()
            before = found[0] if found else Head()
            after = change(before)
            content = (json.dumps(asdict(after), indent=1, sort_keys=True) + "\n").encode()
            try:
                if found:
                    self.place.swap(HEAD, content, found[1])
                else:
                    self.place.write_new(HEAD, content)
                return before, after
            except (Changed, FileExistsError):
                continue  # another writer was there: look again

    def claim(self) -> int:
        """Makes this process the run's owner; the owner before is fenced. Returns: the generation."""
        _, head = self._change(lambda head: replace(head, generation=head.generation + 1, owner=self.owner))
        self.generation = head.generation
        return head.generation

    def _owned(self, head: Head) -> Head:
        if head.owner != self.owner or head.generation != self.generation:
            taken = f"generation {head.generation} has taken over" if head.generation else f"its {HEAD} is gone"
            raise Fenced(f"{self.place.uri}: this process owned generation {self.generation}; {taken}")
        return head

    def _change_as_owner(self, change: Callable[[Head], Head]) -> Head:
        """Changes the head if it is still this process's, then removes the folders that it no longer names."""
        _, head = self._change(lambda head: change(self._owned(head)))
        try:
            for name in self._folders() - head.names():
                match = _FOLDER.fullmatch(name)
                if match and int(match[1]) <= head.generation:
                    self.place.delete(name)
        except OSError as error:  # what counts is done; the next change removes the rest
            log.warning("%s: an old folder could not be removed: %s", self.place.uri, error)
        return head

    def _folders(self) -> set[str]:
        if self.place.local:
            return {path.name for path in self.place.local.iterdir() if path.is_dir()}
        return {entry.name.split("/")[0] for entry in self.place.list() if "/" in entry.name}

    # -------------------------------------------------------------------------------------------- reading

    @contextmanager
    def _verified(self, named: Folder) -> Iterator[Path]:
        """A folder as the head names it, read where it lies or as a temporary copy. Raises: checkpoint.Damaged."""
        if self.place.local:
            folder = self.place.local / named.folder
            _verify(folder, named)
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="dgm-") as temporary:
            self._fetch(named, Path(temporary))
            yield Path(temporary, named.folder)

    def _fetch(self, named: Folder, into: Path) -> None:
        for last in (False, True):  # bytes that were hurt on the way are whole the second time
            try:
                shutil.rmtree(into / named.folder, ignore_errors=True)
                self.place.get_folder(named.folder, into / named.folder)
                _verify(into / named.folder, named)
                return
            except (FileNotFoundError, Corrupted) as error:
                raise checkpoint.Damaged(str(error)) from error
            except checkpoint.Damaged as error:
                if last:
                    raise checkpoint.Damaged(str(error).replace(str(into), self.place.uri)) from error

    @contextmanager
    def newest(self) -> Iterator[Path | None]:
        """The newest checkpoint that is intact, None without one; damaged ones are named in the log and passed over."""
        head = self.head() or Head()
        with ExitStack() as stack:
            folder = None
            for each in reversed(head.checkpoints):
                try:
                    folder = stack.enter_context(self._verified(each))
                    break
                except checkpoint.Damaged as error:
                    log.warning("passing over a damaged checkpoint: %s", error)
            yield folder

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """The finished artifact, verified, for the time of the block. Raises: checkpoint.Damaged."""
        _only_artifact(name)
        head = self.head()
        if head is None or head.artifact is None:
            raise checkpoint.Damaged(f"{self.place.uri}: no {name} was published")
        with self._verified(head.artifact) as folder:
            yield folder

    def has_artifact(self) -> bool:
        try:
            with self.fetched(ARTIFACT):
                return True
        except checkpoint.Damaged as error:
            if (self.head() or Head()).artifact:
                log.warning("passing over a damaged artifact: %s", error)
            return False

    # -------------------------------------------------------------------------------------------- writing

    def save(self, step: int, write: Callable[[Path], Any]) -> None:
        """Lets `write(folder)` make a checkpoint, stores it, and drops the oldest beyond `keep`.

        Checkpoints at or beyond `step` are dropped too: this run was not resumed from them.
        Raises: Fenced; OSError when it cannot be written, with nothing changed.
        """

        def add(head: Head, named: Folder) -> Head:
            earlier = [each for each in head.checkpoints if each.step < step]
            new = Checkpoint(**asdict(named), step=step)
            return replace(head, checkpoints=tuple([*earlier, new][-self.keep :]))

        self._store(f"step-{step:08d}", write, add)

    def publish(self, name: str, folder: Path) -> None:
        """Stores a sealed local folder as the run's artifact; readers see it whole or not at all. Raises: Fenced."""
        _only_artifact(name)
        self._store(name, folder, lambda head, named: replace(head, artifact=named))

    def drop_checkpoints(self) -> None:
        """A finished run needs its artifact alone. Raises: Fenced."""
        self._begin()
        self._change_as_owner(lambda head: replace(head, checkpoints=()))

    def _begin(self) -> Head:
        """The head, which must be this process's; the first writing claims."""
        if self.generation is None:
            self.claim()
        return self._owned(self.head() or Head())

    def _store(self, stem: str, content: Path | Callable[[Path], Any], add: Callable[[Head, Folder], Head]) -> None:
        """Brings a folder here under a name of its own, then names it in the head."""
        head = self._begin()  # before gigabytes are written for nothing
        name, again = f"{stem}-g{self.generation}", 1
        while name in head.names():
            again += 1
            name = f"{stem}-g{self.generation}.{again}"
        try:
            named = Folder(name, self._bring(content, name))
        except BaseException:
            self._discard(name)
            raise
        try:
            self._change_as_owner(lambda head: add(head, named))
        except Fenced:
            self._discard(name)
            raise
        except StorageError:  # on S3 the head may have been changed behind a lost answer: the next change will see
            if self.place.local and name not in (self.head() or Head()).names():
                self._discard(name)
            raise

    def _bring(self, content: Path | Callable[[Path], Any], name: str) -> str:
        """Returns: the SHA-256 of the manifest."""
        if self.place.local and not isinstance(content, Path):
            folder = self.place.local / name
            content(folder)  # written where it stays: no second copy of a large checkpoint
            storing.sync(folder)
            return _manifest_sha256(folder)
        with tempfile.TemporaryDirectory(prefix="dgm-") as temporary:
            folder = content if isinstance(content, Path) else Path(temporary, name)
            if not isinstance(content, Path):
                content(folder)
            self.place.put_folder(folder, name)
            return _manifest_sha256(folder)

    def _discard(self, name: str) -> None:
        try:
            self.place.delete(name)
        except OSError as error:  # what was met first is what the caller must hear; the next save removes the rest
            log.warning("%s/%s: could not be removed: %s", self.place.uri, name, error)


def _only_artifact(name: str) -> None:
    if name != ARTIFACT:
        raise ValueError(f"{name!r}: a run publishes one folder, {ARTIFACT!r}")


def _manifest_sha256(folder: Path) -> str:
    return checkpoint.file_sha256(folder / checkpoint.MANIFEST)


def _verify(folder: Path, named: Folder) -> None:
    try:
        found = _manifest_sha256(folder)
    except OSError as error:
        raise checkpoint.Damaged(f"{folder}: no readable {checkpoint.MANIFEST} ({error})") from error
    if found != named.manifest_sha256:
        raise checkpoint.Damaged(f"{folder / checkpoint.MANIFEST}: not the manifest that {HEAD} names")
    checkpoint.verify(folder)


def ray_storage(storage: str) -> tuple[str, Any]:
    """Where Ray Tune keeps its own state: (storage_path, storage_filesystem).

    The file system is a pyarrow one for s3:// behind an endpoint of its own, else None: Ray finds the rest.
    """
    where, endpoint = place(storage), storing.endpoint()
    if where.local or endpoint is None:
        return where.uri, None
    import pyarrow.fs as fs

    scheme, _, host = endpoint.rstrip("/").partition("://")
    filesystem = fs.S3FileSystem(
        endpoint_override=host,
        scheme=scheme,
        connect_timeout=storing.CONNECT_TIMEOUT_S,
        request_timeout=storing.READ_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=10),
    )
    return where.uri.removeprefix("s3://"), filesystem
