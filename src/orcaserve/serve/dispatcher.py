"""`Dispatcher`: which replica a choice is on: the router's choice, and after a crash the one where its turn comes.

Who can be nowhere now is held, and handed in again as soon as there is a replica for him.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from orcaserve.core.router import Router
from orcaserve.serve.replica import Crash, Replica
from orcaserve.serve.replicas import Replicas
from orcaserve.serve.resume import Choice
from orcaserve.serve.suspects import Suspects
from orcaserve.serve.timeline import Timeline


class Dispatcher:
    """Owner of the router, of the suspects, and of the ids by which engines know choices.

    unfinished: all choices on their way, in order of arrival; they are the pool's. Those that are on no replica are
    held, unless they are paused.
    """

    def __init__(
        self, replicas: Replicas, router: Router, unfinished: Mapping[int, Choice], timeline: Timeline | None
    ) -> None:
        self.router = router
        self.suspects = Suspects()
        self._replicas = replicas
        self._unfinished = unfinished
        self._timeline = timeline
        self._engine_ids = itertools.count(1)

    def hand_in(self, choice: Choice) -> None:
        """To the replica that the router chooses among those that take whoever comes. If there is none it is held."""
        if among := self._open():
            index = self.router.choose(choice.keys, {replica.index: replica.load for replica in among})
            self._give(choice, self._replicas[index])

    def resume(self) -> None:
        """Hands in the suspect whose turn it is, and everyone else who is held, in order of arrival."""
        self._try_suspect()
        if self._open():
            for choice in list(self._unfinished.values()):
                if choice.engine_id is None and not choice.is_paused and choice not in self.suspects:
                    self.hand_in(choice)

    def relieve(self, replica: Replica) -> None:
        """Gives a replica that has just been opened its part of what waits elsewhere, the youngest first."""
        if replica is self.suspects.court:
            return
        for busy in sorted(self._open(), key=lambda other: -other.load):
            for choice in reversed(list(busy.unstarted.values())):
                if busy.load <= replica.load + 1:
                    break
                busy.take_back(choice)
                self._give(choice, replica)

    def acquit(self, choice: Choice) -> None:
        """A choice has got somewhere, or is gone: if it was a suspect, the next one joins."""
        if choice in self.suspects:
            court = self.suspects.court
            self.suspects.acquit(choice)
            self.resume()
            if court is not None and self.suspects.court is None:
                self.relieve(court)
        else:
            self._try_suspect()  # the court may have become free

    def blame(self, replica: Replica, crash: Crash) -> list[Choice]:
        """A replica's engine has died. Returns who is convicted by that, and has to be ended.

        A kill from outside is no evidence, unless it is the second one without progress in between: where there is
        another replica, its victims go on there at once, among others.
        """
        self.suspects.leave(replica)
        is_excusable = crash.from_outside and bool(self._replicas.in_force)
        return self.suspects.blame(crash.on_board, crash.num_on_board == 1, is_excusable)

    def _open(self) -> list[Replica]:
        """The replicas that take whoever comes."""
        return [replica for replica in self._replicas.in_force if replica is not self.suspects.court]

    def _give(self, choice: Choice, replica: Replica) -> None:
        self.router.sent(choice.keys, replica.index)
        replica.submit(choice, next(self._engine_ids))
        if self._timeline is not None:
            self._timeline.handed_in(choice)

    def _try_suspect(self) -> None:
        if (turn := self.suspects.turn(self._replicas)) is not None:
            self._give(*turn)
