"""The worker processes of a host: each is one rank of a model that several share.

Started by the engine as `python -m orcaserve.executors.worker_process PARENT_FD ENDS`, ENDS being the JSON of each
rank's `messages.Ends`. This process imports what all of them need, which takes a second, and forks one for each; then
it only tells how they end. So the imports are there once, in time and in memory, and a dead rank is replaced soon.

A rank reads batches from upstream and passes them on at once. The inbox brings them, from the engine or from the
worker before; the outs lead to the first worker of the next stage and to the others of the own stage. Its threads: the
main one computes; one passes batches on and queues them; one reads the engine's commands and ends the process when the
engine is gone; a heart beat says that the process is alive.

Exit codes of a rank: 0 after the engine's end, 1 if the model cannot be served, 70 if an iteration failed.
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
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import msgspec

from orcaserve.core.batch import Batch
from orcaserve.core.config import ModelError
from orcaserve.engine.framing import FrameReader, encode
from orcaserve.executors.messages import (
    Alive,
    Begin,
    Born,
    Ended,
    Ends,
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


def main(parent_fd: int, ends: Sequence[Ends]) -> int:
    """Imports, forks, and tells of each rank's end; returns the exit code once all have ended.

    No thread may be there when it forks, nor a library's pool: a child would have their locks without them. (numpy's,
    which comes by the import, lets go of itself before a fork.)
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for fd in (parent_fd, *(fd for one in ends for fd in one.all)):
        os.set_inheritable(fd, False)
    die_with_parent()
    dump_when_told()
    told = socket.socket(fileno=parent_fd)
    try:
        with _beating([one.report for one in ends]), uncollected("torch"):
            import orcaserve.executors.rank  # noqa: F401  # torch comes with it
    except Exception as error:
        why = f"the workers could not start: {in_one_line(error)}"
        for one in ends:
            Report(socket.socket(fileno=one.report)).put(Refused(why))
        return EXIT_MODEL
    pids = [_fork(one, ends, told) for one in ends]
    for fd in {fd for one in ends for fd in one.all}:
        os.close(fd)
    with contextlib.suppress(OSError):  # the engine is gone
        told.sendall(encode(Born(tuple(pids))))
        for _ in pids:
            pid, status = os.wait()
            told.sendall(encode(Ended(pids.index(pid), os.waitstatus_to_exitcode(status))))
    return 0


@contextlib.contextmanager
def _beating(report_fds: Sequence[int]) -> Iterator[None]:
    """Says meanwhile that the ranks to be are alive: a first import takes long on a slow disk, or among many."""
    socks = [socket.socket(fileno=os.dup(fd)) for fd in report_fds]
    reports = [Report(sock) for sock in socks]
    done = threading.Event()

    def beat() -> None:
        with contextlib.suppress(OSError):  # the engine is gone
            while not done.wait(BEAT_SECONDS):
                for report in reports:
                    report.put(Alive())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for sock in socks:
            sock.close()


def _fork(own: Ends, ends: Sequence[Ends], told: socket.socket) -> int:
    """Its pid. The child holds nothing of the others', so that the end of each is seen."""
    if pid := os.fork():
        return pid
    try:
        told.close()
        for fd in {fd for one in ends for fd in one.all} - set(own.all):
            os.close(fd)
        os._exit(_be_rank(own))
    except BaseException:
        traceback.print_exc()
        os._exit(EXIT_ITERATION)


def _be_rank(ends: Ends) -> int:
    """Serves until the engine is gone; returns the exit code."""
    die_with_parent()
    sock = socket.socket(fileno=ends.report)
    report = Report(sock)
    begin: queue.SimpleQueue[Begin] = queue.SimpleQueue()
    commands: queue.SimpleQueue[MakeCache | WhileServing] = queue.SimpleQueue()
    arrivals = _Arrivals()

    def on_command(frame: ToWorker) -> None:
        begin.put(frame) if isinstance(frame, Begin) else commands.put(frame)

    _read_in_background(sock, cast(type[ToWorker], ToWorker), on_command, (), lambda: os._exit(0))
    pulse = _Pulse(report)

    def on_serving(alive: Callable[[], Alive], expect: Callable[[Batch], None]) -> None:
        pulse.tell, arrivals.expect = alive, expect

    from orcaserve.executors.rank import serve  # has been imported, late

    try:
        first = begin.get()
        outs = [socket.socket(fileno=fd) for fd in ends.outs] if first.options.control_plane == "separate" else []
        # A neighbour that is gone is the engine's business, which ends everybody.
        _read_in_background(socket.socket(fileno=ends.inbox), Batch, arrivals.put, outs, lambda: None)
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
    """The heart beat, from the start on: it goes on while the main thread is inside a kernel.

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
    os._exit(main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=list[Ends])))
