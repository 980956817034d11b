"""Traces, as a collector receives them."""

from __future__ import annotations

import gzip
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from srt.api.tracing import make_tracer
from srt.configs.server import ServerConfig
from srt.errors import StartupError
from tests.support.front import Front
from tests.support.raw import RawConnection
from tests.support.tokens import VOCAB_SIZE

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.HTTPServer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[Any] = []
        self.bodies: list[bytes] = []


class Receiver(http.server.BaseHTTPRequestHandler):
    """One delivery."""

    server: Collector

    def do_POST(self) -> None:
        """Take spans."""
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector in a thread."""
    with Collector() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join(10)


def test_one_trace_goes_from_the_clients_span_through_all_processes(model: Path, collector: Collector) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    body = b'{"text": "a secret", "rid": "mine", "sampling_params": {"max_new_tokens": 3}}'
    head = f"POST /generate HTTP/1.1\r\nHost: t\r\ntraceparent: 00-{TRACE}-{PARENT}-01\r\n"
    options: Any = {"otlp_traces_endpoint": endpoint}
    with Front(model, vocab_size=VOCAB_SIZE, **options) as front, RawConnection(front.port) as peer:
        peer.send(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert peer.response()[0] == 200
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"POST /generate", "tokenize", "queue", "prefill", "decode"}
    root = spans.pop("POST /generate")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    processes = []
    for span in sorted(spans.values(), key=lambda span: span.start_time_unix_nano):
        assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        told = {entry.key: entry.value for entry in span.attributes}
        assert told["srt.rid"].string_value == "mine"
        processes.append(told["srt.process"].string_value)
    assert processes == ["srt:tokenizer", "srt:scheduler", "srt:worker", "srt:worker"]
    assert not any(b"secret" in body for body in collector.bodies)


def test_without_the_packages_the_start_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError, match=r"needs the extra srt\[tracing\]"):
        make_tracer(ServerConfig(otlp_traces_endpoint="http://localhost:4318/v1/traces"))
