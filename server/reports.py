"""What is told of an HTTP request when it is over: a line in the log, and spans if there is a tracer."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flask import Flask, Response, g, request

from cupy_engine.outputs import RequestOutput
from cupy_engine.sampling_params import SamplingParams

from .arrivals import ARRIVED
from .logs import Line
from .server_config import ServerConfig

logger = logging.getLogger(__name__)

TRACE_HEADERS = ("traceparent", "tracestate")


@dataclass(slots=True)
class CallReport:
    """An HTTP request. Times are on the monotonic clock. ``is_generating``: an engine has it, and will report it."""

    reporter: Reporter
    method: str
    path: str
    trace_headers: dict[str, str]
    start_s: float
    is_generating: bool = False
    status: int = 0
    end_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What became of a request's prompts. ``outcome`` says why it ended, if it is not finished."""

    id: str
    model: str
    call: CallReport
    params: SamplingParams
    results: Sequence[RequestOutput]
    is_finished: bool
    outcome: str
    end_s: float = field(default_factory=time.monotonic)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(result.prompt_token_ids) for result in self.results)

    @property
    def num_cached_tokens(self) -> int:
        return sum(result.num_cached_tokens for result in self.results)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(output.token_ids) for result in self.results for output in result.outputs)

    @property
    def finish_reasons(self) -> list[str]:
        return sorted({str(output.finish_reason) for result in self.results for output in result.outputs})

    @property
    def ttft_s(self) -> float | None:
        return min((r.metrics.ttft_s for r in self.results if r.metrics.ttft_s is not None), default=None)


class Tracer(Protocol):
    """What :class:`cupy_engine.server.tracing.OtelTracer` is."""

    def refused(self, call: CallReport) -> None: ...

    def generated(self, report: GenerationReport) -> str:
        """The trace's id."""


class Reporter:
    """Writes the lines and feeds the tracer, of one worker.

    Raises:
        ConfigError: traces are asked for and OpenTelemetry is not installed.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._tracer: Tracer | None = None
        if config.otlp_traces_endpoint is not None:
            from .tracing import OtelTracer

            self._tracer = OtelTracer(config.otlp_traces_endpoint)

    def install(self, app: Flask) -> None:
        """Follow the requests of an application; ``g.call`` is the current one's report."""
        app.before_request(self._begin)
        app.after_request(self._end)

    def generated(self, report: GenerationReport) -> None:
        trace_id = self._tracer.generated(report) if self._tracer else None
        if self._config.log_requests:
            logger.info(request_line(report, trace_id, with_texts=self._config.log_prompts))

    def _begin(self) -> None:
        headers = {name: value for name in TRACE_HEADERS if (value := request.headers.get(name))}
        start_s: float = request.environ.get(ARRIVED) or time.monotonic()
        g.call = CallReport(self, request.method, request.path, headers, start_s)

    def _end(self, response: Response) -> Response:
        """Report a refusal here: nobody else knows of it."""
        call: CallReport = g.call
        if call.method == "POST" and response.status_code >= 400 and not call.is_generating:
            call.status, call.end_s = response.status_code, time.monotonic()
            if self._tracer:
                self._tracer.refused(call)
            if self._config.log_requests:
                took_ms = (call.end_s - call.start_s) * 1000
                values = {"id": response.headers.get("X-Request-Id"), "path": call.path, "status": call.status}
                logger.info(Line("refused", {**values, "total_ms": took_ms}))
        return response


def request_line(report: GenerationReport, trace_id: str | None = None, *, with_texts: bool = False) -> Line:
    """Figures of a request; its texts only if asked for."""
    first_s = report.ttft_s
    values: dict[str, object] = {
        "id": report.id,
        "model": report.model,
        "prompts": len(report.results),
        "prompt_tokens": report.num_prompt_tokens,
        "cached_tokens": report.num_cached_tokens,
        "output_tokens": report.num_output_tokens,
        "finish": ",".join(report.finish_reasons) if report.is_finished else report.outcome,
        "ttft_ms": "-" if first_s is None else first_s * 1000,
        "total_ms": (report.end_s - report.call.start_s) * 1000,
    }
    if trace_id is not None:
        values["trace_id"] = trace_id
    if with_texts:
        values["texts"] = [[r.prompt or r.prompt_token_ids, *(o.text for o in r.outputs)] for r in report.results]
    return Line("request", values)
