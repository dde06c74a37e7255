"""The HTTP application: a table of endpoints over a `Frontend`. Importing it loads no torch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from orcaserve import __version__
from orcaserve.core.config import EngineInfo
from orcaserve.serve import docs, embeddings, errors, metrics, protocol, responses_chat, responses_protocol
from orcaserve.serve.bodies import Bodies
from orcaserve.serve.chat import ChatWriter
from orcaserve.serve.completions import CompletionWriter
from orcaserve.serve.disconnect import while_connected
from orcaserve.serve.door import Door
from orcaserve.serve.embeddings import EmbeddingWriter, as_completion, embedding_job
from orcaserve.serve.errors import ApiError
from orcaserve.serve.frontend import LOADING_RETRY_SECONDS, Frontend
from orcaserve.serve.gate import ARRIVAL, Gate
from orcaserve.serve.generate import Generation
from orcaserve.serve.job import Job, chat_job, chat_prompt, check_ids, completion_job, encode
from orcaserve.serve.openapi import Operation, describe
from orcaserve.serve.origins import Origins
from orcaserve.serve.page import Page
from orcaserve.serve.protocol import GenerationRequest
from orcaserve.serve.replies import Replies
from orcaserve.serve.request_trace import TRACE, RequestTrace
from orcaserve.serve.responses import ResponsesWriter
from orcaserve.serve.responses_chat import as_chat
from orcaserve.serve.served_model import ServedModel
from orcaserve.serve.sse import EventStream
from orcaserve.serve.terms import TTFT_HEADER, Arrival, Terms

Answer = Response | EventStream
Endpoint = Callable[[Request], Awaitable[Answer]]
Asked = GenerationRequest | protocol.EmbeddingRequest | responses_protocol.ResponsesRequest
T = TypeVar("T", bound=msgspec.Struct)


class Writer(Protocol):
    """Turns the pieces of one job into a response."""

    async def whole(self, generation: Generation) -> bytes:
        """The response's JSON."""
        ...


_GENERATE = (400, 401, 404, 408, 413, 429, 500, 503)
_HEADERS = ((TTFT_HEADER.decode(), "Milliseconds in which the first token is due."),)
_LOOK = (400, 401, 404, 413, 503)


def make_app(frontend: Frontend, page: Page | None = None) -> ASGIApp:
    """The application over a frontend, whose model may still be loading. page: what is shown at `/`, if anything is."""
    door = Door(frontend)
    api = _Api(frontend, door)
    table: list[tuple[Operation, Endpoint]] = [
        (
            Operation(
                method="POST",
                path="/v1/completions",
                summary="Continue a prompt.",
                request=protocol.CompletionRequest,
                response=protocol.Completion,
                chunk=protocol.Completion,
                headers=_HEADERS,
                statuses=_GENERATE,
            ),
            api.completions,
        ),
        (
            Operation(
                method="POST",
                path="/v1/chat/completions",
                summary="Answer a conversation.",
                request=protocol.ChatRequest,
                response=protocol.ChatCompletion,
                chunk=protocol.ChatChunk,
                headers=_HEADERS,
                statuses=_GENERATE,
            ),
            api.chat,
        ),
        (
            Operation(
                method="POST",
                path="/v1/responses",
                summary="Answer a conversation, in items. Nothing is stored.",
                request=responses_protocol.ResponsesRequest,
                response=responses_protocol.ResponseObject,
                chunk=responses_protocol.ResponseEvent,
                headers=_HEADERS,
                statuses=_GENERATE,
            ),
            api.responses,
        ),
        (
            Operation(
                method="POST",
                path="/v1/embeddings",
                summary="Texts as vectors.",
                request=protocol.EmbeddingRequest,
                response=protocol.EmbeddingList,
                headers=_HEADERS,
                statuses=_GENERATE,
            ),
            api.embeddings,
        ),
        (
            Operation(
                method="GET",
                path="/v1/models",
                summary="The models that there are.",
                response=protocol.ModelList,
                statuses=(401,),
            ),
            api.models,
        ),
        (
            Operation(
                method="GET",
                path="/v1/models/{id}",
                summary="One model.",
                response=protocol.ModelCard,
                statuses=(401, 404),
            ),
            api.model,
        ),
        (
            Operation(
                method="POST",
                path="/tokenize",
                summary="Text or a conversation to token ids.",
                request=protocol.TokenizeRequest,
                response=protocol.TokenizeResponse,
                statuses=_LOOK,
            ),
            api.tokenize,
        ),
        (
            Operation(
                method="POST",
                path="/detokenize",
                summary="Token ids to text.",
                request=protocol.DetokenizeRequest,
                response=protocol.DetokenizeResponse,
                statuses=_LOOK,
            ),
            api.detokenize,
        ),
        (
            Operation(
                method="GET",
                path="/tokenizer_info",
                summary="The tokenizer's special tokens and chat template.",
                response=protocol.TokenizerInfo,
                statuses=(401, 503),
            ),
            api.tokenizer_info,
        ),
        (
            Operation(
                method="GET",
                path="/health",
                summary="Whether an engine makes progress.",
                response=protocol.Health,
                statuses=(503,),
            ),
            api.health,
        ),
        (
            Operation(
                method="GET",
                path="/ready",
                summary="Whether requests are taken now.",
                response=protocol.Health,
                statuses=(503,),
            ),
            api.ready,
        ),
        (
            Operation(
                method="GET",
                path="/version",
                summary="Version and numerics profile.",
                response=protocol.Version,
                statuses=(401,),
            ),
            api.version,
        ),
        (Operation(method="GET", path="/metrics", summary="For Prometheus.", statuses=(401,)), api.metrics),
    ]
    document = describe([operation for operation, _ in table])
    described, described_page = msgspec.json.encode(document), docs.render(document)

    async def openapi(request: Request) -> Response:
        return _json(described)

    async def read_docs(request: Request) -> Response:
        return Response(described_page, media_type="text/html; charset=utf-8")

    routes = [
        Route(operation.path.replace("{id}", "{id:path}"), endpoint, methods=[operation.method])
        for operation, endpoint in table
    ]
    routes += [Route("/openapi.json", openapi, methods=["GET"]), Route("/docs", read_docs, methods=["GET"])]
    if page is not None:
        routes += page.routes
    handlers = {HTTPException: _not_routed, ApiError: _refused, Exception: _unforeseen}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    guarded = [operation.path for operation, _ in table if 429 in operation.statuses]
    gated: ASGIApp = Gate(app, frontend.options.api_keys, Origins(frontend.options.cors_origins), door, guarded)
    if frontend.tracing is not None:
        gated = frontend.tracing.around(gated, guarded)
    if frontend.options.cors_origins:
        gated = CORSMiddleware(
            gated,
            allow_origins=frontend.options.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "retry-after-ms", "x-should-retry"],
        )
    return gated


