"""Traces of a real server at a collector: phases, context, errors; and JSON logs that name them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from live_server import TINY, LiveServer, wait_until

otlp = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="no OpenTelemetry")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="no OTLP exporter")

from cupy_engine.server.tracing import phases  # noqa: E402

from cupy_engine.outputs import RequestMetrics  # noqa: E402

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(ThreadingHTTPServer):
    """An OTLP collector that keeps spans as dictionaries."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1/traces"

    def named(self, name: str) -> list[dict[str, Any]]:
        return [span for span in self.spans if span["name"] == name]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        payload = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            payload = gzip.decompress(payload)
        request = otlp.ExportTraceServiceRequest.FromString(payload)
        for resource in request.resource_spans:
            service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
            self.server.spans += [as_dict(s, service) for scope in resource.scope_spans for s in scope.spans]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def as_dict(span: Any, service: str) -> dict[str, Any]:
    return {
        "name": span.name,
        "service": service,
        "trace": span.trace_id.hex(),
        "id": span.span_id.hex(),
        "parent": span.parent_span_id.hex(),
        "start": span.start_time_unix_nano,
        "end": span.end_time_unix_nano,
        "is_error": span.status.code == 2,
        **{a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes},
    }


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def traced(collector: Collector) -> Iterator[LiveServer]:
    options = [str(TINY), "--otlp-traces-endpoint", collector.url, "--log-format", "json", "--workers", "2"]
    with LiveServer.serve(*options, OTEL_BSP_SCHEDULE_DELAY="100", OTEL_SERVICE_NAME="a-name") as live:
        yield live


def post(server: LiveServer, body: dict[str, Any], **headers: str) -> int:
    import urllib.error
    import urllib.request

    payload, all_headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(server.url + "/v1/completions", payload, all_headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_request_becomes_four_spans(traced: LiveServer, collector: Collector) -> None:
    collector.spans.clear()
    body = {"prompt": [5, 6, 7], "max_tokens": 6, "ignore_eos": True, "request_id": "traced", "stream": True}
    assert post(traced, body, traceparent=PARENT) == 200
    wait_until(lambda: len(collector.spans) == 4, 15, "spans arrive")
    (request,) = collector.named("POST /v1/completions")
    assert (request["trace"], request["parent"]) == tuple(PARENT.split("-")[1:3])
    assert request["service"] == "a-name"
    assert request["gen_ai.operation.name"] == "text_completion"
    assert request["gen_ai.response.id"] == "cmpl-traced"
    assert (request["gen_ai.usage.input_tokens"], request["gen_ai.usage.output_tokens"]) == (3, 6)
    assert not request["is_error"]
    queue, prefill, decode = (collector.named(name)[0] for name in ("queue", "prefill", "decode"))
    assert {span["parent"] for span in (queue, prefill, decode)} == {request["id"]}
    assert request["start"] <= queue["start"] <= queue["end"] == prefill["start"]
    assert prefill["end"] == decode["start"] <= decode["end"] <= request["end"]
    lines = [json.loads(each) for each in traced.log().splitlines() if each.startswith("{")]
    (logged,) = [each for each in lines if each.get("id") == "cmpl-traced"]
    assert logged["trace_id"] == request["trace"]
    assert logged["output_tokens"] == 6
    assert {"time", "level", "event"} <= lines[0].keys(), "the engine process logs JSON too"


def test_a_refused_request_becomes_one_span(traced: LiveServer, collector: Collector) -> None:
    collector.spans.clear()
    assert post(traced, {"prompt": [5], "max_tokens": -1}) == 400
    wait_until(lambda: bool(collector.spans), 15, "a span arrives")
    (span,) = collector.spans
    assert span["http.response.status_code"] == 400
    assert not span["is_error"], "the server is not at fault"
    assert span["parent"] == ""


def test_spans_are_sent_before_the_end(collector: Collector) -> None:
    collector.spans.clear()
    with LiveServer.serve(str(TINY), "--otlp-traces-endpoint", collector.url, "--workers", "1") as server:
        assert post(server, {"prompt": [5], "max_tokens": 1}) == 200
        assert server.end() == 0
    assert collector.named("POST /v1/completions")


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (RequestMetrics(1, 2, 3, 4), [("queue", 1, 2), ("prefill", 2, 3), ("decode", 3, 4)]),
        (RequestMetrics(1, 2, 3), [("queue", 1, 2), ("prefill", 2, 3), ("decode", 3, 9)]),
        (RequestMetrics(1), [("queue", 1, 9)]),
    ],
)
def test_phases_of_what_ended_early(metrics: RequestMetrics, expected: list[tuple[str, float, float]]) -> None:
    assert list(phases(metrics, 9)) == expected
