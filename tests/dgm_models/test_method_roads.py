"""Build, fit, save, load: what a user of the library without a cluster relies on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgm_models import registry
from dgm_models.construct import ConfigError
from dgm_models.method import build, fit, load, save
from dgm_models.protocols import DataSpec
from dgm_models.training.checkpoint import MANIFEST, Damaged, seal
from tests.laws import cases

DATA = DataSpec("vector", (2,))
SMALL = {"network": {"name": "mlp", "width": 8, "depth": 1}, "latent_dim": 2}


def test_registry_imports_no_torch() -> None:
    code = "import sys, dgm_models, dgm_models.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=cases.ROOT, check=False).returncode == 0


def test_build_fills_every_default() -> None:
    method = build("vae/beta_vae", DATA, latent_dim=2)
    assert method.params == {
        "network": {"name": "mlp", "width": 256, "depth": 2, "activation": "leaky_relu"},
        "latent_dim": 2,
        "likelihood": "auto",
        "beta": 4.0,
        "cond": None,
    }
    assert "beta=4.0" in repr(method) and "samples, bound, latents" in repr(method)


def test_build_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (cases.parameters(build("vae/vae", DATA, seed=seed, **SMALL)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert cases.differences(one, two) == [] and cases.differences(one, other)


def test_fit_hands_on_the_averaged_weights() -> None:
    x = cases.rows(DATA, 32)
    plain, averaged = (
        cases.parameters(fit(build("vae/vae", DATA, **SMALL), x, steps=5, batch_size=8, average=average))
        for average in (0.0, 0.9)
    )
    assert cases.differences(plain, averaged)


def test_fit_reports_at_its_intervals_and_at_the_end() -> None:
    steps = []
    method = build("vae/vae", DATA, **SMALL)
    fit(method, cases.rows(DATA, 8), steps=5, batch_size=4, report_every=2, report=lambda step, _: steps.append(step))
    assert steps == [2, 4, 5]
    assert [step for step, _ in method.history] == steps
    assert "trained    step 5" in repr(method)


def test_fit_refuses_data_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"x: events of shape \(3,\), the data spec says \(2,\)"):
        fit(build("vae/vae", DATA, **SMALL), torch.zeros(4, 3), steps=1)


def test_fit_refuses_a_setting_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r'fit\.step: unknown key; did you mean "steps"\?'):
        fit(build("vae/vae", DATA, **SMALL), torch.zeros(4, 2), step=1)


def artifact(tmp_path: Path) -> Path:
    return save(build("vae/vae", DATA, **SMALL), tmp_path / "artifact")


def test_load_refuses_changed_weights(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-3] ^= 4
    (folder / "weights.safetensors").write_bytes(bytes(content))
    with pytest.raises(Damaged, match=r"weights\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "vae/vea"}, "'vae/vea' is not registered; did you mean"),
        ({"params": {"latent_dimm": 2}}, r"spec\.params\.latent_dimm: unknown key"),
        ({"data": {"kind": "vector", "shape": [2], "colour": 1}}, r"spec\.data\.colour: unknown key"),
    ],
)
def test_load_refuses_a_spec_that_does_not_fit(change: dict, message: str, tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec | change))
    (folder / MANIFEST).unlink()
    seal(folder)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_load_refuses_weights_of_another_size(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    spec = json.loads((folder / "spec.json").read_text())
    spec["params"]["latent_dim"] = 3
    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / MANIFEST).unlink()
    seal(folder)
    with pytest.raises(ConfigError, match="the weights do not fit"):
        load(folder)


@pytest.mark.parametrize("row", [*registry.ROWS, *registry.TOOLS], ids=lambda row: row.name)
def test_rows_name_paper_capabilities_and_data(row: registry.Row) -> None:
    from dgm_models.protocols import CAPABILITIES

    assert row.paper and row.family == row.name.split("/")[0]
    assert set(row.capabilities) <= CAPABILITIES.keys() and row.capabilities
