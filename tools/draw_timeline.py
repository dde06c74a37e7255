"""Draws what request-level and iteration-level scheduling do with the same requests: a lane each, time to the right.

    python tools/draw_timeline.py docs/figures/static-vs-iteration.png

Both panels come from the engine's own scheduler and loop on a virtual clock, by way of a step log, as
`orcaserve explain --figure` draws one. Needs matplotlib (the extra `plots`).
"""

from __future__ import annotations

import random
import sys

from matplotlib.figure import Figure

from orcaserve.bench.draw_log import lanes, legend
from orcaserve.core.policy import POLICIES
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.step_log import Header, StepLog, read
from orcaserve.sim.executor import LinearCost
from orcaserve.sim.run import Arrival, simulate
from orcaserve.sim.story import stories

COST = LinearCost(per_iteration=0.05, per_token=0.001)
TITLES = {
    "static": "Request-level batching (--policy static): the batch is closed until its longest member ends",
    "default": "Iteration-level scheduling (default): who has ended leaves, who waits joins, every iteration",
}


def workload(count: int = 14) -> list[Arrival]:
    rng = random.Random(4)  # noqa: S311
    return [Arrival(0.12 * i, rng.randint(16, 160), rng.randint(3, 40)) for i in range(count)]


def draw(path: str) -> None:
    arrivals = workload()
    figure = Figure(figsize=(11, 7.2), dpi=130, layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    ends, seen = {}, set()
    for panel, policy in zip(panels, TITLES, strict=True):
        config = SchedulerConfig(
            policy=POLICIES[policy], max_batch_size=4, max_batch_tokens=128, num_blocks=400, block_size=4
        )
        lines = bytearray()
        records, _ = simulate(arrivals, config, COST, witness=StepLog(Header(config=config), lines.extend))
        ends[policy] = max(record.token_times[-1] for record in records)
        seen |= lanes(panel, stories(read(bytes(lines))[0]))
        panel.axvline(ends[policy], color="#444", linewidth=1, linestyle=":")
        mean = sum(record.latency for record in records) / len(records)
        panel.set_title(
            f"{TITLES[policy]}\nall done after {ends[policy]:.1f} s, mean latency {mean:.1f} s", fontsize=10
        )
    panels[-1].set_xlabel("seconds (virtual clock; at most 4 requests per iteration)")
    legend(figure, seen)
    figure.savefig(path)
    print(f"{path}: static {ends['static']:.2f} s, default {ends['default']:.2f} s")


if __name__ == "__main__":
    draw(sys.argv[1])
