"""`Silence`: tells from a process's beats, tick by tick, whether it is frozen. No clock: a tick is a beat long."""

from __future__ import annotations

FROZEN_TICKS = 3
SILENT_TICKS = 40  # even a process that works must get a word out in ten seconds
LOADING_TICKS = 240


class Silence:
    """Owner of what was heard and seen of one process since the last tick.

    is_loading: until `loaded` it may be idle for ten seconds, and silent for a minute: it waits for disks, and for
        libraries that hold Python's lock.
    """

    def __init__(self, is_loading: bool = False) -> None:
        self._is_loading = is_loading
        self._heard = True
        self._silent = 0
        self._idle = 0
        self._pulse: object = None

    def loaded(self) -> None:
        """From now on it has to answer."""
        self._is_loading = False

    def end(self) -> None:
        """Something was heard."""
        self._heard = True

    def tick(self, pulse: object) -> bool:
        """Whether it is frozen. pulse: something that changes while it gets work done; None: not known."""
        self._silent = 0 if self._heard else self._silent + 1
        # A beat can also be late because a library holds Python's lock, or for want of a core.
        worked = pulse is None or pulse != self._pulse
        self._idle = 0 if self._heard or worked else self._idle + 1
        self._heard, self._pulse = False, pulse
        idle, silent = (SILENT_TICKS, LOADING_TICKS) if self._is_loading else (FROZEN_TICKS, SILENT_TICKS)
        return self._idle >= idle or self._silent >= silent
