"""POST /v1/completions: a job's pieces in the shapes of the completions API."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence

import msgspec
from msgspec import UNSET

from orcaserve.core.request import TokenLogprobs
from orcaserve.serve.choice import Joined, Piece
from orcaserve.serve.generate import Generation
from orcaserve.serve.job import Job, Prompt
from orcaserve.serve.logprobs import Offsets, completion_logprobs, prompt_logprobs
from orcaserve.serve.protocol import ChoiceTiming, Completion, CompletionChoice, CompletionLogprobs, Usage
from orcaserve.serve.timings import choice_timings
from orcaserve.serve.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


class CompletionWriter:
    """Turns the pieces of one job into choices. Owner of what must be remembered between two pieces of a choice."""

    def __init__(self, job: Job, tokenizer: Tokenizer, id: str, model: str, fingerprint: str) -> None:
        """id: of the response."""
        self._job = job
        self._tokenizer = tokenizer
        self._text_bytes = tokenizer.text_bytes if job.skip_special_tokens else tokenizer.token_bytes
        self._id = id
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint
        num_choices = len(job.prompts) * job.n
        self._offsets = [Offsets() for _ in range(num_choices)]
        self._has_begun = [False] * num_choices

    async def whole(self, generation: Generation) -> bytes:
        """The response's JSON."""
        choices = [CompletionChoice(index, "") for index in range(len(self._has_begun))]
        texts = [Joined() for _ in choices]
        async for index, piece in generation:
            _extend(choices[index], self._choice(index, piece), texts[index])
        for choice, text in zip(choices, texts, strict=True):
            choice.text = text.text
        return _encode(self._completion(choices, generation.usage, self._timing(generation)))

    async def chunks(self, generation: Generation) -> AsyncGenerator[bytes]:
        """The JSON of each event."""
        job = self._job
        has_more = job.return_token_ids or job.logprobs is not None
        async with generation:
            async for index, piece in generation:
                is_first = not self._has_begun[index]
                choice = self._choice(index, piece)
                says_prompt = is_first and job.prompt_logprobs is not None
                if choice.text or choice.finish_reason or has_more or says_prompt:
                    yield _encode(self._completion([choice], None if job.include_usage else UNSET))
            if job.include_usage or job.include_timing:
                usage = generation.usage if job.include_usage else UNSET
                yield _encode(self._completion([], usage, self._timing(generation)))

    def _completion(
        self,
        choices: list[CompletionChoice],
        usage: Usage | msgspec.UnsetType | None,
        timing: list[ChoiceTiming] | msgspec.UnsetType = UNSET,
    ) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            system_fingerprint=self._fingerprint,
            usage=usage,
            timing=timing,
        )

    def _timing(self, generation: Generation) -> list[ChoiceTiming] | msgspec.UnsetType:
        return choice_timings(generation) if self._job.include_timing else UNSET

    def _choice(self, index: int, piece: Piece) -> CompletionChoice:
        job = self._job
        choice = CompletionChoice(index, piece.text, finish_reason=piece.finish_reason)
        ids: Sequence[int] = piece.token_ids
        texts = [self._text_bytes(id) for id in ids] if job.logprobs is not None else []
        entries: list[TokenLogprobs | None] = list(piece.logprobs)
        if not self._has_begun[index]:
            self._has_begun[index] = True
            prompt = job.prompts[index // job.n]
            if job.echo:
                choice.text = prompt.text + choice.text
                ids = [*prompt.ids, *ids]
                entries = [None, *piece.prompt_logprobs, *entries]
                texts = [*self._echoed(prompt), *texts] if job.logprobs is not None else []
            if job.return_token_ids:
                choice.prompt_token_ids = list(prompt.ids)
            if job.prompt_logprobs is not None:
                choice.prompt_logprobs = prompt_logprobs(
                    piece.prompt_logprobs, job.prompt_logprobs, self._tokenizer.token_bytes
                )
        if job.return_token_ids:
            choice.token_ids = piece.token_ids
        if job.logprobs is not None:
            choice.logprobs = completion_logprobs(
                entries, ids, job.logprobs, self._tokenizer.token_bytes, texts, self._offsets[index]
            )
        return choice

    def _echoed(self, prompt: Prompt) -> list[bytes]:
        """What each token of a prompt adds to its echo: a special one its name, if somebody has written it there.

        The tokenizer itself puts some in front, so that it is the first ones that are not written.
        """
        found: list[bytes] = []
        unwritten: dict[int, int] = {}
        for id in prompt.ids:
            data = self._tokenizer.text_bytes(id)
            if not data:
                name = self._tokenizer.token_bytes(id)
                if id not in unwritten:
                    unwritten[id] = prompt.ids.count(id) - prompt.text.count(name.decode(errors="replace"))
                unwritten[id] -= 1
                data = name if unwritten[id] < 0 else b""
            found.append(data)
        return found


def _extend(choice: CompletionChoice, more: CompletionChoice, text: Joined) -> None:
    text.add(more.text)
    choice.finish_reason = more.finish_reason
    if choice.logprobs is None:
        choice.logprobs = more.logprobs
    elif more.logprobs is not None:
        for name in CompletionLogprobs.__struct_fields__:
            getattr(choice.logprobs, name).extend(getattr(more.logprobs, name))
    if more.prompt_logprobs is not UNSET:
        choice.prompt_logprobs = more.prompt_logprobs
    if more.prompt_token_ids is not UNSET:
        choice.prompt_token_ids = more.prompt_token_ids
    if choice.token_ids is UNSET:
        choice.token_ids = more.token_ids
    elif more.token_ids is not UNSET:
        choice.token_ids.extend(more.token_ids)
