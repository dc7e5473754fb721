"""encode: a run's codes are an ordinary dataset; a prior that is trained on it becomes a model of the original data."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dgm_models
from dgm_models.construct import ConfigError
from dgm_models.method import fingerprint
from dgm_models.protocols import Codes
from dgm_models.training import checkpoint
from dgm_models.training.runtime import Runtime
from pipelines import params as reader
from pipelines import paths
from pipelines.cluster import worker
from pipelines.data import shards
from pipelines.data.manifest import read_manifest
from pipelines.data.prepare import prepare
from pipelines.params import Params, read_yaml
from pipelines.stages import train as training
from pipelines.stages.encode import codes_of, encode_stage
from pipelines.stages.evaluate import evaluate_stage
from pipelines.stages.sample import read, sample_stage
from tests.support import project

PARAMS = """
datasets:
  digits: {name: digits, seed: 0, split: [0.6, 0.2, 0.2]}
codes:
  digits_codes: {run: vq_vae, dataset: digits}
runs:
  vq_vae:
    dataset: digits
    method: {name: vae/vq_vae, width: 8, blocks: 1, halvings: 2, codebook_size: 8, code_dim: 4, decay: 0.9}
    train: {steps: 100, batch_size: 64}
    optim: {lr: 3.0e-3}
  prior:
    dataset: digits_codes
    method: {name: autoregressive/made, width: 32}
    train: {steps: 60, batch_size: 64}
    optim: {lr: 5.0e-3}
evaluation: {importance: 4}
cluster: {storage: .dgm/store}
"""


def load(text: str = PARAMS, folder: Path | None = None) -> Params:
    file = (folder or paths.root()) / "params.yaml"
    file.write_text(text)
    return reader.load([file])


def train_here(key: str, params: Params) -> None:
    """Trains a run in this process, and fetches the artifact as the stage does."""
    job = training.job_of(params.run(key), params)
    worker.train(job, Runtime(), lambda step, metrics: None)
    training.train(params.run(key), paths.artifact(key), params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project.make(tmp_path_factory.mktemp("project"), PARAMS)


@pytest.fixture(scope="module")
def done(folder: Path) -> Params:
    """The whole road but for Ray: prepare, train, encode, train, sample, evaluate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGM_ROOT", str(folder))
        params = load()
        prepare(params.datasets["digits"], paths.data("digits"))
        train_here("vq_vae", params)
        encode_stage("digits_codes", paths.data("digits_codes"), params)
        train_here("prior", params)
        for key in ("vq_vae", "prior"):
            sample_stage(key, paths.samples(key), params)
            evaluate_stage(key, paths.evaluation(key), params)
        return params


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGM_ROOT", str(folder))


# ---- the dataset


def test_codes_are_a_dataset_in_the_splits_of_the_original(done: Params) -> None:
    found, known = read_manifest(paths.data("digits_codes")), read_manifest(paths.data("digits"))
    assert (found.kind, found.shape, found.levels, found.classes) == ("codes", (2, 2), 8, 10)
    assert found.rows == known.rows and found.licence == known.licence
    method = dgm_models.load(paths.artifact("vq_vae"))
    for split in known.rows:
        codes, rows = (shards.load(paths.data(name), split) for name in ("digits_codes", "digits"))
        order, original = codes.id.argsort(), rows.id.argsort()
        assert torch.equal(codes.id[order], rows.id[original])
        assert codes.cond is not None and rows.cond is not None
        assert torch.equal(codes.cond[order], rows.cond[original])
        again = codes_of(method.model, rows.x[original][:300], rows.id[original][:300]).to(codes.x.dtype)
        same = (codes.x[order][:300] == again).float().mean()
        assert float(same) > 0.999  # rows stand in other blocks: a tie may round otherwise
    assert len(shards.load(paths.data("digits_codes"), "train").x.unique()) > 4


def test_codes_are_the_same_bytes_twice(done: Params, tmp_path: Path) -> None:
    again = encode_stage("digits_codes", tmp_path / "again", done)
    assert again.digest == read_manifest(paths.data("digits_codes")).digest
    for part in again.parts:
        assert (tmp_path / "again" / part.path).read_bytes() == (paths.data("digits_codes") / part.path).read_bytes()


def test_codes_carry_what_decodes_them(done: Params) -> None:
    decoder = dgm_models.load(paths.decoder("digits_codes"))
    assert isinstance(decoder.model, Codes)
    sums = read_manifest(paths.data("digits_codes")).source.files
    assert (
        sums == {"decoder": fingerprint(decoder)} == {"decoder": fingerprint(dgm_models.load(paths.artifact("vq_vae")))}
    )


def test_codes_of_another_encoder_are_another_training(done: Params, tmp_path: Path) -> None:
    """The parent is part of the identity, even where it gives the same codes."""
    manifest = read_manifest(paths.data("digits_codes"))
    other = replace(manifest, source=replace(manifest.source, files={"decoder": "0" * 64}))
    run = done.run("prior")
    assert training.run_digest(run, manifest.digest) != training.run_digest(run, other.digest)


