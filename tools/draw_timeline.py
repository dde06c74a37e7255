"""Draws what request-level and iteration-level scheduling do with the same requests: a lane each, time to the right.

    python tools/draw_timeline.py docs/figures/static-vs-iteration.png

Both panels come from the engine's own scheduler and loop on a virtual clock. Needs matplotlib (the extra `plots`).
"""

from __future__ import annotations

import random
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from orcaserve.core.policy import POLICIES
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.sim.executor import LinearCost
from orcaserve.sim.run import Arrival, simulate

COST = LinearCost(per_iteration=0.05, per_token=0.001)
COLOURS = {"queued": "#d9dce3", "prefill": "#f2a541", "decode": "#2f6db5", "burned": "#e4572e"}
TITLES = {
    "static": "Request-level batching (--policy static): the batch is closed until its longest member ends",
    "default": "Iteration-level scheduling (default): who has ended leaves, who waits joins, every iteration",
}


def workload(count: int = 14) -> list[Arrival]:
    rng = random.Random(4)  # noqa: S311
    return [Arrival(0.12 * i, rng.randint(16, 160), rng.randint(3, 40)) for i in range(count)]


def draw(path: str) -> None:
    arrivals = workload()
    figure, panels = plt.subplots(2, 1, figsize=(11, 7.2), sharex=True, layout="constrained")
    ends = {}
    for panel, policy in zip(panels, TITLES, strict=True):
        config = SchedulerConfig(
            policy=POLICIES[policy], max_batch_size=4, max_batch_tokens=128, num_blocks=400, block_size=4
        )
        records, iterations = simulate(arrivals, config, COST)
        ends[policy] = max(record.token_times[-1] for record in records)
        first: dict[int, float] = {}
        given = [0] * len(arrivals)
        for i, iteration in enumerate(iterations):
            end = iterations[i + 1].time if i + 1 < len(iterations) else ends[policy]
            for id, start, count, samples in iteration.rows:
                first.setdefault(id, iteration.time)
                burned = not samples and start + count >= arrivals[id].num_prompt and given[id] > 0
                kind = "burned" if burned else "prefill" if start < arrivals[id].num_prompt else "decode"
                given[id] += samples
                panel.broken_barh(
                    [(iteration.time, end - iteration.time)],
                    (id - 0.38, 0.76),
                    facecolor=COLOURS[kind],
                    edgecolor="white",
                    linewidth=0.4,
                )
        for id, arrival in enumerate(arrivals):
            panel.broken_barh(
                [(arrival.time, first[id] - arrival.time)], (id - 0.16, 0.32), facecolor=COLOURS["queued"]
            )
        panel.axvline(ends[policy], color="#444", linewidth=1, linestyle=":")
        mean = sum(record.latency for record in records) / len(records)
        panel.set_title(
            f"{TITLES[policy]}\nall done after {ends[policy]:.1f} s, mean latency {mean:.1f} s", fontsize=10
        )
        panel.set_ylabel("request")
        panel.set_yticks(range(len(arrivals)))
        panel.invert_yaxis()
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[-1].set_xlabel("seconds (virtual clock; at most 4 requests per iteration)")
    labels = {"queued": "waits", "prefill": "prefill", "decode": "decode", "burned": "ended, but computes on"}
    figure.legend(
        handles=[Patch(facecolor=COLOURS[kind], label=label) for kind, label in labels.items()],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.savefig(path, dpi=130)
    print(f"{path}: static {ends['static']:.2f} s, default {ends['default']:.2f} s")


if __name__ == "__main__":
    draw(sys.argv[1])
