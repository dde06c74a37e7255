"""`RequestTrace`: what is noted of one request for its spans: lengths, times and reasons, never a text.

It knows nothing of OpenTelemetry, and exists only where spans are made.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from orcaserve.core.timing import Timing
from orcaserve.serve.job import Job

TRACE = "orcaserve.trace"  # where a scope has its RequestTrace


class ChoiceTrace:
    """One choice. phases: [name, seconds] in order of time; they add up to its timing. reason: None while it runs."""

    def __init__(self) -> None:
        self.timing = Timing()
        self.phases: list[tuple[str, float]] = []
        self.reason: str | None = None

    def told(self, timing: Timing) -> None:
        """timing: where its time went so far. What came since the last one was told is put in the order of life."""
        before, self.timing = self.timing, timing
        for name, seconds in (
            ("queued", timing.queue_seconds - before.queue_seconds),
            ("prefill", timing.prefill_seconds - before.prefill_seconds),
            ("decode", timing.decode_seconds - before.decode_seconds),
            ("preempted", timing.lost_seconds - before.lost_seconds),
        ):
            if seconds <= 0:
                continue
            if self.phases and self.phases[-1][0] == name:
                seconds += self.phases.pop()[1]
            self.phases.append((name, seconds))


class RequestTrace:
    """Owner of one request's notes. Written by its endpoint and its Generation, in one event loop.

    operation: as the GenAI conventions name it. headers: names in lower case. about: attributes of the way it came.
    Times are those of time.monotonic().
    """

    def __init__(self, operation: str, headers: Mapping[bytes, bytes], about: dict[str, str | int]) -> None:
        self.operation = operation
        self.about = about
        self.headers = headers
        self.began = time.monotonic()
        self.model: str | None = None  # as the client calls it
        self.streams = False
        self.id = ""
        self.job: Job | None = None  # what the pool has taken in
        self.taken = self.began
        self.first_token: float | None = None
        self.choices: list[ChoiceTrace] = []
        self.num_generated = 0
        self._zero = time.time() - time.monotonic()  # what a change of the wall clock does not move

    def asked(self, id: str, model: str | None, *, streams: bool) -> None:
        """id: of the response. model: as the client calls it, if it does."""
        self.id, self.model, self.streams = id, model, streams

    def took(self, job: Job, at: float) -> None:
        """The pool has taken the request in."""
        self.job, self.taken = job, at
        self.choices = [ChoiceTrace() for _ in range(len(job.prompts) * job.n)]

    def ended(self, index: int, reason: str, num_tokens: int) -> None:
        """A choice has. num_tokens: that it generated."""
        self.choices[index].reason = reason
        self.num_generated += num_tokens

    @property
    def error(self) -> str | None:
        """Why not every choice has its end, if one has not."""
        reasons = (choice.reason for choice in self.choices)
        return next((reason or "abort" for reason in reasons if reason not in ("stop", "length")), None)

    def nanoseconds(self, at: float) -> int:
        """Of the wall clock, since 1970."""
        return int((self._zero + at) * 1e9)
