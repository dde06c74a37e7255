"""The note's table: what iteration-level scheduling and paged KV gain as the lengths of outputs vary more.

Prompts of one length, all at once; outputs exponential, drawn again above a limit; the same KV memory for all.
"""

from __future__ import annotations

import itertools
import statistics

import msgspec

from orcaserve.bench import measures
from orcaserve.bench.paper.drive import Trial
from orcaserve.bench.paper.engine import Setup
from orcaserve.bench.paper.lab import Lab, scaled
from orcaserve.bench.paper.section import Section, times
from orcaserve.bench.report import number
from orcaserve.core.policy import DEFAULT, ORCA, STATIC

TITLE = "The gain grows with the variance of lengths (the note's table)"
PROMPT, MEAN, LIMITS = 512, 128, (32, 128, 512, 1536)
LONGEST = PROMPT + LIMITS[-1]
MEMORY = 4 * LONGEST  # tokens of KV: 4 requests of the longest kind, as in the note's static batches of 16, 12, 8 and 4
# The note's tokens/s: static (FasterTransformer), continuous (TGI), continuous with paged KV (vLLM), by limit.
NOTE = {32: (2869, 2948, 6121), 128: (1441, 1442, 3592), 512: (558, 707, 2029), 1536: (346, 665, 1898)}
SYSTEMS = ("static", "continuous", "continuous + paged KV")
EVEN = 0.97  # a quotient from which on two throughputs count as equal
GROWTH = 1.5  # what continuous should at least be by static at the last limit


class Row(msgspec.Struct, frozen=True):
    """One limit. note_limit: the note's own.

    In the order of SYSTEMS, rates: (prompt + generated) tokens/s; sizes: requests of an iteration, on average.
    """

    limit: int
    note_limit: int
    static_batch: int
    requests: int
    rates: tuple[float, float, float]
    sizes: tuple[float, float, float]
    preemptions: int

    @property
    def ratios(self) -> tuple[float, float]:
        """Continuous by static, and with paged KV by without."""
        return self.rates[1] / self.rates[0], self.rates[2] / self.rates[1]

    @property
    def note_ratios(self) -> tuple[float, float]:
        static, continuous, paged = NOTE[self.note_limit]
        return continuous / static, paged / continuous


class Variance(msgspec.Struct, frozen=True):
    """Lengths in tokens; slots: of KV memory."""

    prompt: int
    mean: int
    slots: int
    rows: list[Row]


def measure(lab: Lab) -> Variance:
    factor = lab.factor(LONGEST)
    prompt, mean, slots = (scaled(tokens, factor) for tokens in (PROMPT, MEAN, MEMORY))
    rows = []
    for note_limit in LIMITS:
        limit = scaled(note_limit, factor)
        size = slots // _whole(lab, prompt + limit)
        # Static batches are full, so that none suffers from a short last one.
        n = size * -(-lab.effort.requests * lab.effort.burst // size)
        work = lab.work(f"burst:in={prompt},out=exp{mean}max{limit},n={n}")
        setups = [
            Setup(
                name=name,
                policy=policy,
                max_batch_size=size if policy.request_level else 64,
                slots=slots,
                max_tokens=limit,
            )
            for name, policy in zip(SYSTEMS, (STATIC, ORCA, DEFAULT), strict=True)
        ]
        static, continuous, paged = lab.in_turn(work, setups, f"outputs up to {limit}")
        rows.append(
            Row(
                limit,
                note_limit,
                size,
                n,
                rates=(_rate(static), _rate(continuous), _rate(paged)),
                sizes=(_size(static), _size(continuous), _size(paged)),
                preemptions=paged.preemptions,
            )
        )
    return Variance(prompt, mean, slots, rows)


def _rate(trial: Trial) -> float:
    return measures.total_rate(trial.records) or 0.0


def _size(trial: Trial) -> float:
    return statistics.mean(sample.rows for sample in trial.samples)


def _whole(lab: Lab, tokens: int) -> int:
    """Rounded up to whole blocks."""
    size = lab.engine.block_size
    return -(-tokens // size) * size


def section(found: Variance) -> Section:
    first, last = found.rows[0], found.rows[-1]
    gains = [row.ratios[0] for row in found.rows]
    paged = [row.ratios[1] for row in found.rows]
    surprises = []
    if gains[-1] < GROWTH:
        surprises.append(
            f"At the last limit continuous is {times(gains[-1])} static, less than the {GROWTH:g}× expected (the note "
            "has "
            f"{times(last.note_ratios[0])}), with {last.requests} requests."
        )
    if any(b < EVEN * a for a, b in itertools.pairwise(gains)):
        surprises.append(f"The gain does not grow from limit to limit: {', '.join(map(times, gains))}.")
    if min(paged) < EVEN:
        surprises.append(f"Paged KV costs throughput at a limit: {', '.join(map(times, paged))}.")
    return Section(
        title=TITLE,
        look="Continuous by static is about 1 where the limit cuts all outputs to nearly one length, and grows with "
        "their variance; paged KV has a factor of its own, since it does not set memory aside for outputs that never "
        "come.",
        found=[
            f"Continuous by static is {times(gains[0])} at limit {first.limit} and {times(gains[-1])} at {last.limit} "
            f"(the note: {times(first.note_ratios[0])} and {times(last.note_ratios[0])}).",
            f"Paged KV adds {times(statistics.geometric_mean(paged))} on average and {times(paged[-1])} at the last "
            f"limit (the note: {times(statistics.geometric_mean([row.note_ratios[1] for row in found.rows]))} and "
            f"{times(last.note_ratios[1])}): there {last.sizes[2]:.1f} requests share an iteration in the same "
            f"memory, instead of {last.sizes[1]:.1f}; at the first limit {first.sizes[2]:.1f} instead of "
            f"{first.sizes[1]:.1f}.",
        ],
        surprises=surprises,
        head=[
            "limit",
            "requests",
            "static batch",
            *(f"{name}, tokens/s" for name in SYSTEMS),
            "continuous / static",
            "the note's",
            "+ paged / continuous",
            "the note's",
        ],
        rows=[
            [
                str(row.limit),
                str(row.requests),
                str(row.static_batch),
                *(f"{number(rate)} ({size:.1f})" for rate, size in zip(row.rates, row.sizes, strict=True)),
                times(row.ratios[0]),
                times(row.note_ratios[0]),
                times(row.ratios[1]),
                times(row.note_ratios[1]),
            ]
            for row in found.rows
        ],
        notes=[
            f"Prompts of {found.prompt} tokens (the note: {PROMPT}), outputs exponential of mean {found.mean} (the "
            f"note: {MEAN}), all at once; tokens of prompts and outputs by the time until the last one, and in "
            f"brackets the requests of an iteration on average. KV memory for {found.slots} tokens, "
            f"{MEMORY // LONGEST} requests of the longest kind, as in the note. Static batches are the largest that "
            "it holds at the limit. Everybody declares the limit and ends at its own length, which the scheduler does "
            f"not know. The note's limits are {', '.join(map(str, LIMITS))}; its static system is FasterTransformer, "
            "its continuous one TGI, its paged one vLLM, with OPT-13B on one GPU."
        ],
    )
