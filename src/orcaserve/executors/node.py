"""A host that joins a head: starts the ranks that the head gives it, and passes on what each side says.

Whatever ends (a worker, the head, the link), all of its workers end; then it joins again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import msgspec

from orcaserve.core.config import EngineOptions
from orcaserve.engine.silence import Silence
from orcaserve.executors.link import Link, LinkError, connect, interface_of
from orcaserve.executors.messages import FromHost, FromWorker, Gone, Here, Joined, Run, Start, Tell, ToHost, Told
from orcaserve.executors.workers import TICK_SECONDS, Workers

PAUSE_SECONDS = 0.5

Say = Callable[[str], None]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToHost).decode


def join(model: str, node_rank: int, address: tuple[str, int], secret: bytes, say: Say) -> None:
    """Serves for ever. model: this host's copy. say: told, in a line, what happens."""
    said, joined = "", f"joined {address[0]}:{address[1]}"
    while True:
        try:
            link = connect(address, secret)
        except OSError as error:
            line = f"waiting for the head at {address[0]}:{address[1]} ({error})"
        else:
            session = _Session(model, link, lambda: say(joined))
            line = f"left the head: {session.serve(node_rank)}"
        if line != said:
            say(line)
        said = line
        time.sleep(PAUSE_SECONDS)


class _Session:
    """From joining to the end of the link. Owner of the workers."""

    def __init__(self, model: str, link: Link, on_joined: Callable[[], None]) -> None:
        self._model, self._link = model, link
        self._silence = Silence()
        self._ended = threading.Event()
        self._why = ""
        self._on_joined: Callable[[], None] | None = on_joined

    def serve(self, node_rank: int) -> str:
        """Why it ended."""
        workers: Workers | None = None
        try:
            self._send(Joined(node_rank))
            threading.Thread(target=self._tick, name="beat", daemon=True).start()
            while True:
                frame = _decode(self._link.read())
                self._silence.end()
                self._has_joined()
                if isinstance(frame, Start):
                    workers = self._start(frame)
                elif workers is not None and isinstance(frame, Tell):
                    workers.tell(frame.rank, frame.frame)
                elif workers is not None and isinstance(frame, Run):
                    workers.run(frame.batch)
        except (LinkError, OSError, ValueError, msgspec.MsgspecError) as error:  # ValueError: no interface to use
            return self._why or str(error)
        finally:
            self._ended.set()
            self._link.close()
            if workers is not None:
                workers.close()

    def _start(self, start: Start) -> Workers:
        options: EngineOptions = msgspec.structs.replace(start.options, model=self._model)
        return Workers(
            options, start.places, start.store, interface_of(self._link.own_address), self._on_frame, self._on_lost
        )

    def _on_frame(self, rank: int, frame: FromWorker) -> None:
        self._send(Told(rank, frame))

    def _on_lost(self, why: str) -> None:
        self._why = why
        self._send(Gone(why))
        self._link.close()  # ends the reading

    def _has_joined(self) -> None:
        """With the first frame: before that the other side may still find that the secret is another."""
        if self._on_joined is not None:
            self._on_joined()
            self._on_joined = None

    def _tick(self) -> None:
        """Says that this host is here, and sees that the head is."""
        while not self._ended.wait(TICK_SECONDS):
            with contextlib.suppress(LinkError):
                self._link.beat(_encode(Here()))
            if self._silence.tick(pulse="not seen from here") and not self._why:
                self._why = "nothing is heard of the head"
                self._link.close()

    def _send(self, frame: FromHost) -> None:
        with contextlib.suppress(LinkError):
            self._link.send(_encode(frame))
