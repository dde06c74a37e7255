"""POST /v1/chat/completions: a job's pieces in the shapes of the chat API."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator

import msgspec
from msgspec import UNSET

from orcaserve.core.request import TokenLogprobs
from orcaserve.serve.choice import Piece
from orcaserve.serve.generate import Generation
from orcaserve.serve.job import Job
from orcaserve.serve.logprobs import chat_logprobs, prompt_logprobs
from orcaserve.serve.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from orcaserve.serve.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


class ChatWriter:
    """Turns the pieces of one job into messages. Owner of what must be remembered between two pieces."""

    def __init__(self, job: Job, tokenizer: Tokenizer, model: str, fingerprint: str) -> None:
        self._job = job
        self._token_bytes = tokenizer.token_bytes
        self._id = f"chatcmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint

    async def whole(self, generation: Generation) -> bytes:
        """The response's JSON."""
        job = self._job
        choices = [ChatChoice(index, AssistantMessage("")) for index in range(job.n)]
        texts: list[list[str]] = [[] for _ in choices]
        ids: list[list[int]] = [[] for _ in choices]
        entries: list[list[TokenLogprobs]] = [[] for _ in choices]
        prompt_entries: tuple[TokenLogprobs, ...] = ()
        async for index, piece in generation:
            texts[index].append(piece.text)
            ids[index] += piece.token_ids
            entries[index] += piece.logprobs
            prompt_entries = prompt_entries or piece.prompt_logprobs
            choices[index].finish_reason = piece.finish_reason
        for index, choice in enumerate(choices):
            choice.message.content = "".join(texts[index])
            choice.logprobs = self._logprobs(entries[index])
            if job.return_token_ids:
                choice.token_ids = ids[index]
        response = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            system_fingerprint=self._fingerprint,
            usage=generation.usage,
        )
        if job.return_token_ids:
            response.prompt_token_ids = list(job.prompts[0].ids)
        if job.prompt_logprobs is not None:
            response.prompt_logprobs = prompt_logprobs(prompt_entries, job.prompt_logprobs, self._token_bytes)
        return _encode(response)

    async def chunks(self, generation: Generation) -> AsyncGenerator[bytes]:
        """The JSON of each event. A choice's first chunk has the role; the first of all what is said of the prompt."""
        job = self._job
        begun: set[int] = set()
        async with generation:
            async for index, piece in generation:
                if index not in begun:
                    role = ChatChunkChoice(index, ChatDelta("assistant", ""))
                    chunk = self._chunk([role])
                    if not begun and job.return_token_ids:
                        chunk.prompt_token_ids = list(job.prompts[0].ids)
                    if not begun and job.prompt_logprobs is not None:
                        chunk.prompt_logprobs = prompt_logprobs(
                            piece.prompt_logprobs, job.prompt_logprobs, self._token_bytes
                        )
                    begun.add(index)
                    yield _encode(chunk)
                if piece.text or piece.finish_reason or job.return_token_ids or job.logprobs is not None:
                    yield _encode(self._chunk([self._piece(index, piece)]))
            if job.include_usage:
                chunk = self._chunk([])
                chunk.usage = generation.usage
                yield _encode(chunk)

    def _piece(self, index: int, piece: Piece) -> ChatChunkChoice:
        return ChatChunkChoice(
            index,
            ChatDelta(content=piece.text) if piece.text else ChatDelta(),
            self._logprobs(piece.logprobs),
            piece.finish_reason,
            piece.token_ids if self._job.return_token_ids else UNSET,
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        usage: Usage | msgspec.UnsetType | None = None if self._job.include_usage else UNSET
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            system_fingerprint=self._fingerprint,
            usage=usage,
        )

    def _logprobs(self, entries: list[TokenLogprobs]) -> ChatLogprobs | None:
        return None if self._job.logprobs is None else chat_logprobs(entries, self._job.logprobs, self._token_bytes)
