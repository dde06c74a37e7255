"""`Slack`: how many times as long as foretold nearly all of what comes takes."""

from __future__ import annotations


class Slack:
    """A factor that a `share` (0 … 1) of the ratios of time to foretold time stays within; from 1 to `most`.

    It follows that quantile in steps of one size, since a single large ratio tells no more than another that is above
    it: up by `step * share` for each of those, down by `step * (1 - share)` for each of the others.
    """

    __slots__ = ("_most", "_share", "_step", "value")

    def __init__(self, share: float, most: float, step: float) -> None:
        self.value = 1.0
        self._share = share
        self._most = most
        self._step = step

    def learn(self, seconds: float, foretold: float) -> None:
        """Something has taken so long of which so long had been foretold."""
        move = self._share if seconds > foretold * self.value else self._share - 1
        self.value = min(self._most, max(1.0, self.value + self._step * move))
