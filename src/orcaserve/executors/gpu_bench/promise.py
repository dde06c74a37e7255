"""`promise`: requests get the same tokens alone, in threes and in a crowd, whatever their prompts are cut into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orcaserve.bench.gpu.report import Line
from orcaserve.core.request import NewRequest
from orcaserve.executors.gpu_bench.crowd import Outcome, crowd, draw_requests
from orcaserve.executors.gpu_bench.lab import Lab, scheduler, sizes_of

CHUNK = 256  # tokens of an iteration where requests run alone or in threes
TEMPERATURES = (0.0, 0.8)  # half of the requests are greedy


def promise(lab: Lab) -> Iterator[Line]:
    """The first half of the requests is run again alone, the second in threes."""
    plan = lab.plan
    requests = draw_requests(
        plan.promised,
        plan.promise_prompts,
        plan.promise_outputs,
        sizes_of(plan.promise_model).vocab,
        temperatures=TEMPERATURES,
        seed=1,
    )
    longest = plan.promise_prompts[1] + plan.promise_outputs[1]
    rows, half = plan.shared_rows, len(requests) // 2
    engine = lab.engine(
        plan.promise_model, rows=rows, batch_tokens=plan.batch_tokens, longest=longest, tokens=rows * longest
    )

    def run(some: Sequence[NewRequest], rows: int, batch_tokens: int) -> Outcome:
        return crowd(engine.device, scheduler(engine, rows=rows, batch_tokens=batch_tokens), lab.watch, some)

    together = run(requests, rows, plan.batch_tokens)
    yield Line(
        what=f"{plan.promise_model}: {len(requests)} requests, up to {rows} in an iteration", seconds=together.seconds
    )
    for what, some, few in (("one by one", requests[:half], 1), ("in threes", requests[half:], 3)):
        again = run(some, few, CHUNK)
        equal = sum(tokens == together.tokens[id] for id, tokens in again.tokens.items())
        yield Line(
            what=f"again {what}, at most {CHUNK} tokens an iteration",
            seconds=again.seconds,
            note=f"{equal} of {len(some)} answers have the same tokens ({again.num_tokens} in all)",
            wrong=equal != len(some),
        )