def test_codes_of_changed_data_are_refused(done: Params, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    method = dgm_models.load(paths.artifact("vq_vae"))
    dgm_models.save(method, folder, lineage={**method.lineage, "data_digest": "0" * 64})
    kept = tmp_path / "kept"
    shutil.move(paths.artifact("vq_vae"), kept)
    try:
        shutil.copytree(folder, paths.artifact("vq_vae"))
        with pytest.raises(ValueError, match=r"vq_vae was trained on other data than data/digits holds"):
            encode_stage("digits_codes", tmp_path / "codes", done)
    finally:
        shutil.rmtree(paths.artifact("vq_vae"))
        shutil.move(kept, paths.artifact("vq_vae"))


# ---- the prior's run


def test_prior_s_artifact_is_a_model_of_the_original_data(done: Params, tmp_path: Path) -> None:
    spec = json.loads((paths.artifact("prior") / "spec.json").read_text())
    digits = read_manifest(paths.data("digits"))
    assert spec["data"]["kind"] == "image"
    assert (spec["lineage"]["dataset"], spec["lineage"]["data_digest"]) == ("digits", digits.digest)
    assert spec["lineage"]["codes"]["data_digest"] == read_manifest(paths.data("digits_codes")).digest
    assert spec["lineage"]["run"] == "prior" and done.dataset_of("prior") == "digits"
    assert spec["decoder"]["sha256"] == fingerprint(dgm_models.load(paths.artifact("vq_vae")))
    assert spec["decoder"]["lineage"]["run"] == "vq_vae"
    checkpoint.verify(paths.artifact("prior"))
    assert (paths.artifact("prior") / "metrics.jsonl").is_file()
    alone = shutil.copytree(paths.artifact("prior"), tmp_path / "alone")
    here = paths.samples("prior")
    assert torch.equal(dgm_models.sample(dgm_models.load(alone), 20), read(here, digits.shape)[:20])


def test_prior_is_evaluated_as_any_run_on_the_dataset(done: Params) -> None:
    rows = {
        key: {row["metric"]: row for row in json.loads((paths.evaluation(key) / "evaluation.json").read_text())}
        for key in ("vq_vae", "prior")
    }
    assert rows["prior"].keys() == rows["vq_vae"].keys() >= {"kid/raw", "bits_per_dim", "nll", "elbo"}
    for row in (rows["prior"]["bits_per_dim"], rows["vq_vae"]["bits_per_dim"]):
        assert (row["kind"], row["split"], row["n"]) == (
            "bound",
            "test",
            read_manifest(paths.data("digits")).rows["test"],
        )
    better = rows["vq_vae"]["bits_per_dim"]["value"] - rows["prior"]["bits_per_dim"]["value"]
    assert 0.0 < better < 4 * 3 / 64  # all that a prior can save are the codes' bits: 4 codes out of 8
    assert rows["prior"]["kid/raw"]["value"] < rows["vq_vae"]["kid/raw"]["value"]


def test_plan_reads_the_codes(done: Params) -> None:
    from pipelines.plan.plan import plan

    document = plan(done.run("prior"), done, 1)
    assert document["data"]["rows"] == read_manifest(paths.data("digits_codes")).rows["train"]
    one, two = (plan(done.run("vq_vae"), done, workers)["step"] for workers in (1, 2))
    assert one["sent"] == 0 < two["sent"]  # codebooks are reduced without looking at a value


# ---- params


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("run: vq_vae,", "run: vq_va,", r"codes\.digits_codes\.run: no run 'vq_va'; did you mean"),
        (
            "run: vq_vae,",
            "run: prior,",
            r"codes\.digits_codes\.run: prior is a autoregressive/made, which has no codes",
        ),
        ("vq_vae, dataset: digits}", "vq_vae, dataset: moons}", r"dataset: 'moons'; runs\.vq_vae is on 'digits'"),
        ("vq_vae, dataset: digits}", "vq_vae}", r"codes\.digits_codes\.dataset: missing"),
        ("digits_codes: {", "digits: {", r"codes\.digits: datasets\.digits has the same name"),
        (
            "dataset: digits_codes",
            "dataset: digits_code",
            r"runs\.prior\.dataset: no dataset 'digits_code'; did you mean",
        ),
        (
            "{name: autoregressive/made, width: 32}",
            "{name: vae/vae}",
            r"runs\.prior\.method\.name: vae/vae does not model whole codes; these do: autoregressive/made",
        ),
    ],
)
def test_wrong_codes_are_named_with_their_path(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in PARAMS
    with pytest.raises(ConfigError, match=message):
        load(PARAMS.replace(old, new, 1), tmp_path)


def test_zoo_s_codes_name_the_zoo_s_run() -> None:
    found = reader.load([project.ROOT / "params.yaml", project.ROOT / "zoo" / "params.yaml"])
    assert found.codes["digits_vq_vae"].run == "zoo/vq_vae"
    assert found.dataset_of("zoo/vq_vae_made") == "digits"


def test_every_dataset_of_codes_has_a_stage() -> None:
    stage = read_yaml(project.ROOT / "zoo" / "dvc.yaml")["stages"]["encode"]
    assert stage["foreach"] == "${codes}"
    assert {"zoo/artifacts/${item.run}", "data/${item.dataset}"} <= set(stage["do"]["deps"])
