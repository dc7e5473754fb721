"""The run store: folder and s3:// alike; readers see a whole folder or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from dgm_models.training import checkpoint
from pipelines.cluster.store import RunStore


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="runs")
    yield "s3://runs/store"
    patch.undo()
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def _write(value: float) -> object:
    return lambda folder: checkpoint.write(folder, {"weights": {"w": torch.full((3,), value)}}, {"state": {"v": value}})


def _newest(store: RunStore) -> float | None:
    with store.newest() as folder:
        return None if folder is None else float(checkpoint.read_tensors(folder, "weights")["w"][0])


def test_newest_checkpoint_is_found_and_old_ones_dropped(storage: str) -> None:
    store = RunStore(storage, "abc", keep=2)
    assert _newest(store) is None
    for step in (10, 20, 30):
        store.save(step, _write(float(step)))
    assert _newest(store) == 30.0
    assert store._steps() == [20, 30]
    assert _newest(RunStore(storage, "other")) is None


def test_damaged_checkpoint_is_passed_over(storage: str, tmp_path: Path) -> None:
    store = RunStore(storage, "abc")
    store.save(10, _write(1.0))
    store.save(20, _write(2.0))
    name = f"{store.base}/step-00000020/weights.safetensors"
    with store.filesystem.open_input_stream(name) as stream:
        content = bytearray(stream.read())
    content[-1] ^= 1  # one flipped bit: it still loads
    with store.filesystem.open_output_stream(name) as stream:
        stream.write(bytes(content))
    assert _newest(store) == 1.0


def test_checkpoint_without_manifest_does_not_count(storage: str) -> None:
    store = RunStore(storage, "abc")
    store.save(10, _write(1.0))
    store.save(20, _write(2.0))
    store.filesystem.delete_file(f"{store.base}/step-00000020/manifest.json")
    assert _newest(store) == 1.0


def test_published_artifact_is_fetched_whole(storage: str, tmp_path: Path) -> None:
    store = RunStore(storage, "abc")
    assert not store.has_artifact()
    folder = tmp_path / "artifact"
    checkpoint.write(folder, {"weights": {"w": torch.ones(2)}}, {"spec": {}})
    store.publish("artifact", folder)
    assert store.has_artifact()
    with store.fetched("artifact") as found:
        assert sorted(path.name for path in found.iterdir()) == ["manifest.json", "spec.json", "weights.safetensors"]


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a folder nor s3://"):
        RunStore("gs://bucket/x", "abc")
