"""A folder of safetensors and JSON, written whole or not at all, and verified by SHA-256 before it is read.

Neither torch nor safetensors notices a flipped bit: a length and a SHA-256 for every file stand in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"


class Damaged(ValueError):
    """A folder that is not what its manifest says."""


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]) -> None:
    """Writes `<name>.safetensors` for every group of tensors and `<name>.json` for every document.

    The files go to a folder beside `folder`, the manifest last, then one rename; what stood there before is replaced.
    Raises: OSError naming the folder when the disk is full or not writable; nothing half-written stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir()
        for name, group in tensors.items():
            # a tensor may be a view of another's memory: every one gets its own
            own = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in group.items()}
            save_file(own, temporary / f"{name}.safetensors")
        for name, document in documents.items():
            (temporary / f"{name}.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        seal(temporary)
        replace(temporary, folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OSError(f"{folder}: could not be written ({error}); what was there before is untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(folder: Path) -> None:
    """Writes the manifest of a finished folder, and flushes every file to the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            _flush(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1, sort_keys=True) + "\n")
    _flush(folder / MANIFEST)


def replace(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder`; an old folder is moved aside first and deleted last."""
    old = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify(folder: Path) -> None:
    """Raises Damaged naming the first file of the manifest that is missing, short or changed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder}: no readable {MANIFEST} ({error})") from error
    for name, facts in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise Damaged(f"{folder}: the manifest names {name!r}, which lies outside the folder")
        if not path.is_file():
            raise Damaged(f"{path}: missing")
        if path.stat().st_size != facts["bytes"] or file_sha256(path) != facts["sha256"]:
            raise Damaged(f"{path}: its content is not what the manifest says (length or SHA-256 differ)")


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def read_document(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors "parameter.field" and a JSON document of the rest."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, fields in state["state"].items():
        for key, value in fields.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}.{key}"] = value
    return tensors, {"scalars": scalars, "groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], document: Any) -> None:
    """The inverse of `flatten_optimizer`, onto an optimizer over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for source in (tensors, document["scalars"]):
        for name, value in source.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
    groups = [dict(group) for group in document["groups"]]
    for group in groups:
        group.update({key: tuple(value) for key, value in group.items() if key == "betas"})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
