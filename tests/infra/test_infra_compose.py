"""compose.yaml against compose's own schema; the server's options are the same in compose and on Kubernetes."""

from __future__ import annotations

import configparser
import copy
import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "infra" / "mlflow"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())


def validate(document: dict[str, Any]) -> None:
    found = importlib.resources.files("check_jsonschema.builtin_schemas.vendor").joinpath("compose-spec.json")
    jsonschema.validate(document, json.loads(found.read_text()))


def kubernetes(kind: str) -> dict[str, Any]:
    found = yaml.safe_load_all((FOLDER / "kubernetes" / "mlflow.yaml").read_text())
    return next(document for document in found if document["kind"] == kind)


def test_infra_compose_is_valid() -> None:
    validate(COMPOSE)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("services.mlflow.comand", []),
        ("services.mlflow.healthcheck.retry", 3),
        ("services.postgres.image", 17),
        ("volume", {}),
    ],
)
def test_infra_compose_schema_refuses_a_planted_bug(path: str, value: Any) -> None:
    document = copy.deepcopy(COMPOSE)
    *names, last = path.split(".")
    where = document
    for name in names:
        where = where[name]
    where[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


def test_infra_compose_holds_no_secret_and_opens_loopback_alone() -> None:
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD$|SECRET|ACCESS_KEY", name):
                assert re.fullmatch(r"\$\{\w+:[-?].*\}", value), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    given = dict(line.split("=", 1) for line in (FOLDER / "example.env").read_text().splitlines() if "=" in line[:40])
    given = {name: value for name, value in given.items() if not name.startswith("#")}
    assert all(not value for name, value in given.items() if re.search("PASSWORD|SECRET", name))


def test_infra_compose_example_names_every_variable_that_is_demanded() -> None:
    demanded = set(re.findall(r"\$\{(\w+):\?", (FOLDER / "compose.yaml").read_text()))
    example = {line.partition("=")[0] for line in (FOLDER / "example.env").read_text().splitlines()}
    assert demanded and demanded <= example


def test_infra_mlflow_server_is_the_same_everywhere() -> None:
    (container,) = kubernetes("Deployment")["spec"]["template"]["spec"]["containers"]

    def settings(words: list[str]) -> list[str]:
        return [word for word in words if not word.startswith(("--artifacts-destination=", "--allowed-hosts="))]

    compose = COMPOSE["services"]["mlflow"]
    assert settings(container["command"]) == settings(compose["command"])
    assert "--backend-store-uri=postgresql+psycopg2://" in container["command"]
    assert "--app-name=basic-auth" in container["command"] and "--serve-artifacts" in container["command"]
    assert compose["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert {"name": "MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "value": "false"} in container["env"]
    text = (FOLDER / "basic_auth.ini").read_text()
    assert kubernetes("ConfigMap")["data"]["basic_auth.ini"] == text
    read = configparser.ConfigParser()
    read.read_string(text)
    assert read["mlflow"]["database_uri"] == "postgresql+psycopg2://"
    assert "admin_password" not in read["mlflow"]
