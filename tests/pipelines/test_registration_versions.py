"""One model version a run and evaluation, its receipt, and a fetch that trusts nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dgm_models.training import checkpoint
from pipelines import files, registration, tracking
from pipelines.registration import fetch, register, sync


def write_run(root: Path, run: str, *, seed: int = 0, evaluation_seed: int = 0) -> None:
    """artifacts/<run> and evaluations/<run> as the stages write them, small."""
    artifact, evaluation = root / "artifacts" / run, root / "evaluations" / run
    lineage = {
        "run": run, "run_digest": hashlib.sha256(f"{run}{seed}".encode()).hexdigest(), "data_digest": "d" * 64,
        "git_commit": "c" * 40, "git_dirty": True, "dataset": "digits", "seed": seed,
    }  # fmt: skip
    spec = {
        "version": 1, "method": "vae/beta_vae", "params": {"beta": 4.0}, "capabilities": ["samples"],
        "data": {"kind": "image", "shape": [1, 8, 8], "levels": 17, "classes": 10, "location": 0.0, "scale": 1.0},
        "lineage": lineage,
    }  # fmt: skip
    checkpoint.write(artifact, {"weights": {"w": torch.full((4,), float(seed))}}, {"spec": spec})
    curves = [{"step": step, "metrics": {"loss": 1 / step}} for step in range(1, 6)]
    (artifact / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curves))
    checkpoint.seal(artifact)
    shared = {"n": 40, "split": "test", "extractor_sha256": "e" * 64, "seed": evaluation_seed, "unit": ""}
    rows = [
        {"metric": "fid/digits", "value": 3.0 + evaluation_seed, "low": 2.5, "high": 3.5, "kind": "estimate", **shared},
        {"metric": "bits_per_dim", "value": 2.0, "low": None, "high": None, "kind": "bound", **shared},
    ]
    evaluation.mkdir(parents=True, exist_ok=True)
    (evaluation / "evaluation.json").write_text(json.dumps(rows))
    (evaluation / "grid.png").write_bytes(b"png")
    save_file({"real": torch.zeros(40, 2), "fake": torch.ones(40, 2)}, evaluation / "features.safetensors")


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    tracking.client(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    (tmp_path / "server").mkdir()
    shutil.copy(empty_database, tmp_path / "server" / "mlflow.db")
    return f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}"


def register_run(root: Path, run: str, uri: str) -> dict[str, Any]:
    receipt = root / "receipts" / f"{run}.json"
    return register(root / "artifacts" / run, root / "evaluations" / run, "digits", receipt, uri=uri)


def sync_all(root: Path, uri: str) -> list[str]:
    return sync(sorted((root / "receipts").iterdir()), root / "artifacts", root / "evaluations", uri=uri)


def numbers(uri: str) -> list[str]:
    return [str(each.version) for each in tracking.client(uri).search_model_versions("name='digits'")]


def version_folder(uri: str, version: str) -> Path:
    source = tracking.client(uri).get_model_version_download_uri("digits", version)
    return Path(source.removeprefix("file://"))


def test_register_makes_one_version_with_everything_in_it(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    receipt = register_run(tmp_path, "vae", uri)
    assert receipt == json.loads((tmp_path / "receipts" / "vae.json").read_text())
    mlflow = tracking.client(uri)
    version = mlflow.get_model_version("digits", receipt["version"])
    lineage = json.loads((tmp_path / "artifacts" / "vae" / "spec.json").read_text())["lineage"]
    assert version.tags["dgm.run_digest"] == lineage["run_digest"] == receipt["run_digest"]
    assert version.tags["dgm.extractor"] == "e" * 64
    folder = version_folder(uri, "1")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "MLmodel", "card.md", "contents.json", "requirements.txt", "artifacts/artifact/weights.safetensors",
        "artifacts/evaluation/grid.png", "artifacts/evaluation/features.safetensors",
    } <= found  # fmt: skip
    assert "pkl" not in "".join(found)
    run = mlflow.get_run(str(version.run_id))
    assert run.data.metrics["fid/digits"] == 3.0 and run.data.metrics["fid/digits.high"] == 3.5
    assert "bits_per_dim.low" not in run.data.metrics
    assert run.data.metrics["loss"] == 0.2  # the curves, too
    assert run.data.tags["dgm.git_commit"] == "c" * 40 and run.data.tags["dgm.data_digest"] == "d" * 64
    assert run.info.status == "FINISHED"
    assert dict(mlflow.get_registered_model("digits").aliases) == {}


def test_register_gives_a_signature_of_the_stored_event(uri: str, tmp_path: Path) -> None:
    from mlflow.models import Model

    write_run(tmp_path, "vae")
    register_run(tmp_path, "vae", uri)
    signature = Model.load(str(version_folder(uri, "1"))).signature
    assert signature is not None
    output = signature.outputs.inputs[0]
    assert output.shape == (-1, 1, 8, 8) and output.type.name == "uint8"
    assert {each.name for each in signature.params.params} == {"n", "seed", "label"}
    requirements = (version_folder(uri, "1") / "requirements.txt").read_text()
    assert "torch==" in requirements and "+" not in requirements


def test_register_uses_the_run_that_holds_the_curves(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    digest = json.loads((tmp_path / "artifacts" / "vae" / "spec.json").read_text())["lineage"]["run_digest"]
    curves = tracking.Curves("vae", digest, "digits", {"lr": 0.1}, {}, tmp_path / "spool", uri, 20.0)
    for step in (1, 2, 3):
        assert curves.log(step, {"loss": 1 / step})
    curves.close()  # the tracker missed the end
    receipt = register_run(tmp_path, "vae", uri)
    mlflow = tracking.client(uri)
    assert mlflow.get_model_version("digits", receipt["version"]).run_id == curves.run_id
    assert sorted(item.step for item in mlflow.get_metric_history(str(curves.run_id), "loss")) == [1, 2, 3, 4, 5]
    assert mlflow.get_run(str(curves.run_id)).data.params == {"lr": "0.1"}


def test_register_twice_makes_one_version_and_leaves_the_receipt(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    first = register_run(tmp_path, "vae", uri)
    before = (tmp_path / "receipts" / "vae.json").stat()
    assert register_run(tmp_path, "vae", uri) == first
    assert (tmp_path / "receipts" / "vae.json").stat().st_mtime_ns == before.st_mtime_ns
    assert numbers(uri) == ["1"]


def test_register_of_another_evaluation_is_another_version_of_the_same_run(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    first = register_run(tmp_path, "vae", uri)
    write_run(tmp_path, "vae", evaluation_seed=1)
    second = register_run(tmp_path, "vae", uri)
    assert (first["version"], second["version"]) == ("1", "2")
    mlflow = tracking.client(uri)
    runs = {str(mlflow.get_model_version("digits", number).run_id) for number in ("1", "2")}
    assert len(runs) == 1 and mlflow.get_run(runs.pop()).data.metrics["fid/digits"] == 4.0


def test_register_at_once_makes_one_version(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    register_run(tmp_path, "vae", uri)
    write_run(tmp_path, "gan")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: register_run(tmp_path, "gan", uri)["version"], range(4)))
    assert len(set(found)) == 1
    assert sorted(numbers(uri)) == sorted({"1", found[0]})


@pytest.mark.parametrize("where", ["log_artifacts", "create_model_version", "set_model_version_tag", "receipt"])
def test_register_after_a_stop_half_way_ends_in_one_good_version(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Stopped after uploading half, after uploading all, between creating and tagging, and before the receipt."""
    from mlflow import MlflowClient

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    def upload_some(self: MlflowClient, run_id: str, folder: str, artifact_path: str) -> None:
        self.log_artifact(run_id, f"{folder}/MLmodel", artifact_path)
        raise Killed

    def create_bare(self: MlflowClient, name: str, source: str, run_id: str, **_: Any) -> None:
        real_create(self, name, source, run_id)
        raise Killed

    write_run(tmp_path, "vae")
    real_create = MlflowClient.create_model_version
    with monkeypatch.context() as patch:
        if where == "log_artifacts":
            patch.setattr(MlflowClient, "log_artifacts", upload_some)
        elif where == "create_model_version":
            patch.setattr(MlflowClient, "create_model_version", killed)
        elif where == "set_model_version_tag":
            patch.setattr(MlflowClient, "create_model_version", create_bare)
        else:
            patch.setattr(registration.Package, "receipt", killed)
        with pytest.raises(Killed):
            register_run(tmp_path, "vae", uri)
    assert not (tmp_path / "receipts" / "vae.json").exists()
    assert register_run(tmp_path, "vae", uri)["version"] == "1"
    assert numbers(uri) == ["1"]
    fetch("models:/digits/1", tmp_path / "fetched", tracker=uri)
    mlflow = tracking.client(uri)
    assert len(mlflow.search_runs([tracking.experiment_id(mlflow, "digits")])) == 1


