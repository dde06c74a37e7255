"""What is learnt of answers' lengths: near the truth, in bounded memory, and newer samples weigh more."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orcaserve.core.lengths import EDGES, ENOUGH, MOST_CELLS, Histogram, Lengths


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=60), st.floats(0, 1))
def test_quantiles_are_right_to_a_quarter_of_an_octave(values: list[int], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.learn(value)
    found = histogram.quantile(share)
    slack = 2.0**0.25 + 1e-9
    # Sixty samples differ in weight by a quarter, so that the rank is not that of equal ones.
    weights = sorted((value, (256 / 255) ** i) for i, value in enumerate(values))
    total, passed = sum(weight for _, weight in weights), 0.0
    for value, weight in weights:
        passed += weight
        if passed >= share * total * (1 - 1e-9):
            assert value / slack <= found <= value * slack
            return


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 1e6))
def test_below_is_the_share_of_smaller_ones(values: list[float], at: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.learn(value)
    share = histogram.below(at)
    assert 0 <= share <= 1 + 1e-9
    if at >= 1:
        assert share <= 1.3 * sum(value < at * 1.19 for value in values) / len(values) + 1e-9
    assert histogram.below(at) <= histogram.below(2 * at + 1) + 1e-9


def test_the_shortest_answers_have_a_bin_of_their_own() -> None:
    histogram = Histogram()
    for value in (0, 1, 1.1):
        histogram.learn(value)
    assert histogram.quantile(1.0) <= 2**0.25
    assert histogram.below(1.2) == pytest.approx(1)


@pytest.mark.parametrize("i", [0, 1, 9, len(EDGES) - 2])
def test_a_bin_is_taken_to_be_filled_evenly(i: int) -> None:
    histogram, beyond = Histogram(), Histogram()
    histogram.learn(EDGES[i])
    assert [histogram.quantile(share) for share in (0.0, 1.0)] == [EDGES[i], EDGES[i + 1]]
    assert EDGES[i] < histogram.quantile(0.5) < EDGES[i + 1]
    beyond.learn(9 * EDGES[-1])
    assert [beyond.quantile(share) for share in (0.0, 1.0)] == [EDGES[-1], 2 * EDGES[-1]], "the last has no end"


def test_newer_samples_weigh_more_and_nothing_overflows() -> None:
    histogram = Histogram()
    for _ in range(20_000):
        histogram.learn(1000)
    assert histogram.mean == pytest.approx(1000)
    for _ in range(256):
        histogram.learn(10)
    assert histogram.mean == pytest.approx(10 + 990 / 2.718, rel=0.02)
    for _ in range(2_000):
        histogram.learn(10)
    assert histogram.mean == pytest.approx(10, rel=0.1)
    assert histogram.quantile(0.9) < 12


def test_it_asks_the_bucket_then_the_tenant_then_everybody() -> None:
    lengths = Lengths()
    assert lengths.expected("a", 100) is None and lengths.quantile("a", 100, 0.5) is None
    lengths.learn("b", 5, 50)
    assert lengths.expected("a", 100) == 50, "somebody's is better than nothing"
    for _ in range(ENOUGH):
        lengths.learn("a", 1000, 200)
    assert lengths.expected("a", 100) == 200, "his other prompts"
    for _ in range(ENOUGH - 1):
        lengths.learn("a", 100, 7)
    assert lengths.expected("a", 100) > 7, "not enough yet"
    lengths.learn("a", 100, 7)
    assert lengths.expected("a", 100) == pytest.approx(7), "prompts of 64 to 127 tokens"
    assert lengths.expected("a", 65) == pytest.approx(7)
    assert lengths.expected("a", 1000) == pytest.approx(200)
    low, high = lengths.quantile("a", 100, 0.01), lengths.quantile("a", 100, 1.0)
    assert 7 / 1.19 <= low <= high <= 7 * 1.19


def test_memory_is_bounded_and_the_idle_go_first() -> None:
    lengths = Lengths()
    rng = random.Random(1)
    for _ in range(ENOUGH):
        lengths.learn("idle", 8, 3)
    for number in range(3 * MOST_CELLS):
        lengths.learn(f"tenant {number}", rng.randint(1, 5000), 40)
        if number % 100 == 0:
            lengths.learn("busy", 8, 3)
    assert len(lengths._cells) <= MOST_CELLS
    assert lengths.expected("busy", 8) == pytest.approx(3)
    assert lengths.expected("idle", 8) == pytest.approx(40, rel=0.1), "it is a stranger again"
