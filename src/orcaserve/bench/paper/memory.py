"""The memory picture: what share of the KV memory holds tokens, by how admission sets it aside."""

from __future__ import annotations

import msgspec

from orcaserve.bench import measures
from orcaserve.bench.paper.drive import Trial
from orcaserve.bench.paper.engine import Setup
from orcaserve.bench.paper.lab import Lab, scaled
from orcaserve.bench.paper.section import Section, times
from orcaserve.bench.report import number
from orcaserve.core.policy import DEFAULT, ORCA

TITLE = "Where the KV memory goes"
PROMPT, MEAN, LIMIT = (32, 512), 128, 1536
LONGEST = PROMPT[1] + LIMIT
AT_ONCE = 4
FILLING = 4  # the first quarter of the iterations fills the memory
DRAWN = 500  # samples that are kept to be drawn
KINDS = {"reserve the most": ORCA, "reserve the exact": ORCA, "paged": DEFAULT}


class Line(msgspec.Struct, frozen=True):
    """Means while requests wait and the memory is full: shares of the memory that hold tokens, that are taken.

    rate: (prompt + generated) tokens/s of the whole run. samples: shares over time, as (seconds, stored, held).
    """

    name: str
    stored: float
    held: float
    rate: float
    preemptions: int
    samples: list[tuple[float, float, float]]


class Memory(msgspec.Struct, frozen=True):
    workload: str
    slots: int
    limit: int
    lines: list[Line]


def measure(lab: Lab) -> Memory:
    factor = lab.factor(LONGEST)
    low, high, mean, limit = (scaled(tokens, factor) for tokens in (*PROMPT, MEAN, LIMIT))
    text = f"burst:in={low}-{high},out=exp{mean}max{limit},n={lab.effort.requests * lab.effort.burst}"
    work, slots = lab.work(text), scaled(AT_ONCE * LONGEST, factor)
    setups = [
        Setup(
            name=name,
            policy=policy,
            max_batch_size=64,
            slots=slots,
            max_tokens=None if name == "reserve the exact" else limit,
        )
        for name, policy in KINDS.items()
    ]
    return Memory(text, slots, limit, [_line(trial) for trial in lab.in_turn(work, setups, "all kinds")])


def _line(trial: Trial) -> Line:
    some = trial.samples[:: -(-len(trial.samples) // DRAWN)]
    shares = [(sample.at, sample.stored / trial.slots, sample.held / trial.slots) for sample in some]
    stored, held = means(trial)
    rate = measures.total_rate(trial.records) or 0.0
    return Line(trial.setup, stored, held, rate, trial.preemptions, shares)


def means(trial: Trial) -> tuple[float, float]:
    """Shares of the memory that hold tokens and that are taken, weighted by time, while it is what others wait for."""
    waiting = [sample for sample in trial.samples if sample.waiting] or trial.samples
    full = waiting[len(waiting) // FILLING :]
    total = sum(sample.seconds for sample in full) * trial.slots
    return (
        sum(sample.seconds * sample.stored for sample in full) / total,
        sum(sample.seconds * sample.held for sample in full) / total,
    )


def section(found: Memory) -> Section:
    most, exact, paged = found.lines
    surprises = []
    if not most.stored < exact.stored < paged.stored:
        surprises.append("The shares that hold tokens do not rise in the order of the table.")
    return Section(
        title=TITLE,
        look="Memory that is set aside for tokens that may come holds nothing meanwhile; paged KV fills nearly all of "
        "it (vLLM's paper: 96 %, against 20 to 38 %).",
        found=[
            f"Of the KV memory {_percent(most.stored)} holds tokens if the longest possible output is reserved, "
            f"{_percent(exact.stored)} if its exact length were known, and {_percent(paged.stored)} if it is paged.",
            f"Throughput is {times(paged.rate / most.rate)} that of the first, and {times(paged.rate / exact.rate)} "
            "that of the second.",
        ],
        surprises=surprises,
        head=["admission", "holds tokens", "set aside", "tokens/s", "preemptions"],
        rows=[
            [line.name, _percent(line.stored), _percent(line.held), number(line.rate), str(line.preemptions)]
            for line in found.lines
        ],
        notes=[
            f"`{found.workload}`; KV memory for {found.slots} tokens. “The most” reserves prompt + {found.limit}, "
            "“the exact” is told what nobody can know, “paged” is the default. Means over the "
            "iterations in which others wait, but for the first quarter of these, which fills the memory."
        ],
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
