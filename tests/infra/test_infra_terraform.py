"""Terraform by Terraform: format, the provider's schema, and `terraform test`, which asks AWS nothing."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "infra" / "s3"
MIRRORS = ("~/.terraform.d/plugins", "/usr/local/share/terraform/plugins", "/usr/share/terraform/plugins", "/opt/*")


def terraform(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # an empty settings file: no mirror or token of whoever runs the tests
    settings = os.environ | {"TF_CLI_CONFIG_FILE": os.devnull, "CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1"}
    return subprocess.run(["terraform", *words], cwd=folder, env=settings, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def initialized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the configuration with the provider beside it; skipped where there is none."""
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not installed")
    usual = [found for name in MIRRORS for found in sorted(glob.glob(os.path.expanduser(name)))]
    given = [os.environ.get("TERRAFORM_PLUGIN_DIR", ""), *usual]
    folders = [name for name in given if name and (Path(name) / "registry.terraform.io" / "hashicorp" / "aws").is_dir()]
    if not folders:
        pytest.skip(
            "the provider hashicorp/aws is not on this machine: `terraform providers mirror`, TERRAFORM_PLUGIN_DIR"
        )
    copy = tmp_path_factory.mktemp("terraform") / "s3"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
    done = terraform(copy, "init", "-backend=false", "-input=false", "-no-color", f"-plugin-dir={folders[0]}")
    assert done.returncode == 0, done.stderr
    return copy


@pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not installed")
def test_infra_terraform_is_formatted(tmp_path: Path) -> None:
    assert terraform(FOLDER, "fmt", "-check", "-recursive").returncode == 0
    (tmp_path / "a.tf").write_text('variable "a" {\ntype=string\n}\n')
    assert terraform(tmp_path, "fmt", "-check").returncode != 0


def test_infra_terraform_fits_the_provider(initialized: Path) -> None:
    done = terraform(initialized, "validate", "-no-color")
    assert done.returncode == 0, done.stdout + done.stderr


def test_infra_terraform_tests_pass_and_see_a_planted_bug(initialized: Path, tmp_path: Path) -> None:
    done = terraform(initialized, "test", "-no-color")
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stdout + done.stderr
    copy = tmp_path / "s3"
    shutil.copytree(initialized, copy, symlinks=True)
    text = (copy / "buckets.tf").read_text()
    (copy / "buckets.tf").write_text(text.replace("restrict_public_buckets = true", "restrict_public_buckets = false"))
    done = terraform(copy, "test", "-no-color")
    assert done.returncode != 0 and "public access" in done.stdout + done.stderr
