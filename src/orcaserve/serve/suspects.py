"""`Suspects`: choices that were on board when an engine died, in the order in which they are tried, and where.

They run one by one on a replica that carries nobody else, the court; each is joined by the next after its first output.
Who has crashed most often without getting anywhere goes first, so that he is alone soon.
"""

from __future__ import annotations

from collections.abc import Sequence

from orcaserve.serve.replica import Replica
from orcaserve.serve.replicas import Replicas
from orcaserve.serve.resume import Choice

LONE_CRASHES = 2  # a single one may have been somebody's kill -9


class Suspects:
    """Owner of their order and of the choice of a court. What has befallen a choice is written on it.

    court: where they are tried, which should get nobody else meanwhile; None while there is no such place.
    """

    def __init__(self) -> None:
        self.court: Replica | None = None
        self._is_clear = False  # whoever is at the court has come as a suspect
        self._in_order: dict[int, Choice] = {}  # by arrival

    def __contains__(self, choice: Choice) -> bool:
        return choice.arrival in self._in_order

    def blame(self, on_board: Sequence[Choice], is_alone: bool, is_excusable: bool) -> list[Choice]:
        """An engine has died with these on board. Returns those that are convicted by it; they remain in the order.

        is_alone: there was nobody else, not even one who is gone by now.
        is_excusable: it was killed from outside, so that who has not crashed before is no suspect yet.
        """
        for choice in on_board:
            choice.crashes += 1
            choice.lone_crashes += is_alone
        suspects = [choice for choice in on_board if choice.crashes > 1 or not is_excusable]
        everyone = {**self._in_order, **{choice.arrival: choice for choice in suspects}}
        ordered = sorted(everyone.values(), key=lambda choice: (-choice.crashes, choice.arrival))
        self._in_order = {choice.arrival: choice for choice in ordered}
        return [choice for choice in suspects if choice.lone_crashes == LONE_CRASHES]

    def acquit(self, choice: Choice) -> None:
        """It got through its trial, or is gone; it need not have been a suspect."""
        self._in_order.pop(choice.arrival, None)

    def leave(self, replica: Replica) -> None:
        """A replica whose engine has died is no court."""
        if replica is self.court:
            self.court = None

    def clear(self) -> None:
        self._in_order.clear()
        self.court = None

    def turn(self, replicas: Replicas) -> tuple[Choice, Replica] | None:
        """The suspect who can be tried now, and where; None if that is nobody."""
        if not self._in_order:
            self.court = None
            return None
        if self.court is None:
            self.court, self._is_clear = _choose_court(replicas), False
        first = next(iter(self._in_order.values()))
        if self.court is None or first.engine_id is not None:
            return None
        self._is_clear = self._is_clear or not self.court.submitted
        return (first, self.court) if self._is_clear else None


def _choose_court(replicas: Replicas) -> Replica | None:
    """A replica without work, one whose engine is new first. Never the last one that serves, if others are coming.

    Where none is coming and all are busy, the least busy one gets nothing more and will be free when its requests end.
    """
    ready = replicas.in_force
    if not ready or (replicas.is_any_coming and len(ready) == 1):
        return None
    if idle := [replica for replica in ready if not replica.submitted]:
        return min(idle, key=lambda replica: replica.experience)
    return None if replicas.is_any_coming else min(ready, key=lambda replica: replica.load)
