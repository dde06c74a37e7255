"""Token buckets against their slow twin, and what a bucket promises whatever is asked of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orcaserve.core.token_bucket import TokenBucket

PER_MINUTE = 60.0
asks = st.lists(st.tuples(st.floats(0, 30), st.floats(0.1, 90)), max_size=40)  # seconds since the one before, amount


class Slow:
    """A bucket as one would explain it: a level that rises with time, and may be negative."""

    def __init__(self, per_minute: float) -> None:
        self.holds = self.level = per_minute
        self.per_second = per_minute / 60
        self.at = 0.0

    def wait(self, amount: float, now: float) -> float:
        self.level = min(self.holds, self.level + (now - self.at) * self.per_second)
        self.at = now
        return max(0.0, (min(amount, self.holds) - self.level) / self.per_second)

    def take(self, amount: float, now: float) -> None:
        self.wait(0, now)
        self.level -= amount


@given(asks, st.booleans())
def test_the_twins_agree(asks: list[tuple[float, float]], overdraws: bool) -> None:
    bucket, slow, now = TokenBucket(PER_MINUTE), Slow(PER_MINUTE), 0.0
    for gap, amount in asks:
        now += gap
        wait = max(0.0, bucket.has_since(amount) - now)
        assert abs(wait - slow.wait(amount, now)) < 1e-6
        if overdraws or wait == 0:
            bucket.take(amount, now)
            slow.take(amount, now)
        assert bucket.is_full(now) == (slow.wait(PER_MINUTE, now) <= 0) or abs(slow.level - PER_MINUTE) < 1e-6


@given(asks)
def test_no_window_gives_more_than_a_minutes_worth_and_what_flows_in(asks: list[tuple[float, float]]) -> None:
    bucket, now = TokenBucket(PER_MINUTE), 0.0
    taken: list[tuple[float, float]] = []
    for gap, amount in asks:
        now += gap
        if bucket.has_since(amount) <= now:
            bucket.take(amount, now)
            taken.append((now, min(amount, PER_MINUTE)))  # more than it holds is given when it is full
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            span = taken[last][0] - taken[first][0]
            assert sum(amount for _, amount in taken[first : last + 1]) <= PER_MINUTE + span * PER_MINUTE / 60 + 1e-6


@given(asks, st.floats(0.1, 60))
def test_the_wait_is_exact(asks: list[tuple[float, float]], amount: float) -> None:
    """Who comes again when he was told to gets it; who comes earlier does not."""
    bucket, now = TokenBucket(PER_MINUTE), 0.0
    for gap, taken in asks:
        now += gap
        bucket.take(taken, now)
    since = bucket.has_since(amount)
    slow = Slow(PER_MINUTE)
    now = 0.0
    for gap, taken in asks:
        now += gap
        slow.take(taken, now)
    if since > now + 1e-3:
        assert slow.wait(amount, since - 1e-3) > 0
    assert slow.wait(amount, max(now, since) + 1e-6) == 0


def test_a_new_bucket_is_full() -> None:
    bucket = TokenBucket(30)
    assert bucket.has_since(30) <= 0
    assert bucket.is_full(0)
    bucket.take(1, 0)
    assert bucket.has_since(30) == 2
    assert not bucket.is_full(1.9)
    assert bucket.is_full(2)
