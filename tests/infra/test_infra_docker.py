"""The image: pinned base, the lock in two steps, no root, and nothing in the context that is not copied."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
KNOWN = [
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
]

Instructions = list[tuple[str, str]]


def read(text: str) -> Instructions:
    """(instruction, its words) with continued lines joined. Raises ValueError for an instruction Docker has not."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, words = line.strip().partition(" ")
        if name not in KNOWN or not words:
            raise ValueError(f"{line!r} is no instruction")
        found.append((name, words))
    if found[0][0] != "FROM":
        raise ValueError("the first instruction is not FROM")
    return found


def base_is_pinned(found: Instructions) -> bool:
    return all(
        re.fullmatch(r"python:3\.11\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", words)
        for name, words in found
        if name == "FROM"
    )


def user_is_not_root(found: Instructions) -> bool:
    users = [words for name, words in found if name == "USER"]
    return bool(users) and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]) is not None  # a number: Kubernetes checks it


def lock_is_used(found: Instructions) -> bool:
    """torch alone first, without its dependencies; everything else under the lock's constraints; then a check."""
    steps = [step for name, words in found if name == "RUN" for step in words.split("&&")]
    installs = [step for step in steps if "pip install" in step and "-U pip" not in step]
    checks = [step for step in steps if "pip check" in step]
    return (
        len(installs) == 2
        and "--no-deps" in installs[0] and "^torch==" in installs[0] and "requirements.lock" in installs[0]
        and "-c requirements.lock" in installs[1]
        and len(checks) == 1
    )  # fmt: skip


CHECKS: dict[str, tuple[Callable[[Instructions], bool], str, str]] = {
    "base": (base_is_pinned, "FROM python:3.11.14-slim-bookworm", "FROM python:3.11-slim"),
    "user": (user_is_not_root, "USER 10001:10001", "USER root"),
    "lock": (lock_is_used, "pip install -c requirements.lock", "pip install"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_infra_docker_holds_and_a_planted_bug_is_seen(name: str) -> None:
    holds, right, wrong = CHECKS[name]
    text = DOCKERFILE.read_text()
    assert text.count(right) == 1
    assert holds(read(text))
    assert not holds(read(text.replace(right, wrong)))


def test_infra_docker_reader_refuses_what_is_no_instruction() -> None:
    with pytest.raises(ValueError, match="RNU"):
        read(DOCKERFILE.read_text().replace("\nRUN ", "\nRNU ", 1))


def test_infra_docker_shell_commands_parse() -> None:
    for name, words in read(DOCKERFILE.read_text()):
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", words], check=True)


def test_infra_docker_health_is_the_default_command_s() -> None:
    words = dict(read(DOCKERFILE.read_text()))
    assert words["CMD"].startswith('["ray", "start", "--head", "--block"')
    assert words["HEALTHCHECK"].endswith('CMD ["ray", "health-check"]')
    assert "RAY_AUTH_MODE=token" in words["ENV"]  # without a token's file the head does not start


def test_infra_docker_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = {
        word for name, words in read(DOCKERFILE.read_text()) if name == "COPY" for word in words.split()[:-1]
    }  # fmt: skip
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
