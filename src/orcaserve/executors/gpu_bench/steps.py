"""`steps`: what one iteration takes on the device: decodes at several batch sizes, and prompts, invariant and fast."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import get_args

from orcaserve.bench.client import BenchError
from orcaserve.bench.gpu.report import Line
from orcaserve.bench.gpu.roofline import least_seconds, multiplied
from orcaserve.bench.paper.engine import Engine
from orcaserve.core.batch import Batch, RowResult, ScheduledRequest
from orcaserve.core.config import Numerics
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.executors.gpu_bench.lab import AS_IT_IS, BLOCK, Kept, Lab, sizes_of
from orcaserve.ops.gpu.benchmark import fill
from orcaserve.sim.cost import size_of
from orcaserve.sim.shape import ModelShape

READS = 3  # iterations that read prompts, of which the first only warms up
HOLD, LONG_HOLD = 5e-3, 30e-3  # seconds that the device is held, in which the host submits decodes, or prompts


def steps(lab: Lab) -> Iterator[Line]:
    """Of every model, once with each numerics; then with fewer bits, and a mixture of experts."""
    for model in lab.plan.step_models:
        for numerics in get_args(Numerics):
            yield from _steps(lab, model, Kept(numerics=numerics), numerics)
    short = lab.plan.short_model
    yield from _steps(lab, short, Kept(quantization="int8"), "int8 weights")
    yield from _steps(lab, short, Kept(quantization="int4"), "int4 weights")
    yield from _steps(lab, short, Kept(kv_dtype="int8"), "int8 KV")
    yield from _steps(lab, lab.plan.mixture, AS_IT_IS, "invariant")


def _steps(lab: Lab, model: str, kept: Kept, how: str) -> Iterator[Line]:
    plan = lab.plan
    steps, prompt = plan.context + plan.warm + plan.timed, plan.prefill // plan.prompts
    engine = lab.engine(
        model,
        kept=kept,
        rows=max(*plan.batches, plan.prompts, plan.beside + 1),
        batch_tokens=plan.prefill,
        longest=max(steps, prompt + 1, *plan.arriving),
        tokens=BLOCK
        * max(
            max(plan.batches) * _blocks(steps),
            plan.prompts * _blocks(prompt),
            (plan.beside + 2) * max(map(_blocks, (steps, *plan.arriving))),
        ),
    )
    for cache in engine.device.caches:
        fill(cache)
    iterations, sizes, name = _Iterations(engine, lab), sizes_of(model, kept), f"{model}, {how}"
    for batch in plan.batches:
        yield _decoded(lab, sizes, name, batch, iterations.decode(batch, plan.context))
    for length in plan.arriving:
        yield _arriving(lab, sizes, name, length, iterations.arrive(plan.beside, plan.context, length))
    yield _read(lab, sizes, name, iterations.read(plan.prompts, prompt))


def _decoded(lab: Lab, sizes: ModelShape, name: str, batch: int, seconds: float) -> Line:
    context = lab.plan.context
    least = least_seconds(lab.card, sizes, size_of([(context - 1, 1, True)] * batch))
    what = f"{name}: decode of {batch} at {context}"
    return Line(what=what, seconds=seconds, rate=batch / seconds, unit="tokens/s", limit=batch / least)


def _arriving(lab: Lab, sizes: ModelShape, name: str, length: int, seconds: float) -> Line:
    plan = lab.plan
    size = size_of([*[(plan.context - 1, 1, True)] * plan.beside, (0, length, True)])
    return Line(
        what=f"{name}: prompt after prompt of {length} beside a decode of {plan.beside}",
        seconds=seconds,
        rate=1 / seconds,
        unit="iterations/s",
        limit=1 / least_seconds(lab.card, sizes, size),
    )


def _read(lab: Lab, sizes: ModelShape, name: str, seconds: float) -> Line:
    count, length = lab.plan.prompts, lab.plan.prefill // lab.plan.prompts
    size = size_of([(0, length, True)] * count)
    return Line(
        what=f"{name}: {count} prompts of {length}",
        seconds=seconds,
        rate=multiplied(sizes, size) / seconds / 1e12,
        unit="TFLOP/s",
        limit=lab.card.flops / 1e12,
        note=f"{size.tokens / seconds:.0f} tokens/s",
    )


class _Iterations:
    """Batches made by hand, each with the tokens that the one before gave. Owner of the requests' ids and blocks."""

    def __init__(self, engine: Engine, lab: Lab) -> None:
        self._engine = engine
        self._watch = lab.watch
        self._warm, self._timed = lab.plan.warm, lab.plan.timed
        self._rng = random.Random(0)  # noqa: S311
        self._num_steps = 0

    def decode(self, rows: int, context: int) -> float:
        """Median seconds. What the cache holds anyway is taken for what the requests have said."""
        new = self._requests(rows, context)
        tables = self._tables(rows, context + self._warm + self._timed)
        batch = [
            ScheduledRequest(one.id, context - 1, 1, table, samples=True)
            for one, table in zip(new, tables, strict=True)
        ]
        spans = []
        for step in range(self._warm + self._timed):
            seconds, results = self._run(batch, () if step else new, HOLD)
            spans.append(seconds)
            batch = [
                ScheduledRequest(row.id, context + step, 1, (), (row.token_id or 0,), samples=True) for row in results
            ]
        self._engine.device.forget_all()
        return statistics.median(spans[self._warm :])

    def arrive(self, rows: int, context: int, length: int) -> float:
        """Mean seconds, the host's work included where it is not hidden: each iteration is given while one runs.

        In every one another prompt of `length` tokens is read beside `rows` decodes.
        """
        count = self._warm + self._timed
        new, prompts = self._requests(rows, context), self._requests(count, length, first=rows)
        tables = self._tables(rows + 2, max(context + count, length))
        known: dict[int, int] = {}  # of each decode, the token that was drawn for it and has not been told
        waiting, began = None, 0.0
        for step, prompt in enumerate(prompts):
            decodes = [
                ScheduledRequest(
                    id=one.id,
                    start=context - 1 + step,
                    num_tokens=1,
                    new_blocks=() if step else tables[one.id],
                    token_ids=(known[one.id],) if one.id in known else (),
                    samples=True,
                )
                for one in new
            ]
            read = ScheduledRequest(prompt.id, 0, length, tables[rows + step % 2][: _blocks(length)], samples=True)
            batch = Batch(
                step=self._num_steps,
                rows=(*decodes, read),
                new=(prompt,) if step else (*new, prompt),
                freed=(prompts[step - 1].id,) if step else (),
            )
            self._num_steps += 1
            if step == self._warm:
                self._watch.wait()
                began = time.perf_counter()
            pending = self._engine.device.submit(batch)
            if waiting is not None:
                known = {row.id: row.token_id or 0 for row in waiting.result().rows}
            waiting = pending
        self._watch.wait()
        seconds = time.perf_counter() - began
        self._engine.device.forget_all()
        return seconds / self._timed

    def read(self, count: int, length: int) -> float:
        """Median seconds of an iteration that reads so many prompts together, and samples after each."""
        spans = []
        for _ in range(READS):
            new, tables = self._requests(count, length), self._tables(count, length)
            rows = [
                ScheduledRequest(one.id, 0, length, table, samples=True) for one, table in zip(new, tables, strict=True)
            ]
            spans.append(self._run(rows, new, LONG_HOLD)[0])
            self._engine.device.forget_all()
        return statistics.median(spans[1:])

    def _requests(self, count: int, length: int, first: int = 0) -> list[NewRequest]:
        vocab, params = self._engine.vocab_size, SamplingParams(temperature=0.6, ignore_eos=True)
        return [
            NewRequest(
                id=id,
                token_ids=tuple(self._rng.choices(range(vocab), k=length)),
                num_prompt=length,
                max_tokens=self._warm + self._timed + 1,
                params=params,
                seed=id,
            )
            for id in range(first, first + count)
        ]

    def _tables(self, count: int, length: int) -> list[tuple[int, ...]]:
        """Blocks in no order, as they are after an hour of serving."""
        each = _blocks(length)
        blocks = list(range(count * each))
        self._rng.shuffle(blocks)
        return [tuple(blocks[i * each : (i + 1) * each]) for i in range(count)]

    def _run(
        self, rows: Sequence[ScheduledRequest], new: Sequence[NewRequest], hold: float
    ) -> tuple[float, tuple[RowResult, ...]]:
        batch = Batch(step=self._num_steps, rows=tuple(rows), new=tuple(new))
        self._num_steps += 1
        self._watch.hold(hold)
        first = self._watch.mark()
        pending = self._engine.device.submit(batch)
        second = self._watch.mark()
        results = pending.result().rows
        self._watch.wait()
        if wrong := next((row.error for row in results if row.error is not None), None):
            raise BenchError(wrong)
        return self._watch.seconds(first, second), results


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)
