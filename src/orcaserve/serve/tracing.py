"""`Tracing`: a request's notes as OpenTelemetry spans, on their way to an OTLP endpoint. Needs the extra `otel`.

Spans wait in a bounded queue for a thread of the SDK's. What the endpoint does not take is counted, and told once; no
request ever waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orcaserve import __version__
from orcaserve.serve.request_trace import TRACE, ChoiceTrace, RequestTrace

_log = logging.getLogger("orcaserve.serve")
_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
}
_PARENT = ("traceparent", "tracestate")
_MOST_WAITING = 8192  # spans
_BATCH = 512
_DELAY_SECONDS = 1.0
_EXPORT_SECONDS = 3.0  # for one batch, with what is tried again
_FLUSH_SECONDS = 2.0  # what an endpoint that is down gets at the end


class Tracing:
    """Owner of the spans until they are delivered.

    endpoint: an OTLP/HTTP URL; without a path it is the standard's, /v1/traces. model_name: what the model is served
    as. count: told ("sent" | "failed" | "dropped", how many), from whatever thread. most_waiting: spans in the queue.
    Headers, service name and resource attributes may come by the standard's own variables (OTEL_EXPORTER_OTLP_HEADERS,
    OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES), which the SDK reads.
    Raises ValueError for an endpoint that is none, in one line.
    """

    def __init__(
        self,
        endpoint: str,
        model_name: str,
        count: Callable[[str, int], None],
        most_waiting: int = _MOST_WAITING,
    ) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it tells of every batch; we do once
        self._model_name = model_name
        self._delivery = _Delivery(_traces_url(endpoint), count, most_waiting)
        own = Resource({"service.name": "orcaserve", "service.version": __version__})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(_Bounded(self._delivery, count, most_waiting))
        self._tracer = self._provider.get_tracer("orcaserve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def around(self, app: ASGIApp, guarded: Collection[str]) -> ASGIApp:
        """app, noting the requests to the paths of `guarded`."""
        return _Traced(app, self, guarded)

    def end(self, trace: RequestTrace, error: str | None) -> None:
        """Makes the spans of a request that has ended now. error: why it was not answered, if it was not.

        Never raises: whoever is served does not feel it.
        """
        try:
            self._make(trace, error)
        except Exception:
            _log.exception("a request has no spans")

    def _make(self, trace: RequestTrace, error: str | None) -> None:
        parent = {name: trace.headers.get(name.encode(), b"").decode("latin-1") for name in _PARENT}
        model = trace.model or self._model_name
        root = self._tracer.start_span(
            f"{trace.operation} {model}",
            context=self._propagator.extract({name: value for name, value in parent.items() if value}, Context()),
            kind=SpanKind.SERVER,
            start_time=trace.nanoseconds(trace.began),
        )
        if root.is_recording():
            root.set_attributes(_attributes(trace, model, self._model_name))
            if error := trace.error or error:
                root.set_attribute("error.type", error)
                root.set_status(Status(StatusCode.ERROR))
            within = set_span_in_context(root, Context())
            for index, choice in enumerate(trace.choices):
                self._phases(trace, index, choice, within)
        root.end()

    def _phases(self, trace: RequestTrace, index: int, choice: ChoiceTrace, within: Context) -> None:
        at = trace.taken
        for name, seconds in choice.phases:
            span = self._tracer.start_span(
                name, context=within, start_time=trace.nanoseconds(at), attributes={"orcaserve.choice.index": index}
            )
            at += seconds
            span.end(trace.nanoseconds(at))

    async def close(self) -> None:
        """Sends what waits, for a short while."""
        closing = asyncio.ensure_future(asyncio.to_thread(self._provider.shutdown))
        await asyncio.wait([closing], timeout=_FLUSH_SECONDS)
        self._delivery.give_up()
        await closing


def _attributes(trace: RequestTrace, model: str, served: str) -> dict[str, AttributeValue]:
    """By the GenAI conventions, as far as they have a name; else by names of ours."""
    found: dict[str, AttributeValue] = {
        **trace.about,
        "gen_ai.operation.name": trace.operation,
        "gen_ai.provider.name": "orcaserve",
        "gen_ai.request.model": model,
    }
    job = trace.job
    if job is None:
        return found
    params = job.prompts[0].params
    timings = [choice.timing for choice in trace.choices]
    found |= {
        "gen_ai.response.model": served,
        "gen_ai.response.id": trace.id,
        "gen_ai.response.finish_reasons": [choice.reason or "abort" for choice in trace.choices],
        "gen_ai.usage.input_tokens": sum(len(prompt.ids) for prompt in job.prompts),
        "gen_ai.usage.output_tokens": trace.num_generated,
        "gen_ai.usage.cache_read.input_tokens": sum(timing.cached_tokens for timing in timings[:: job.n]),
        "orcaserve.preemptions": sum(timing.preemptions for timing in timings),
        "orcaserve.recomputed_tokens": sum(timing.recomputed_tokens for timing in timings),
        "orcaserve.swapped_tokens": sum(timing.swapped_tokens for timing in timings),
    }
    if trace.operation == "embeddings":
        return found
    found |= {
        "gen_ai.request.choice.count": job.n,
        "gen_ai.request.max_tokens": params.max_tokens or 0,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.stream": trace.streams,
    }
    if params.seed is not None:
        found["gen_ai.request.seed"] = params.seed
    if trace.first_token is not None:
        found["gen_ai.response.time_to_first_chunk"] = trace.first_token - trace.began
    return found


def _traces_url(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise ValueError("the OTLP endpoint is a URL such as http://127.0.0.1:4318/v1/traces (HTTP, not gRPC)")
    return parts._replace(path="/v1/traces").geturl() if parts.path in ("", "/") else endpoint


class _Traced:
    """ASGI middleware around the gate: every request to a path of `guarded` is noted, and becomes spans at its end."""

    def __init__(self, app: ASGIApp, tracing: Tracing, guarded: Collection[str]) -> None:
        self._app = app
        self._tracing = tracing
        self._guarded = frozenset(guarded)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._guarded:
            return await self._app(scope, receive, send)
        path = scope["path"]
        about: dict[str, str | int] = {"http.request.method": "POST", "http.route": path}
        trace = RequestTrace(_OPERATIONS.get(path, path), dict(scope["headers"]), about)
        error: str | None = "abort"  # of one who does not wait for the beginning of the answer

        async def send_noting(message: Message) -> None:
            nonlocal error
            if message["type"] == "http.response.start":
                about["http.response.status_code"] = message["status"]
                error = str(message["status"]) if message["status"] >= 400 else None
            await send(message)

        try:
            await self._app({**scope, TRACE: trace}, receive, send_noting)
        finally:
            self._tracing.end(trace, error)


class _Bounded(SpanProcessor):
    """The SDK's processor with a bound that is counted when it is met."""

    def __init__(self, delivery: _Delivery, count: Callable[[str, int], None], most_waiting: int) -> None:
        self._places = delivery.places
        self._count = count
        self._batches = BatchSpanProcessor(
            delivery,
            max_queue_size=most_waiting,
            schedule_delay_millis=1000 * _DELAY_SECONDS,
            max_export_batch_size=min(_BATCH, most_waiting),
        )

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        pass

    def on_end(self, span: ReadableSpan) -> None:
        if self._places.acquire(blocking=False):
            self._batches.on_end(span)
        else:
            self._count("dropped", 1)

    def shutdown(self) -> None:
        self._batches.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._batches.force_flush(timeout_millis)


class _Delivery(SpanExporter):
    """The OTLP exporter, counted. Called from the SDK's thread."""

    def __init__(self, url: str, count: Callable[[str, int], None], most_waiting: int) -> None:
        self.places = threading.Semaphore(most_waiting)  # of spans that wait
        self._exporter = OTLPSpanExporter(endpoint=url, timeout=_EXPORT_SECONDS)
        self._count = count
        self._is_down = False
        self._has_given_up = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = SpanExportResult.FAILURE if self._has_given_up else self._exporter.export(spans)
        except Exception:
            result = SpanExportResult.FAILURE
        finally:
            self.places.release(len(spans))
        is_down = result is not SpanExportResult.SUCCESS
        self._count("failed" if is_down else "sent", len(spans))
        if is_down and not self._is_down:
            _log.warning("the OTLP endpoint takes no spans; they are dropped, and counted in orcaserve:spans_total")
        self._is_down = is_down
        return result

    def give_up(self) -> None:
        """What is not delivered by now need not be."""
        self._has_given_up = True
        self._exporter.shutdown()

    def shutdown(self) -> None:
        pass
