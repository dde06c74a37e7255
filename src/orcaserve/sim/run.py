"""`simulate`: a list of arrivals through the real scheduler and loop, and when each request got each token."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from orcaserve.core.batch import Batch
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.loop import EngineLoop, Witness
from orcaserve.engine.messages import Abort, Command, Step, Submit
from orcaserve.sim.cost import Seconds
from orcaserve.sim.executor import SimExecutor, VirtualClock

_PARAMS = SamplingParams()


class Arrival(msgspec.Struct, frozen=True):
    """One request of a workload: when it comes (seconds), its prompt and its output in tokens.

    prompt_ids, output_ids: the tokens, where a prefix cache may find something; () stands for a prompt like no other.
    leaves: when its client hangs up, if that is before its end. tenant, priority, deadline: as in NewRequest.
    """

    time: float
    num_prompt: int
    num_output: int
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    leaves: float | None = None
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.time < float("inf"):
            raise ValueError(f"a request comes at 0 seconds or later, not at {self.time}")
        if self.num_prompt < 1 or self.num_output < 1:
            raise ValueError(
                f"a request has a prompt and an output of 1 token or more, not {self.num_prompt} and {self.num_output}"
            )
        if len(self.prompt_ids) not in (0, self.num_prompt):
            raise ValueError(f"a prompt of {self.num_prompt} tokens has {len(self.prompt_ids)} ids")


class Iteration(msgspec.Struct, frozen=True):
    """One iteration as it ran: when it was submitted and which rows it had, as (request, start, tokens, samples)."""

    time: float
    rows: tuple[tuple[int, int, int, bool], ...]


class Record(msgspec.Struct, frozen=True):
    """What one request saw: its arrival and the times at which its tokens came back, in seconds.

    places: the row of the batch that each token came from, from 0. num_cached: prompt tokens that the cache spared.
    """

    arrival: float
    token_times: tuple[float, ...]
    places: tuple[int, ...] = ()
    num_cached: int = 0

    @property
    def latency(self) -> float:
        return self.token_times[-1] - self.arrival

    @property
    def normalised_latency(self) -> float:
        """Seconds per generated token, the paper's measure."""
        return self.latency / len(self.token_times)


class World:
    """Inbox and outbox of a simulated engine; owner of what has arrived and what has come back."""

    def __init__(self, arrivals: Sequence[Arrival], clock: VirtualClock) -> None:
        events = [(arrival.time, id, False) for id, arrival in enumerate(arrivals)]
        events += [(arrival.leaves, id, True) for id, arrival in enumerate(arrivals) if arrival.leaves is not None]
        self._arrivals = list(arrivals)
        self._coming = deque(sorted(events, key=lambda event: event[0]))
        self._clock = clock
        self._open = set(range(len(arrivals)))
        self.token_times: list[list[float]] = [[] for _ in arrivals]
        self.places: list[list[int]] = [[] for _ in arrivals]
        self.num_cached = [0] * len(arrivals)

    def offer(self, arrival: Arrival) -> int:
        """One more request, which comes no earlier than those before it; returns its place among them."""
        id = len(self._arrivals)
        self._arrivals.append(arrival)
        self._open.add(id)
        self.token_times.append([])
        self.places.append([])
        self.num_cached.append(0)
        insort(self._coming, (arrival.time, id, False))
        if arrival.leaves is not None:
            insort(self._coming, (arrival.leaves, id, True))
        return id

    @property
    def is_open(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._open)

    def is_unfinished(self, id: int) -> bool:
        """Whether this request has not ended."""
        return id in self._open

    def take(self, block: bool) -> list[Command]:
        commands: list[Command] = []
        coming = self._coming
        if block and coming:
            self._clock.advance_to(coming[0][0])
        while coming and coming[0][0] <= self._clock.now:
            time, id, leaves = coming.popleft()
            if id not in self._open:  # it has left before it was let in, or has ended
                continue
            if not leaves:
                commands.append(Submit(self._request(id), self._clock.now - time))
            else:
                self._open.discard(id)
                commands.append(Abort(id))
        return commands

    def put(self, step: Step) -> None:
        now = self._clock.now
        for place, output in enumerate(step.outputs):
            if output.error is not None:
                raise ValueError(f"request {output.id} of the workload: {output.error}")
            if output.token_ids:
                self.token_times[output.id].append(now)
                self.places[output.id].append(place)
            if output.num_cached:
                self.num_cached[output.id] = output.num_cached
            if output.finish_reason is not None:
                self._open.discard(output.id)

    def records(self) -> list[Record]:
        """What every request has seen, in the order of their places."""
        seen = zip(self._arrivals, self.token_times, self.places, self.num_cached, strict=True)
        return [Record(arrival.time, tuple(times), tuple(places), cached) for arrival, times, places, cached in seen]

    def sample(self, id: int, position: int) -> int:
        arrival = self._arrivals[id]
        at = position - arrival.num_prompt
        return arrival.output_ids[at] if at < len(arrival.output_ids) else 0

    def _request(self, id: int) -> NewRequest:
        arrival = self._arrivals[id]
        return NewRequest(
            id=id,
            token_ids=arrival.prompt_ids or (-1 - id,) * arrival.num_prompt,
            num_prompt=arrival.num_prompt,
            max_tokens=arrival.num_output,
            params=_PARAMS,
            tenant=arrival.tenant,
            priority=arrival.priority,
            deadline=arrival.deadline,
        )


def simulate(
    arrivals: Sequence[Arrival],
    config: SchedulerConfig,
    cost: Callable[[Batch], Seconds],
    host: Callable[[Batch], float] | None = None,
    *,
    keep_iterations: bool = True,
    scheduler: Callable[[SchedulerConfig], Scheduler] = Scheduler,
    witness: Witness | None = None,
) -> tuple[list[Record], list[Iteration]]:
    """Runs a workload to its end. Every request that does not leave generates exactly `num_output` tokens.

    cost: seconds of a batch in every stage, without copies: they take `config.swap.copy_seconds` a block. host: seconds
    before a batch is submitted. keep_iterations: False saves their memory. witness: is told all that the loop does.
    Raises ValueError for a request that the KV cache can never hold.
    """
    clock = VirtualClock()
    world = World(arrivals, clock)
    iterations: list[Iteration] = []

    def noted(batch: Batch) -> Seconds:
        rows = tuple((row.id, row.start, row.num_tokens, row.samples) for row in batch.rows)
        iterations.append(Iteration(clock.now, rows))
        return cost(batch)

    copy_seconds = config.swap.copy_seconds if config.swap else 0.0
    executor = SimExecutor(noted if keep_iterations else cost, clock, host, world.sample, copy_seconds)
    loop = EngineLoop(scheduler(config), executor, world, world, clock, witness)
    while world.is_open:
        loop.step()
    return world.records(), iterations
