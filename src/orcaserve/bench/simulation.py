"""A workload on a simulated engine: the same requests, records and figures as `bench serve`, in virtual time."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from orcaserve.bench import load_report
from orcaserve.bench.client import Record
from orcaserve.bench.workloads import Work
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.loop import Witness
from orcaserve.engine.step_log import Arrived, Left, Log, Returned, Submitted
from orcaserve.sim import replay
from orcaserve.sim.cost import CostModel, Door
from orcaserve.sim.run import Arrival, simulate
from orcaserve.sim.shape import ModelShape


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """What `simulate fit` writes: a cost model, and the engine it was fitted to."""

    cost: CostModel
    config: SchedulerConfig
    model: ModelShape | None = None
    machine: str = ""


def arrivals_of(work: Work) -> list[Arrival]:
    """A workload's requests, with their token ids only where two of them begin alike."""
    ids = work.shares_prompts
    return [
        Arrival(
            item.at,
            len(item.prompt_ids),
            item.max_tokens,
            item.prompt_ids if ids else (),
            tenant=item.tenant or "",
            priority=item.priority,
            deadline=item.deadline,
        )
        for item in work.items
    ]


def arrivals_of_log(log: Log) -> list[Arrival]:
    """The requests that an engine was given, as long as they became; those that never gave a token are left out.

    What it generated before a crash counts as prompt: it was one to this engine.
    """
    names = replay.block_names(log)
    size = log.header.config.block_size
    arrived = {event.id: event for event in log.events if isinstance(event, Arrived)}
    left = {event.id: event.at for event in log.events if isinstance(event, Left)}
    outputs: dict[int, int] = defaultdict(int)
    ended: set[int] = set()  # whose rows that were ahead gave nothing any more
    flying: deque[Submitted] = deque()
    for event in log.events:
        if isinstance(event, Submitted):
            flying.append(event)
        elif isinstance(event, Returned) and flying:
            for id, _, _, samples in flying.popleft().rows:
                outputs[id] += samples and id not in ended and id not in event.failed
            ended.update(event.stopped, event.failed)
    found = []
    for id, event in arrived.items():
        leaves = left.get(id)
        known = event.prompt + event.done
        length = event.max_tokens - event.done if leaves is not None else outputs[id]
        if length < 1:
            continue
        tokens = replay.tokens_of(names[id], id, size, known + length)
        found.append(
            Arrival(
                event.at,
                known,
                length,
                tokens[:known],
                tokens[known:],
                leaves,
                tenant=event.tenant,
                priority=event.priority,
                deadline=event.deadline,
            )
        )
    if not found:
        raise ValueError("the step log has no request that generated a token")
    return found


def run(
    arrivals: Sequence[Arrival],
    config: SchedulerConfig,
    cost: CostModel,
    *,
    seed: int = 0,
    replicas: int = 1,
    witnesses: Sequence[Witness] = (),
) -> list[Record]:
    """Simulates the arrivals on so many equal engines, dealt out in turn, and gives the records that a client writes.

    seed: of the noise. witnesses: of each engine's loop. ValueError if there is no request, or one that can never fit.
    """
    if not arrivals:
        raise ValueError("there is no request to simulate")
    records: list[Record | None] = [None] * len(arrivals)
    in_order = sorted(range(len(arrivals)), key=lambda i: arrivals[i].time)
    for replica in range(replicas):
        own = in_order[replica::replicas]
        witness = witnesses[replica] if witnesses else None
        seen = _on_one([arrivals[i] for i in own], config, cost, seed + replica, witness)
        for i, record in zip(own, seen, strict=True):
            records[i] = record
    return [record for record in records if record is not None]


def _on_one(
    arrivals: list[Arrival], config: SchedulerConfig, cost: CostModel, seed: int, witness: Witness | None
) -> list[Record]:
    door = cost.door
    seen = [
        msgspec.structs.replace(arrival, time=time)
        for arrival, time in zip(arrivals, _through(door, arrivals), strict=True)
    ]
    found, _ = simulate(seen, config, cost.noisy(seed), cost.host, keep_iterations=False, witness=witness)
    return [
        Record(
            due=arrival.time,
            sent=arrival.time,
            token_times=tuple(
                time + door.deliver + place * door.per_row
                for time, place in zip(got.token_times, got.places, strict=True)
            ),
            max_tokens=arrival.num_output,
            prompt_tokens=arrival.num_prompt,
            seen_prompt_tokens=arrival.num_prompt,
            cached_tokens=got.num_cached,
            counted="ids",
            error=None if len(got.token_times) == arrival.num_output else "its client hung up",
            error_kind=None if len(got.token_times) == arrival.num_output else "hung up",
            tenant=arrival.tenant or None,
        )
        for arrival, got in zip(arrivals, found, strict=True)
    ]


def _through(door: Door, arrivals: Sequence[Arrival]) -> list[float]:
    """When the engine may take each request; arrivals stand in the order of their times."""
    shut, times = 0.0, []
    for arrival in arrivals:
        begin = max(arrival.time, shut)
        shut = begin + door.busy
        times.append(begin + door.arrive)
    return times


def write(records: Sequence[Record], limits: dict[str, float], what: dict[str, object], folder: Path) -> None:
    """Writes report.json and requests.jsonl, as `bench serve` does. what: how it was simulated."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = load_report.summary(records, limits)
    by_tenant = load_report.by_tenants(records, limits)
    found = {"summary": summary, "tenants": by_tenant, "limits": limits, "simulated": what}
    (folder / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    with (folder / "requests.jsonl").open("wb") as file:
        for record in records:
            file.write(msgspec.json.encode(record) + b"\n")
