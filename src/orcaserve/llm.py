"""`LLM` and `AsyncLLM`: the engine from Python, without HTTP: the same pool, the same checks, the same promise."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from orcaserve import builtin
from orcaserve.core.config import EngineInfo, EngineOptions, ModelError
from orcaserve.core.request import SamplingParams, TokenLogprobs
from orcaserve.core.timing import Timing
from orcaserve.serve.admission import Limits
from orcaserve.serve.decode_body import UnknownFields, decode
from orcaserve.serve.errors import ApiError
from orcaserve.serve.find_model import find_model
from orcaserve.serve.generate import Generation
from orcaserve.serve.job import Job, chat_job, completion_job
from orcaserve.serve.metrics import Metrics
from orcaserve.serve.pool import EngineFailed, Pool
from orcaserve.serve.protocol import ChatRequest, CompletionRequest
from orcaserve.serve.served_model import ServedModel
from orcaserve.serve.terms import Arrival, Terms

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
T = TypeVar("T")


class RequestError(ValueError):
    """A request that cannot be served, or that failed; the message says why and what to do."""


class Piece(msgspec.Struct, frozen=True):
    """What one choice of a stream gained. text: what has become certain, which may lag behind the tokens.

    timing: where the choice's time went, with its last piece.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    timing: Timing | None = None


