"""`ray up` on AWS: Ray's own loader takes the file, EC2's own model takes the nodes, and every door is closed."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "infra" / "ray" / "cluster.yaml").read_text())


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)  # file_mounts are relative to the repository
    return copy.deepcopy(CONFIG)


def commands(config: dict[str, Any]) -> list[str]:
    return [line for key, lines in config.items() if key.endswith("_commands") for line in lines]


def launch_errors(node: dict[str, Any]) -> str:
    """What botocore's model of RunInstances says of a node_config; empty when it fits."""
    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    return str(ParamValidator().validate(node | {"MinCount": 1, "MaxCount": 1}, shape).generate_report())


def test_infra_ray_loader_takes_the_cluster(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (("worker",), {}, jsonschema.ValidationError),
        (("max_workers",), "four", jsonschema.ValidationError),
        (("available_node_types", "gpu", "node_cfg"), {}, jsonschema.ValidationError),
        (("head_node_type",), "haed", ValueError),
    ],
)
def test_infra_ray_loader_refuses_a_planted_bug(
    config: dict[str, Any], path: tuple[str, ...], value: Any, error: type[Exception]
) -> None:
    where = config
    for name in path[:-1]:
        where = where[name]
    where[path[-1]] = value
    with pytest.raises(error):
        validate_config(prepare_config(config))


def test_infra_ray_nodes_are_what_ec2_takes() -> None:
    for kind in CONFIG["available_node_types"].values():
        assert launch_errors(kind["node_config"]) == ""
    assert "MarketTyp" in launch_errors({"InstanceMarketOptions": {"MarketTyp": "spot"}})


def test_infra_ray_installs_the_lock_s_ray_and_no_nightly_wheel(config: dict[str, Any]) -> None:
    locked = re.search(r"^ray==(.+)$", (ROOT / "requirements.lock").read_text(), re.M)
    filled = prepare_config(config)
    text = "\n".join(commands(filled))
    assert locked and f"ray.__version__ == '{locked[1]}'" in text
    assert "-c requirements.lock" in text
    assert "ray-wheels" not in text and ".whl" not in text  # as in Ray's own defaults for AWS


def test_infra_ray_doors_are_closed(config: dict[str, Any]) -> None:
    filled = prepare_config(config)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [line for line in filled[key] if " ray start " in line]
        assert "RAY_AUTH_MODE=token" in start and "RAY_USAGE_STATS_ENABLED=0" in start
    (head,) = [line for line in filled["head_start_ray_commands"] if " ray start " in line]
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=0" in head
    assert "0.0.0.0" not in "\n".join(commands(filled))
    assert filled["provider"]["security_group"]["GroupName"].endswith("-ray")
    (token,) = [line for line in filled["setup_commands"] if "auth_token" in line and "secretsmanager" in line]
    assert token.startswith("umask 077;") and "chmod 600" in token


def test_infra_ray_nodes_have_roles_and_no_keys() -> None:
    text = (ROOT / "infra" / "ray" / "cluster.yaml").read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret_access_key|AWS_SECRET", text, re.I)
    head, worker = (CONFIG["available_node_types"][name]["node_config"] for name in ("head", "gpu"))
    assert head["IamInstanceProfile"] != worker["IamInstanceProfile"]
    assert "InstanceMarketOptions" not in head and worker["InstanceMarketOptions"]["MarketType"] == "spot"
    assert head["MetadataOptions"]["HttpTokens"] == worker["MetadataOptions"]["HttpTokens"] == "required"
    assert CONFIG["idle_timeout_minutes"] <= 15


def test_infra_ray_commands_parse() -> None:
    for line in commands(CONFIG):
        subprocess.run(["bash", "-n", "-c", line], check=True)
