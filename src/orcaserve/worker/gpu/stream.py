"""`Stream`: work that a device does in order, behind the host's back; and its twin that does it at once on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Run = Callable[[], None]


class Event(Protocol):
    """A place in a stream."""

    def wait(self) -> None:
        """Until all that was put on the stream before it is done."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """Device time between two places that have been reached."""
        ...


class Stream(Protocol):
    """What is put on it is done in order, later. Copies are between `host_buffer`s and tensors of the device."""

    @property
    def device(self) -> torch.device: ...

    def host_buffer(self, size: int) -> Tensor:
        """int32 [size] of the host's memory that the device can reach by itself."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None: ...

    def mark(self) -> Event: ...

    def record(self, run: Run) -> Run:
        """What does again all that `run` does to the device, from the same memory to the same memory.

        It runs at least once meanwhile.
        """
        ...


class CudaEvent:
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: CudaEvent) -> float:
        return earlier._event.elapsed_time(self._event) / 1000


class CudaStream:
    """The current stream of a GPU. What it records are CUDA graphs, which share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def host_buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self) -> CudaEvent:
        return CudaEvent()

    def record(self, run: Run) -> Run:
        run()  # compiles kernels and opens libraries, which a graph cannot
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


class Now:
    """An event of the host's stream: it has been reached."""

    def wait(self) -> None:
        return

    def seconds_since(self, earlier: Event) -> float:
        return 0.0


class HostStream:
    """Does everything at once."""

    device = torch.device("cpu")

    def host_buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def mark(self) -> Now:
        return Now()

    def record(self, run: Run) -> Run:
        run()
        return run
