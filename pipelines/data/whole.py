"""A folder that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_folder(out: Path, mark: str) -> Iterator[Path]:
    """Yields an empty folder beside `out` and renames it to `out` when the block ends without an error.

    An error removes it and leaves `out` as it was. What a killed process left behind is removed by the next call.

    Args:
        out: the folder to make or to replace.
        mark: the file that every such folder holds; a folder with other content is not replaced.
    Raises: ValueError if `out` is something else than an earlier folder of this kind.
    """
    if out.exists() and not (out.is_dir() and ((out / mark).is_file() or not any(out.iterdir()))):
        raise ValueError(f"{out}: exists and holds no {mark}, so it is not replaced; move it away or give another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        temporary.chmod(0o755)
        yield temporary
        _swap(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the swap there is nothing left of it
        os.close(lock)


def _prefix(out: Path) -> str:
    return f".{out.name}.unfinished."


def _swap(new: Path, out: Path) -> None:
    """Renames `new` to `out`; a folder that was there before steps aside and is removed last."""
    if not out.exists():
        new.rename(out)
    else:
        aside = new.with_name(new.name + ".old")
        out.rename(aside)
        try:
            new.rename(out)
        except OSError:
            aside.rename(out)
            raise
        shutil.rmtree(aside)
    folder = os.open(out.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _sweep(out: Path) -> None:
    """Removes the folders of earlier calls whose process is gone: their lock is free."""
    for left in out.parent.glob(f"{_prefix(out)}*"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)
