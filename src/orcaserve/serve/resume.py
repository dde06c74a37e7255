"""`Choice`: one choice on its way, with all that is needed to go on with it: the resume record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from orcaserve.core.request import NewRequest, Output
from orcaserve.core.router import Keys
from orcaserve.core.timing import Timing
from orcaserve.serve.stream import Stream, Update
from orcaserve.serve.terms import Terms


class Choice:
    """One choice on its way: the resume record, and what the pool knows of its luck. Owned by the Pool."""

    __slots__ = (
        "_latest",
        "_past",
        "_since",
        "alarm",
        "arrival",
        "arrived",
        "crashes",
        "engine_id",
        "expected",
        "foretold",
        "generated",
        "has_output",
        "has_prompt_logprobs",
        "is_paused",
        "is_waiting",
        "keys",
        "lone_crashes",
        "queue_seconds",
        "replica",
        "request",
        "stream",
        "terms",
    )

    def __init__(self, arrival: int, request: NewRequest, keys: Keys, terms: Terms) -> None:
        self.arrival = arrival
        self.arrived = time.monotonic()
        self.queue_seconds: float | None = None  # known from its first iteration until its stream has been told
        self.request = request  # as it arrived; its id means nothing
        self.keys = keys  # the prompt's, for the router
        self.terms = terms
        self.alarm: asyncio.TimerHandle | None = None  # rings when the next of its deadlines passes
        self.expected = 0.0  # tokens that it should generate, as was thought when it came
        self.foretold = 0.0  # seconds to its first token, as was thought when it came with little time; else 0
        self.stream: Callable[[], Stream | None] = lambda: None  # a weak reference: to drop the stream is to leave
        self.generated: list[int] = []
        self.has_output = False  # whether its prompt has been computed once
        self.has_prompt_logprobs = False
        self.engine_id: int | None = None  # None while no engine has it
        self.replica: int | None = None  # whose engine that is
        self.is_paused = False  # no engine has it, because its client has not read what there is
        self.is_waiting = True  # for its first iteration; a resubmission does not wait in this sense
        self.crashes = 0  # in a row with it on board, without any progress of its own
        self.lone_crashes = 0  # those of them with nobody else on board
        self._past = Timing()  # of the engines before
        self._latest: Timing | None = None  # the last that the engine which has it has told
        self._since = self.arrived  # when it was handed to that one

    @property
    def has_begun(self) -> bool:
        """Whether something of it has been delivered, which only an engine of the same profile can go on with."""
        return bool(self.generated) or self.has_prompt_logprobs

    @property
    def num_tokens(self) -> int:
        """Of its prompt, and generated so far."""
        return self.request.num_prompt + len(self.generated)

    def goes_to(self, engine_id: int, replica: int) -> None:
        """It is about to be handed to an engine. What none has accounted for was spent in the queue, or is lost."""
        now = time.monotonic()
        known = self._latest or Timing()
        unknown = max(0.0, now - self._since - known.seconds)
        gap = Timing(queue_seconds=unknown) if self.is_waiting else Timing(lost_seconds=unknown)
        self._past += known + gap + Timing(ids=(engine_id,))
        self._latest, self._since = None, now
        self.engine_id, self.replica = engine_id, replica

    def take(self, output: Output) -> Update:
        """What its engine has computed of it is noted. Returns what its stream gains by that."""
        update = Update(
            choice=self.request.choice,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            pooled=output.pooled,
            num_cached=0 if self.generated else output.num_cached,  # later, it is about a resubmission
            queue_seconds=self.queue_seconds,
            finish_reason=output.finish_reason,
            error=output.error,
            timing=None if output.timing is None else self._past + output.timing,
        )
        if output.timing is not None:
            self._latest = output.timing
        self.queue_seconds = None
        self.generated += output.token_ids
        self.has_output = True
        self.has_prompt_logprobs = self.has_prompt_logprobs or bool(output.prompt_logprobs)
        self.crashes = self.lone_crashes = 0
        return update

    def push(self, update: Update) -> None:
        """To its stream, if there still is somebody who has that."""
        if (stream := self.stream()) is not None:
            stream.push(update)

    @property
    def is_late(self) -> bool:
        """Whether its client has not read what there is, so that nothing should follow."""
        stream = self.stream()
        return stream is not None and stream.is_full(self.request.choice)

    @property
    def due(self) -> float | None:
        """By when its next token is wanted, in time.monotonic(); None: whenever."""
        return self.terms.end_by if self.has_output else self.terms.start_by

    @property
    def footprint(self) -> float:
        """Tokens that it should have in the KV cache at its end."""
        return self.request.num_prompt + self.expected

    def submission(self, id: int) -> NewRequest:
        """The request as an engine needs it now: with the tokens so far, and what is left of its deadline."""
        request = self.request
        params = request.params
        if self.has_prompt_logprobs:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        token_ids = (*request.token_ids, *self.generated)
        deadline = None if self.due is None else self.due - time.monotonic()
        return msgspec.structs.replace(request, id=id, token_ids=token_ids, params=params, deadline=deadline)
