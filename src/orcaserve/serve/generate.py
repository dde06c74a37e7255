"""`Generation`: hands a job to the pool and gives the pieces of its choices as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from orcaserve.core.timing import Timing
from orcaserve.serve import errors
from orcaserve.serve.admission import ContextLengthError, NotTaken
from orcaserve.serve.choice import ChoiceText, Piece
from orcaserve.serve.door import refusal
from orcaserve.serve.errors import ApiError
from orcaserve.serve.job import Job
from orcaserve.serve.metrics import Metrics
from orcaserve.serve.pool import Pool
from orcaserve.serve.protocol import PromptTokensDetails, Usage
from orcaserve.serve.replies import Reply
from orcaserve.serve.request_trace import RequestTrace
from orcaserve.serve.stream import Stream, Update
from orcaserve.serve.terms import Terms
from orcaserve.serve.tokenizer import Tokenizer
from orcaserve.worker.grammars import NOT_FOLLOWED

_LATE = ("deadline_passed", "timeout")


class Generation:
    """A job under way. Iterate over it once: (index of the choice, piece). Leaving `async with` aborts the rest.

    Raises ApiError from its beginning if the pool does not take the job, and while iterating if a choice fails.
    """

    def __init__(
        self,
        job: Job,
        terms: Terms,
        pool: Pool,
        tokenizer: Tokenizer,
        metrics: Metrics,
        name: str = "",
        trace: RequestTrace | None = None,
    ) -> None:
        """name: what the client knows the job by. trace: where it is noted what becomes of it."""
        self._job = job
        self._metrics = metrics
        self._trace = trace
        self._reply: Reply | None = None
        taken = time.monotonic()
        self._arrived = taken if terms.arrived is None else terms.arrived
        self._is_computed = [False] * len(job.prompts)
        self._num_cached = [0] * len(job.prompts)
        self._choices = [ChoiceText(job, tokenizer) for _ in range(len(job.prompts) * job.n)]
        self._unfinished = set(range(len(self._choices)))
        self._times: list[tuple[float, float] | None] = [None] * len(self._choices)  # of the first and latest token
        self._timings: list[Timing | None] = [None] * len(self._choices)
        prompts = [(prompt.ids, prompt.params) for prompt in job.prompts]
        timed = job.include_timing or bool(job.stops.patterns) or trace is not None
        try:
            self._streams = pool.submit_all(prompts, job.end_token_ids, job.cache_salt, terms, name=name, timed=timed)
        except NotTaken as error:
            raise refusal(error, metrics) from None
        except ContextLengthError as error:
            raise errors.context_length(error.num_prompt, error.max_tokens, error.max_model_len, "prompt") from None
        for prompt in job.prompts:
            metrics.accepted(len(prompt.ids))
        if trace is not None:
            trace.took(job, taken)

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.abort()
        for index in self._unfinished:
            self._metrics.aborted()
            self._note_end(index, "abort")
        self._unfinished.clear()

    @property
    def job(self) -> Job:
        return self._job

    def keep_in(self, reply: Reply) -> None:
        """All that comes is kept there until the end, so that it comes only as fast as there is room."""
        self._reply = reply

    def abort(self) -> None:
        """Ends what is unfinished: the iteration over it ends, without those choices' last pieces."""
        for stream in self._streams:
            stream.abort()

    @property
    def usage(self) -> Usage:
        """So far. A prompt counts once, however many choices it has."""
        prompt_tokens = sum(len(prompt.ids) for prompt in self._job.prompts)
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return Usage(
            prompt_tokens,
            completion_tokens,
            prompt_tokens + completion_tokens,
            PromptTokensDetails(sum(self._num_cached)),
        )

    @property
    def timings(self) -> list[Timing | None]:
        """Of each choice so far: known once it has ended, and all along if the job includes timing."""
        return list(self._timings)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        async with aclosing(_merged(self._streams)) as updates:
            async for number, update in updates:
                index = number * self._job.n + update.choice
                if update.timing is not None:
                    self._timings[index] = update.timing
                    if self._trace is not None:
                        self._trace.choices[index].told(update.timing)
                # How much an error finds that nobody has taken yet is chance: with it a response may be whole.
                for one in update.apart():
                    if one.finish_reason in ("error", "abort"):
                        raise self._failed(index, one)
                    piece = self._take(number, index, one)
                    if self._reply is not None:
                        await self._reply.take(piece)
                    yield index, piece
                    if piece.is_cut:
                        break

    def _take(self, number: int, index: int, update: Update) -> Piece:
        if update.choice == 0:
            self._num_cached[number] += update.num_cached
        if not self._is_computed[number]:  # else the prompts of those who are gone before their turn would count
            self._is_computed[number] = True
            self._metrics.computed(len(self._job.prompts[number].ids))
        if update.queue_seconds is not None:
            self._metrics.queued(update.queue_seconds)
        piece = self._choices[index].take(update)
        if piece.is_cut:
            self._streams[number].abort(update.choice)
        self._measure(index, len(piece.token_ids))
        if piece.finish_reason is not None:
            self._has_ended(index, piece.finish_reason)
        return piece

    def _failed(self, index: int, update: Update) -> ApiError:
        """What a client is told of a choice that has ended in an error."""
        why = update.cut_off
        self._has_ended(index, "abort" if why == "cancelled" else "timeout" if why in _LATE else "error")
        if why == "deadline_passed":
            self._metrics.rejected(why)
        if why is not None:
            return errors.cut_off(why)
        wrong = update.error or "The request was aborted."
        return errors.grammar_failed(wrong) if wrong.startswith(NOT_FOLLOWED) else errors.generation_failed(wrong)

    def _measure(self, index: int, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        now = time.monotonic()
        times = self._times[index]
        if times is None:
            self._metrics.first_token(now - self._arrived, num_tokens)
            if self._trace is not None and self._trace.first_token is None:
                self._trace.first_token = now
        else:
            self._metrics.more_tokens(now - times[1], num_tokens)
        self._times[index] = (now if times is None else times[0], now)

    def _has_ended(self, index: int, reason: str) -> None:
        self._unfinished.discard(index)
        first, latest = self._times[index] or (0.0, 0.0)
        seconds = time.monotonic() - self._arrived
        self._metrics.finished(reason, seconds, latest - first, self._choices[index].num_tokens, self._timings[index])
        self._note_end(index, reason)

    def _note_end(self, index: int, reason: str) -> None:
        if self._trace is not None:
            self._trace.ended(index, reason, self._choices[index].num_tokens)


async def _merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Update]]:
    """The updates of several streams as they come, each with its stream's number."""
    if len(streams) == 1:
        async for update in streams[0]:
            yield 0, update
        return
    waiting = {asyncio.ensure_future(anext(stream, None)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                number = waiting.pop(task)
                latest = task.result()
                if latest is not None:
                    waiting[asyncio.ensure_future(anext(streams[number], None))] = number
                    yield number, latest
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
