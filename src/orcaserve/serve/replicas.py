"""`Replicas`: all engines behind the pool, seen as one: what they can do together, and how they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.engine.messages import Stats
from orcaserve.serve.replica import Keeper, Replica
from orcaserve.worker.machine import available_memory, usable_cpus


class Replication(msgspec.Struct, frozen=True, kw_only=True):
    """How many engines there are, and by what a request is given to one of them: a key of `ROUTERS`.

    commands: argv of what stands in for each one's process, if they run on other hosts. None: they share this one.
    """

    replicas: int = 1
    router: str = "prefix"
    commands: tuple[tuple[str, ...], ...] | None = None


class Replicas:
    """Owner of the replicas, and of which numerics profile is in force: streams go on only where it is.

    info: what a request may count on, whichever replica it comes to; num_blocks are those of all. None before the first
    engine is ready.
    """

    def __init__(
        self, options: EngineOptions, replication: Replication, command: Sequence[str] | None, keeper: Keeper
    ) -> None:
        """command: argv of an engine process on this host; None: ours."""
        count = replication.replicas
        commands: Sequence[Sequence[str] | None]
        if replication.commands is None:
            each, commands = shares(options, count), [command] * count
        else:
            each, commands = [options] * count, replication.commands
        self._all = [
            Replica(index, own, keeper, argv) for index, (own, argv) in enumerate(zip(each, commands, strict=True))
        ]
        self.info: EngineInfo | None = None

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._all)

    def __getitem__(self, index: int) -> Replica:
        return self._all[index]

    @property
    def state(self) -> str:
        """As a replica's: that of the best one."""
        if self.in_force:
            return "ready"
        if all(replica.state == "failed" for replica in self._all):
            return "failed"
        return "loading" if self.info is None else "restarting"

    @property
    def in_force(self) -> list[Replica]:
        """Those that are ready, and whose numerics profile is the one in force."""
        profile = None if self.info is None else self.info.profile
        return [
            replica
            for replica in self._all
            if replica.state == "ready" and replica.info is not None and replica.info.profile == profile
        ]

    @property
    def is_any_coming(self) -> bool:
        """Whether an engine is being started."""
        return any(replica.state in ("loading", "restarting") for replica in self._all)

    @property
    def not_ready(self) -> tuple[int, ...]:
        """Those that get no requests now, by number."""
        ready = self.in_force
        return tuple(replica.index for replica in self._all if replica not in ready)

    @property
    def step_age(self) -> float:
        """The best one's: the others' requests can go on there."""
        return min((replica.step_age for replica in self._all if replica.state != "failed"), default=0.0)

    @property
    def stats(self) -> Stats:
        """Of all together. Counters never go down."""
        parts = [replica.stats for replica in self._all]
        return Stats(**{name: sum(getattr(part, name) for part in parts) for name in Stats.__struct_fields__})

    def adopt(self, info: EngineInfo) -> None:
        """This engine's profile is in force from now on, and what it can do is what requests may count on."""
        alike = [one.info for one in self._all if one.info is not None and one.info.profile == info.profile]
        self.info = msgspec.structs.replace(
            info,
            max_model_len=min(one.max_model_len for one in alike),
            num_blocks=sum(one.num_blocks for one in alike),
        )


def shares(options: EngineOptions, count: int) -> list[EngineOptions]:
    """The options of each of `count` replicas on this host: its part of threads and memory, and its own step log."""
    if count == 1:
        return [options]
    threads = max(1, (options.threads or usable_cpus()) // count)
    memory = available_memory() // count
    logs = step_logs(options.step_log, count)
    return [msgspec.structs.replace(options, threads=threads, memory=memory, step_log=log) for log in logs]


def step_logs(path: str | None, count: int) -> list[str | None]:
    """The step log of each replica: engines that run at the same time cannot write to one."""
    return [path if path is None or count == 1 else f"{path}.{index}" for index in range(count)]
