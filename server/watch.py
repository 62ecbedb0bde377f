"""``/metrics`` for Prometheus and ``/stats`` for the live page: both read every engine of this server."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response

from cupy_engine.errors import EngineDeadError
from cupy_engine.messages import Metric

from . import metrics_page
from .answering import json_response
from .gpu_monitor import GpuMonitor
from .metrics_page import EngineView
from .model_directory import ModelDirectory
from .replica_pool import PooledReplica

_LIVE_HISTOGRAMS = ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds")
_LIVE_COUNTERS = ("prompt_tokens", "prompt_tokens_cached", "generation_tokens")


def watch_blueprint(models: ModelDirectory) -> Blueprint:
    """The routes."""
    routes, api = Blueprint("watch", __name__), Watch(models)
    routes.get("/metrics")(api.metrics)
    routes.get("/stats")(api.stats)
    return routes


class Watch:
    """Handlers; each call runs on a request thread."""

    def __init__(self, models: ModelDirectory) -> None:
        self._models = models
        self._gpus = GpuMonitor()

    def metrics(self) -> Response:
        """The page; an engine that does not answer is down on it, and its other figures are missing."""
        return Response(metrics_page.render(self._views(wants_live=False)), content_type=metrics_page.CONTENT_TYPE)

    def stats(self) -> Response:
        """The same in short, with a picture of each engine, for people."""
        return json_response({"engines": [self._shown(view) for view in self._views(wants_live=True)]})

    def _views(self, *, wants_live: bool) -> list[EngineView]:
        return [
            self._view(served.deployment.id, replica, wants_live=wants_live)
            for served in self._models.served()
            for replica in served.pool.replicas.values()
        ]

    def _view(self, model_name: str, replica: PooledReplica, *, wants_live: bool) -> EngineView:
        try:
            reply = replica.client.stats(wants_live=wants_live)
        except EngineDeadError:
            return EngineView(model_name, replica.name, replica.state, replica.status.num_restarts)
        status = replica.client.status
        gpus = self._gpus.read(status.gpu_ids if status else ())
        return EngineView(model_name, replica.name, "ready", replica.status.num_restarts, reply, gpus)

    def _shown(self, view: EngineView) -> dict[str, Any]:
        shown = {"model": view.model_name, "engine": view.engine, "state": view.state, "gpus": view.gpus}
        if view.reply is None:
            return shown
        metrics = {metric.name: metric for metric in view.reply.metrics}
        return shown | {
            "stats": view.reply.stats,
            "live": view.reply.live,
            "max_num_seqs": self._models.find(view.model_name).engine_config.max_num_seqs,
            "counters": {name: metrics[name].values[""] for name in _LIVE_COUNTERS if name in metrics},
            "histograms": {name: metrics[name].histogram for name in _LIVE_HISTOGRAMS if name in metrics},
            "finished": _values(metrics.get("request_success")),
            "rejected": _values(metrics.get("admission_rejections")),
        }


def _values(metric: Metric | None) -> dict[str, float]:
    return metric.values if metric else {}
