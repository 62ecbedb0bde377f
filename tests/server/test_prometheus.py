"""A real Prometheus scrapes a real server with several workers, and an alert of ours fires."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_server import TINY, LiveServer, wait_until

DEPLOY = Path(__file__).parents[2] / "server" / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
PANELS_WITHOUT_DATA = {  # on this server, which has
    "Targets met",  # no targets
    "Draft tokens accepted",  # no speculative decoding
    "GPU utilization",  # no GPU
    "GPU memory",
}
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)"
)
CONFIG = """
global: {scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms}
rule_files: [alerts.yml]
scrape_configs:
  - job_name: cupy-engine
    scrape_timeout: 200ms
    static_configs: [{targets: ["%s", "127.0.0.1:1"]}]
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **query: str) -> Any:
        try:
            with urllib.request.urlopen(f"{self._url}{path}?{urllib.parse.urlencode(query)}", timeout=5) as answer:
                return json.load(answer)["data"]
        except OSError:
            return {"result": [], "alerts": []}

    def value(self, expression: str) -> float | None:
        found = self.get("/api/v1/query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None


@pytest.fixture
def prometheus(server: LiveServer, tmp_path: Path) -> Iterator[Prometheus]:
    (tmp_path / "prometheus.yml").write_text(CONFIG % server.url.removeprefix("http://"))
    (tmp_path / "alerts.yml").write_text(re.sub(r"for: \w+", "for: 0s", RULES.read_text()))
    port = free_port()
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(["prometheus", *options], cwd=tmp_path, stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


@needs_prometheus
def test_scrape_and_alert(server: LiveServer, prometheus: Prometheus) -> None:
    before = server.metric("generation_tokens_total")
    with ThreadPoolExecutor(4) as pool:
        bodies = [{"prompt": "One", "max_tokens": 5, "ignore_eos": True}] * 4
        assert all(status == 200 for status, _ in pool.map(lambda b: server.call("/v1/completions", b), bodies))
    expected = before + 20
    wait_until(lambda: prometheus.value("cupy_engine:generation_tokens_total") == expected, 20, "a scrape")
    assert prometheus.value("sum(cupy_engine:engine_up)") == 1
    assert prometheus.value('up{job="cupy-engine",instance!="127.0.0.1:1"}') == 1

    def firing() -> set[str]:
        alerts = prometheus.get("/api/v1/alerts")["alerts"]
        return {a["labels"]["alertname"] + " " + a["labels"].get("instance", "") for a in alerts}

    wait_until(lambda: "CupyEngineUnreachable 127.0.0.1:1" in firing(), 20, "an alert for the dead target")
    assert not any(each.startswith("CupyEngineDown") for each in firing())


def panel_expressions() -> list[tuple[str, str]]:
    """What the dashboard asks of Prometheus for each panel, as Grafana would with everything chosen."""
    panels = json.loads((DEPLOY / "grafana" / "cupy-engine.json").read_text())["panels"]
    asked = [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", ())]
    chosen = {"$__rate_interval": "30s", "$model": ".*", "$instance": ".*"}
    return [(title, re.sub(r"\$\w+", lambda found: chosen[found[0]], expression)) for title, expression in asked]


@needs_prometheus
def test_every_panel_shows_something(server: LiveServer, prometheus: Prometheus) -> None:
    def empty() -> set[str]:
        values = [(title, prometheus.value(expression)) for title, expression in panel_expressions()]
        return {title for title, value in values if value is None or math.isnan(value)}

    def ask_and_look() -> bool:
        body = {"prompt": "One two three", "max_tokens": 5, "ignore_eos": True}
        assert server.call("/v1/completions", body)[0] == 200
        return empty() == PANELS_WITHOUT_DATA

    with contextlib.suppress(AssertionError):
        wait_until(ask_and_look, 20, "data")
    assert empty() == PANELS_WITHOUT_DATA


def test_workers_tell_the_same(server: LiveServer) -> None:
    """Whoever answers, counters never go back: fresh connections reach different workers."""
    previous = 0.0
    for _ in range(8):
        assert server.call("/v1/completions", {"prompt": "One", "max_tokens": 2, "ignore_eos": True})[0] == 200
        now = server.metric("generation_tokens_total")
        assert now >= previous + 2
        previous = now


def test_stats_for_the_live_page(server: LiveServer) -> None:
    status, body = server.call("/stats")
    assert status == 200
    (engine,) = body["engines"]
    assert engine["state"] == "ready"
    assert set(engine["live"]["blocks"]) <= set(".c123456789")
    assert len(engine["live"]["blocks"]) == -(-engine["stats"]["num_kv_blocks"] // engine["live"]["blocks_step"])
    bounds, counts, _ = engine["histograms"]["time_to_first_token_seconds"]
    assert len(counts) == len(bounds) + 1
    assert engine["counters"]["generation_tokens"] >= 0


def samples(page: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"^cupy_engine:{name}\{{[^}}]*\}} (\S+)$", page, re.MULTILINE)]


def test_the_page_stays_through_a_restart() -> None:
    """One of two engines is killed: the page goes on, says so, and counts the restart."""
    with LiveServer.serve(str(TINY), "--replicas", "2", "--workers", "1") as server:
        engines = [pid for pid, command in server.pids().items() if "engine_process" in command]
        assert len(engines) == 2
        assert samples(server.call("/metrics")[1], "engine_restarts_total") == [0, 0]
        os.kill(engines[0], signal.SIGKILL)
        seen_up = set()

        def is_over() -> bool:
            status, page = server.call("/metrics")
            assert status == 200
            seen_up.add(sum(samples(page, "engine_up")))
            return sorted(samples(page, "engine_restarts_total")) == [0, 1] and sum(samples(page, "engine_up")) == 2

        wait_until(is_over, 30, "the engine is back")
        assert 1 in seen_up, "one engine was down for a while"
        assert [engine["state"] for engine in server.call("/stats")[1]["engines"]] == ["ready", "ready"]