def test_register_refuses_a_damaged_artifact(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    (tmp_path / "artifacts" / "vae" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        register_run(tmp_path, "vae", uri)
    assert not (tmp_path / "receipts").exists()


@pytest.mark.parametrize("name", ["run_digest", "data_digest", "git_commit"])
def test_register_refuses_an_artifact_without_lineage(uri: str, tmp_path: Path, name: str) -> None:
    write_run(tmp_path, "vae")
    path = tmp_path / "artifacts" / "vae" / "spec.json"
    spec = json.loads(path.read_text())
    del spec["lineage"][name]
    path.write_text(json.dumps(spec))
    checkpoint.seal(path.parent)
    with pytest.raises(ValueError, match=rf"lineage\.{name}"):
        register_run(tmp_path, "vae", uri)


def test_register_refuses_a_model_that_others_made(uri: str, tmp_path: Path) -> None:
    tracking.client(uri).create_registered_model("digits")
    write_run(tmp_path, "vae")
    with pytest.raises(ValueError, match="was not made by `register`"):
        register_run(tmp_path, "vae", uri)


def test_card_says_what_the_files_say(tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    package = registration.read_package(tmp_path / "artifacts" / "vae", tmp_path / "evaluations" / "vae", "digits")
    card = registration.card(package)
    assert "# vae: vae/beta_vae on digits" in card
    assert "| fid/digits | 3 | [2.5, 3.5] | 40 |" in card
    assert "- beta: `4.0`" in card and "c" * 40 in card
    assert "changes that were not committed" in card
    assert "bits_per_dim: a bound" in card and "bits_per_dim: without an interval" in card


def test_final_metrics_name_the_split_where_a_metric_has_several() -> None:
    rows = [{"metric": "nll", "value": 1.0, "split": split} for split in ("valid", "test")]
    assert registration.final_metrics(rows) == {"nll/valid": 1.0, "nll/test": 1.0}


def test_fetch_gives_back_the_artifact_by_number_and_alias(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    register_run(tmp_path, "vae", uri)
    tracking.client(uri).set_registered_model_alias("digits", "champion", "1")
    for number, address in enumerate(["models:/digits/1", "models:/digits@champion"]):
        found = fetch(address, tmp_path / f"fetched-{number}", tracker=uri)
        for path in (tmp_path / "artifacts" / "vae").iterdir():
            assert (found / path.name).read_bytes() == path.read_bytes()
    assert fetch("models:/digits/1", tmp_path / "fetched-0", tracker=uri) == tmp_path / "fetched-0"
    evaluation = fetch("models:/digits/1", tmp_path / "evaluation", part="evaluation", tracker=uri)
    assert (evaluation / "grid.png").read_bytes() == b"png"


@pytest.mark.parametrize("name", ["weights.safetensors", "spec.json", "manifest.json", "metrics.jsonl"])
def test_fetch_refuses_a_flipped_bit_in_any_file(uri: str, tmp_path: Path, name: str) -> None:
    write_run(tmp_path, "vae")
    register_run(tmp_path, "vae", uri)
    path = version_folder(uri, "1") / "artifacts" / "artifact" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is changed"):
        fetch("models:/digits/1", tmp_path / "fetched", tracker=uri)
    assert not (tmp_path / "fetched").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_fetch_refuses_files_that_were_added_or_taken_or_all_exchanged(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    write_run(tmp_path, "other", seed=1)
    register_run(tmp_path, "vae", uri)
    stored = version_folder(uri, "1")
    (stored / "artifacts" / "artifact" / "extra.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"extra\.pkl is not listed"):
        fetch("models:/digits/1", tmp_path / "fetched", tracker=uri)
    (stored / "artifacts" / "artifact" / "extra.pkl").unlink()
    (stored / "artifacts" / "artifact" / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights\.safetensors is missing"):
        fetch("models:/digits/1", tmp_path / "fetched", tracker=uri)
    register_run(tmp_path, "other", uri)  # a whole, consistent, other version in its place
    shutil.rmtree(stored)
    shutil.copytree(version_folder(uri, "2"), stored)
    with pytest.raises(ValueError, match=r"contents\.json is changed"):
        fetch("models:/digits/1", tmp_path / "fetched", tracker=uri)


def test_fetch_refuses_to_overwrite(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    register_run(tmp_path, "vae", uri)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        fetch("models:/digits/1", tmp_path / "mine", tracker=uri)


@pytest.mark.parametrize("address", ["models:/digits@latest", "models:/digits/9", "models:/digits", "runs:/x/model"])
def test_fetch_refuses_an_address_of_no_version(uri: str, tmp_path: Path, address: str) -> None:
    write_run(tmp_path, "vae")
    register_run(tmp_path, "vae", uri)
    with pytest.raises(ValueError, match=r"no such version|expected models:/"):
        fetch(address, tmp_path / "fetched", tracker=uri)


def test_fetch_runs_no_code_of_the_registry(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    register_run(tmp_path, "vae", uri)
    trap = tmp_path / "it-ran"
    (version_folder(uri, "1") / "sampler.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    fetch("models:/digits/1", tmp_path / "fetched", tracker=uri)
    assert not trap.exists()


def test_sync_makes_a_lost_database_again_and_then_does_nothing(uri: str, tmp_path: Path, empty_database: Path) -> None:
    for seed, run in enumerate(("vae", "gan")):
        write_run(tmp_path, run, seed=seed)
        register_run(tmp_path, run, uri)
    before = {path.name: path.read_bytes() for path in (tmp_path / "receipts").iterdir()}
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(empty_database, tmp_path / "elsewhere" / "mlflow.db")
    other = f"sqlite:///{tmp_path / 'elsewhere' / 'mlflow.db'}"
    done = sync_all(tmp_path, other)
    assert [line.split(": ", 1)[1] for line in done] == ["run vae: version 1 created", "run gan: version 2 created"]
    assert sync_all(tmp_path, other) == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "receipts").iterdir()} == before
    fetch("models:/digits/2", tmp_path / "fetched", tracker=other)
    mlflow = tracking.client(other)
    run_id = str(mlflow.get_model_version("digits", "1").run_id)
    assert mlflow.get_run(run_id).data.metrics["loss"] == 0.2


def test_sync_and_register_go_by_digest_where_numbers_differ(uri: str, tmp_path: Path, empty_database: Path) -> None:
    for seed, run in enumerate(("vae", "gan")):
        write_run(tmp_path, run, seed=seed)
        register_run(tmp_path, run, uri)
    before = (tmp_path / "receipts" / "gan.json").read_bytes()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(empty_database, tmp_path / "elsewhere" / "mlflow.db")
    other = f"sqlite:///{tmp_path / 'elsewhere' / 'mlflow.db'}"
    assert register_run(tmp_path, "gan", other)["version"] == "1"  # 2 in the receipt
    assert (tmp_path / "receipts" / "gan.json").read_bytes() == before
    assert sync_all(tmp_path, other) == ["digits: run vae: version 2 created"]
    assert sync_all(tmp_path, uri) == []


def test_sync_uploads_again_what_the_artifact_store_lost(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    register_run(tmp_path, "vae", uri)
    shutil.rmtree(version_folder(uri, "1"))
    assert sync_all(tmp_path, uri) == ["digits: run vae: version 1 mended"]
    fetch("models:/digits/1", tmp_path / "fetched", tracker=uri)


def test_sync_says_what_it_cannot_do(uri: str, tmp_path: Path) -> None:
    write_run(tmp_path, "vae")
    register_run(tmp_path, "vae", uri)
    (tmp_path / "evaluations" / "vae" / "grid.png").write_bytes(b"other")
    assert sync_all(tmp_path, uri) == ["digits: run vae: not done: evaluation/grid.png differ(s) from the receipt"]
    shutil.rmtree(tmp_path / "artifacts" / "vae")
    assert "not done" in sync_all(tmp_path, uri)[0]
    (tmp_path / "receipts" / "vae.json").write_text("{}")
    with pytest.raises(ValueError, match="is no receipt"):
        sync_all(tmp_path, uri)


def test_write_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"a": {1, 2}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
