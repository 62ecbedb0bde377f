"""OpenTelemetry traces (extra ``otel``): a span per HTTP request, and below it the engine's queue, prefill, decode.

Spans are made when a request is over, from times that were taken anyway, so a stream pays nothing for being traced.
Context comes in as W3C ``traceparent``; OpenTelemetry's own variables (``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``,
``OTEL_EXPORTER_OTLP_HEADERS``, …) hold.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cupy_engine import __version__
from cupy_engine.errors import ConfigError
from cupy_engine.outputs import RequestMetrics

from .reports import CallReport, GenerationReport

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


class OtelTracer:
    """Sends spans to an OTLP collector over HTTP. Made before a fork if need be: it connects at first use.

    Args:
        endpoint: the collector's URL for traces, such as http://localhost:4318/v1/traces.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            import opentelemetry.exporter.otlp.proto.http
            import opentelemetry.sdk  # noqa: F401
        except ImportError:
            raise ConfigError("otlp_traces_endpoint", "traces need 'cupy-engine[otel]' installed") from None
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._tracer: Any = None

    def refused(self, call: CallReport) -> None:
        """A request that never reached an engine."""
        wall_ns = _wall_clock()
        span, _ = self._start(call, wall_ns, {"http.response.status_code": call.status}, is_error=call.status >= 500)
        span.end(wall_ns(call.end_s))

    def generated(self, report: GenerationReport) -> str:
        """A request that did; its trace id."""
        from opentelemetry import trace

        wall_ns = _wall_clock()
        span, context = self._start(report.call, wall_ns, _attributes(report), is_error=not report.is_finished)
        for index, result in enumerate(report.results):
            for name, start_s, end_s in phases(result.metrics, report.end_s):
                child = self._tracer.start_span(name, context, start_time=wall_ns(start_s))
                child.set_attribute("cupy_engine.prompt_index", index)
                child.end(wall_ns(end_s))
        span.end(wall_ns(report.end_s))
        return trace.format_trace_id(span.get_span_context().trace_id)

    def _start(
        self, call: CallReport, wall_ns: Callable[[float], int], attributes: dict[str, Any], *, is_error: bool
    ) -> tuple[Any, Any]:
        """The span of an HTTP request, and the context for those below it."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._connect()
        parent = TraceContextTextMapPropagator().extract(call.trace_headers)
        name, kind = f"{call.method} {call.path}", trace.SpanKind.SERVER
        span = self._tracer.start_span(name, parent, kind, start_time=wall_ns(call.start_s))
        span.set_attributes({"http.request.method": call.method, "http.route": call.path, **attributes})
        if is_error:
            span.set_status(trace.StatusCode.ERROR)
        return span, trace.set_span_in_context(span, parent)

    def _connect(self) -> None:
        """Start the exporter, if this process has not yet: its thread does not survive a fork."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        with self._lock:
            if self._pid == os.getpid():
                return
            name = os.environ.get("OTEL_SERVICE_NAME", "cupy-engine")
            provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": __version__}))
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(self._endpoint)))
            self._tracer = provider.get_tracer("cupy_engine", __version__)
            self._pid = os.getpid()


def phases(metrics: RequestMetrics, end_s: float) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) of what a request went through; the phase in which it ended early goes on to ``end_s``."""
    start_s: float = metrics.arrival_time_s
    ends = (metrics.scheduled_time_s, metrics.first_token_time_s, metrics.finish_time_s)
    for name, phase_end_s in zip(("queue", "prefill", "decode"), ends, strict=True):
        yield name, start_s, end_s if phase_end_s is None else phase_end_s
        if phase_end_s is None:
            return
        start_s = phase_end_s


def _attributes(report: GenerationReport) -> dict[str, Any]:
    """OpenTelemetry's names for generative AI, where there is one."""
    params = report.params
    values = {
        "gen_ai.operation.name": OPERATIONS.get(report.call.path),
        "gen_ai.provider.name": "cupy-engine",
        "gen_ai.request.model": report.model,
        "gen_ai.response.id": report.id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.usage.input_tokens": report.num_prompt_tokens,
        "gen_ai.usage.output_tokens": report.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": report.num_cached_tokens,
        "gen_ai.response.finish_reasons": report.finish_reasons if report.is_finished else None,
        "gen_ai.latency.time_to_first_token": report.ttft_s,
        "error.type": None if report.is_finished else report.outcome,
    }
    return {name: value for name, value in values.items() if value is not None}


def _wall_clock() -> Callable[[float], int]:
    """From the monotonic clock's seconds to nanoseconds since the epoch, the same for all spans of a request."""
    offset_ns = time.time_ns() - time.monotonic_ns()
    return lambda monotonic_s: offset_ns + int(monotonic_s * 1e9)
