"""Raw files of the user: in a folder, file:// or s3://."""

from __future__ import annotations

from pathlib import Path

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
