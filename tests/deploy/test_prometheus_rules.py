"""Alert rules and dashboard: every metric they name exists, and promtool agrees with their syntax and their timing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cupy_engine.server.gpu_monitor import GpuUse
from cupy_engine.server.metrics_page import EngineView, render

from cupy_engine.block_manager import BlockManager
from cupy_engine.messages import EngineStats, StatsReply
from cupy_engine.metrics import EngineMetrics
from cupy_engine.seats import Seats

ROOT = Path(__file__).parents[2] / "server" / "deploy"
RULES = ROOT / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "grafana" / "cupy-engine.json"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)"
)


def promtool(*arguments: str | Path, folder: Path) -> str:
    run = subprocess.run(["promtool", *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def names() -> set[str]:
    """The names of all samples on a server's page."""

    class Idle:
        block_manager = BlockManager(8, 16)
        num_running = num_waiting = num_swapped = 0
        seats = Seats(1)

    reply = StatsReply(token=1, stats=EngineStats(), metrics=EngineMetrics().snapshot(Idle()))  # type: ignore[arg-type]
    page = render([EngineView("m", reply=reply, gpus=[GpuUse("0", 0.1, 1)])]).decode()
    return set(re.findall(r"^(cupy_engine:\w+)\{", page, re.MULTILINE))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*").replace("$instance", ".*")


def test_rules_name_real_metrics(names: set[str]) -> None:
    used = set(re.findall(r"cupy_engine:\w+", RULES.read_text()))
    assert used
    assert used <= names, used - names


def test_the_guide_explains_every_alert() -> None:
    guide = (ROOT / "README.md").read_text()
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            (line,) = [line for line in guide.splitlines() if f"`{rule['alert']}`" in line]
            assert f"| {rule['labels']['severity']} |" in line


def test_dashboard_names_real_metrics(names: set[str]) -> None:
    used = {name for expression in dashboard_expressions() for name in re.findall(r"cupy_engine:\w+", expression)}
    assert used <= names, used - names


def test_dashboard_lies_well() -> None:
    """Panels have titles and explanations and do not overlap."""
    cells = set()
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        at = panel["gridPos"]
        area = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not area & cells, panel["title"]
        cells |= area
    ids = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(ids) == len(set(ids))


@needs_promtool
def test_config_and_rules_are_valid(tmp_path: Path) -> None:
    assert "13 rules found" in promtool("check", "config", ROOT / "prometheus" / "prometheus.yml", folder=tmp_path)


@needs_promtool
def test_dashboard_queries_are_valid(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": each} for i, each in enumerate(dashboard_expressions())]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file, folder=tmp_path)


@needs_promtool
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    cases = (Path(__file__).parent / "alerts_test.yml").read_text()
    tested = set(re.findall(r"alertname: (\w+)", cases))
    assert tested == set(re.findall(r"alert: (\w+)", RULES.read_text())), "an alert without a case"
    shutil.copy(RULES, tmp_path)
    (tmp_path / "alerts_test.yml").write_text(cases)
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml", folder=tmp_path)


@needs_promtool
@pytest.mark.parametrize("key", ["", "secret"])
def test_compose_gives_prometheus_the_key(tmp_path: Path, key: str) -> None:
    (script,) = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["command"]
    script = script.replace("$$", "$").replace("/tmp", str(tmp_path))  # first: the checkout may be in /tmp itself
    script = script.replace("/etc/prometheus", str(ROOT / "prometheus"))
    script = re.sub(r"exec prometheus --config.file=(\S+).*", r"exec promtool check config \1", script)
    subprocess.run(["sh", "-ec", script], env={"API_KEY": key, "PATH": os.environ["PATH"]}, check=True, timeout=60)
    config = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    job = next(job for job in config["scrape_configs"] if job["job_name"] == "cupy-engine")
    expected = {"type": "Bearer", "credentials_file": str(tmp_path / "api-key")} if key else None
    assert job.get("authorization") == expected
    assert (tmp_path / "api-key").read_text() == key
