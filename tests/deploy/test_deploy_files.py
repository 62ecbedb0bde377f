"""What is deployed fits together: valid manifests, commands that the command line understands, metrics that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cupy_engine.server.commands import build_parser

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "server" / "deploy"
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "cupy-engine.yaml").read_text()))
COMPOSE = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def manifest(kind: str) -> dict[str, Any]:
    (found,) = [each for each in MANIFESTS if each["kind"] == kind]
    return found


def container() -> dict[str, Any]:
    (found,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("version", ["1.27", "1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("each", MANIFESTS, ids=lambda each: each["kind"])
def test_manifests_are_valid(each: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(each, version, strict=True)


def test_a_typo_in_a_manifest_would_be_found() -> None:
    broken = json.loads(json.dumps(manifest("Deployment")).replace("containerPort", "containrPort"))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_manifests_point_at_each_other() -> None:
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("Deployment")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert manifest("Service")["spec"]["selector"].items() <= labels.items()
    assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert manifest("NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    target = manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifest("Deployment")["metadata"]["name"])
    assert "replicas" not in manifest("Deployment")["spec"], "the autoscaler's number would be overwritten"
    ports = {port["name"] for port in container()["ports"]}
    probes = [container()[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["httpGet"]["port"] for probe in probes} <= ports
    assert manifest("Service")["spec"]["ports"][0]["targetPort"] in ports


def test_probes_need_no_key() -> None:
    from cupy_engine.server.app import OPEN_ENDPOINTS

    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = container()[name]["httpGet"]["path"]
        assert "operations." + path.removeprefix("/") in OPEN_ENDPOINTS


def test_pod_ends_later_than_the_server() -> None:
    args = container()["args"]
    drain_s = float(args[args.index("--drain-timeout-s") + 1])
    sleep_s = float(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert manifest("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain_s + sleep_s


def test_autoscaler_metrics_come_from_the_adapter() -> None:
    adapter = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    pattern = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    assert pattern
    for metric in manifest("HorizontalPodAutoscaler")["spec"]["metrics"]:
        name = metric["pods"]["metric"]["name"].replace("cupy_engine_", "cupy_engine:")
        assert re.fullmatch(pattern[1], name)
        renamed = re.sub(rule["name"]["matches"], rule["name"]["as"].replace("${1}", r"\1"), name)
        assert renamed == metric["pods"]["metric"]["name"]
        assert name in (DEPLOY / "prometheus" / "alerts.yml").read_text(), "a name that is tested to exist"


def docker_command() -> list[str]:
    found = re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found
    return list(json.loads(found[1]))


@pytest.mark.parametrize(
    "arguments",
    [docker_command(), COMPOSE["services"]["cupy-engine"]["command"], container()["args"]],
    ids=["docker", "compose", "kubernetes"],
)
def test_commands_are_understood(arguments: list[str]) -> None:
    parsed = build_parser().parse_args(arguments)
    assert (parsed.host, parsed.port) == ("0.0.0.0", 8000)


def test_commands_of_the_guide_are_understood() -> None:
    text = (DEPLOY / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:\w+=\S+ )*cupy-engine (serve .*?)(?:\s+#.*)?$", text, re.MULTILINE)
    assert commands
    for command in commands:
        build_parser().parse_args(shlex.split(command))


def test_links_of_the_guide_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (DEPLOY / "README.md").read_text()):
        assert (DEPLOY / target).exists(), target


def test_docker_copies_what_the_package_needs() -> None:
    import tomllib

    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    copied = set(re.findall(r"^COPY (\w+) \w+$", DOCKERFILE, re.MULTILINE))
    assert {Path(folder).parts[0] for folder in folders} <= copied
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (default,) = re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert set(default.split(",")) <= extras.keys()


def test_compose_mounts_what_exists() -> None:
    volumes = COMPOSE["volumes"]
    for service in COMPOSE["services"].values():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in volumes, mount
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = {t for job in prometheus["scrape_configs"] for c in job["static_configs"] for t in c["targets"]}
    assert "cupy-engine:8000" in targets
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/cupy-engine.yml").read_text())["providers"][0]
    assert any(provider["options"]["path"] in mount for mount in COMPOSE["services"]["grafana"]["volumes"])
