"""`paper`: Orca's trace under request-level and iteration-level scheduling, and the ladder of ideas, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from orcaserve.bench import measures
from orcaserve.bench.gpu.report import Line
from orcaserve.bench.paper import ladder
from orcaserve.bench.paper.drive import drive
from orcaserve.bench.paper.engine import default, orca, static
from orcaserve.bench.paper.lab import FULL, Watch
from orcaserve.bench.paper.lab import Lab as PaperLab
from orcaserve.bench.workloads.spec import make
from orcaserve.executors.gpu_bench.lab import Lab

ROWS = 32  # requests of an iteration at most, as in the paper
WHOLE = 4096  # tokens of an iteration where prompts are not cut


def paper(lab: Lab) -> Iterator[Line]:
    plan = lab.plan
    longest = plan.paper_longest
    engine = lab.engine(plan.paper_model, rows=ROWS, batch_tokens=WHOLE, longest=longest, tokens=ROWS * longest)
    work = make(plan.trace, vocab=engine.vocab_size, seed=0)
    setups = [setup(ROWS) for setup in (static, orca, default)]
    drive(engine, work, setups[-1])  # brings in the kernels
    for setup in setups:
        trial = drive(engine, work, setup)
        rate = measures.request_rate(trial.records)
        latency = 1000 * measures.normalised_latency(trial.records)
        yield Line(
            what=f"{plan.paper_model}, Orca's trace at once, {setup.name}",
            seconds=measures.wall(trial.records),
            rate=rate,
            unit="requests/s",
            note=f"{latency:.3g} ms/token in the median",
        )
    effort = msgspec.structs.replace(FULL, requests=plan.sessions)  # three times as many sessions / 3
    found = ladder.measure(PaperLab(engine, effort, 0, _Nobody()))
    below = found.rungs[0].throughput
    for rung in found.rungs:
        yield Line(
            what=f"{plan.paper_model}, ladder of {found.requests} requests: {rung.name}",
            rate=rung.throughput,
            unit="requests/s",
            note=f"{rung.throughput / below:.2f}× {found.rungs[0].name}; {rung.rows:.1f} rows; "
            f"gap p99 {1000 * (rung.gap or 0):.3g} ms",
        )


class _Nobody:
    """Watches no run."""

    @contextmanager
    def run(self, label: str, total: int) -> Iterator[Watch]:
        yield self

    def ended(self) -> None:
        pass
