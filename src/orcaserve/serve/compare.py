"""`compare`: the requests that were recorded, as they ran, and as they would have run under another policy.

The other run is simulated: the engine's own scheduler and loop on a virtual clock, with a cost that is fitted to the
recorded iterations. So is the policy in force, to see how far the simulation can be believed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.serve.timeline import Chunk, Ended, Event, Iterated
from orcaserve.sim.cost import CostModel, Size, StageCost, size_of
from orcaserve.sim.fit import fit_stage
from orcaserve.sim.run import Arrival, Iteration, Record, simulate

MOST_REQUESTS = 150  # the latest
MOST_TOKENS = 20_000  # that they generated; a simulated token costs some 20 µs
MOST_SAMPLES = 240
FEWEST_ITERATIONS = 20
FEWEST_REQUESTS = 2


class TooLittle(Exception):
    """There are too few finished requests, or iterations."""


class Span(msgspec.Struct, frozen=True):
    """One request in a run: seconds from the run's beginning."""

    id: int
    arrived: float
    ended: float
    first: float


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the requests. seconds: from the first arrival to the last end; mean_first: to the first token."""

    policy: str
    requests: tuple[Span, ...]
    iterations: tuple[Iterated, ...]
    seconds: float
    mean_latency: float
    mean_first: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """recorded, simulated: the two runs of the same requests.

    check: seconds that a simulation of the policy in force takes. fitted: iterations that the cost is fitted to; error:
    the median of what it is off by, as a share.
    """

    recorded: Run
    simulated: Run
    check: float
    fitted: int
    error: float


def compare(events: Sequence[Event], ours: SchedulerConfig, other: SchedulerConfig) -> Comparison:
    """events: a timeline's. ours, other: the first engine's configuration, and one with another policy.

    Raises TooLittle.
    """
    iterations = [event for event in events if isinstance(event, Iterated) and event.engine == 0]
    samples = [(_size(event), event.seconds) for event in iterations if event.seconds > 0]
    if len(samples) < FEWEST_ITERATIONS:
        raise TooLittle
    chosen = _chosen(events, iterations)
    if len(chosen) < FEWEST_REQUESTS:
        raise TooLittle
    samples = samples[:: -(-len(samples) // MOST_SAMPLES)]
    stage = fit_stage(samples)
    cost = CostModel(stages=(stage,))
    began = chosen[0].arrived
    arrivals = [Arrival(round(one.arrived - began, 6), one.prompt, one.generated) for one in chosen]
    ids = [one.id for one in chosen]
    records, ran = simulate(arrivals, other, cost)
    check, _ = simulate(arrivals, ours, cost, keep_iterations=False)
    return Comparison(
        recorded=_recorded(ours.policy.name, chosen, iterations, began),
        simulated=_simulated(other.policy.name, ids, records, ran, stage),
        check=_until(check),
        fitted=len(samples),
        error=statistics.median(abs(stage(size) / seconds - 1) for size, seconds in samples),
    )


def _size(event: Iterated) -> Size:
    chunks = [(start, count, False) for _, start, count in (*event.prefill, *event.again)]
    of = size_of(chunks)
    singles = len(event.decode) + len(event.idle)
    return Size(
        of.tokens + singles, of.rows + singles, event.samples, of.context + event.context, of.attended + event.context
    )


def _chosen(events: Sequence[Event], iterations: Sequence[Iterated]) -> list[Ended]:
    """The latest finished requests whose every iteration is kept, in order of arrival."""
    there = {id for event in iterations for id in _members(event)}
    kept_since = events[0].at if events else 0.0
    chosen: list[Ended] = []
    tokens = 0
    for event in reversed(events):
        if not isinstance(event, Ended) or event.id not in there or not event.generated or event.how == "error":
            continue
        tokens += event.generated
        if len(chosen) == MOST_REQUESTS or tokens > MOST_TOKENS or event.arrived < kept_since:
            break
        chosen.append(event)
    return sorted(chosen, key=lambda one: one.arrived)


def _members(event: Iterated) -> tuple[int, ...]:
    return (*event.decode, *event.idle, *(id for id, _, _ in (*event.prefill, *event.again)))


def _recorded(policy: str, chosen: Sequence[Ended], iterations: Sequence[Iterated], began: float) -> Run:
    spans = tuple(
        Span(one.id, one.arrived - began, one.at - began, (one.at if one.first is None else one.first) - began)
        for one in chosen
    )
    ids = {one.id for one in chosen}
    until = max(one.at for one in chosen)
    kept = [
        msgspec.structs.replace(
            event,
            at=event.at - began,
            decode=tuple([id for id in event.decode if id in ids]),
            idle=tuple([id for id in event.idle if id in ids]),
            prefill=_of(event.prefill, ids),
            again=_of(event.again, ids),
            preempted=tuple([id for id in event.preempted if id in ids]),
            blocks=(),
        )
        for event in iterations
        if began <= event.at <= until
    ]
    return _run(policy, spans, [event for event in kept if _members(event)])


def _of(chunks: tuple[Chunk, ...], ids: set[int]) -> tuple[Chunk, ...]:
    return tuple([chunk for chunk in chunks if chunk[0] in ids])


def _simulated(
    policy: str, ids: Sequence[int], records: Sequence[Record], ran: Sequence[Iteration], stage: StageCost
) -> Run:
    reached = [0] * len(ids)
    generated = [0] * len(ids)
    iterations = []
    for one in ran:
        seconds = stage(size_of([(start, count, samples) for _, start, count, samples in one.rows]))
        decode, idle, prefill, again = [], [], [], []
        for place, start, count, samples in one.rows:
            end = start + count
            if end > reached[place] and generated[place] and start >= reached[place]:
                decode.append(ids[place])
            elif end > reached[place]:
                prefill.append((ids[place], start, count))
            elif count == 1 and end == reached[place]:
                idle.append(ids[place])
            else:
                again.append((ids[place], start, count))
            reached[place] = max(reached[place], end)
            generated[place] += samples
        iterations.append(
            Iterated(
                at=round(one.time + seconds, 6),
                seconds=round(seconds, 6),
                tokens=sum(count for _, _, count, _ in one.rows),
                decode=tuple(decode),
                idle=tuple(idle),
                prefill=tuple(prefill),
                again=tuple(again),
            )
        )
    spans = tuple(
        Span(id, record.arrival, record.token_times[-1], record.token_times[0])
        for id, record in zip(ids, records, strict=True)
    )
    return _run(policy, spans, iterations)


def _run(policy: str, spans: tuple[Span, ...], iterations: Sequence[Iterated]) -> Run:
    return Run(
        policy=policy,
        requests=spans,
        iterations=tuple(iterations),
        seconds=max(span.ended for span in spans),
        mean_latency=statistics.fmean(span.ended - span.arrived for span in spans),
        mean_first=statistics.fmean(span.first - span.arrived for span in spans),
    )


def _until(records: Sequence[Record]) -> float:
    return max(record.token_times[-1] for record in records)
