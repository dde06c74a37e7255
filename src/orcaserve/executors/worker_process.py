"""A worker process: one rank of a model that several share. Reads batches from upstream and passes them on at once.

Started by the engine as `python -m orcaserve.executors.worker_process REPORT_FD INBOX_FD [OUT_FD ...]`. The inbox
brings batches, from the engine or from the worker before; the outs lead to the first worker of the next stage and to
the others of the own stage. Its threads: the main one computes; one passes batches on and queues them; one reads the
engine's commands and ends the process when the engine is gone; a heart beat says that the process is alive.

Exit codes: 0 after the engine's end, 1 if the model cannot be served, 70 if an iteration failed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from orcaserve.core.batch import Batch
from orcaserve.core.config import ModelError
from orcaserve.engine.framing import FrameReader, encode
from orcaserve.executors.messages import (
    Alive,
    Begin,
    FromWorker,
    MakeCache,
    Refused,
    ToWorker,
    WhileServing,
)
from orcaserve.worker.process import die_with_parent, dump_when_told, in_one_line, tell, uncollected
from orcaserve.worker.receiver import Receiver

BEAT_SECONDS = 0.25
EXIT_MODEL, EXIT_ITERATION = 1, 70

Frame = TypeVar("Frame")


class Report:
    """The way to the engine. Owner of the socket's writing end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._one = threading.Lock()

    def put(self, frame: FromWorker) -> None:
        with self._one:
            self._sock.sendall(encode(frame))


def main(report_fd: int, inbox_fd: int, out_fds: Sequence[int]) -> int:
    """Serves until the engine is gone; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for fd in (report_fd, inbox_fd, *out_fds):
        os.set_inheritable(fd, False)
    die_with_parent()
    dump_when_told()
    sock = socket.socket(fileno=report_fd)
    report = Report(sock)
    begin: queue.SimpleQueue[Begin] = queue.SimpleQueue()
    commands: queue.SimpleQueue[MakeCache | WhileServing] = queue.SimpleQueue()
    arrivals = _Arrivals()

    def on_command(frame: ToWorker) -> None:
        begin.put(frame) if isinstance(frame, Begin) else commands.put(frame)

    _read_in_background(sock, cast(type[ToWorker], ToWorker), on_command, (), lambda: os._exit(0))
    pulse = _Pulse(report)
    try:
        first = begin.get()
        outs = [socket.socket(fileno=fd) for fd in out_fds] if first.options.control_plane == "separate" else []
        # A neighbour that is gone is the engine's business, which ends everybody.
        _read_in_background(socket.socket(fileno=inbox_fd), Batch, arrivals.put, outs, lambda: None)
        with uncollected():
            from orcaserve.executors.rank import serve  # torch comes with it: late, so that beats tell that we live

        def on_serving(alive: Callable[[], Alive], expect: Callable[[Batch], None]) -> None:
            pulse.tell, arrivals.expect = alive, expect

        return serve(first, commands, arrivals.batches, report.put, on_serving)
    except ModelError as error:
        report.put(Refused(str(error)))
        return EXIT_MODEL


class _Arrivals:
    """Batches that have come, until the main thread takes them. expect: is told of each before that."""

    def __init__(self) -> None:
        self.batches: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self.expect: Callable[[Batch], None] = lambda batch: None

    def put(self, batch: Batch) -> None:
        self.expect(batch)
        self.batches.put(batch)


class _Pulse:
    """The heart beat, from the start on: it goes on while the main thread loads torch, or is inside a kernel.

    tell: what it tells.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self.tell: Callable[[], Alive] = Alive
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the engine is gone
            while True:
                self._report.put(self.tell())
                time.sleep(BEAT_SECONDS)


def _read_in_background(
    sock: socket.socket,
    kind: type[Frame],
    take: Callable[[Frame], None],
    outs: Sequence[socket.socket],
    at_end: Callable[[], None],
) -> None:
    """Gives every frame to `take`, and before that its bytes to the outs, for as long as somebody sends."""

    def read() -> None:
        try:
            reader, receiver = FrameReader(kind), Receiver(sock)
            while data := receiver.receive():
                for out in outs:
                    out.sendall(data)
                for frame in reader.feed(data):
                    take(cast(Frame, frame))
        except OSError:
            pass
        except Exception as error:
            tell(f"orcaserve worker: the link failed: {in_one_line(error)}")
            os._exit(EXIT_ITERATION)
        at_end()

    threading.Thread(target=read, daemon=True).start()


if __name__ == "__main__":
    code = main(int(sys.argv[1]), int(sys.argv[2]), [int(fd) for fd in sys.argv[3:]])
    os._exit(code)
