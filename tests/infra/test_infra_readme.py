"""infra/README.md: every folder has an up, a check and a down, and every file that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "infra" / "README.md").read_text()
FOLDERS = sorted(path.name for path in (ROOT / "infra").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS)
def test_infra_readme_has_up_check_and_down(folder: str) -> None:
    (section,) = re.findall(rf"^## {folder}\n(.*?)(?=^## )", TEXT, re.M | re.S)
    for verb in ("up", "check", "down"):
        assert re.search(rf"^\| {verb} \| .*`.+`", section, re.M), verb
    assert f"| `{folder}/` |" in TEXT


def test_infra_readme_names_files_that_exist() -> None:
    named = set(re.findall(r"infra/[\w./-]*\w", TEXT))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
