"""`Workers`: the worker processes of one host, the sockets to them, and whether they are alive.

The ranks are forked by a process that has imported what they need, their parent (`worker_process`); it tells how they
end, and ends with them.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess  # an argument list, never a shell
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from orcaserve.core.config import EngineOptions
from orcaserve.engine.framing import FrameReader, encode
from orcaserve.engine.silence import Silence
from orcaserve.executors.messages import (
    Begin,
    Born,
    Ended,
    Ends,
    FromParent,
    FromWorker,
    Place,
    Serving,
    StoreAt,
    ToWorker,
)
from orcaserve.worker.machine import available_memory, usable_cpus
from orcaserve.worker.process import DUMP_SECONDS, has_ended, pulse, tell_to_dump
from orcaserve.worker.receiver import Receiver

COMMAND = (sys.executable, "-m", "orcaserve.executors.worker_process")
TICK_SECONDS = 0.25  # as often as workers say that they are alive
END_SECONDS = 2.0

OnFrame = Callable[[int, FromWorker], None]
OnLost = Callable[[str], None]


class Workers:
    """The ranks of one host, as processes. Owner of them and of the sockets to them.

    What they report is heard by a thread, which calls `on_frame(rank, frame)`, and `on_lost(why)` once.
    """

    def __init__(
        self,
        options: EngineOptions,
        places: Sequence[Place],
        store: StoreAt | None,
        interface: str,
        on_frame: OnFrame,
        on_lost: OnLost,
    ) -> None:
        """Starts them and has them load, sharing memory and threads evenly; raises OSError if none can be started.

        Must run in a thread that lives as long as they shall: they ask Linux to die with it. store: where all ranks
        find each other; None: these are all, and do so in a file of their own. interface: on which they listen.
        A file descriptor in `store` is given to them.
        """
        self._options = options
        self._on_frame, self._on_lost = on_frame, on_lost
        self._ended = threading.Event()
        self._telling = threading.Lock()
        self.places = tuple(places)
        self._born = Born(())
        self._parent_reader = FrameReader(FromParent)
        self._codes: dict[int, int] = {}  # of those that have ended
        self._store_fd = os.memfd_create("orcaserve-ranks")
        self._store = store or StoreAt(self._store_fd)
        self._shared = {} if options.device == "cuda" else _shared_files(places)
        self._thread = threading.Thread(target=self._listen, name="workers", daemon=True)
        inboxes = [socket.socketpair() for _ in places]
        reports = [socket.socketpair() for _ in places]
        self._control = inboxes[0][0]
        self._reports = [ours for ours, _ in reports]
        self._from_parent, parent = socket.socketpair()
        self._parent_receiver = Receiver(self._from_parent)
        files = [_real(self._store.fd, self._shared.get(place.stage)) for place in places]
        ends = [
            Ends(
                report=reports[index][1].fileno(),
                inbox=inboxes[index][1].fileno(),
                outs=tuple(inboxes[other][0].fileno() for other in passes_on(places, index)),
                files=files[index],
            )
            for index in range(len(places))
        ]
        try:
            self._parent = subprocess.Popen(  # noqa: S603
                [*COMMAND, str(parent.fileno()), msgspec.json.encode(ends).decode()],
                pass_fds=(parent.fileno(), *{fd for one in ends for fd in one.all}),
                # torch's own switches: where it listens, and that it need not say so
                env={
                    **os.environ,
                    "GLOO_SOCKET_IFNAME": interface,
                    "NCCL_SOCKET_IFNAME": interface,
                    "TORCH_CPP_LOG_LEVEL": "ERROR",
                },
                stdin=subprocess.DEVNULL,
                stdout=2,
            )
        except BaseException:
            for sock in (self._from_parent, self._control, *self._reports):
                sock.close()
            os.close(self._store_fd)
            raise
        finally:
            for sock in (parent, *(theirs for _, theirs in reports), *(theirs for _, theirs in inboxes)):
                sock.close()
            for into, _ in inboxes[1:]:
                into.close()
            for file in self._shared.values():
                os.close(file)
        self._thread.start()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the ranks, once they are there."""
        return self._born.pids

    def tell(self, rank: int, frame: ToWorker) -> None:
        with contextlib.suppress(OSError), self._telling:  # its death is heard elsewhere
            self._reports[rank - self.places[0].rank].sendall(encode(frame))

    def run(self, batch: bytes) -> None:
        """A batch as it is on the control plane: to the first worker, which passes it on."""
        with contextlib.suppress(OSError):
            self._control.sendall(batch)

    def close(self) -> None:
        """Ends all of them, and waits for that."""
        self._ended.set()
        for sock in self._reports:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        if not self.pids:  # it imports, and would not hear of anything before that is done
            self._parent.kill()
        try:
            self._parent.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._parent.kill()
            self._parent.wait()
        for pid in self.pids:  # whom nobody has waited for if their parent was killed
            _await_end(pid, END_SECONDS)
        if self._thread.is_alive():
            self._thread.join(END_SECONDS)
        for sock in (*self._reports, self._control, self._from_parent):
            sock.close()
        if self._store_fd >= 0:
            os.close(self._store_fd)
            self._store_fd = -1

    def _listen(self) -> None:
        readers = [FrameReader(FromWorker) for _ in self._reports]
        receivers = [Receiver(sock) for sock in self._reports]
        silences = [Silence(is_loading=True) for _ in self._reports]
        ranks = [place.rank for place in self.places]
        with selectors.DefaultSelector() as selector:
            for index, sock in enumerate(self._reports):
                selector.register(sock, selectors.EVENT_READ, index)
            selector.register(self._from_parent, selectors.EVENT_READ)
            ticked = time.monotonic()
            while not self._ended.is_set():
                for key, _ in selector.select(TICK_SECONDS):
                    if key.data is None:
                        if not self._hear_parent():
                            selector.unregister(self._from_parent)
                        continue
                    index = cast(int, key.data)
                    data = _receive(receivers[index])
                    if not data:
                        return self._lose(f"worker {ranks[index]} is gone ({self._manner(index)})")
                    silences[index].end()
                    for frame in readers[index].feed(data):
                        if isinstance(frame, Serving):
                            silences[index].loaded()
                        self._on_frame(ranks[index], cast(FromWorker, frame))
                if time.monotonic() - ticked >= TICK_SECONDS:
                    ticked = time.monotonic()
                    for index, silence in enumerate(silences):
                        if silence.tick(pulse(self._pid(index))):
                            self._dump(index)
                            return self._lose(f"worker {ranks[index]} is frozen")

    def _lose(self, why: str) -> None:
        if not self._ended.is_set():
            self._on_lost(why)

    def _dump(self, index: int) -> None:
        """Has it write down what every thread is doing, of which it dies; gives it a moment for that."""
        if self._parent.poll() is not None or index in self._codes:
            return  # its number may be another's already
        pid = self._pid(index)
        tell_to_dump(pid)
        _await_end(pid, DUMP_SECONDS)

    def _pid(self, index: int) -> int:
        """Of the process that a rank is, or that is to fork it."""
        return self.pids[index] if self.pids else self._parent.pid

    def _hear_parent(self) -> bool:
        """What the ranks' parent says; False at its end. With all of them there, they begin."""
        if not (data := _receive(self._parent_receiver)):
            return False
        for frame in self._parent_reader.feed(data):
            if isinstance(frame, Ended):
                self._codes[frame.index] = frame.code
            elif isinstance(frame, Born):
                self._born = frame
                self._begin()
        return True

    def _begin(self) -> None:
        options = self._options
        memory, threads = available_memory(most=options.memory), options.threads or usable_cpus()
        share = memory // len(self.places), max(1, threads // len(self.places))
        for index, place in enumerate(self.places):
            device = f"cuda:{index}" if options.device == "cuda" else "cpu"
            self.tell(place.rank, Begin(options, place, self._store, *share, device, self._shared.get(place.stage)))

    def _manner(self, index: int) -> str:
        """How a rank whose socket is closed has ended, as its parent says, or ends itself."""
        self._from_parent.settimeout(TICK_SECONDS)
        while index not in self._codes and self._hear_parent():
            pass
        code = self._codes.get(index)
        if code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._parent.wait(TICK_SECONDS)
        if code is None:
            return "it closed its socket"
        return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _await_end(pid: int, most: float) -> None:
    """Of a process that need not be this one's child; for so many seconds at most."""
    end = time.monotonic() + most
    while not has_ended(pid) and time.monotonic() < end:
        time.sleep(0.005)


def _real(*fds: int | None) -> tuple[int, ...]:
    """Those that are there."""
    return tuple(fd for fd in fds if fd is not None and fd >= 0)


def _shared_files(places: Sequence[Place]) -> dict[int, int]:
    """By stage a file without a name, in memory, for the stages of several ranks that are all among these."""
    ranks = Counter(place.stage for place in places)
    tensor = places[0].tensor
    return {stage: os.memfd_create("orcaserve-parts") for stage in ranks if ranks[stage] == tensor > 1}


def passes_on(places: Sequence[Place], index: int) -> list[int]:
    """To which of a host's workers, by index, one of them passes batches on.

    The first of each stage to the others of its stage, and to the first of the next stage.
    """
    own = places[index].stage
    if index and places[index - 1].stage == own:
        return []
    later = range(index + 1, len(places))
    following = [other for other in later if places[other].stage != own][:1]
    return following + [other for other in later if places[other].stage == own]


def _receive(receiver: Receiver) -> memoryview:
    try:
        return receiver.receive()
    except OSError:
        return memoryview(b"")
