"""`TokenBucket`: so much a minute, and a minute's worth at once; what was taken flows in again evenly.

The generic cell rate algorithm (ITU-T I.371) in one number: when the bucket will be full again.
"""

from __future__ import annotations


class TokenBucket:
    """A limit of a rate. Owner of when it will be full again; it begins full.

    per_minute: what flows in, and what it holds; more than 0. Times are seconds of a clock that never goes back.
    """

    __slots__ = ("_full_at", "_per_second", "per_minute")

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self._per_second = per_minute / 60
        self._full_at = float("-inf")

    def has_since(self, amount: float) -> float:
        """Since when, or from when on, so much may be taken. Of more than it holds: when it is full."""
        return self._full_at - max(0.0, self.per_minute - amount) / self._per_second

    def is_full(self, now: float) -> bool:
        return self._full_at <= now

    def take(self, amount: float, now: float) -> None:
        """Takes it whether it is there or not: what is lacking has to flow in before anything else can be taken."""
        self._full_at = max(self._full_at, now) + amount / self._per_second
