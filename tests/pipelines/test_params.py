"""params.yaml -> strict types, or an error that names the path, the value and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dgm_models.construct import ConfigError
from pipelines import params
from tests.support import project


def _load(tmp_path: Path, text: str) -> params.Params:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    return params.load([file])


def test_the_projects_own_params_are_right() -> None:
    files = [project.ROOT / "params.yaml", project.ROOT / "zoo" / "params.yaml"]
    assert {"beta_vae", "gan", "made"} <= set(params.load(files).runs)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("latent_dim: 8}", "latent_dmi: 8}", 'runs.vae.method.latent_dmi: unknown key; did you mean "latent_dim"?'),
        ("width: 64", "widht: 64", 'runs.vae.network.widht: unknown key; did you mean "width"?'),
        ("name: vae/vae", "name: vae/vea", "runs.vae.method.name: 'vae/vea' is not registered; did you mean"),
        ("name: mlp, width: 64", "name: mpl, width: 64", "runs.vae.network.name: 'mpl' is not known"),
        ("steps: 300", "steps: 0", "runs.vae.train.steps: 0 is not a whole number at least 1"),
        ("steps: 300", "steps: 1.5", "runs.vae.train.steps: 1.5 is not a whole number"),
        ("steps: 300", "steps: yes", "runs.vae.train.steps: 'yes' is not a whole number"),
        ("average: 0.99", "average: 1.5", "runs.vae.train.average: 1.5 is not a number at least 0 and at most 1"),
        ("lr: 2.0e-3", "lr: .inf", "runs.vae.optim.lr: inf is not a number"),
        ("lr: 2.0e-3", "lr: '1e-3'", "1.0e-3"),
        ("dataset: digits\n    method: {name: vae", "dataset: digit\n    method: {name: vae", 'did you mean "digits"?'),
        ("searches: {}", "serches: {}", 'serches: unknown section; did you mean "searches"?'),
        ("workers: 1", "workers: 0", "cluster.workers: 0 is not"),
        ("name: digits, seed", "name: digitz, seed", 'did you mean "digits"?'),
        ("split: [0.6, 0.2, 0.2]", "split: [0.6, 0.2, 0.3]", "datasets.digits: split"),
        ("average: 0.99,", "average: 0.99, keep: best,", "runs.vae.train: keep: 'best' needs validate_every above 0"),
    ],
)
def test_wrong_value_is_named_with_its_path(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in project.PARAMS
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, project.PARAMS.replace(old, new, 1))
    assert message in str(error.value)


def test_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    assert _load(tmp_path, project.PARAMS.replace("lr: 2.0e-3", "lr: 1e-3")).runs["vae"].optim.default.lr == 1e-3


def test_leading_zero_is_decimal(tmp_path: Path) -> None:
    assert _load(tmp_path, project.PARAMS.replace("steps: 300", "steps: 010")).runs["vae"].train.steps == 10


def test_duplicate_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="duplicate key"):
        _load(tmp_path, project.PARAMS.replace("latent_dim: 8}", "latent_dim: 8, latent_dim: 9}"))


def test_alias_is_a_value_of_its_own(tmp_path: Path) -> None:
    text = project.PARAMS.replace("network: {name: mlp, width: 64, depth: 1}", "network: &net {name: mlp, width: 64}")
    text = text.replace("network: {name: mlp, width: 32, depth: 1}", "network: *net")
    found = _load(tmp_path, text)
    assert found.runs["gan"].arguments["network"] == {"name": "mlp", "width": 64}
    changed = params.override(found.runs["vae"].section, {"network.width": 5}, "x")
    assert changed["network"]["width"] == 5 and found.runs["gan"].section["network"]["width"] == 64


SEARCH = """
searches:
  s: {run: vae, space: {method.latent_dim: {choice: [2, 4]}, optim.lr: {log_uniform: [1.0e-4, 1.0e-2]}}}
tuned:
  best: {search: s, dataset: digits}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method.latent_dim", "method.latent_dims", "latent_dims: unknown key"),
        ("[2, 4]", "[2, 0]", "0 is not a whole number at least 1"),
        ("log_uniform: [1.0e-4, 1.0e-2]", "log_uniform: [1.0e-2, 1.0e-4]", "is not [low, high]"),
        ("log_uniform: [1.0e-4, 1.0e-2]", "log_uniform: [1.0e-2, 1], choice: [1]", "exactly one of"),
        ("run: vae", "run: vea", 'did you mean "vae"?'),
        ("search: s", "search: t", "no search 't'"),
        ("dataset: digits}", "dataset: digit}", "searches.s is on 'digits'"),
        ("best:", "vae:", "has the same name"),
    ],
)
def test_wrong_search_is_named_with_its_path(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = project.PARAMS.replace("searches: {}\ntuned: {}\n", SEARCH.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, text)
    assert message in str(error.value)


def test_identity_follows_what_changes_the_result(tmp_path: Path) -> None:
    base = _load(tmp_path, project.PARAMS)
    digest = params.canonical_digest(params.identity(base.runs["vae"]))
    for old, new, same in [
        ("lr: 2.0e-3", "lr: 3.0e-3", False),
        ("latent_dim: 8}", "latent_dim: 9}", False),
        ("average: 0.99", "average: 0.98", False),
        ("workers: 1", "workers: 2", True),
        ("report_every: 50", "report_every: 25", True),
    ]:
        changed = _load(tmp_path, project.PARAMS.replace(old, new, 1))
        assert (params.canonical_digest(params.identity(changed.runs["vae"])) == digest) is same, new


def test_help_imports_nothing_heavy() -> None:
    script = "import sys, pipelines.cli; print([m for m in ('torch', 'ray', 'mlflow', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_models_imports_no_torch() -> None:
    script = (
        "import sys; from pipelines.cli import models; models(as_json=True); "
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == "False"
    assert '"vae/beta_vae"' in done.stdout
