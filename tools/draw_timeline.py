"""Draws what two ways to schedule do with the same requests: a lane each, time to the right.

    python tools/draw_timeline.py docs/figures/static-vs-iteration.png
    python tools/draw_timeline.py docs/figures/chunked-prefill.png chunked-prefill

Every panel comes from the engine's own scheduler and loop on a virtual clock, by way of a step log, as
`orcaserve explain --figure` draws one. Needs matplotlib (the extra `plots`).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from itertools import pairwise

import msgspec
from matplotlib.figure import Figure

from orcaserve.bench.draw_log import lanes, legend
from orcaserve.core.policy import POLICIES, Policy
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.step_log import Header, StepLog, read
from orcaserve.sim.executor import LinearCost
from orcaserve.sim.run import Arrival, simulate
from orcaserve.sim.story import stories

COST = LinearCost(per_iteration=0.05, per_token=0.001)
DEFAULT, ORCA = POLICIES["default"], POLICIES["orca"]


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """panels: policy and what stands above it. rows, tokens: most of them in an iteration. blocks: of 4 tokens.

    pauses: whether to show where each token came, and to tell the longest time between two of an answer.
    """

    panels: tuple[tuple[Policy, str], ...]
    workload: Callable[[], list[Arrival]]
    rows: int = 4
    tokens: int = 128
    blocks: int = 400
    pauses: bool = False


def mixed(count: int = 14) -> list[Arrival]:
    """Prompts and outputs of all lengths, one after the other."""
    rng = random.Random(4)  # noqa: S311
    return [Arrival(0.12 * i, rng.randint(16, 160), rng.randint(3, 40)) for i in range(count)]


def a_long_prompt() -> list[Arrival]:
    """Six streams that run, and then one who brings 1 200 tokens."""
    return [*(Arrival(0.05 * i, 24, 40) for i in range(6)), Arrival(0.8, 1200, 12)]


def chats(count: int = 10) -> list[Arrival]:
    """Conversations that begin with the same 320 tokens."""
    shared = tuple(range(10_000, 10_320))
    own = [tuple(range(1000 * i, 1000 * i + 40)) for i in range(count)]
    return [Arrival(0.25 * i, 360, 16, prompt_ids=shared + own[i]) for i in range(count)]


def short_answers(count: int = 16) -> list[Arrival]:
    """Requests that may generate far more than they will."""
    rng = random.Random(7)  # noqa: S311
    return [Arrival(0.03 * i, rng.randint(24, 72), rng.randint(20, 60)) for i in range(count)]


PICTURES = {
    "static-vs-iteration": Picture(
        panels=(
            (POLICIES["static"], "Request-level (--policy static): the batch is closed until its longest member ends"),
            (DEFAULT, "Iteration-level scheduling (default): who has ended leaves, who waits joins, every iteration"),
        ),
        workload=mixed,
    ),
    "selective-batching": Picture(
        panels=(
            (POLICIES["stacked"], "Without selective batching (--policy stacked): only equal rows share an iteration"),
            (DEFAULT, "With it (default): prompts and decodes of any length go together"),
        ),
        workload=mixed,
    ),
    "paged-kv": Picture(
        panels=(
            (ORCA, "Room for prompt and max_tokens set aside at the start (--policy orca): blocks lack, rows are free"),
            (
                DEFAULT,
                "Blocks as tokens come (default): more requests at a time; when blocks lack, the youngest yields",
            ),
        ),
        workload=short_answers,
        rows=16,
        blocks=120,
    ),
    "chunked-prefill": Picture(
        panels=(
            (ORCA, "Whole prompts (--policy orca): six streams stand still while request 6 is read"),
            (DEFAULT, "Chunks (default, at most 64 tokens an iteration): they go on. White lines are tokens"),
        ),
        workload=a_long_prompt,
        rows=8,
        tokens=64,
        pauses=True,
    ),
    "prefix-cache": Picture(
        panels=(
            (msgspec.structs.replace(DEFAULT, prefix_cache=False), "Every prompt is computed whole"),
            (DEFAULT, "With the prefix cache (default): what the prompts have in common is computed once"),
        ),
        workload=chats,
        rows=8,
        blocks=1200,
    ),
}


def draw(path: str, name: str = "static-vs-iteration") -> None:
    picture = PICTURES[name]
    arrivals = picture.workload()
    figure = Figure(figsize=(11, 2.2 + 0.36 * len(arrivals)), dpi=130, layout="constrained")
    panels = figure.subplots(len(picture.panels), 1, sharex=True)
    seen: set[str] = set()
    for panel, (policy, words) in zip(panels, picture.panels, strict=True):
        config = SchedulerConfig(
            policy=policy,
            max_batch_size=picture.rows,
            max_batch_tokens=picture.tokens,
            num_blocks=picture.blocks,
            block_size=4,
        )
        lines = bytearray()
        records, _ = simulate(arrivals, config, COST, witness=StepLog(Header(config=config), lines.extend))
        end = max(record.token_times[-1] for record in records)
        seen |= lanes(panel, stories(read(bytes(lines))[0]))
        panel.axvline(end, color="#444", linewidth=1, linestyle=":")
        mean = sum(record.latency for record in records) / len(records)
        told = f"all done after {end:.1f} s, mean latency {mean:.1f} s"
        if picture.pauses:
            pause = max(b - a for record in records for a, b in pairwise(record.token_times))
            for lane, record in enumerate(records):
                panel.vlines(record.token_times, lane - 0.4, lane + 0.4, color="white", linewidth=1)
            told += f", longest pause in an answer {pause:.2f} s"
        panel.set_title(f"{words}\n{told}", fontsize=10)
        print(f"{path}: {policy.name}: {told}")
    panels[-1].set_xlabel(f"seconds (virtual clock; at most {picture.rows} requests per iteration)")
    legend(figure, seen)
    figure.savefig(path)


if __name__ == "__main__":
    draw(*sys.argv[1:3])
