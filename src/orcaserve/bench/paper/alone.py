"""Fig. 9: the engine alone. The time that one batch of equal requests takes, under either kind of scheduling."""

from __future__ import annotations

import statistics

import msgspec

from orcaserve.bench import measures
from orcaserve.bench.client import Record
from orcaserve.bench.paper.engine import orca, static
from orcaserve.bench.paper.lab import Lab, scaled
from orcaserve.bench.paper.section import Section, listed, times
from orcaserve.bench.report import number

TITLE = "The engine alone (Fig. 9)"
BATCHES = (1, 2, 4, 8, 16, 32)
PROMPTS, OUTPUT = (32, 128), 32
AS_GOOD = 1.1  # a quotient up to which two engines count as equally fast
FLAT = 1.5  # an iteration of 8 requests that takes longer than this, by one of 1, is not bound by reading weights


class Point(msgspec.Struct, frozen=True):
    """Seconds per batch under both, medians of the rounds. step: of an iteration that decodes, without prompts."""

    prompt: int
    batch: int
    static: float
    orca: float
    step: float


class Alone(msgspec.Struct, frozen=True):
    """overhead: the share of the time that scheduler and loop took, at the largest batch."""

    output: int
    rounds: int
    points: list[Point]
    overhead: float


def measure(lab: Lab) -> Alone:
    factor = lab.factor(max(PROMPTS) + OUTPUT)
    output = scaled(OUTPUT, factor)
    points, outside = [], []
    for prompt in (scaled(tokens, factor) for tokens in PROMPTS):
        for batch in BATCHES:
            work = lab.work(f"burst:in={prompt},out={output},n={batch}")
            walls: dict[bool, list[float]] = {False: [], True: []}
            steps = []
            for _ in range(lab.effort.rounds):
                for setup in (static(batch), orca(batch)):
                    trial = lab.run(work, setup, f", {prompt} tokens in")
                    wall = measures.wall(trial.records)
                    walls[setup.policy.request_level].append(wall)
                    if not setup.policy.request_level:
                        steps.append(_step(trial.records))
                        outside.append((batch, 1 - trial.busy / wall))
            points.append(
                Point(
                    prompt,
                    batch,
                    static=statistics.median(walls[True]),
                    orca=statistics.median(walls[False]),
                    step=statistics.median(steps),
                )
            )
    overhead = statistics.median(share for batch, share in outside if batch == max(BATCHES))
    return Alone(output, lab.effort.rounds, points, overhead)


def _step(records: list[Record]) -> float:
    """Seconds of an iteration in which all decode."""
    gaps = measures.times("itl", records)
    return statistics.median(gaps) if gaps else 0.0


def section(found: Alone) -> Section:
    worst = max(point.orca / point.static for point in found.points)
    mean = statistics.geometric_mean([point.orca / point.static for point in found.points])
    said = [
        f"Iteration-level scheduling takes {mean:.2f} times the static batch's time on average, {worst:.2f} at most."
    ]
    for prompt in sorted({point.prompt for point in found.points}):
        of = {point.batch: point for point in found.points if point.prompt == prompt}
        small, large = of[min(of)], of[max(of)]
        said.append(
            f"With {prompt} tokens in, {large.batch} requests take {large.orca / small.orca:.1f} times as long as one."
        )
    surprises = []
    if mean > AS_GOOD:
        surprises.append(f"The iteration-level engine is slower alone: {mean:.2f} times the static one's time.")
    first = [point for point in found.points if point.prompt == found.points[0].prompt]
    step = {point.batch: point.step for point in first}
    if step[1] > 0 and step[8] > FLAT * step[1]:
        surprises.append(
            f"An iteration that decodes 8 requests takes {step[8] / step[1]:.1f} times as long as one of a single "
            "request: time goes by for every request, in Python or in attention, not for reading the weights once. On "
            "such a small model batching saves less than on a large one, and every ratio below is smaller for it."
        )
    return Section(
        title=TITLE,
        look="Where all requests are equal, iteration-level scheduling has nothing to win: the two lines should lie "
        "on each other, and rise more slowly than the batch grows.",
        found=said,
        surprises=surprises,
        head=["tokens in", "batch", "static, s", "orca, s", "orca / static", "decode iteration, ms"],
        rows=[
            [
                str(point.prompt),
                str(point.batch),
                number(point.static),
                number(point.orca),
                times(point.orca / point.static),
                number(1000 * point.step),
            ]
            for point in found.points
        ],
        notes=[
            f"Requests of {listed([str(p) for p in sorted({p.prompt for p in found.points})])} tokens in and "
            f"{found.output} out, all at once, one batch; medians of {found.rounds} rounds, the two in turn, on the "
            f"same kernels. Scheduler and loop take {100 * found.overhead:.1f} % of the time at the largest batch."
        ],
    )
