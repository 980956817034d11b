"""Traces of requests for an OpenTelemetry collector: one span for the HTTP call, one for each stage of each prompt.

Every process stamps what it does with a clock that all share, and the stamps come back with the answer; so the spans
of all processes are made here, when a call has ended, and the others know nothing of traces.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Protocol

from srt import __version__
from srt.api.http import Exchange
from srt.api.tickets import Stream, Ticket
from srt.configs.server import ServerConfig
from srt.errors import StartupError

CONTEXT_HEADERS: Final = (b"traceparent", b"tracestate")
"""W3C trace context: the span of the client's that a call belongs to."""


class Stage(NamedTuple):
    """A part of a request's time, in seconds since it was received, and the process that had it."""

    name: str
    process: str
    begin_s: float
    end_s: float


def stages(stream: Stream) -> Iterator[Stage]:
    """The stages of an ended request; none if it did not come as far as the scheduler."""
    timing = stream.timing
    if timing is None:
        return
    yield Stage("tokenize", "srt:tokenizer", 0.0, timing.tokenized_s)
    yield Stage("queue", "srt:scheduler", timing.tokenized_s, timing.queue_s)
    if stream.completion_tokens:
        yield Stage("prefill", "srt:worker", timing.queue_s, timing.first_token_s)
        yield Stage("decode", "srt:worker", timing.first_token_s, timing.total_s)


class Tracer(Protocol):
    """Where traces go."""

    def ended(self, ticket: Ticket, exchange: Exchange) -> None:
        """A call is over."""

    def close(self) -> None:
        """Hand over what is left."""


class NoTracer:
    """Nowhere."""

    def ended(self, ticket: Ticket, exchange: Exchange) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class OtlpTracer:
    """To a collector, over HTTP, from a thread of its own; what a full queue does not take is dropped and logged.

    `exporter` is a `SpanExporter`; a batch of at most 512 spans is handed over every 5 s.
    """

    def __init__(self, exporter: Any) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "srt", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("srt", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def ended(self, ticket: Ticket, exchange: Exchange) -> None:
        """Make the spans of a call. They hold ids, sizes and times, never what was said."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        end_ns = time.time_ns()
        begin_ns = end_ns - int((time.perf_counter() - ticket.started_at) * 1e9)
        method, path = exchange.scope["method"], exchange.scope["path"]
        carrier = {
            name.decode(): exchange.headers[name].decode("latin-1")
            for name in CONTEXT_HEADERS
            if name in exchange.headers
        }
        root = self._tracer.start_span(
            f"{method} {path}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=begin_ns,
            attributes={
                "http.request.method": method,
                "url.path": path,
                "srt.rid": ticket.name,
                "srt.request_id": exchange.request_id,
                "srt.client_gone": ticket.client_gone,
            },
        )
        inside = set_span_in_context(root)
        for stream in ticket.streams:
            for stage in stages(stream):
                span = self._tracer.start_span(
                    stage.name,
                    context=inside,
                    start_time=begin_ns + int(stage.begin_s * 1e9),
                    attributes={"srt.process": stage.process, "srt.rid": stream.name, **_counts(stage, stream)},
                )
                span.end(begin_ns + int(stage.end_s * 1e9))
        root.end(end_ns)

    def close(self) -> None:
        """Hand over what is left."""
        self._provider.shutdown()


def _counts(stage: Stage, stream: Stream) -> dict[str, int | str]:
    match stage.name:
        case "prefill":
            return {
                "gen_ai.usage.input_tokens": stream.prompt.tokens,
                "srt.cached_tokens": stream.prompt.cached_tokens,
                "srt.image_tokens": stream.prompt.image_tokens,
            }
        case "decode":
            finish = "" if stream.finish is None else stream.finish.kind
            return {
                "gen_ai.usage.output_tokens": stream.completion_tokens,
                "srt.finish_reason": finish,
                "srt.retractions": stream.retractions,
            }
        case _:
            return {}


def make_tracer(server: ServerConfig) -> Tracer:
    """What `--otlp-traces-endpoint` asks for. Raises: StartupError if the packages for it are not there."""
    if server.otlp_traces_endpoint is None:
        return NoTracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OtlpTracer(OTLPSpanExporter(endpoint=server.otlp_traces_endpoint))
    except ImportError as error:
        raise StartupError(f"--otlp-traces-endpoint needs the extra srt[tracing]: {error}") from error
