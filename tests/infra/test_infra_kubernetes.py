"""Kubernetes manifests: what is Kubernetes' own against its strict schemas, KubeRay's fields against their reference.

No package ships KubeRay's schemas: `RAY` below holds the field names and values of its API reference, release 1.7.0.
Pod templates, services and network rules inside are Kubernetes' own and are validated as such; the Serve application is
validated by Ray's own model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
FILES = sorted([*KUBERAY.glob("*.yaml"), *(ROOT / "infra" / "mlflow" / "kubernetes").glob("*.yaml")])
KUBERNETES = ("1.31", "1.37")  # the oldest and the newest that the manifests are checked against
PATHS = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}

Document = dict[str, Any]


def documents() -> list[Document]:
    return [found for path in FILES for found in yaml.safe_load_all(path.read_text())]


def some(kind: str) -> list[Document]:
    return [found for found in documents() if found["kind"] == kind]


def ray() -> dict[str, Document]:
    return {found["kind"]: found for found in documents() if found["apiVersion"] == "ray.io/v1"}


def cluster_of(document: Document) -> Document:
    for name in PATHS[document["kind"]]:
        document = document[name]
    return document


def groups(cluster: Document) -> list[Document]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


# ---------------------------------------------------------------- schemas


def fields(required: str = "", **known: Any) -> Document:
    return {"type": "object", "properties": known, "required": required.split(), "additionalProperties": False}


def one_of(*values: str) -> Document:
    return {"enum": list(values)}


ANY: Document = {}  # validated elsewhere: Kubernetes' own types
TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
RULES = {"ingressRules": {"type": "array"}, "egressRules": {"type": "array"}}
GROUP = {"template": ANY, "rayStartParams": TEXTS, "resources": TEXTS, "labels": TEXTS}
CLUSTER = fields(
    "headGroupSpec rayVersion",
    rayVersion=TEXT,
    suspend=FLAG,
    enableInTreeAutoscaling=FLAG,
    authOptions=fields("mode", mode=one_of("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    autoscalerOptions=fields(
        resources=ANY, image=TEXT, imagePullPolicy=TEXT, securityContext=ANY, idleTimeoutSeconds=COUNT, env=ANY,
        envFrom=ANY, volumeMounts=ANY, command=ANY, args=ANY, version=one_of("v1", "v2"),
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    ),
    networkPolicy=fields(
        mode=one_of("DenyAll", "DenyAllIngress", "DenyAllEgress"), head=fields(**RULES), worker=fields(**RULES),
        workerGroups={"type": "array", "items": fields("groupName", groupName=TEXT, **RULES)},
    ),
    headGroupSpec=fields("template", headService=ANY, enableIngress=FLAG, serviceType=TEXT, **GROUP),
    workerGroupSpecs={"type": "array", "items": fields(
        "groupName template", groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, suspend=FLAG,
        idleTimeoutSeconds=COUNT, priority={"type": "integer"}, numOfHosts=COUNT, **GROUP,
    )},
)  # fmt: skip
SPECS = {
    "RayCluster": CLUSTER,
    "RayJob": fields(
        "entrypoint rayClusterSpec", entrypoint=TEXT, rayClusterSpec=CLUSTER, runtimeEnvYAML=TEXT, jobId=TEXT,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), submitterPodTemplate=ANY,
        submitterConfig=fields(backoffLimit=COUNT), backoffLimit=COUNT, activeDeadlineSeconds=COUNT, metadata=TEXTS,
        preRunningDeadlineSeconds={"type": "integer", "minimum": 1}, ttlSecondsAfterFinished=COUNT,
        shutdownAfterJobFinishes=FLAG, suspend=FLAG, entrypointNumCpus=ANY, entrypointNumGpus=ANY,
    ),
    "RayService": fields(
        "serveConfigV2 rayClusterConfig", serveConfigV2=TEXT, rayClusterConfig=CLUSTER, excludeHeadPodFromServeSvc=FLAG,
        rayClusterDeletionDelaySeconds=COUNT, serveService=ANY, suspend=FLAG,
        upgradeStrategy=fields("type", type=one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None")),
    ),
}  # fmt: skip
RAY = {
    kind: fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=ANY,
        spec=spec,
    )
    for kind, spec in SPECS.items()
}


def inside(document: Document) -> Iterator[Document]:
    """What a KubeRay document holds of Kubernetes' own, as documents of their own."""
    cluster = cluster_of(document)
    templates = [group["template"] for group in groups(cluster)]
    if "submitterPodTemplate" in document["spec"]:
        templates.append(document["spec"]["submitterPodTemplate"])
    for template in templates:
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template.get("metadata", {})},
               "spec": template["spec"]}  # fmt: skip
    options = cluster["autoscalerOptions"]
    container = {
        "name": "x",
        "image": "x",
        "resources": options["resources"],
        "securityContext": options["securityContext"],
    }
    yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}}
    for rules in (cluster["networkPolicy"]["head"], cluster["networkPolicy"]["worker"]):
        spec = {"podSelector": {}, "ingress": rules.get("ingressRules", []), "egress": rules.get("egressRules", [])}
        yield {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "x"}, "spec": spec}


