"""POST /v1/chat/completions: a job's pieces in the shapes of the chat API."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Literal

import msgspec
from msgspec import UNSET

from orcaserve.core.request import TokenLogprobs
from orcaserve.serve.choice import Joined, Piece
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
    FunctionCall,
    ToolCall,
    Usage,
)
from orcaserve.serve.reply import Call, Part, Reply, Thought
from orcaserve.serve.timings import choice_timings
from orcaserve.serve.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


class ChatWriter:
    """Turns the pieces of one job into messages. Owner of what must be remembered between two pieces."""

    def __init__(self, job: Job, tokenizer: Tokenizer, id: str, model: str, fingerprint: str) -> None:
        """id: of the response."""
        self._job = job
        self._token_bytes = tokenizer.token_bytes
        self._id = id
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint

    async def whole(self, generation: Generation) -> bytes:
        """The response's JSON."""
        job = self._job
        choices = [ChatChoice(index, AssistantMessage(""), logprobs=self._logprobs([])) for index in range(job.n)]
        replies = self._replies()
        said = [_Said() for _ in choices]
        ids: list[list[int]] = [[] for _ in choices]
        prompt_entries: tuple[TokenLogprobs, ...] = ()
        async for index, piece in generation:
            said[index].add(replies[index].feed(piece.text))
            if job.return_token_ids:
                ids[index] += piece.token_ids
            if (logprobs := choices[index].logprobs) and (more := self._logprobs(piece.logprobs)):
                logprobs.content += more.content
            prompt_entries = prompt_entries or piece.prompt_logprobs
            choices[index].finish_reason = piece.finish_reason
        for index, choice in enumerate(choices):
            said[index].add(replies[index].finish())
            said[index].tell(choice)
            if job.return_token_ids:
                choice.token_ids = ids[index]
        response = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            system_fingerprint=self._fingerprint,
            usage=generation.usage,
            timing=choice_timings(generation) if job.include_timing else UNSET,
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
        replies = self._replies()
        async with generation:
            async for index, piece in generation:
                parts = replies[index].feed(piece.text)
                if piece.finish_reason is not None:
                    parts += replies[index].finish()
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
                for part in parts[:-1]:
                    yield _encode(self._chunk([ChatChunkChoice(index, _delta([part], replies[index]))]))
                if parts or piece.finish_reason or job.return_token_ids or job.logprobs is not None:
                    yield _encode(self._chunk([self._piece(index, piece, parts[-1:], replies[index])]))
            if job.include_usage or job.include_timing:
                chunk = self._chunk([])
                if job.include_usage:
                    chunk.usage = generation.usage
                if job.include_timing:
                    chunk.timing = choice_timings(generation)
                yield _encode(chunk)

    def _replies(self) -> list[Reply]:
        job = self._job
        return [job.reply() for _ in range(job.n)]

    def _piece(self, index: int, piece: Piece, parts: list[Part], reply: Reply) -> ChatChunkChoice:
        return ChatChunkChoice(
            index,
            _delta(parts, reply),
            self._logprobs(piece.logprobs),
            _reason(piece.finish_reason, reply.num_calls),
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


class _Said:
    """What a whole response says so far. Owner of its parts."""

    def __init__(self) -> None:
        self._content, self._thoughts = Joined(), Joined()
        self._calls: list[Call] = []

    def add(self, parts: list[Part]) -> None:
        for part in parts:
            if isinstance(part, Call):
                self._calls.append(part)
            elif isinstance(part, Thought):
                self._thoughts.add(part.text)
            else:
                self._content.add(part)

    def tell(self, choice: ChatChoice) -> None:
        """Puts it into the choice's message."""
        message = choice.message
        message.content = self._content.text or (None if self._calls else "")
        if thoughts := self._thoughts.text:
            message.reasoning_content = thoughts
        if self._calls:
            message.tool_calls = [_call(call) for call in self._calls]
        choice.finish_reason = _reason(choice.finish_reason, len(self._calls))


def _delta(parts: list[Part], reply: Reply) -> ChatDelta:
    """Of one part, or none. A call is told when it is complete."""
    delta = ChatDelta()
    for part in parts:
        if isinstance(part, Call):
            delta.tool_calls = [_call(part, reply.next_call())]
        elif isinstance(part, Thought):
            delta.reasoning_content = part.text
        else:
            delta.content = part
    return delta


def _call(call: Call, index: int | msgspec.UnsetType = UNSET) -> ToolCall:
    return ToolCall(id=f"call_{secrets.token_hex(12)}", function=FunctionCall(call.name, call.arguments), index=index)


def _reason(
    reason: Literal["stop", "length", "tool_calls"] | None, num_calls: int
) -> Literal["stop", "length", "tool_calls"] | None:
    return "tool_calls" if reason == "stop" and num_calls else reason
