"""`Timing`: where one request's time went, and in what company it ran; `Timer`, by which the scheduler knows."""

from __future__ import annotations

import msgspec


class Timing(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Where a request's time went. Seconds of the scheduler's clock; the sum of two goes on after an engine's crash.

    ids: what the engines knew it by, one for each submission, as their step logs do; the request pool fills them in.
    queue_seconds: before its first iteration. prefill_seconds: from there to its first token. decode_seconds: from
        there to its last. lost_seconds: from a preemption or a crash until it had computed as much again. Together
        they are all its time.
    preemptions: how often its KV was taken away. recomputed_tokens: that were computed once more. swapped_tokens: that
        were brought back from the swap space instead.
    cached_tokens: of its prompt, which the prefix cache spared when it first ran.
    iterations: that it took part in, one ahead of its end included. mates: the others in them, added up.
    most_mates: others in one of them.
    """

    ids: tuple[int, ...] = ()
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    lost_seconds: float = 0.0
    preemptions: int = 0
    recomputed_tokens: int = 0
    swapped_tokens: int = 0
    cached_tokens: int = 0
    iterations: int = 0
    mates: int = 0
    most_mates: int = 0

    @property
    def seconds(self) -> float:
        """All its time."""
        return self.queue_seconds + self.prefill_seconds + self.decode_seconds + self.lost_seconds

    @property
    def mean_mates(self) -> float:
        """Others in its mean iteration."""
        return self.mates / self.iterations if self.iterations else 0.0

    def __add__(self, later: Timing) -> Timing:
        return Timing(
            ids=self.ids + later.ids,
            queue_seconds=self.queue_seconds + later.queue_seconds,
            prefill_seconds=self.prefill_seconds + later.prefill_seconds,
            decode_seconds=self.decode_seconds + later.decode_seconds,
            lost_seconds=self.lost_seconds + later.lost_seconds,
            preemptions=self.preemptions + later.preemptions,
            recomputed_tokens=self.recomputed_tokens + later.recomputed_tokens,
            swapped_tokens=self.swapped_tokens + later.swapped_tokens,
            cached_tokens=self.cached_tokens + later.cached_tokens,
            iterations=self.iterations + later.iterations,
            mates=self.mates + later.mates,
            most_mates=max(self.most_mates, later.most_mates),
        )


_QUEUE, _PREFILL, _DECODE, _LOST = range(4)


class Timer:
    """In which of four phases one request is, and how long it was in each. Owned by its Request.

    now: the request comes in. num_computed_before: tokens that an engine before this one had computed.
    returning: tokens that the swap space gave back when it was let in last, which count once it runs.
    decodes: whether a row of it changes no phase, so that `computed` need not be told.
    """

    __slots__ = (
        "_phase",
        "_reached",
        "_seconds",
        "_since",
        "_swapped",
        "cached",
        "decodes",
        "iterations",
        "mates",
        "most_mates",
        "preemptions",
        "recomputed",
        "returning",
    )

    def __init__(self, now: float, num_computed_before: int) -> None:
        self.iterations = 0
        self.mates = 0
        self.most_mates = 0
        self.preemptions = 0
        self.recomputed = 0
        self.returning = 0
        self.cached = 0
        self.decodes = False
        self._swapped = 0
        self._reached = num_computed_before
        self._phase = _LOST if num_computed_before else _QUEUE
        self._seconds = [0.0, 0.0, 0.0, 0.0]
        self._since = now

    def admitted(self, num_cached: int) -> None:
        """It runs. What the cache spares one that ran before is no saving, but a smaller loss."""
        if self._phase == _QUEUE:
            self.cached = num_cached

    def described(self, now: float) -> None:
        """Its first iteration begins, or the first one since a preemption."""
        self._swapped += self.returning
        if self._phase == _QUEUE:
            self._enter(_PREFILL, now)

    def preempted(self, now: float, num_computed: int) -> None:
        """The K and V of so many tokens are lost. Who was let in, but never ran, goes on waiting as before."""
        if self._phase == _QUEUE:
            return
        self.preemptions += 1
        self._reached = max(self._reached, num_computed)
        self._enter(_LOST, now)

    def computed(self, start: int, end: int, has_token: bool, now: float) -> None:
        """The positions [start, end) are back. has_token: whether the request has generated a token by now."""
        if self._phase == _LOST:
            self.recomputed += max(0, min(end, self._reached) - start)
            if end <= self._reached:
                return
        if has_token:
            self._enter(_DECODE, now)
        elif self._phase == _LOST:
            self._enter(_PREFILL, now)

    def timing(self, now: float) -> Timing:
        """All that is known now."""
        seconds = list(self._seconds)
        seconds[self._phase] += now - self._since
        queue, prefill, decode, lost = seconds
        return Timing(
            queue_seconds=queue,
            prefill_seconds=prefill,
            decode_seconds=decode,
            lost_seconds=lost,
            preemptions=self.preemptions,
            recomputed_tokens=self.recomputed,
            swapped_tokens=self._swapped,
            cached_tokens=self.cached,
            iterations=self.iterations,
            mates=self.mates,
            most_mates=self.most_mates,
        )

    def _enter(self, phase: int, now: float) -> None:
        self._seconds[self._phase] += now - self._since
        self._since = now
        self._phase = phase
        self.decodes = phase == _DECODE
