"""`Choice`: one choice on its way, with all that is needed to go on with it: the resume record."""

from __future__ import annotations

import time
import weakref

import msgspec

from orcaserve.core.request import NewRequest
from orcaserve.core.router import Keys
from orcaserve.serve.stream import Stream


class Choice:
    """One choice on its way: the resume record, and what the pool knows of its luck. Owned by the Pool."""

    __slots__ = (
        "arrival",
        "arrived",
        "crashes",
        "engine_id",
        "generated",
        "has_prompt_logprobs",
        "is_waiting",
        "keys",
        "lone_crashes",
        "queue_seconds",
        "replica",
        "request",
        "stream",
    )

    def __init__(self, arrival: int, request: NewRequest, keys: Keys) -> None:
        self.arrival = arrival
        self.arrived = time.monotonic()
        self.queue_seconds: float | None = None  # known from its first iteration until its stream has been told
        self.request = request  # as it arrived; its id means nothing
        self.keys = keys  # the prompt's, for the router
        self.stream: weakref.ref[Stream] | None = None
        self.generated: list[int] = []
        self.has_prompt_logprobs = False
        self.engine_id: int | None = None  # None while no engine has it
        self.replica: int | None = None  # whose engine that is
        self.is_waiting = True  # for its first iteration; a resubmission does not wait in this sense
        self.crashes = 0  # in a row with it on board, without any progress of its own
        self.lone_crashes = 0  # those of them with nobody else on board

    @property
    def has_begun(self) -> bool:
        """Whether something of it has been delivered, which only an engine of the same profile can go on with."""
        return bool(self.generated) or self.has_prompt_logprobs

    @property
    def num_tokens(self) -> int:
        """Of its prompt, and generated so far."""
        return self.request.num_prompt + len(self.generated)

    def submission(self, id: int) -> NewRequest:
        """The request as an engine needs it now."""
        request = self.request
        params = request.params
        if self.has_prompt_logprobs:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        token_ids = (*request.token_ids, *self.generated)
        return msgspec.structs.replace(request, id=id, token_ids=token_ids, params=params)