class Choice(msgspec.Struct, frozen=True):
    """One whole answer. finish_reason: "stop" or "length"."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str


class Response(msgspec.Struct, frozen=True):
    """The choices for one prompt.

    prompt_logprobs: of the prompt's tokens but the first, if they were asked for.
    num_cached: prompt tokens that the prefix cache spared. timings: where each choice's time went.
    """

    prompt_token_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached: int = 0
    timings: tuple[Timing, ...] = ()

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


class AsyncLLM:
    """A model behind a request pool; owner of both. Use as `async with AsyncLLM(...) as llm`.

    model: a folder, a hub name, or the built-in model. options: the fields of EngineOptions, such as dtype or policy.
    A prompt is a text, token ids, or chat messages. Sampling is told by fields named as in the HTTP API (temperature=0,
    max_tokens=20, stop=["\\n"], seed=1, ...), and what they do not say is the model's own default; or by `params`, and
    then nothing is the model's: where they are silent, what it predicts is left as it is. Without max_tokens an answer
    may fill the context. `user`, `priority` and `timeout` mean what they do in the HTTP API.
    Raises ModelError from `start`, RequestError from requests.
    """

    def __init__(self, model: str = builtin.NAME, *, limits: Limits | None = None, **options: Any) -> None:
        name, folder = find_model(model)
        self._set_up(name, EngineOptions(model=str(folder), **options), limits, None)

    @classmethod
    def of(
        cls,
        name: str,
        engine: EngineOptions,
        limits: Limits | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> Self:
        """From a model that has been found already."""
        self = cls.__new__(cls)
        self._set_up(name, engine, limits, on_progress)
        return self

    def _set_up(
        self,
        name: str,
        engine: EngineOptions,
        limits: Limits | None,
        on_progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self._name = name
        self._engine = engine
        self._limits = limits
        self._on_progress = on_progress
        self._metrics = Metrics(name)
        self._unknown = UnknownFields()
        self._pool: Pool | None = None
        self._model: ServedModel | None = None

    async def start(self) -> EngineInfo:
        """Loads the model. Raises ModelError if it cannot be served."""
        if self._pool is not None:
            return await self._pool.ready()
        self._model = ServedModel(self._name, self._engine.model)
        self._pool = Pool(self._engine, limits=self._limits, on_progress=self._on_progress)
        try:
            await self._pool.start()
            return await self._pool.ready()
        except BaseException as error:
            await self.close()
            if isinstance(error, EngineFailed):
                raise ModelError(str(error)) from None
            raise

    async def close(self) -> None:
        """Ends the engine; requests that still run get an error."""
        if self._pool is not None:
            await self._pool.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None, **fields: Any) -> AsyncIterator[Piece]:
        """The pieces of all choices as they come. Leaving early aborts the rest."""
        pool, model, info = await self._ready()
        try:
            job, terms = await self._job(prompt, params, fields, model, info)
            async with Generation(job, terms, pool, model.tokenizer, self._metrics) as generation:
                async for index, piece in generation:
                    yield Piece(
                        index,
                        piece.text,
                        tuple(piece.token_ids),
                        tuple(piece.logprobs),
                        piece.finish_reason,
                        generation.timings[index] if piece.finish_reason is not None else None,
                    )
        except ApiError as error:
            raise RequestError(str(error)) from None

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, **fields: Any) -> Response:
        """The whole answer to one prompt."""
        pool, model, info = await self._ready()
        try:
            job, terms = await self._job(prompt, params, fields, model, info)
            pieces: list[list[Any]] = [[] for _ in range(job.n)]
            async with Generation(job, terms, pool, model.tokenizer, self._metrics) as generation:
                async for index, piece in generation:
                    pieces[index].append(piece)
                num_cached = generation.usage.prompt_tokens_details.cached_tokens
                timings = tuple(timing for timing in generation.timings if timing is not None)
        except ApiError as error:
            raise RequestError(str(error)) from None
        choices = tuple(
            Choice(
                text="".join(piece.text for piece in of_one),
                token_ids=tuple(id for piece in of_one for id in piece.token_ids),
                logprobs=tuple(entry for piece in of_one for entry in piece.logprobs),
                finish_reason=of_one[-1].finish_reason,
            )
            for of_one in pieces
        )
        prompt_logprobs = tuple(entry for piece in pieces[0] for entry in piece.prompt_logprobs)
        return Response(job.prompts[0].ids, choices, prompt_logprobs, num_cached, timings)

    async def _ready(self) -> tuple[Pool, ServedModel, EngineInfo]:
        info = await self.start()
        if self._pool is None or self._model is None:
            raise RequestError("this LLM is closed")
        return self._pool, self._model, info

    async def _job(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        fields: Mapping[str, Any],
        model: ServedModel,
        info: EngineInfo,
    ) -> tuple[Job, Terms]:
        """Checks a request as the server does."""
        arrival = Arrival(at=time.monotonic())
        is_chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
        asked: dict[str, Any] = {} if params is None else _fields(params)
        asked |= fields
        if is_chat and (top := asked.pop("logprobs", None)) is not None:
            asked |= {"logprobs": True, "top_logprobs": int(top)}
        asked["messages" if is_chat else "prompt"] = prompt if isinstance(prompt, str) else list(prompt)
        try:
            body = json.dumps(asked, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RequestError(f"not a request: {error}") from None
        if is_chat:
            chat = decode(body, ChatRequest, self._unknown)
            return await chat_job(chat, model, info), arrival.terms(chat)
        request = decode(body, CompletionRequest, self._unknown)
        return await completion_job(request, model, info, default_max_tokens=None), arrival.terms(request)


class LLM:
    """AsyncLLM for programs without an event loop: owner of a thread that runs one. Close it, or use `with`.

    Many prompts given at once are batched by the scheduler, and their answers come back in order.
    """

    def __init__(self, model: str = builtin.NAME, **options: Any) -> None:
        self._llm = AsyncLLM(model, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="orcaserve", daemon=True)
        self._thread.start()
        try:
            self.info = self._run(self._llm.start())
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **fields: Any
    ) -> list[Response]:
        """One response per prompt. A single prompt may be given without its list."""
        several = prompts if _is_several(prompts) else [prompts]

        async def all_of_them() -> list[Response]:
            asked = [asyncio.ensure_future(self._llm.generate(prompt, params, **fields)) for prompt in several]
            try:
                return await asyncio.gather(*asked)
            finally:
                for task in asked:
                    task.cancel()

        return self._run(all_of_them())

    def close(self) -> None:
        """Ends the engine and the thread."""
        if self._loop.is_closed():
            return
        self._run(self._llm.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _is_several(prompts: Any) -> bool:
    """Whether this is a list of prompts: of texts, of lists of ids, or of conversations."""
    return not isinstance(prompts, str) and (not prompts or isinstance(prompts[0], str | Sequence))


def _fields(params: SamplingParams) -> dict[str, Any]:
    """SamplingParams as fields of the HTTP API. Raises RequestError."""
    if params.grammar is not None:
        raise RequestError("a grammar is checked before it is used: give it as structured_outputs={'grammar': …}")
    fields = {name: value for name, value in msgspec.structs.asdict(params).items() if value is not None}
    fields["logit_bias"] = {str(id): addend for id, addend in params.logit_bias}
    return fields
