"""A checkpoint is written whole or not at all, and read only when it is what its manifest says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from dgm_models.training import checkpoint
from dgm_models.training.checkpoint import Damaged

TENSORS = {"weights": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}}


def written(folder: Path) -> Path:
    checkpoint.write(folder, TENSORS, {"state": {"step": 3}})
    return folder


def test_checkpoint_gives_back_what_was_written(tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    checkpoint.verify(folder)
    found = checkpoint.read_tensors(folder, "weights")
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype
        for name, value in TENSORS["weights"].items()
    )
    assert checkpoint.read_document(folder, "state") == {"step": 3}
    assert os.listdir(tmp_path) == ["c"]


def test_checkpoint_takes_views_and_shared_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    checkpoint.write(tmp_path / "c", {"weights": {"t": base.T, "row": base[1], "same": base}}, {})
    found = checkpoint.read_tensors(tmp_path / "c", "weights")
    assert torch.equal(found["t"], base.T) and torch.equal(found["row"], base[1]) and torch.equal(found["same"], base)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "short", "long", "missing"])
def test_checkpoint_damage_names_the_file(name: str, damage: str, tmp_path: Path) -> None:
    path = written(tmp_path / "c") / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"flipped": flipped, "short": content[:-1], "long": content + b"x"}[damage])
    with pytest.raises(Damaged, match=name):
        checkpoint.verify(tmp_path / "c")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_checkpoint_without_a_readable_manifest_is_damaged(content: str | None, tmp_path: Path) -> None:
    manifest = written(tmp_path / "c") / checkpoint.MANIFEST
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)
    with pytest.raises(Damaged, match="no readable manifest"):
        checkpoint.verify(tmp_path / "c")


def test_checkpoint_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    (tmp_path / "secret").write_text("x")
    facts = {"bytes": 1, "sha256": checkpoint.file_sha256(tmp_path / "secret")}
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"files": {"../secret": facts}}))
    with pytest.raises(Damaged, match="outside the folder"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("fault", [OSError("no space left on device"), TypeError("no JSON"), KeyboardInterrupt()])
def test_checkpoint_that_cannot_be_written_leaves_what_was_there(
    fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "c")

    def fail(path: Path) -> None:
        raise fault

    monkeypatch.setattr(checkpoint, "seal", fail)
    with pytest.raises(OSError if isinstance(fault, OSError) else type(fault)) as error:
        checkpoint.write(folder, {"weights": {"a": torch.zeros(1)}}, {})
    if isinstance(fault, OSError):
        assert str(folder) in str(error.value) and "untouched" in str(error.value)
    checkpoint.verify(folder)
    assert checkpoint.read_document(folder, "state") == {"step": 3}
    assert os.listdir(tmp_path) == ["c"]


def test_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    folder = written(tmp_path / "c")
    checkpoint.write(folder, {"other": {"z": torch.ones(1)}}, {})
    checkpoint.verify(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "other.safetensors"]


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "sgd"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_checkpoint_of_an_optimizer_goes_on_where_it_was(name: str, momentum: float, tmp_path: Path) -> None:
    from dgm_models.training.optim import Optim

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, x: float) -> None:
        module(torch.full((1, 2), x)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    settings = Optim(name=name, momentum=momentum, weight_decay=0.1, lr=0.01)
    torch.manual_seed(0)
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = settings.build(one)
    step(one, optimizer, 1.0)
    tensors, document = checkpoint.flatten_optimizer(optimizer)
    checkpoint.write(tmp_path / "c", {"optimizer": tensors}, {"state": document})
    two.load_state_dict(one.state_dict())
    restored = settings.build(two)
    checkpoint.restore_optimizer(
        restored,
        checkpoint.read_tensors(tmp_path / "c", "optimizer"),
        checkpoint.read_document(tmp_path / "c", "state"),
    )
    for x in (2.0, -1.0):
        step(one, optimizer, x)
        step(two, restored, x)
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
