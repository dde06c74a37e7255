"""From records to figures: pure functions of the requests of one work, none of which failed.

A figure that cannot be told, such as a rate over no time, is None.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from orcaserve.bench.client import Record
from orcaserve.bench.workloads import Kind

Records = Sequence[Record]


def decode_rate(records: Records) -> float | None:
    """Tokens per second while all of them decode: those after the moment at which the last request got its first."""
    all_decode = max(record.first for record in records)
    end = max(record.last for record in records)
    count = sum(time > all_decode for record in records for time in record.token_times)
    return count / (end - all_decode) if end > all_decode else None


def wall(records: Records) -> float:
    """Seconds from the first arrival to the last token."""
    return max(record.last for record in records) - min(record.due for record in records)


def output_rate(records: Records) -> float | None:
    """Generated tokens per second of wall time."""
    seconds = wall(records)
    return sum(record.output_tokens for record in records) / seconds if seconds > 0 else None


def normalised_latency(records: Records) -> float:
    """Median over requests of the paper's measure: seconds from arrival to last token, per generated token."""
    return statistics.median((record.last - record.due) / record.output_tokens for record in records)


def ttft(records: Records, share: float) -> float | None:
    """Seconds from arrival to the first token: the quantile of the requests."""
    return quantile([record.first - record.due for record in records], share)


def tpot(records: Records, share: float) -> float | None:
    """Seconds per token after the first: the quantile of the requests that have more than one."""
    several = [record for record in records if record.output_tokens > 1]
    return quantile([(record.last - record.first) / (record.output_tokens - 1) for record in several], share)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of the values lie, on a straight line between neighbours; 0.5 is the median."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Figure(NamedTuple):
    """A named number of a work. is_rate: more of it is better; else it is a time, and less is better."""

    name: str
    unit: str
    is_rate: bool
    measure: Callable[[Records], float | None]


_OUTPUT = Figure("output", "tokens/s", True, output_rate)
FIGURES: dict[Kind, tuple[Figure, ...]] = {
    "decode": (Figure("decode", "tokens/s", True, decode_rate),),
    "trace": (Figure("wall time", "s", False, wall), _OUTPUT),
    "poisson": (
        Figure("normalised latency", "s/token", False, normalised_latency),
        Figure("TTFT p50", "s", False, lambda records: ttft(records, 0.5)),
        Figure("TTFT p99", "s", False, lambda records: ttft(records, 0.99)),
        Figure("TPOT p50", "s", False, lambda records: tpot(records, 0.5)),
        Figure("TPOT p99", "s", False, lambda records: tpot(records, 0.99)),
    ),
}


def figures(kind: Kind, records: Records) -> list[float | None]:
    """A kind's figures, in the order of FIGURES; None for all of them if a request failed or got no token."""
    failed = any(record.error or not record.token_times for record in records)
    return [None if failed else figure.measure(records) for figure in FIGURES[kind]]
