"""Raw files of the user: in a folder, file:// or s3://."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.data.raw import Array
from pipelines.storage import Place, place


def file_of(path: str) -> tuple[Place, str]:
    """The place and the name of one file."""
    if "://" not in path:
        local = Path(path).expanduser()
        return place(local.parent), local.name
    parent, _, name = path.rstrip("/").rpartition("/")
    return place(parent), name


def origin(path: str, kind: str) -> str:
    """What the manifest says of where the bytes come from: a URI, or no path when they lie on this machine."""
    return path if path.startswith("s3://") else f"a local {kind}"


def files_in(dataset: str, folder: str, suffixes: tuple[str, ...], what: str) -> list[str]:
    """The names of a folder's files, of those in its subfolders too, that end so; hidden ones are passed over.

    Args:
        dataset: its name, for messages.
        folder: a path or URI.
        suffixes: in lower case.
        what: one of them, for messages.
    Raises: ValueError when there is no such folder, or no such file in it.
    """
    where = place(folder)
    if where.local and not where.local.is_dir():
        raise ValueError(f"{dataset}: {folder}: no such folder")
    files = [entry.name for entry in where.list()]
    names = [n for n in files if n.lower().endswith(suffixes) and not n.rpartition("/")[2].startswith(".")]
    if not names:
        raise ValueError(f"{dataset}: {folder}: no {what} in it; expected files ending in {', '.join(suffixes)}")
    return sorted(names)


def subfolders(dataset: str, folder: str, names: Sequence[str]) -> tuple[tuple[str, ...], Array | None]:
    """(class names, [N] labels) of files by their subfolder: none when all lie in the folder itself."""
    tops = [name.split("/")[:-1][:1] for name in names]
    if not any(tops):
        return (), None
    if not all(tops):
        loose = names[tops.index([])]
        raise ValueError(f"{dataset}: {folder}: {loose} lies beside the classes' subfolders; expected it in one")
    classes = sorted({top[0] for top in tops})
    number = {name: i for i, name in enumerate(classes)}
    return tuple(classes), np.array([number[top[0]] for top in tops], np.int32)
