"""What deploys the server: compose, Prometheus, Grafana and Kubernetes files against schemas, options and metrics."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from runtime.pipeline import Pipeline
from runtime.serve.__main__ import arguments
from runtime.serve.limits import Limits
from runtime.serve.ray.settings import check_nodes, read_settings
from tests import ROOT
from tests.client import serving

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes" / "driffusion.yaml"
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all(KUBERNETES.read_text()))
RAY: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "rayservice.yaml").read_text()))


def of(kind: str) -> dict[str, Any]:
    (found,) = [one for one in OBJECTS if one["kind"] == kind]
    return found


def name(one: Mapping[str, Any]) -> str:
    return f"{one['kind']}-{one['metadata']['name']}"


POD: dict[str, Any] = of("Deployment")["spec"]["template"]["spec"]
SERVER: dict[str, Any] = POD["containers"][0]


@pytest.mark.parametrize("one", [*OBJECTS, *(one for one in RAY if one["kind"] != "RayService")], ids=name)
def test_kubernetes_knows_every_field(one: dict[str, Any]) -> None:
    kubernetes_validate.validate(one, "1.33", strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    wrong = json.loads(json.dumps(of("Deployment")))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


def test_selectors_find_the_pods() -> None:
    labels = of("Deployment")["spec"]["template"]["metadata"]["labels"]
    for selector in (
        of("Deployment")["spec"]["selector"]["matchLabels"],
        of("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        of("Service")["spec"]["selector"],
    ):
        assert selector.items() <= labels.items()
    assert of("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == of("Deployment")["metadata"]["name"]
    assert of("HorizontalPodAutoscaler")["spec"]["minReplicas"] > of("PodDisruptionBudget")["spec"]["minAvailable"]


def commands() -> dict[str, list[str]]:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return {"compose": compose["services"]["server"]["command"], "kubernetes": SERVER["args"]}


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_commands_are_the_servers(where: str) -> None:
    command = commands()[where]
    assert command[:3] == ["python", "-m", "runtime.serve"]
    options = arguments().parse_args(command[3:])
    assert (options.host, options.port) == ("0.0.0.0", 8000)


def test_who_asks_by_name_is_known_to_the_server() -> None:
    """A server refuses Host headers that it does not know (DNS rebinding), Prometheus' and the Service's included."""
    (target,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"]
    name = target["targets"][0].partition(":")[0]
    assert name in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert name in arguments().parse_args(commands()["compose"][3:]).allowed_hosts
    assert of("Service")["metadata"]["name"] in arguments().parse_args(SERVER["args"][3:]).allowed_hosts


def test_pods_have_time_to_drain() -> None:
    drain = arguments().parse_args(SERVER["args"][3:]).drain
    assert POD["terminationGracePeriodSeconds"] > SERVER["lifecycle"]["preStop"]["sleep"]["seconds"] + drain
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
    assert int(compose["stop_grace_period"].removesuffix("s")) > Limits.drain


def test_pods_write_into_their_volumes_alone() -> None:
    for container in (*POD["initContainers"], SERVER):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        (cache,) = [one["value"] for one in container["env"] if one["name"] == "XDG_CACHE_HOME"]
        assert mounted == {"/store", "/tmp"}
        assert cache.startswith("/store/")
    assert arguments().parse_args(SERVER["args"][3:]).build == Path("/store")


def test_probes_are_routes_of_the_server() -> None:
    source = "".join(path.read_text() for path in (ROOT / "runtime" / "serve" / "openai").glob("*.py"))
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'"{SERVER[name]["httpGet"]["path"]}"' in source
        assert SERVER[name]["httpGet"]["port"] == SERVER["ports"][0]["name"]


def test_every_query_names_metrics_that_the_server_has(pipeline: Pipeline) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    metric = of("HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    source = (ROOT / "runtime" / "serve" / "metrics.py").read_text()
    with serving(pipeline) as client:
        text = client.get("/metrics").text
    told = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)) | set(re.findall(r"^(driffusion_\w+)[ {]", text, re.M))
    asked = set(re.findall(r"driffusion_\w+", " ".join([*queries, metric])))
    for name in asked:
        gpu = name.removeprefix("driffusion_gpu_")
        known = name in told or name.removesuffix("_bucket") in told or (gpu != name and f'"{gpu}"' in source)
        assert known, f"{name} is no metric of the server"
    assert len(asked) > 8
    provided = yaml.safe_load((DEPLOY / "grafana" / "datasources.yaml").read_text())["datasources"][0]["uid"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {provided}


# --- the RayService --------------------------------------------------------------------------------------------------

(SERVICE,) = (one["spec"] for one in RAY if one["kind"] == "RayService")
HEAD: dict[str, Any] = SERVICE["rayClusterConfig"]["headGroupSpec"]
(WORKERS,) = SERVICE["rayClusterConfig"]["workerGroupSpecs"]
# the fields that KubeRay's Go types have (ray-operator/apis/ray/v1); True: must be there
FIELDS = {
    "spec": {"serveConfigV2": True, "rayClusterConfig": True, "serveService": False},
    "rayClusterConfig": {
        "headGroupSpec": True, "workerGroupSpecs": False, "rayVersion": False, "enableInTreeAutoscaling": False,
        "autoscalerOptions": False, "headServiceAnnotations": False, "suspend": False,
    },
    "headGroupSpec": {
        "rayStartParams": True, "template": True, "serviceType": False, "headService": False, "enableIngress": False,
    },
    "workerGroupSpecs": {
        "groupName": True, "minReplicas": True, "maxReplicas": True, "rayStartParams": True, "template": True,
        "replicas": False, "numOfHosts": False, "scaleStrategy": False,
    },
}  # fmt: skip


def test_kuberay_knows_every_field_around_the_pods() -> None:
    given = {
        "spec": SERVICE,
        "rayClusterConfig": SERVICE["rayClusterConfig"],
        "headGroupSpec": HEAD,
        "workerGroupSpecs": WORKERS,
    }
    for what, one in given.items():
        assert set(one) <= set(FIELDS[what]), what
        assert {field for field, must in FIELDS[what].items() if must} <= set(one), what
    for group in (HEAD, WORKERS):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("group", [HEAD, WORKERS], ids=["head", "workers"])
def test_kubernetes_knows_every_field_of_a_clusters_pods(group: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "one"}, "template": group["template"]}
    kubernetes_validate.validate(pod, "1.33", strict=True)
    pod = json.loads(json.dumps(pod))
    pod["template"]["spec"]["containers"][0]["readinessProbe"]["httpGett"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, "1.33", strict=True)


def test_a_replica_of_the_service_fits_on_a_worker() -> None:
    config = yaml.safe_load(SERVICE["serveConfigV2"])
    (application,) = config["applications"]
    module, function = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    settings = read_settings(application["args"])
    worker = WORKERS["template"]["spec"]["containers"][0]["resources"]["limits"]
    check_nodes(settings, [{"CPU": float(worker["cpu"]), "GPU": float(worker["nvidia.com/gpu"])}])
    (model,) = settings.models
    assert model.replicas == (WORKERS["minReplicas"], WORKERS["maxReplicas"]), "one on a worker"
    assert WORKERS["minReplicas"] <= WORKERS["replicas"] <= WORKERS["maxReplicas"]
    assert settings.access.has_host("driffusion-cluster-serve-svc")
    assert str(settings.store) == "/engines"
    assert config["http_options"]["port"] == 8000


def test_a_clusters_pods_write_into_their_volumes_alone_and_have_time_to_drain() -> None:
    (application,) = yaml.safe_load(SERVICE["serveConfigV2"])["applications"]
    settings = read_settings(application["args"])
    for group in (HEAD, WORKERS):
        (container,) = group["template"]["spec"]["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounted) == {str(settings.build), "/tmp"}
        assert set(mounted.values()) == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert "8000" in {str(port["containerPort"]) for port in container["ports"]}
    pod = WORKERS["template"]["spec"]
    command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    told, waited = (int(one) for one in re.findall(r"(?:seconds|sleep) (\d+)", command))
    assert settings.served.drain < told <= waited < pod["terminationGracePeriodSeconds"]
    (budget,) = (one["spec"] for one in RAY if one["kind"] == "PodDisruptionBudget")
    assert budget["selector"]["matchLabels"].items() <= WORKERS["template"]["metadata"]["labels"].items()
    assert not budget["selector"]["matchLabels"].items() <= HEAD["template"]["metadata"]["labels"].items()
    assert budget["minAvailable"] < WORKERS["minReplicas"]


def test_the_clusters_ray_is_the_one_that_is_installed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["cluster"] == [f"ray[serve]=={SERVICE['rayClusterConfig']['rayVersion']}"]


def test_panels_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())["panels"]
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_files_that_compose_mounts_are_there() -> None:
    for service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).is_file(), source


def test_the_pictures_are_built_with_arguments_that_the_dockerfile_has() -> None:
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for name in ("compose.yaml", "compose.gpu.yaml"):
        for service in ("engines", "server"):
            given = yaml.safe_load((DEPLOY / name).read_text())["services"][service]["build"]["args"]
            assert set(given) <= declared
