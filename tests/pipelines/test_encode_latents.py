"""encode: a run's latents are a dataset of real codes, and a diffusion model of them becomes one of the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dgm_models
from dgm_models.construct import ConfigError
from dgm_models.method import fingerprint
from pipelines import cli, paths
from pipelines.data import shards
from pipelines.data.manifest import read_manifest
from pipelines.data.prepare import prepare
from pipelines.params import Params
from pipelines.stages import train as training
from pipelines.stages.encode import encode_stage
from pipelines.stages.evaluate import evaluate_stage
from pipelines.stages.sample import sample_stage
from tests.pipelines.test_encode import load, train_here
from tests.support import project

PARAMS = """
datasets:
  digits: {name: digits, seed: 0, split: [0.6, 0.2, 0.2]}
codes:
  digits_latents: {run: autoencoder, dataset: digits}
runs:
  autoencoder:
    dataset: digits
    method: {name: vae/beta_vae, latent_dim: 16, beta: 0.2}
    network: {name: grid, width: 8, blocks: 1, halvings: 1}
    train: {steps: 60, batch_size: 64}
    optim: {lr: 5.0e-3}
  prior:
    dataset: digits_latents
    method: {name: diffusion/latent_diffusion, sampler: {name: ddim, steps: 10}}
    network: {name: mlp, width: 32, depth: 2}
    train: {steps: 60, batch_size: 64}
    optim: {lr: 3.0e-3}
evaluation: {importance: 2, max_samples: 100}
cluster: {storage: .dgm/store}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project.make(tmp_path_factory.mktemp("project"), PARAMS)


@pytest.fixture(scope="module")
def done(folder: Path) -> Params:
    """The whole road but for Ray: prepare, train, encode, train, sample, evaluate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGM_ROOT", str(folder))
        params = load(PARAMS)
        prepare(params.datasets["digits"], paths.data("digits"))
        train_here("autoencoder", params)
        told = CliRunner().invoke(cli.app, ["encode", "digits_latents"])
        assert "[1, 4, 4] real codes, 16 for the 64 values of an example" in told.output
        train_here("prior", params)
        sample_stage("prior", paths.samples("prior"), params)
        evaluate_stage("prior", paths.evaluation("prior"), params)
        return params


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGM_ROOT", str(folder))


def test_latents_are_real_codes_with_their_location_and_scale(done: Params) -> None:
    found = read_manifest(paths.data("digits_latents"))
    assert (found.kind, found.shape, found.levels, found.classes) == ("codes", (1, 4, 4), None, 10)
    z = shards.load(paths.data("digits_latents"), "train").x
    assert z.dtype == torch.float32
    assert float(z.mean()) == pytest.approx(found.location, abs=1e-4)
    assert float(z.std()) == pytest.approx(found.scale, rel=1e-3)


def test_latents_are_the_same_bytes_twice(done: Params, tmp_path: Path) -> None:
    again = encode_stage("digits_latents", tmp_path / "again", done)
    assert again.digest == read_manifest(paths.data("digits_latents")).digest


def test_prior_of_latents_is_a_model_of_the_data(done: Params) -> None:
    spec = json.loads((paths.artifact("prior") / "spec.json").read_text())
    manifest = read_manifest(paths.data("digits_latents"))
    decoder = fingerprint(dgm_models.load(paths.artifact("autoencoder")))
    assert spec["data"]["kind"] == "image" and spec["capabilities"] == ["samples", "bound"]
    assert spec["decoder"]["sha256"] == decoder == manifest.source.files["decoder"]
    assert (spec["decoder"]["codes"]["location"], spec["decoder"]["codes"]["scale"]) == (
        manifest.location,
        manifest.scale,
    )
    rows = {row["metric"]: row for row in json.loads((paths.evaluation("prior") / "evaluation.json").read_text())}
    assert rows["bits_per_dim"]["kind"] == "bound" and 0 < rows["bits_per_dim"]["value"] < 8
    assert rows["evaluations_per_sample"]["value"] == 11


def test_decoder_that_did_not_make_the_codes_is_refused(done: Params, tmp_path: Path) -> None:
    kept = shutil.copytree(paths.decoder("digits_latents"), tmp_path / "kept")
    method = dgm_models.load(kept)
    with torch.no_grad():
        next(method.model.parameters()).view(-1)[0] += 1e-3
    try:
        shutil.rmtree(paths.decoder("digits_latents"))
        dgm_models.save(method, paths.decoder("digits_latents"))
        with pytest.raises(ValueError, match=r"data/digits_latents: made by the decoder .*, beside it lies"):
            training.train(done.run("prior"), tmp_path / "again", done)
    finally:
        shutil.rmtree(paths.decoder("digits_latents"))
        shutil.copytree(kept, paths.decoder("digits_latents"))


def test_prior_of_whole_codes_cannot_model_latents(tmp_path: Path) -> None:
    wrong = PARAMS.replace(
        "{name: diffusion/latent_diffusion, sampler: {name: ddim, steps: 10}}", "{name: autoregressive/made}"
    )
    wrong = wrong.replace("    network: {name: mlp, width: 32, depth: 2}\n", "")
    with pytest.raises(
        ConfigError, match=r"autoregressive/made does not model real codes; these do: .*latent_diffusion"
    ):
        load(wrong, tmp_path)
