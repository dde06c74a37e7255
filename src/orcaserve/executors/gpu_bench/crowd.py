"""`crowd`: requests that are all there at once, through the engine's own scheduler and loop, to their end."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import msgspec

from orcaserve.bench.client import BenchError
from orcaserve.bench.paper.engine import Device
from orcaserve.core.batch import Batch
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler
from orcaserve.engine.executor import Executor, Pending
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Command, Step, Submit
from orcaserve.ops.gpu.stopwatch import Mark, Stopwatch


class Outcome(msgspec.Struct, frozen=True):
    """tokens: what each request got, by its id. seconds: from the first request to the last token.

    busy: of these, those in which the device was at work. iterations: how many there were.
    """

    tokens: dict[int, list[int]]
    seconds: float
    busy: float
    iterations: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))


def draw_requests(
    count: int,
    prompts: tuple[int, int],
    outputs: tuple[int, int],
    vocab: int,
    *,
    temperatures: Sequence[float],
    seed: int,
) -> list[NewRequest]:
    """Lengths are uniform, the ends included; temperatures in turn; nothing ends a request before its length."""
    rng = random.Random(seed)  # noqa: S311
    requests = []
    for id in range(count):
        prompt = tuple(rng.randrange(vocab) for _ in range(rng.randint(*prompts)))
        temperature = temperatures[id % len(temperatures)]
        requests.append(
            NewRequest(
                id=id,
                token_ids=prompt,
                num_prompt=len(prompt),
                max_tokens=rng.randint(*outputs),
                params=SamplingParams(temperature=temperature, ignore_eos=True),
                seed=rng.getrandbits(63),
            )
        )
    return requests


def crowd(device: Device, scheduler: Scheduler, watch: Stopwatch, requests: Sequence[NewRequest]) -> Outcome:
    """Raises BenchError if a request fails."""
    device.forget_all()
    clients, watched = _Clients(requests), _Watched(device, watch)
    loop = EngineLoop(scheduler, watched, clients, clients, time.perf_counter)
    began = time.perf_counter()
    while clients.num_open:
        loop.step()
    seconds = time.perf_counter() - began
    watch.wait()
    return Outcome(clients.tokens, seconds, watched.busy(), len(watched.spans))


class _Clients:
    """Inbox and outbox. Owner of what has come."""

    def __init__(self, requests: Sequence[NewRequest]) -> None:
        self._commands: list[Command] = [Submit(request) for request in requests]
        self.tokens: dict[int, list[int]] = {request.id: [] for request in requests}
        self.num_open = len(requests)

    def take(self, block: bool) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands

    def put(self, step: Step) -> None:
        for output in step.outputs:
            if output.error is not None:
                raise BenchError(f"request {output.id}: {output.error}")
            self.tokens[output.id] += output.token_ids
            self.num_open -= output.finish_reason is not None


class _Watched:
    """An executor whose iterations are marked on the device. Owner of the marks.

    spans: for each iteration the marks around it, and host seconds of its submission if the device had nothing to do.
    """

    def __init__(self, executor: Executor, watch: Stopwatch) -> None:
        self._executor = executor
        self._watch = watch
        self.spans: list[tuple[Mark, Mark, float]] = []

    def submit(self, batch: Batch) -> Pending:
        waits = not self.spans or self._watch.is_reached(self.spans[-1][1])
        first, began = self._watch.mark(), time.perf_counter()
        pending = self._executor.submit(batch)
        took = time.perf_counter() - began
        self.spans.append((first, self._watch.mark(), took if waits else 0.0))
        return pending

    def busy(self) -> float:
        """Seconds that the device was at work, at least: where it had nothing to do, a submission counts as waiting."""
        return sum(self._busy())

    def _busy(self) -> Iterator[float]:
        for first, second, waited in self.spans:
            yield max(0.0, self._watch.seconds(first, second) - waited)
