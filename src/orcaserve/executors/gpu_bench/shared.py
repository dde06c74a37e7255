"""`shared`: the benchmark that others publish: many requests at once, and output tokens a second until the last one.

Prompts and outputs have uniform lengths, temperature 0.6, no end tokens: nano-vllm's choice, which others took over.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from orcaserve.bench.gpu.report import Line
from orcaserve.bench.gpu.roofline import least_seconds_of
from orcaserve.core.request import NewRequest
from orcaserve.executors.gpu_bench.crowd import Outcome, crowd, draw_requests
from orcaserve.executors.gpu_bench.lab import BLOCK, Lab, scheduler, sizes_of

WARM = 8  # tokens of the longest output of the run that does not count
SPARE = 1.1  # times the tokens that the requests come to on average, once all are half done


def shared_requests(lab: Lab, vocab: int) -> list[NewRequest]:
    plan = lab.plan
    return draw_requests(
        plan.shared_requests, plan.shared_prompts, plan.shared_outputs, vocab, temperatures=(0.6,), seed=0
    )


def shared(lab: Lab) -> Iterator[Line]:
    """Of every model: all at once, then one request alone."""
    for model in lab.plan.shared_models:
        yield from _shared(lab, model)


def _shared(lab: Lab, model: str) -> Iterator[Line]:
    plan = lab.plan
    requests = shared_requests(lab, sizes_of(model).vocab)
    engine = lab.engine(
        model,
        rows=plan.shared_rows,
        batch_tokens=plan.batch_tokens,
        longest=plan.shared_prompts[1] + plan.shared_outputs[1],
        tokens=_most_tokens([(len(one.token_ids), one.max_tokens) for one in requests], plan.shared_rows),
    )

    def run(some: list[NewRequest]) -> Outcome:
        decides = scheduler(engine, rows=plan.shared_rows, batch_tokens=plan.batch_tokens)
        return crowd(engine.device, decides, lab.watch, some)

    # brings in all kernels at all batch sizes
    run([msgspec.structs.replace(one, max_tokens=1 + one.id % WARM) for one in requests])
    yield _line(lab, model, requests, run(requests))
    alone = [msgspec.structs.replace(requests[0], max_tokens=plan.alone)]
    yield _line(lab, model, alone, run(alone))


def _line(lab: Lab, model: str, requests: list[NewRequest], found: Outcome) -> Line:
    """The limit: every iteration as short as the card allows, and nothing between them."""
    lengths = [(len(one.token_ids), one.max_tokens) for one in requests]
    tokens = sum(outputs for _, outputs in lengths)
    count = f"{len(requests)} requests" if len(requests) > 1 else "1 request"
    return Line(
        what=f"{model}: {count}, {sum(prompt for prompt, _ in lengths)} tokens in, {tokens} out",
        seconds=found.seconds,
        rate=found.num_tokens / found.seconds,
        unit="tokens/s",
        limit=tokens / least_seconds_of(lab.card, sizes_of(model), lengths, lab.plan.shared_rows),
        note=f"{found.iterations} iterations; the GPU was at work {found.busy / found.seconds:.1%} of it, at least",
        wrong=found.num_tokens != tokens,
    )


def _most_tokens(lengths: list[tuple[int, int]], rows: int) -> int:
    """That requests hold at a time, where all go step by step from the start, and `rows` of them run; an estimate."""
    most = 0
    for step in range(max(output for _, output in lengths)):
        held = sorted((prompt + step for prompt, output in lengths if output > step), reverse=True)
        most = max(most, sum(held[:rows]))
    return int(most * SPARE) + rows * BLOCK
