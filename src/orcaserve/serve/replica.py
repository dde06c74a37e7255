"""`Replica`: one engine behind the pool and what belongs to it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.engine.messages import Abort, Stats, Step, Submit
from orcaserve.serve.frames import Beat, Watch
from orcaserve.serve.resume import Choice
from orcaserve.serve.supervisor import Death, Supervisor

_COUNTERS = ("num_preemptions", "num_swapped", "prefix_queries", "prefix_hits", "num_steps")


class Crash(NamedTuple):
    """An engine's death, as it concerns requests.

    on_board: of its last batches or, if none of those is left, all that had arrived there: then it was an arrival.
    num_on_board: counts those of its last batches that had ended or left meanwhile, too.
    from_outside: somebody else has killed it.
    """

    on_board: tuple[Choice, ...]
    num_on_board: int
    from_outside: bool


class Keeper(Protocol):
    """Whom replicas serve. Called from the event loop; must not raise."""

    def on_loading(self, replica: Replica, stage: str, done: int, total: int) -> None: ...

    def on_ready(self, replica: Replica) -> None:
        """It has an engine, which has been given nothing yet."""
        ...

    def on_step(self, replica: Replica, step: Step) -> None: ...

    def on_death(self, replica: Replica, crash: Crash) -> bool:
        """Its engine is dead, and has nobody any more. True if that settled something."""
        ...

    def on_failed(self, replica: Replica, message: str) -> None:
        """It will have no further engine, and has nobody any more."""
        ...


class Replica:
    """Owner of a supervisor and, while its engine lives, of the record of what that has been given.

    submitted: by engine id, in the order of submission. unstarted: those of them that await their first iteration here.
    load: how many they are. info: of its latest engine. busy_seconds: of that one's ranks, as frames.Beat has them.
    """

    def __init__(self, index: int, options: EngineOptions, keeper: Keeper, command: Sequence[str] | None) -> None:
        self.index = index
        self.submitted: dict[int, Choice] = {}
        self.unstarted: dict[int, Choice] = {}
        self.info: EngineInfo | None = None
        self.busy_seconds: tuple[float, ...] = ()
        self._keeper = keeper
        self._supervisor = Supervisor(options, self, command)
        self._is_watched = False
        self._stats = Stats()  # of the engine that lives
        self._before = Stats()  # what those before it counted

    # -- what the pool asks and says -----------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "loading", "ready", "restarting", or "failed" for good."""
        return self._supervisor.state

    @property
    def pid(self) -> int | None:
        return self._supervisor.pid

    @property
    def step_age(self) -> float:
        """Seconds since its engine finished an iteration, while it has work; else 0."""
        return self._supervisor.step_age

    @property
    def num_restarts(self) -> int:
        """Engines that got ready after the first one."""
        return max(0, self._supervisor.num_starts - 1)

    @property
    def load(self) -> int:
        return len(self.submitted)

    @property
    def experience(self) -> int:
        """Iterations of the engine that lives now: a new one has the least in its prefix cache."""
        return self._stats.num_steps

    @property
    def stats(self) -> Stats:
        """The engine's state; counters go on from what the engines before it had counted."""
        return msgspec.structs.replace(self._stats, **_counted((self._before, self._stats)))

    def start(self) -> None:
        self._supervisor.start()

    async def stop(self) -> None:
        await self._supervisor.stop()

    def submit(self, choice: Choice, id: int) -> None:
        """Gives the engine a choice. id: never used before, by any replica."""
        choice.goes_to(id, self.index)
        self.submitted[id] = self.unstarted[id] = choice
        self._supervisor.send(Submit(choice.submission(id)))

    def watch(self, on: bool) -> None:
        """Whether its engines are to say why requests wait."""
        self._is_watched = on
        self._supervisor.send(Watch(on))

    def has_begun(self, choice: Choice) -> bool:
        """Whether a choice takes part in an iteration that is under way, as far as is known."""
        return choice.engine_id is not None and choice.engine_id in self._supervisor.on_record

    def take_back(self, choice: Choice) -> None:
        """Has the engine forget a choice that it has been given."""
        if choice.engine_id is not None:
            self._supervisor.send(Abort(choice.engine_id))
            self.release(choice)

    def release(self, choice: Choice) -> None:
        """The engine has done with a choice."""
        if choice.engine_id is not None:
            del self.submitted[choice.engine_id]
            self.unstarted.pop(choice.engine_id, None)
            choice.engine_id = choice.replica = None

    def _release_all(self) -> None:
        for choice in list(self.submitted.values()):
            self.release(choice)

    # -- what the supervisor tells -------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return bool(self.submitted)

    def on_loading(self, stage: str, done: int, total: int) -> None:
        self._keeper.on_loading(self, stage, done, total)

    def on_ready(self, info: EngineInfo) -> None:
        self.info = info
        if self._is_watched:
            self._supervisor.send(Watch(True))
        self._keeper.on_ready(self)

    def on_beat(self, beat: Beat) -> None:
        if beat.stats is not None:
            self._stats = beat.stats
        self.busy_seconds = beat.busy_seconds

    def on_step(self, step: Step) -> None:
        self._stats = step.stats
        self._keeper.on_step(self, step)
        for id in step.started:
            self.unstarted.pop(id, None)

    def on_death(self, death: Death) -> bool:
        self._before = Stats(**_counted((self._before, self._stats)))
        self._stats = Stats()
        self.busy_seconds = ()
        crash = self._crash(death)
        self._release_all()
        return self._keeper.on_death(self, crash)

    def _crash(self, death: Death) -> Crash:
        record = death.record
        if record is not None:
            flying = set(record.in_flight)
            if on_board := [choice for id, choice in self.submitted.items() if id in flying]:
                return Crash(tuple(on_board), len(flying), death.from_outside)
        arrived = [choice for id, choice in self.submitted.items() if record is None or id <= record.heard]
        return Crash(tuple(arrived), len(arrived), death.from_outside)

    def on_failed(self, message: str) -> None:
        self._release_all()
        self._keeper.on_failed(self, message)


def _counted(lives: Sequence[Stats]) -> dict[str, int]:
    return {name: sum(getattr(life, name) for life in lives) for name in _COUNTERS}
