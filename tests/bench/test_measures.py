"""Figures on a clock that the test owns: what the times dictate, whatever the times."""

from __future__ import annotations

import statistics

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcaserve.bench import measures
from orcaserve.bench.client import Record
from orcaserve.bench.measures import FIGURES, figures, quantile

TIMES = st.integers(0, 10**6).map(lambda tick: tick / 1024)  # sums and differences of these are exact


def record(due: float, *times: float, error: str | None = None) -> Record:
    return Record(due=due, sent=due, token_times=times, max_tokens=len(times), prompt_tokens=1, error=error)


@st.composite
def a_record(draw: st.DrawFn) -> Record:
    due, *times = sorted(draw(st.lists(TIMES, min_size=2, max_size=20)))
    return record(due, *times)


RECORDS = st.lists(a_record(), min_size=1, max_size=8)


def steady(batch: int, step: float, stagger: float) -> list[Record]:
    """Each begins `stagger` after the one before; 128 tokens, `step` apart."""
    return [record(0.0, *(1 + i * stagger + step * j for j in range(128))) for i in range(batch)]


def test_decoding_alone_is_one_over_the_step() -> None:
    assert measures.decode_rate(steady(1, 0.125, 0)) == 8


@given(batch=st.integers(1, 16), stagger=st.integers(0, 4))
def test_decoding_counts_only_after_the_last_first_token(batch: int, stagger: int) -> None:
    records = steady(batch, 0.25, stagger * 0.25)
    lag = (batch - 1) * stagger  # steps from the first request's first token to the last one's
    tokens = sum(127 - min(127, lag - i * stagger) for i in range(batch))
    assert measures.decode_rate(records) == pytest.approx(tokens / (127 * 0.25))


def test_what_the_paper_measures() -> None:
    records = [record(0, 1, 2, 3, 4), record(1, 3), record(2, 3, 7)]
    assert measures.wall(records) == 7
    assert measures.output_rate(records) == 1
    assert measures.normalised_latency(records) == 2  # of 1, 2, 2.5
    assert measures.ttft(records, 0.5) == 1  # of 1, 2, 1
    assert measures.tpot(records, 0.5) == 2.5  # of 1, none, 4
    assert measures.tpot(records[1:2], 0.5) is None
    assert measures.decode_rate([record(0, 1)]) is None


@given(RECORDS, TIMES)
def test_figures_do_not_depend_on_when_the_clock_began(records: list[Record], shift: float) -> None:
    later = [
        msgspec.structs.replace(one, due=one.due + shift, token_times=tuple(time + shift for time in one.token_times))
        for one in records
    ]
    for kind in FIGURES:
        assert figures(kind, records) == figures(kind, later)


@given(RECORDS)
def test_a_clock_at_half_the_speed_doubles_rates_and_halves_times(records: list[Record]) -> None:
    slow = [
        msgspec.structs.replace(one, due=one.due / 2, token_times=tuple(time / 2 for time in one.token_times))
        for one in records
    ]
    for kind, named in FIGURES.items():
        for figure, a, b in zip(named, figures(kind, records), figures(kind, slow), strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert b == (a * 2 if figure.is_rate else a / 2)


@given(RECORDS)
def test_the_order_of_the_requests_does_not_matter(records: list[Record]) -> None:
    for kind in FIGURES:
        assert figures(kind, records) == figures(kind, records[::-1])


@given(RECORDS, st.sampled_from(["error", "nothing"]))
def test_a_work_with_a_failed_request_has_no_figures(records: list[Record], how: str) -> None:
    failed = record(0, 1, error="it broke") if how == "error" else record(0)
    for kind in FIGURES:
        assert set(figures(kind, [*records, failed])) == {None}


@given(st.lists(TIMES, min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found is not None and min(values) <= found <= max(values)
    assert quantile(values, 0.5) == statistics.median(values)
    assert (quantile(values, 0), quantile(values, 1)) == (min(values), max(values))
    if len(values) > 1:
        assert quantile(values, 0.99) == pytest.approx(statistics.quantiles(values, n=100, method="inclusive")[98])