def validate(document: Document) -> None:
    """Raises ValidationError of the validator that refused."""
    parts = [document]
    if document["apiVersion"] == "ray.io/v1":
        jsonschema.validate(document, RAY[document["kind"]])
        parts = list(inside(document))
        if document["kind"] == "RayService":
            ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
    for part in parts:
        for version in KUBERNETES:
            kubernetes_validate.validate(part, version, strict=True)


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_infra_kubernetes_manifest_is_valid(path: Path) -> None:
    found = list(yaml.safe_load_all(path.read_text()))
    assert found
    for document in found:
        validate(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "dgm"


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", "spec.authOption", {}),
        ("RayCluster", "spec.authOptions.mode", "tokn"),
        ("RayCluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("RayCluster", "spec.headGroupSpec.template.spec.nodeSelektor", {}),
        ("RayCluster", "spec.networkPolicy.mode", "denyAll"),
        ("RayCluster", "spec.networkPolicy.worker.egressRules", [{"too": []}]),
        ("RayJob", "spec.backOffLimit", 3),
        ("RayJob", "spec.submitterPodTemplate.spec.restartPolicy", 1),
        ("RayService", "spec.serveConfigV2", "applications: [{name: a, import_paht: b}]"),
        ("Deployment", "spec.template.spec.containers", [{"name": "a", "imag": "b"}]),
        ("Service", "spec.ports", "5000"),
        ("NetworkPolicy", "spec.policyType", ["Ingress"]),
    ],
)
def test_infra_kubernetes_validator_refuses_a_planted_bug(kind: str, path: str, value: Any) -> None:
    document = copy.deepcopy(some(kind)[0])
    validate(document)
    *names, last = path.split(".")
    where = document
    for name in names:
        where = where[name]
    where[last] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError, ValueError)):
        validate(document)


@pytest.mark.parametrize("kind", PATHS)
def test_infra_kuberay_cluster_is_closed_and_pinned(kind: str) -> None:
    cluster = cluster_of(ray()[kind])
    locked = re.search(r"^ray==(.+)$", (ROOT / "requirements.lock").read_text(), re.M)
    assert locked and cluster["rayVersion"] == locked[1]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "dgm-ray-token"}
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["networkPolicy"]["mode"] == "DenyAll"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for side in ("head", "worker"):  # without DNS no worker finds the head
        ports = [port for rule in cluster["networkPolicy"][side]["egressRules"] for port in rule["ports"]]
        assert {"protocol": "UDP", "port": 53} in ports
    for group in groups(cluster):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        names = {item["name"]: item for item in container["env"]}
        assert names["RAY_USAGE_STATS_ENABLED"]["value"] == "0"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert next(item for item in spec["volumes"] if item["name"] == "shm")["emptyDir"]["medium"] == "Memory"
        assert spec["serviceAccountName"] == "dgm-ray"


def test_infra_kuberay_clusters_differ_only_where_they_should() -> None:
    clusters = {kind: cluster_of(found) for kind, found in ray().items()}
    for key in ("authOptions", "autoscalerOptions", "rayVersion", "enableInTreeAutoscaling"):
        assert clusters["RayCluster"][key] == clusters["RayJob"][key] == clusters["RayService"][key]
    assert clusters["RayCluster"]["workerGroupSpecs"] == clusters["RayJob"]["workerGroupSpecs"]
    containers = [group["template"]["spec"]["containers"][0] for found in clusters.values() for group in groups(found)]
    for key in ("image", "env", "securityContext"):
        assert all(container[key] == containers[0][key] for container in containers)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_infra_kuberay_trains_on_spot_under_a_head_on_demand(kind: str) -> None:
    cluster = cluster_of(ray()[kind])
    capacity = "eks.amazonaws.com/capacityType"
    assert cluster["headGroupSpec"]["template"]["spec"]["nodeSelector"] == {capacity: "ON_DEMAND"}
    for group in cluster["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        assert spec["nodeSelector"] == {capacity: "SPOT"}
        assert {item["key"] for item in spec["tolerations"]} == {"nvidia.com/gpu", "dgm/spot"}
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert 60 <= spec["terminationGracePeriodSeconds"] < 120  # a spot notice comes two minutes ahead


def test_infra_kuberay_job_retries_on_a_new_cluster_and_ends() -> None:
    spec = ray()["RayJob"]["spec"]
    assert spec["backoffLimit"] >= 1 and spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]


def test_infra_kuberay_service_serves_the_application_of_this_project() -> None:
    import importlib

    (application,) = yaml.safe_load(ray()["RayService"]["spec"]["serveConfigV2"])["applications"]
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert set(application["args"]) == {"model"}
    assert [item["name"] for item in application["deployments"]] == ["Sampler"]


def test_infra_kubernetes_holds_no_secret() -> None:
    assert not some("Secret")
    for path in FILES:
        for line in path.read_text().splitlines():
            if re.search(r"(password|token|secret|session-key)\b.*\bvalue:", line, re.I):
                raise AssertionError(f"{path.name}: {line}")
    (deployment,) = some("Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    secret = [item["name"] for item in container["env"] if "secretKeyRef" in item.get("valueFrom", {})]
    assert {"PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"} <= set(secret)


def test_infra_mlflow_is_reached_where_the_manifests_say() -> None:
    (service,) = some("Service")
    (deployment,) = some("Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    host = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc:{service['spec']['ports'][0]['port']}"
    (allowed,) = [word for word in container["command"] if word.startswith("--allowed-hosts=")]
    assert host in allowed.partition("=")[2].split(",")
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    for found in ray().values():
        for group in groups(cluster_of(found)):
            names = {item["name"]: item for item in group["template"]["spec"]["containers"][0]["env"]}
            assert names["MLFLOW_TRACKING_URI"]["value"] == f"http://{host}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
