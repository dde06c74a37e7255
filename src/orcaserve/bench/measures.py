"""From records to figures: pure functions of the requests of one work, none of which failed.

A figure that cannot be told, such as a rate over no time, is None.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from orcaserve.bench.client import Record
from orcaserve.bench.workloads import Kind

Records = Sequence[Record]

# The times in one request, in seconds: from arrival to first token; per token after the first; each gap between two
# tokens; from arrival to last token; the same by generated tokens, which is the paper's measure.
TIMES: dict[str, Callable[[Record], Sequence[float]]] = {
    "ttft": lambda record: [record.first - record.due],
    "tpot": lambda record: [(record.last - record.first) / (n - 1)] if (n := record.output_tokens) > 1 else [],
    "itl": lambda record: [b - a for a, b in itertools.pairwise(record.token_times)],
    "latency": lambda record: [record.last - record.due],
    "normalised": lambda record: [(record.last - record.due) / record.output_tokens],
}


def decode_rate(records: Records) -> float | None:
    """Tokens per second while all of them decode: those after the moment at which the last request got its first."""
    all_decode = max(record.first for record in records)
    end = max(record.last for record in records)
    count = sum(time > all_decode for record in records for time in record.token_times)
    return count / (end - all_decode) if end > all_decode else None


def wall(records: Records) -> float:
    """Seconds from the first arrival to the last token."""
    return max(record.last for record in records) - min(record.due for record in records)


def request_rate(records: Records) -> float | None:
    """Requests per second of wall time."""
    return _rate(len(records), records)


def output_rate(records: Records) -> float | None:
    """Generated tokens per second of wall time."""
    return _rate(sum(record.output_tokens for record in records), records)


def total_rate(records: Records) -> float | None:
    """Tokens of prompts and outputs per second of wall time."""
    return _rate(sum(prompt_tokens(record) + record.output_tokens for record in records), records)


def prompt_tokens(record: Record) -> int:
    """As the server counts them, if it does."""
    return record.seen_prompt_tokens or record.prompt_tokens


def times(name: str, records: Records) -> list[float]:
    """Of all requests together. name: one of TIMES."""
    return [value for record in records for value in TIMES[name](record)]


def normalised_latency(records: Records) -> float:
    """Median over requests of the paper's measure: seconds from arrival to last token, per generated token."""
    return statistics.median(times("normalised", records))


def ttft(records: Records, share: float) -> float | None:
    """Seconds from arrival to the first token: the quantile of the requests."""
    return quantile(times("ttft", records), share)


def tpot(records: Records, share: float) -> float | None:
    """Seconds per token after the first: the quantile of the requests that have more than one."""
    return quantile(times("tpot", records), share)


def meets(record: Record, limits: Mapping[str, float]) -> bool:
    """Whether a request was answered, with none of its times above its limit in seconds; names are those of TIMES."""
    if record.error or not record.token_times:
        return False
    return all(value <= limit for name, limit in limits.items() for value in TIMES[name](record))


def limits_from(text: str) -> dict[str, float]:
    """Limits as they are written, in seconds: ttft=1.0,tpot=0.1. ValueError says what is wrong."""
    limits: dict[str, float] = {}
    for pair in text.split(","):
        name, _, seconds = pair.strip().partition("=")
        if name not in TIMES or name in limits or not re.fullmatch(r"\d{0,6}\.?\d{1,6}", seconds):
            raise ValueError(f"{text!r} are no limits: they are some of {', '.join(TIMES)}, as in ttft=1.0,tpot=0.1")
        limits[name] = float(seconds)
    return limits


def _rate(count: int, records: Records) -> float | None:
    seconds = wall(records)
    return count / seconds if seconds > 0 else None


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
_LATENCIES = (
    Figure("normalised latency", "s/token", False, normalised_latency),
    Figure("TTFT p50", "s", False, lambda records: ttft(records, 0.5)),
    Figure("TTFT p99", "s", False, lambda records: ttft(records, 0.99)),
    Figure("TPOT p50", "s", False, lambda records: tpot(records, 0.5)),
    Figure("TPOT p99", "s", False, lambda records: tpot(records, 0.99)),
)
FIGURES: dict[Kind, tuple[Figure, ...]] = {
    "decode": (Figure("decode", "tokens/s", True, decode_rate),),
    "trace": (Figure("wall time", "s", False, wall), _OUTPUT),
    "poisson": _LATENCIES,
    "load": (Figure("throughput", "requests/s", True, request_rate), _OUTPUT, *_LATENCIES),
}


def figures(kind: Kind, records: Records) -> list[float | None]:
    """A kind's figures, in the order of FIGURES; None for all of them if a request failed or got no token."""
    failed = any(record.error or not record.token_times for record in records)
    return [None if failed else figure.measure(records) for figure in FIGURES[kind]]
