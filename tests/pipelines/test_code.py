"""A run's code is one list: in the digest, in dvc.yaml, and it holds everything that a method imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dgm_models import registry
from pipelines import paths
from pipelines.params import read_yaml
from tests.support import project

# what a method may import beside its code: text, checks, and the wiring that changes no number
NEUTRAL = {"dgm_models", "dgm_models.construct", "dgm_models.registry"}


def test_dvc_yaml_names_the_code_of_a_run() -> None:
    stages = read_yaml(project.ROOT / "dvc.yaml")["stages"]
    expected = set(paths.code_of("dgm_models/${item.method.name}.py"))
    assert expected <= set(stages["train"]["do"]["deps"])
    assert set(paths.code_of("dgm_models/extractor/classifier.py")) <= set(stages["extractor"]["do"]["deps"])
    zoo = read_yaml(project.ROOT / "zoo" / "dvc.yaml")["stages"]
    assert expected <= set(zoo["train"]["do"]["deps"])


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dgm_models"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def _file(module: str) -> Path | None:
    path = project.ROOT / Path(*module.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else None


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_everything_a_method_imports_is_in_its_code(name: str) -> None:
    code = paths.code_of(registry.row(name).file)
    waiting, seen = [project.ROOT / registry.row(name).file], set()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        relative = file.relative_to(project.ROOT).as_posix()
        assert any(relative == part or relative.startswith(f"{part}/") for part in code), f"{relative} is not in {code}"
        for module in _imports(file) - NEUTRAL:
            if (found := _file(module)) and module not in NEUTRAL:
                waiting.append(found)


def test_every_method_has_a_line_in_papers() -> None:
    papers = (project.ROOT / "PAPERS.md").read_text()
    for row in registry.ROWS:
        assert row.file in papers, row.name
    for line in papers.splitlines():
        if line.startswith("|") and "`" in line:
            for cell in line.split("`")[1::2]:
                assert (project.ROOT / cell.split("::")[0]).exists(), f"PAPERS.md names {cell}"


def test_every_method_has_a_run() -> None:
    files = [project.ROOT / "params.yaml", project.ROOT / "zoo" / "params.yaml"]
    run = {each["method"]["name"] for file in files for each in read_yaml(file)["runs"].values()}
    assert {row.name for row in registry.ROWS} - run == set()
