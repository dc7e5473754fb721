"""Composites: a prior over another method's codes is saved, loaded and sampled as one model of the original data."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgm_models.construct import ConfigError
from dgm_models.method import Method, build, compose, encoded, fingerprint, fit, load, save
from dgm_models.protocols import DataSpec, capabilities
from dgm_models.sampling import sample
from dgm_models.training.checkpoint import MANIFEST, seal
from tests.dgm_models.test_contract_composite import DATA, digits, distance


def decoder_of(x: Tensor, data: DataSpec = DATA, steps: int = 150) -> Method:
    method = build("vae/vq_vae", data, width=16, blocks=1, halvings=2, codebook_size=8, code_dim=4)
    return fit(method, x, steps=steps, batch_size=64, optim={"lr": 5e-3})


def prior_of(decoder: Method, x: Tensor, steps: int = 150) -> Method:
    codes = decoder.model.codes(encoded(decoder.model, x).x).to(torch.uint8)
    method = build("autoregressive/made", decoder.model.code_spec, width=32)
    return fit(method, codes, steps=steps, batch_size=64, optim={"lr": 5e-3})


@pytest.fixture(scope="module")
def parts() -> tuple[Method, Method]:
    decoder = decoder_of(digits())
    return prior_of(decoder, digits()), decoder


def bound(method: Method, x: Tensor) -> Tensor:
    with torch.no_grad():
        return method.model.elbo(encoded(method.model, x).x, torch.Generator().manual_seed(0), k=4)


def test_composite_is_a_model_of_the_original_data(parts: tuple[Method, Method]) -> None:
    whole = compose(*parts)
    assert whole.data == DATA and whole.model.data == DATA
    assert capabilities(whole.model) == ("samples", "bound")
    x = sample(whole, 5)
    assert x.shape == (5, *DATA.shape) and x.dtype == torch.uint8
    assert "autoregressive/made over the codes of vae/vq_vae on image 1 x 8 x 8" in repr(whole)


def test_composite_draws_digits_and_a_uniform_prior_does_not(parts: tuple[Method, Method]) -> None:
    prior, decoder = parts
    # 300 pictures whose distances to the nearest digit are spread by about 3: a standard error of 0.2
    learned, uniform = (distance(sample(method, 300)) for method in (compose(prior, decoder), decoder))
    assert learned < distance(digits()) + 2.0 < uniform - 2.0


def test_composite_prior_raises_the_bound(parts: tuple[Method, Method]) -> None:
    prior, decoder = parts
    learned, uniform = bound(compose(prior, decoder), digits()), bound(decoder, digits())
    assert float((learned - uniform).mean()) > 2.0  # nats of the codes' 4 log 8 = 8.3


def test_composite_survives_the_artifacts_it_was_made_of(parts: tuple[Method, Method], tmp_path: Path) -> None:
    folders = [save(method, tmp_path / name) for method, name in zip(parts, ("prior", "decoder"), strict=True)]
    whole = compose(*(load(folder) for folder in folders))
    before, nats = sample(whole, 20, seed=3), bound(whole, digits(50))
    folder = save(whole, tmp_path / "whole", lineage={"run": "x"})
    for other in folders:
        shutil.rmtree(other)
    again = load(folder)
    assert torch.equal(sample(again, 20, seed=3), before)
    assert torch.equal(bound(again, digits(50)), nats)
    assert (again.name, again.data, again.params, again.lineage) == (whole.name, DATA, parts[0].params, {"run": "x"})
    assert again.decoder is not None and again.decoder.params == parts[1].params
    assert torch.equal(sample(load(save(again, tmp_path / "twice")), 20, seed=3), before)


def test_composite_spec_names_the_decoder_by_its_content(parts: tuple[Method, Method], tmp_path: Path) -> None:
    prior, decoder = parts
    spec = json.loads((save(compose(prior, decoder), tmp_path / "whole") / "spec.json").read_text())
    assert spec["decoder"]["method"] == "vae/vq_vae"
    assert spec["decoder"]["sha256"] == fingerprint(decoder) == fingerprint(load(save(decoder, tmp_path / "parent")))
    assert spec["capabilities"] == ["samples", "bound"]
    with torch.no_grad():
        changed = load(tmp_path / "parent")
        next(changed.model.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(changed) != fingerprint(decoder)


def test_composite_of_other_codes_is_refused(parts: tuple[Method, Method]) -> None:
    prior, decoder = parts
    other = build("autoregressive/made", DataSpec("codes", (2, 2), 4), width=8)
    with pytest.raises(ValueError, match=r"the prior models .*levels=4.*the decoder's codes are .*levels=8"):
        compose(other, decoder)
    with pytest.raises(ValueError, match="GeneratorCritic has no codes"):
        compose(prior, build("gan/minimax", DATA, network={"name": "mlp", "width": 8}))
    with pytest.raises(ValueError, match="Classifier is no prior of codes: it has no sampler"):
        compose(build("extractor/classifier", replace(DATA, classes=3), network={"name": "mlp", "width": 8}), decoder)
    asked = build("vae/vae", replace(DATA, classes=3), network={"name": "mlp", "width": 8}, cond={"name": "label"})
    with pytest.raises(ValueError, match="LatentVariable has codes of data with a label; train it without cond"):
        compose(prior, asked)


def test_composite_spec_with_a_decoder_without_codes_is_refused(parts: tuple[Method, Method], tmp_path: Path) -> None:
    folder = save(compose(*parts), tmp_path / "whole")
    spec = json.loads((folder / "spec.json").read_text())
    spec["decoder"] |= {"method": "gan/minimax", "params": {}}
    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / MANIFEST).unlink()
    seal(folder)
    with pytest.raises(ConfigError, match="gan/minimax has no codes"):
        load(folder)
