"""The ladder: one trace, and one idea more on each rung, from static batching to the prefix cache."""

from __future__ import annotations

import statistics

import msgspec

from orcaserve.bench import measures
from orcaserve.bench.paper.engine import Setup
from orcaserve.bench.paper.lab import Lab, scaled
from orcaserve.bench.paper.section import Section, times
from orcaserve.bench.report import number
from orcaserve.core.policy import DEFAULT, ORCA, STACKED, STATIC

TITLE = "One idea at a time (ablation)"
SYSTEM, WORDS, ANSWER, TURNS = 96, (8, 24), (16, 128), (2, 4)
LIMIT = 256  # tokens that everybody declares as the longest output
CHUNK = 128  # tokens of an iteration where prompts are cut
LONGEST = SYSTEM + TURNS[1] * WORDS[1] + (TURNS[1] - 1) * ANSWER[1] + LIMIT
AT_ONCE = 3  # requests of the longest kind that the KV memory holds
_PAGED = msgspec.structs.replace(ORCA, name="paged", reserve=False)
_CHUNKED = msgspec.structs.replace(DEFAULT, name="chunked", prefix_cache=False)
RUNGS = {
    "static": STATIC,
    "iteration-level": STACKED,
    "+ selective batching": ORCA,
    "+ paged KV": _PAGED,
    "+ chunked prefill": _CHUNKED,
    "+ prefix cache": DEFAULT,
}


class Rung(msgspec.Struct, frozen=True):
    """throughput in requests/s; latency: median normalised, s/token; gap: p99 between two tokens, s.

    rows: requests of an iteration, on average. cached: prompt tokens that the prefix cache spared.
    """

    name: str
    throughput: float
    latency: float
    ttft: float | None
    gap: float | None
    rows: float
    cached: int
    preemptions: int


class Ladder(msgspec.Struct, frozen=True):
    workload: str
    requests: int
    prompt_tokens: int
    slots: int
    rungs: list[Rung]


def measure(lab: Lab) -> Ladder:
    factor = lab.factor(LONGEST)
    system, limit = scaled(SYSTEM, factor), scaled(LIMIT, factor)
    (a, b), (c, d) = ((scaled(tokens, factor) for tokens in ends) for ends in (WORDS, ANSWER))
    # All sessions begin at nearly the same time, so that the machine is full throughout.
    sessions = -(-lab.effort.requests * lab.effort.burst // 3)
    text = (
        f"chat:sessions={sessions},rate=1000,turns={TURNS[0]}-{TURNS[1]},think=0.01,"
        f"system={system},in={a}-{b},out={c}-{d}"
    )
    work = lab.work(text)
    slots = AT_ONCE * scaled(LONGEST, factor)
    setups = [
        # A static batch is what memory holds.
        Setup(name=name, policy=policy, max_batch_size=32, slots=slots, batch_tokens=CHUNK, max_tokens=limit)
        for name, policy in RUNGS.items()
    ]
    rungs = [
        Rung(
            trial.setup,
            throughput=measures.request_rate(trial.records) or 0.0,
            latency=measures.normalised_latency(trial.records),
            ttft=measures.ttft(trial.records, 0.5),
            gap=measures.quantile(measures.times("itl", trial.records), 0.99),
            rows=statistics.mean(sample.rows for sample in trial.samples),
            cached=trial.cached_tokens,
            preemptions=trial.preemptions,
        )
        for trial in lab.in_turn(work, setups, "all rungs")
    ]
    return Ladder(text, len(work.items), sum(len(item.prompt_ids) for item in work.items), slots, rungs)


def section(found: Ladder) -> Section:
    rungs = {rung.name: rung for rung in found.rungs}
    static, stacked, orca, paged, chunked, last = found.rungs
    surprises = []
    if stacked.throughput < static.throughput:
        share = times(stacked.throughput / static.throughput)
        surprises.append(
            f"Iteration-level scheduling alone is slower than static batching ({share}), with {stacked.rows:.1f} "
            "requests in an iteration: what cannot be stacked runs one after the other. It is the reason that the "
            "paper gives for selective batching."
        )
    for better, worse in ((orca, static), (orca, stacked), (paged, orca), (last, chunked)):
        if better.throughput < worse.throughput:
            surprises.append(f"“{better.name}” is slower than “{worse.name}”.")
    if (chunked.gap or 0) > (paged.gap or 0):
        surprises.append("Chunked prefill does not shorten the longest gaps between tokens.")
    return Section(
        title=TITLE,
        look="Each rung adds one idea to the one above it on the same requests: without selective batching hardly "
        "anybody can share an iteration; chunked prefill is there for the gaps between tokens, not for throughput.",
        found=[
            f"From “{static.name}” to “{last.name}” throughput grows {times(last.throughput / static.throughput)}; "
            f"selective batching makes {times(orca.throughput / stacked.throughput)} of that, paged KV "
            f"{times(paged.throughput / orca.throughput)}, the prefix cache "
            f"{times(last.throughput / chunked.throughput)}.",
            f"The longest gaps between tokens (p99) are {_ms(paged.gap)} with whole prompts and {_ms(chunked.gap)} "
            "with chunked ones.",
            f"The prefix cache spared {100 * last.cached / found.prompt_tokens:.0f} % of the prompt tokens.",
        ],
        surprises=surprises,
        head=[
            "rung",
            "requests/s",
            "by the one above",
            "by static",
            "s/token (median)",
            "TTFT p50, s",
            "gap p99, ms",
            "rows",
        ],
        rows=[
            [
                rung.name,
                number(rung.throughput),
                "" if before is None else times(rung.throughput / before.throughput),
                times(rung.throughput / static.throughput),
                number(rung.latency),
                number(rung.ttft),
                "" if rung is static else number(1000 * (rung.gap or 0)),
                f"{rung.rows:.1f}",
            ]
            for before, rung in zip([None, *found.rungs], rungs.values(), strict=False)
        ],
        notes=[
            f"{found.requests} requests, `{found.workload}`: chats that begin with the same system prompt and repeat "
            f"what was said. KV memory for {found.slots} tokens; everybody declares the same longest output and ends "
            f"at its own. rows: requests of an iteration, on average. Chunks are of {CHUNK} tokens. A static batch "
            "returns all its tokens at its end, so that it has no gaps."
        ],
    )


def _ms(seconds: float | None) -> str:
    return f"{number(1000 * (seconds or 0))} ms"