class _Api:
    """The endpoints."""

    def __init__(self, frontend: Frontend, door: Door) -> None:
        self._frontend = frontend
        self._door = door
        self._bodies = Bodies(frontend)
        self._replies = Replies(frontend.options.whole_bytes)

    async def completions(self, request: Request) -> Answer:
        frontend = self._frontend
        body = await self._bodies.read(request, protocol.CompletionRequest)
        model, info = frontend.available(body.model)
        terms = self._terms(request, body, model, info)
        job = await completion_job(body, model, info)
        id = f"cmpl-{request.state.request_id}"
        generation = self._generation(request, body, job, terms, model, id)
        writer = CompletionWriter(job, model.tokenizer, id, frontend.model_name, info.profile)
        return await self._answer(request, generation, writer, stream=bool(body.stream))

    async def chat(self, request: Request) -> Answer:
        frontend = self._frontend
        body = await self._bodies.read(request, protocol.ChatRequest)
        model, info = frontend.available(body.model)
        terms = self._terms(request, body, model, info)
        job = await chat_job(body, model, info)
        id = f"chatcmpl-{request.state.request_id}"
        generation = self._generation(request, body, job, terms, model, id)
        writer = ChatWriter(job, model.tokenizer, id, frontend.model_name, info.profile)
        return await self._answer(request, generation, writer, stream=bool(body.stream))

    async def responses(self, request: Request) -> Answer:
        frontend = self._frontend
        body = await self._bodies.read(request, responses_protocol.ResponsesRequest)
        model, info = frontend.available(body.model)
        asked = as_chat(body)
        with errors.renaming(responses_chat.NAMES):
            terms = self._terms(request, asked, model, info)
            job = await chat_job(asked, model, info)
        id = request.state.request_id
        generation = self._generation(request, body, job, terms, model, f"resp_{id}")
        writer = ResponsesWriter(body, job, model.tokenizer, id, frontend.model_name)
        if body.stream:
            return EventStream(writer.chunks(generation), end=b"")
        return await self._whole(request, generation, writer)

    async def embeddings(self, request: Request) -> Answer:
        frontend = self._frontend
        body = await self._bodies.read(request, protocol.EmbeddingRequest)
        model, info = frontend.available(body.model)
        asked = as_completion(body)
        with errors.renaming(embeddings.NAMES):
            terms = self._terms(request, asked, model, info)
            job = await embedding_job(body, asked, model, info)
        id = f"embd-{request.state.request_id}"
        generation = self._generation(request, body, job, terms, model, id)
        return await self._whole(request, generation, EmbeddingWriter(body, frontend.model_name))

    def _terms(self, request: Request, body: GenerationRequest, model: ServedModel, info: EngineInfo) -> Terms:
        """On what terms a request comes that may go on to be tokenised. Raises ApiError."""
        arrival: Arrival | None = request.scope.get(ARRIVAL)
        if arrival is None:  # the router takes a path for an equal one that does not lead through the door
            raise errors.not_found()
        return self._door.terms(arrival, body, model, info)

    def _generation(
        self, request: Request, body: Asked, job: Job, terms: Terms, model: ServedModel, id: str
    ) -> Generation:
        """Hands the job in. id: of the response. Raises ApiError."""
        frontend = self._frontend
        trace: RequestTrace | None = request.scope.get(TRACE)
        streams = bool(getattr(body, "stream", False))
        if not streams:
            self._replies.check(job)
        if trace is not None:
            trace.asked(id, body.model, streams=streams)
        return Generation(job, terms, frontend.pool, model.tokenizer, frontend.metrics, id, trace)

    async def _answer(
        self, request: Request, generation: Generation, writer: CompletionWriter | ChatWriter, *, stream: bool
    ) -> Answer:
        return EventStream(writer.chunks(generation)) if stream else await self._whole(request, generation, writer)

    async def _whole(self, request: Request, generation: Generation, writer: Writer) -> Answer:
        with self._replies.reply(generation.job) as reply:
            async with generation:
                generation.keep_in(reply)
                return _json(await while_connected(writer.whole(generation), request.receive))

    async def models(self, request: Request) -> Answer:
        return _encoded(protocol.ModelList(data=[self._card(name) for name in self._frontend.model_names]))

    async def model(self, request: Request) -> Answer:
        name = request.path_params["id"]
        if name not in self._frontend.model_names:
            raise errors.model_not_found(name, self._frontend.model_name)
        return _encoded(self._card(name))

    def _card(self, name: str) -> protocol.ModelCard:
        frontend = self._frontend
        return protocol.ModelCard(
            id=name,
            created=frontend.created,
            root=frontend.model_name,
            max_model_len=frontend.info.max_model_len if frontend.info is not None else None,
        )

    async def tokenize(self, request: Request) -> Answer:
        body = await self._bodies.read(request, protocol.TokenizeRequest)
        model, info = self._frontend.available(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise errors.invalid("Give either 'prompt' or 'messages'.", "prompt")
        if body.messages is not None:
            ids, _ = await chat_prompt(
                body.messages, model, info, body.add_generation_prompt is not False, body.chat_template_kwargs or {}
            )
        else:
            ids = await encode(
                body.prompt or "", model, info, "prompt", add_special_tokens=body.add_special_tokens is not False
            )
        return _encoded(protocol.TokenizeResponse(ids, len(ids), info.max_model_len))

    async def detokenize(self, request: Request) -> Answer:
        body = await self._bodies.read(request, protocol.DetokenizeRequest)
        model, info = self._frontend.available(body.model)
        check_ids(body.tokens, info, "tokens")
        return _encoded(protocol.DetokenizeResponse(model.tokenizer.decode(body.tokens)))

    async def tokenizer_info(self, request: Request) -> Answer:
        model, info = self._frontend.available(None)
        special = model.tokenizer.special_tokens
        return _encoded(
            protocol.TokenizerInfo(
                tokenizer_class="PreTrainedTokenizerFast",
                vocab_size=info.vocab_size,
                bos_token=special.get("bos_token"),
                eos_token=special.get("eos_token"),
                pad_token=special.get("pad_token"),
                unk_token=special.get("unk_token"),
                chat_template=model.tokenizer.chat_template,
            )
        )

    async def health(self, request: Request) -> Answer:
        frontend = self._frontend
        if frontend.is_stuck:
            raise errors.unavailable("failed" if frontend.state == "failed" else "stuck", None)
        return _encoded(protocol.Health(step_age=round(frontend.pool.step_age, 3)))

    async def ready(self, request: Request) -> Answer:
        state = self._frontend.state
        if state not in ("ready", "restarting"):  # while an engine is restarted, requests wait in the pool
            raise errors.unavailable(state, None if state == "failed" else LOADING_RETRY_SECONDS)
        replicas = self._frontend.pool.replicas
        lacking = replicas.not_ready if len(replicas) > 1 else ()
        return _encoded(protocol.Health(replicas_not_ready=lacking or msgspec.UNSET))

    async def version(self, request: Request) -> Answer:
        info = self._frontend.info
        if info is None:
            return _encoded(protocol.Version(__version__))
        return _encoded(protocol.Version(__version__, info.profile, info.deterministic))

    async def metrics(self, request: Request) -> Answer:
        return Response(self._frontend.metrics.render(), headers={"content-type": metrics.CONTENT_TYPE})


async def _not_routed(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        return _error(errors.method_not_allowed((error.headers or {}).get("Allow", "")))
    return _error(errors.not_found())


async def _refused(request: Request, error: Exception) -> Response:
    return _error(error if isinstance(error, ApiError) else errors.internal())


async def _unforeseen(request: Request, error: Exception) -> Response:
    """The gate logs it and answers; without this, Starlette would answer before it, in words of its own."""
    raise error


def _error(error: ApiError) -> Response:
    return Response(error.encode(), error.status, error.headers, "application/json")


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _encoded(value: msgspec.Struct) -> Response:
    return _json(msgspec.json.encode(value))
