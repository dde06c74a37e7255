"""`Service`: the methods of orcaserve.v1.OrcaServe, over the same door, jobs and pool as the HTTP API's."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from typing import Any

import grpc

from orcaserve.serve import errors
from orcaserve.serve.door import Door
from orcaserve.serve.errors import ApiError
from orcaserve.serve.frontend import Frontend
from orcaserve.serve.generate import Generation
from orcaserve.serve.job import Job, chat_job, completion_job
from orcaserve.serve.keys import Keys
from orcaserve.serve.protocol import ChatRequest
from orcaserve.serve.request_trace import RequestTrace
from orcaserve.serve.rpc import shapes
from orcaserve.serve.rpc.translate import NAMES, as_request, reply_of, usage_of

_log = logging.getLogger("orcaserve.serve")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    410: grpc.StatusCode.CANCELLED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}


class Service:
    """Owner of the record of requests on their way, which is what Abort looks at."""

    def __init__(self, frontend: Frontend, keys: Keys) -> None:
        self._frontend = frontend
        self._door = Door(frontend)
        self._keys = keys
        self._running: dict[tuple[str | None, str], Generation] = {}  # by tenant and request id

    async def generate(self, request: Any, context: Any) -> None:
        """Generate: request is a GenerateRequest."""
        tracing = self._frontend.tracing
        if tracing is None:
            return await self._answer(request, context, None)
        operation = "chat" if request.WhichOneof("input") == "chat" else "text_completion"
        about: dict[str, str | int] = {"rpc.system.name": "grpc", "rpc.method": f"{shapes.SERVICE}/Generate"}
        trace = RequestTrace(operation, metadata_of(context.invocation_metadata()), about)
        trace.streams = True
        error: str | None = "abort"
        try:
            await self._answer(request, context, trace)
            error = None
        except grpc.aio.AbortError:
            error = context.code().name
            raise
        finally:
            tracing.end(trace, error)

    async def _answer(self, request: Any, context: Any, trace: RequestTrace | None) -> None:
        try:
            await self._generate(request, context, trace)
        except ApiError as error:
            await refuse(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            _log.exception("a call of Generate failed")
            await refuse(context, errors.internal())

    async def abort(self, request: Any, context: Any) -> Any:
        """Abort: request is an AbortRequest."""
        generation = self._running.get((self._tenant(context), request.request_id))
        if generation is not None:
            generation.abort()
        return shapes.AbortReply(found=generation is not None)

    async def _generate(self, message: Any, context: Any, trace: RequestTrace | None) -> None:
        tenant = self._tenant(context)
        arrival = self._door.knock(metadata_of(context.invocation_metadata()), tenant)
        name = message.request_id or secrets.token_hex(16)
        if not _REQUEST_ID.fullmatch(name):
            raise errors.invalid("'request_id' is 1 to 128 letters, digits, '.', '_' or '-'.", "request_id")
        request = as_request(message)
        request.timeout = context.time_remaining()
        model, info = self._frontend.available(request.model)
        with errors.renaming(NAMES):
            terms = self._door.terms(arrival, request, model, info)
            if isinstance(request, ChatRequest):
                job = await chat_job(request, model, info)
            else:
                job = await completion_job(request, model, info)
        if (tenant, name) in self._running:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"A request {name!r} is on its way already.")
        if trace is not None:
            trace.asked(name, request.model, streams=True)
        generation = Generation(job, terms, self._frontend.pool, model.tokenizer, self._frontend.metrics, name, trace)
        self._running[tenant, name] = generation
        try:
            async with generation:
                await context.send_initial_metadata((("x-request-id", name), ("x-numerics-profile", info.profile)))
                await self._send(generation, job, context, is_chat=isinstance(request, ChatRequest))
        finally:
            del self._running[tenant, name]

    async def _send(self, generation: Generation, job: Job, context: Any, *, is_chat: bool) -> None:
        num_choices = len(job.prompts) * job.n
        parsers = [job.reply() if is_chat else None for _ in range(num_choices)]
        num_ended = 0
        async for index, piece in generation:
            num_ended += piece.finish_reason is not None
            await context.write(reply_of(index, piece, parsers[index]))
        if num_ended < num_choices:
            await context.abort(grpc.StatusCode.CANCELLED, "The request was aborted.")
        await context.write(usage_of(generation.usage))

    def _tenant(self, context: Any) -> str | None:
        return self._keys.tenant(metadata_of(context.invocation_metadata()).get(b"authorization", b""))


def metadata_of(pairs: Any) -> Mapping[bytes, bytes]:
    """A call's metadata as headers are: names in lower case; of repeated ones the last."""
    return {
        key.lower().encode(): value.encode() if isinstance(value, str) else bytes(value) for key, value in pairs or ()
    }


async def refuse(context: Any, error: ApiError) -> None:
    """Ends a call with an error of the catalogue; what HTTP says besides in body and headers, trailing metadata say."""
    of = error.body.error
    trailing = [(f"error-{name}", value) for name, value in (("code", of.code), ("param", of.param)) if value]
    trailing += [(name, value) for name, value in error.headers.items() if name.startswith(("retry-after", "x-should"))]
    if "retry-after-ms" in error.headers:
        trailing.append(("grpc-retry-pushback-ms", error.headers["retry-after-ms"]))
    code = _CODES.get(error.status, grpc.StatusCode.UNKNOWN)
    await context.abort(code, of.message, tuple((name, value) for name, value in trailing if value.isascii()))
