"""`Stopwatch`: when a device came to a point of its work. On a GPU by its own events; else by the host's clock."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], object]
Mark = Any  # an event of the device, or seconds of the host's clock

_SPAN = 0.4e-3  # seconds that a timing of the device takes at least, so that its clock's ticks do not count
_MOST = 64  # calls of one timing
_CLOCK = 2e9  # cycles a second of the device, about


class Stopwatch(Protocol):
    """Marks points of what the device has been given to do."""

    def mark(self) -> Mark:
        """A point behind all that was given so far."""
        ...

    def is_reached(self, mark: Mark) -> bool:
        """Whether the device has come so far."""
        ...

    def seconds(self, first: Mark, second: Mark) -> float:
        """Between two marks, once both are reached."""
        ...

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        ...

    def hold(self, seconds: float) -> None:
        """Keeps the device from what it is given next for so long, if it works behind the host's back."""
        ...

    def call_seconds(self, calls: Sequence[Call], samples: int) -> float:
        """Of one of the calls, in turn: the median of so many samples, without what the host does between them."""
        ...


def stopwatch(device: torch.device) -> Stopwatch:
    return _DeviceWatch(device) if device.type == "cuda" else _HostWatch()


class _DeviceWatch:
    """Of the stream that is current on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_reached(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return first.elapsed_time(second) * 1e-3

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def hold(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * _CLOCK))

    def call_seconds(self, calls: Sequence[Call], samples: int) -> float:
        """From a graph that holds many calls, each at least once, so that nothing waits for launches."""
        for call in calls:  # compiles what is not compiled yet
            call()
        self.wait()
        self.hold(_SPAN)  # else a short call would seem to take as long as the host takes to launch it
        first = self.mark()
        calls[0]()
        second = self.mark()
        self.wait()
        once = max(self.seconds(first, second), 1e-6)
        rounds = max(1, min(round(_SPAN / once), _MOST) // len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        marks = [self.mark()]
        for _ in range(samples):
            graph.replay()
            marks.append(self.mark())
        self.wait()
        spans = [self.seconds(*pair) for pair in itertools.pairwise(marks)]
        return statistics.median(spans) / (rounds * len(calls))


class _HostWatch:
    """The work is done when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_reached(self, mark: float) -> bool:
        return True

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def wait(self) -> None:
        pass

    def hold(self, seconds: float) -> None:
        pass

    def call_seconds(self, calls: Sequence[Call], samples: int) -> float:
        spans = []
        for _ in range(samples + 1):
            first = self.mark()
            for call in calls:
                call()
            spans.append(self.mark() - first)
        return statistics.median(spans[1:]) / len(calls)
