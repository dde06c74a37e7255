"""`simulate`: a list of arrivals through the real scheduler and loop, and when each request got each token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from orcaserve.core.batch import Batch
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Command, Step, Submit
from orcaserve.sim.executor import SimExecutor, VirtualClock


class Arrival(msgspec.Struct, frozen=True):
    """One request of a workload: when it comes (seconds), its prompt and its output in tokens."""

    time: float
    num_prompt: int
    num_output: int


class Iteration(msgspec.Struct, frozen=True):
    """One iteration as it ran: when it was submitted and which rows it had, as (request, start, tokens, samples)."""

    time: float
    rows: tuple[tuple[int, int, int, bool], ...]


class Record(msgspec.Struct, frozen=True):
    """What one request saw: its arrival and the times at which its tokens came back, in seconds."""

    arrival: float
    token_times: tuple[float, ...]

    @property
    def latency(self) -> float:
        return self.token_times[-1] - self.arrival

    @property
    def normalised_latency(self) -> float:
        """Seconds per generated token, the paper's measure."""
        return self.latency / len(self.token_times)


class _World:
    """Inbox and outbox of a simulated engine; owner of what has arrived and what has come back."""

    def __init__(self, arrivals: Sequence[Arrival], clock: VirtualClock) -> None:
        self._coming = deque(sorted(enumerate(arrivals), key=lambda item: item[1].time))
        self._clock = clock
        self.token_times: list[list[float]] = [[] for _ in arrivals]
        self.num_open = len(arrivals)

    def take(self, block: bool) -> list[Command]:
        if block and self._coming:
            self._clock.advance_to(self._coming[0][1].time)
        commands: list[Command] = []
        while self._coming and self._coming[0][1].time <= self._clock.now:
            id, arrival = self._coming.popleft()
            token_ids = (id,) * arrival.num_prompt
            commands.append(
                Submit(
                    NewRequest(
                        id=id,
                        token_ids=token_ids,
                        num_prompt=arrival.num_prompt,
                        max_tokens=arrival.num_output,
                        params=SamplingParams(),
                    )
                )
            )
        return commands

    def put(self, step: Step) -> None:
        for output in step.outputs:
            if output.error is not None:
                raise ValueError(f"request {output.id} of the workload: {output.error}")
            self.token_times[output.id].extend(self._clock.now for _ in output.token_ids)
            self.num_open -= output.finish_reason is not None


def simulate(
    arrivals: Sequence[Arrival], config: SchedulerConfig, cost: Callable[[Batch], float]
) -> tuple[list[Record], list[Iteration]]:
    """Runs a workload to its end. Every request generates exactly `num_output` ≥ 1 tokens.

    Raises ValueError for a request that the KV cache can never hold.
    """
    clock = VirtualClock()
    world = _World(arrivals, clock)
    iterations: list[Iteration] = []

    def priced(batch: Batch) -> float:
        rows = tuple((row.id, row.start, row.num_tokens, row.samples) for row in batch.rows)
        iterations.append(Iteration(clock.now, rows))
        return cost(batch)

    loop = EngineLoop(Scheduler(config), SimExecutor(priced, clock), world, world, clock)
    while world.num_open:
        loop.step()
    records = [Record(arrival.time, tuple(times)) for arrival, times in zip(arrivals, world.token_times, strict=True)]
    return records, iterations
