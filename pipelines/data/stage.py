"""Prepared datasets on their way: from the folder to the cluster's storage, and from there to a node."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pipelines.data.manifest import FILE, Part, read_manifest
from pipelines.data.raw import SPLITS
from pipelines.data.shards import check, verified, write_synced
from pipelines.storage import place

THREADS = 8  # files on their way at once


def stage(folder: Path | str, storage: str) -> str:
    """Copies a prepared dataset to `<storage>/data/<digest>/`: shards first, the manifest last.

    What is there is left alone: the folder is named by the manifest's digest, which covers every shard's sha256, so a
    shard of the right length is the right shard. Two at once write the same bytes.

    Args:
        folder: the prepared dataset.
        storage: a folder or s3://bucket/prefix.
    Returns: the URI of the copy. With a storage on this machine, and for a dataset that lies on S3 already, it is the
        dataset itself, and nothing is copied.
    Raises: ValueError when a shard differs from the manifest; nothing damaged is copied.
    """
    if place(storage).local or not place(folder).local:
        return str(folder)
    manifest = read_manifest(folder)
    target = place(storage).at(f"data/{manifest.digest}")
    there = {entry.name: entry.bytes for entry in target.list()}

    def send(part: Part) -> None:
        verified(folder, part)
        target.put(Path(folder, part.path), part.path)

    missing = [part for part in manifest.parts if there.get(part.path) != part.bytes]
    _each(send, missing)
    if missing or FILE not in there:
        target.write(FILE, manifest.to_json().encode())
    return target.uri


def fetch_dataset(uri: str, cache: Path, splits: Iterable[str] = SPLITS) -> Path:
    """A node's copy of a dataset, every shard held to its sha256; a split is there whole or not at all.

    Args:
        uri: a dataset's URI. A folder is returned as it is.
        cache: the copy is `<cache>/<digest>/`. Several workers of a node may ask at once: one copies, the others wait.
        splits: which of them.
    Raises: ValueError when a shard differs from the manifest.
    """
    source = place(uri)
    if source.local:
        return source.local
    manifest = read_manifest(uri)
    folder = cache / manifest.digest
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{manifest.digest}.lock"):
        for split in splits:
            if (folder / split).is_dir():
                continue
            unfinished = folder / f".{split}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed: the lock is ours
            unfinished.mkdir(parents=True)

            def fetch(part: Part, into: Path = unfinished) -> None:
                target = into / Path(part.path).name
                source.get(part.path, target)
                with target.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                check(uri, part, target.stat().st_size, sha256)

            try:
                _each(fetch, [part for part in manifest.parts if part.split == split])
                unfinished.rename(folder / split)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        if not (folder / FILE).is_file():
            write_synced(folder / f".{FILE}", manifest.to_json().encode())
            (folder / f".{FILE}").rename(folder / FILE)
    return folder


def _each(work: Callable[[Part], None], parts: list[Part]) -> None:
    """All of them, THREADS at a time; the first error is raised and what has not begun is dropped."""
    with ThreadPoolExecutor(THREADS) as threads:
        tasks = [threads.submit(work, part) for part in parts]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
