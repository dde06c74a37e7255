"""`Workers`: the worker processes of one host, the sockets to them, and whether they are alive."""

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

from orcaserve.core.config import EngineOptions
from orcaserve.engine.framing import FrameReader, encode
from orcaserve.engine.silence import Silence
from orcaserve.executors.messages import Begin, FromWorker, Place, Serving, StoreAt, ToWorker
from orcaserve.worker.machine import available_memory, usable_cpus
from orcaserve.worker.process import DUMP_SECONDS, pulse, tell_to_dump
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
        """Starts them and has them load, sharing memory and threads evenly; raises OSError if that cannot be done.

        Must run in a thread that lives as long as they shall: they ask Linux to die with it. store: where all ranks
        find each other; None: these are all, and do so in a file of their own. interface: on which they listen.
        A file descriptor in `store` is given to them.
        """
        self._on_frame, self._on_lost = on_frame, on_lost
        self._ended = threading.Event()
        self._telling = threading.Lock()
        self.places = tuple(places)
        self._reports: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._store_fd = os.memfd_create("orcaserve-ranks")
        self._store = store or StoreAt(self._store_fd)
        self._interface = interface
        self._thread = threading.Thread(target=self._listen, name="workers", daemon=True)
        inboxes = [socket.socketpair() for _ in places]
        self._control = inboxes[0][0]
        shared = {} if options.device == "cuda" else _shared_files(places)
        try:
            for index, place in enumerate(places):
                self._start(index, inboxes, shared.get(place.stage))
        except BaseException:
            self.close()
            raise
        finally:
            for index, (into, inbox) in enumerate(inboxes):
                inbox.close()
                if index:
                    into.close()
            for file in shared.values():
                os.close(file)
        memory, threads = available_memory(most=options.memory), options.threads or usable_cpus()
        share = memory // len(places), max(1, threads // len(places))
        for index, place in enumerate(places):
            device = f"cuda:{index}" if options.device == "cuda" else "cpu"
            self.tell(place.rank, Begin(options, place, self._store, *share, device, shared.get(place.stage)))
        self._thread.start()

    def _start(self, index: int, inboxes: Sequence[tuple[socket.socket, socket.socket]], shared: int | None) -> None:
        ours, theirs = socket.socketpair()
        self._reports.append(ours)
        outs = [inboxes[other][0].fileno() for other in passes_on(self.places, index)]
        fds = [theirs.fileno(), inboxes[index][1].fileno(), *outs]
        files = [fd for fd in (self._store.fd, -1 if shared is None else shared) if fd >= 0]
        with theirs:
            process = subprocess.Popen(  # noqa: S603
                [*COMMAND, *map(str, fds)],
                pass_fds=(*fds, *files),
                # torch's own switches: where it listens, and that it need not say so
                env={
                    **os.environ,
                    "GLOO_SOCKET_IFNAME": self._interface,
                    "NCCL_SOCKET_IFNAME": self._interface,
                    "TORCH_CPP_LOG_LEVEL": "ERROR",
                },
                stdin=subprocess.DEVNULL,
                stdout=2,
            )
        self._processes.append(process)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes)

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
        end = time.monotonic() + END_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._thread.is_alive():
            self._thread.join(END_SECONDS)
        for sock in (*self._reports, self._control):
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
            ticked = time.monotonic()
            while not self._ended.is_set():
                for key, _ in selector.select(TICK_SECONDS):
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
                        if silence.tick(pulse(self._processes[index].pid)):
                            self._dump(index)
                            return self._lose(f"worker {ranks[index]} is frozen")

    def _lose(self, why: str) -> None:
        if not self._ended.is_set():
            self._on_lost(why)

    def _dump(self, index: int) -> None:
        """Has it write down what every thread is doing, of which it dies; gives it a moment for that."""
        process = self._processes[index]
        if process.poll() is None:
            tell_to_dump(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DUMP_SECONDS)

    def _manner(self, index: int) -> str:
        try:
            code = self._processes[index].wait(TICK_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its socket"
        return f"exit code {code}" if code >= 0 else f"signal {-code}"


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
