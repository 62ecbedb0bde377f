"""The page for Prometheus: what every engine counted, under vLLM's names with the prefix ``cupy_engine:``.

An engine counts and a worker renders, so the page is the same whichever worker answers, and complete where one server
has several engines: their samples differ in the labels ``model_name`` and ``engine``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from cupy_engine import __version__
from cupy_engine.messages import Metric, StatsReply

from .gpu_monitor import GpuUse

PREFIX = "cupy_engine:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ["model_name", "engine"]


@dataclass(frozen=True, slots=True)
class EngineView:
    """One engine process as a worker sees it. ``reply`` is ``None`` while it does not answer.

    ``engine`` tells the engines of one model apart; ``num_restarts`` is how often it had to be started again.
    """

    model_name: str
    engine: str = "0"
    state: str = "ready"
    num_restarts: int = 0
    reply: StatsReply | None = None
    gpus: list[GpuUse] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        return [self.model_name, self.engine]


def render(views: Sequence[EngineView]) -> bytes:
    """The page in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page([*_server_families(views), *_engine_families(views)]))
    return generate_latest(registry)


class _Page:
    """A prometheus_client collector of families made already."""

    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Family]:
        return iter(self._families)


def _server_families(views: Sequence[EngineView]) -> Iterator[Family]:
    info = GaugeMetricFamily(PREFIX + "info", "The server's version; always 1.", labels=["version"])
    info.add_metric([__version__], 1)
    up = GaugeMetricFamily(PREFIX + "engine_up", "Whether the engine takes requests.", labels=_LABELS)
    restarts = CounterMetricFamily(PREFIX + "engine_restarts", "Engine processes started again.", labels=_LABELS)
    labels = [*_LABELS, "gpu"]
    busy = GaugeMetricFamily(PREFIX + "gpu_utilization_perc", "Share of time with a kernel, 0 to 1.", labels=labels)
    used = GaugeMetricFamily(PREFIX + "gpu_memory_used_bytes", "GPU memory in use, by anyone.", labels=labels)
    for view in views:
        up.add_metric(view.labels, view.state == "ready")
        restarts.add_metric(view.labels, view.num_restarts)
        for gpu in view.gpus:
            busy.add_metric([*view.labels, gpu.name], gpu.utilization)
            used.add_metric([*view.labels, gpu.name], gpu.memory_used_bytes)
    yield from (info, up, restarts, busy, used)


def _engine_families(views: Iterable[EngineView]) -> Iterable[Family]:
    """One family per metric name, with the samples of all engines."""
    families: dict[str, Any] = {}
    for view in views:
        for metric in view.reply.metrics if view.reply else ():
            family = families.get(metric.name) or families.setdefault(metric.name, _family(metric))
            _add(family, view.labels, metric)
    return families.values()


def _family(metric: Metric) -> Family:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    labels = [*_LABELS, metric.label] if metric.label else _LABELS
    made: Family = kinds[metric.kind](PREFIX + metric.name, metric.text, labels=labels)
    return made


def _add(family: Any, labels: list[str], metric: Metric) -> None:
    for value, number in metric.values.items():
        family.add_metric([*labels, value] if metric.label else labels, number)
    if metric.histogram is not None:
        names = [*(str(float(bound)) for bound in metric.histogram.bounds), "+Inf"]
        totals = map(float, accumulate(metric.histogram.counts))
        family.add_metric(labels, list(zip(names, totals, strict=True)), metric.histogram.sum)
