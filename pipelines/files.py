"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(folder: Path, seal: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and is removed when it does not."""
    from dgm_models.training import checkpoint  # here, not above: it imports torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        if seal:
            checkpoint.seal(temporary)
        checkpoint.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    write_bytes(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file and the way out."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); `dvc repro` makes it") from error
