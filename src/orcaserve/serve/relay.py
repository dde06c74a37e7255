"""A relay: stands in for an engine process that runs on another host, so that the supervisor need not know.

Started in the engine process's place as `python -m orcaserve.serve.relay HOST:PORT SECRET_FILE SOCKET_FD RECORDER_FD`.
It listens there for the host (`serve.replica_host`) and passes on the bytes between that host's engine process and the
frontend. It ends with that engine, by the same exit code, or as soon as nothing is heard of the host.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from orcaserve.engine.framing import encode
from orcaserve.engine.silence import Silence
from orcaserve.executors.link import Link, LinkError, accept, parse_address
from orcaserve.serve.flight_recorder import FlightRecorder, Record
from orcaserve.serve.frames import BEAT_SECONDS, Beat, Failed, Loading
from orcaserve.worker.process import die_with_parent, tell
from orcaserve.worker.receiver import Receiver

EXIT_REFUSED, EXIT_LOST = 1, 75


class Offer(msgspec.Struct, frozen=True, tag=True):
    """A host's first frame: it can run an engine."""


class Data(msgspec.Struct, frozen=True, tag=True):
    """Bytes of the socket between frontend and engine process."""

    data: bytes


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The engine process is dead. code: as subprocess has it."""

    code: int
    record: Record | None


class Here(msgspec.Struct, frozen=True, tag=True):
    """The sender is alive."""


ToReplicaHost = Data | Here
FromReplicaHost = Offer | Data | Ended | Here

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FromReplicaHost).decode


def main(address: str, secret_file: str, socket_fd: int, recorder_fd: int) -> int:
    for fd in (socket_fd, recorder_fd):
        os.set_inheritable(fd, False)
    die_with_parent()
    sock = socket.socket(fileno=socket_fd)
    try:
        listening = socket.create_server(parse_address(address))
        secret = Path(secret_file).read_bytes().strip()
    except (OSError, ValueError) as error:
        sock.sendall(encode(Failed(f"no host can join at {address}: {error}")))
        return EXIT_REFUSED
    has_come = threading.Event()
    waiting = threading.Thread(target=_say_that_one_waits, args=(sock, has_come), daemon=True)
    waiting.start()
    with listening:
        link = _host(listening, secret)
    has_come.set()
    waiting.join()
    return _Session(link, sock, FlightRecorder(recorder_fd)).run()


def _say_that_one_waits(sock: socket.socket, has_come: threading.Event) -> None:
    """Beats in the engine's place, whoever may be talking at the door; ends the process when the frontend is gone."""
    try:
        sock.sendall(encode(Loading("waiting for a host", 0, 0)))
        while not has_come.wait(BEAT_SECONDS):
            sock.sendall(encode(Beat()))
    except OSError:
        os._exit(0)


def _host(listening: socket.socket, secret: bytes) -> Link:
    """The next one that knows the secret and offers an engine."""
    while True:
        came = accept(listening, secret, BEAT_SECONDS)
        if came is not None:
            link, first = came
            with suppress(msgspec.MsgspecError):  # it is some other command's, or of another version
                if isinstance(_decode(first), Offer):
                    return link
            link.close()


class _Session:
    """From the host's offer to its engine's end. Owner of the link."""

    def __init__(self, link: Link, sock: socket.socket, recorder: FlightRecorder) -> None:
        self._link, self._sock, self._recorder = link, sock, recorder
        self._silence = Silence()

    def run(self) -> int:
        """The exit code."""
        for target in (self._pass_on, self._tick):
            threading.Thread(target=target, daemon=True).start()
        try:
            while True:
                frame = _decode(self._link.read())
                self._silence.end()
                if isinstance(frame, Data):
                    self._sock.sendall(frame.data)
                elif isinstance(frame, Ended):
                    if frame.record is not None:
                        self._recorder.hear(frame.record.heard)
                        self._recorder.fly(frame.record.in_flight)
                    return frame.code if frame.code >= 0 else EXIT_LOST
        except (LinkError, msgspec.MsgspecError) as error:
            tell(f"orcaserve relay: the host is gone: {error}")
            return EXIT_LOST
        except OSError:
            return 0  # the frontend is gone

    def _pass_on(self) -> None:
        """From the frontend to the host."""
        try:
            receiver = Receiver(self._sock)
            while data := receiver.receive():
                self._link.send(_encode(Data(bytes(data))))
        except LinkError:
            return  # who reads says why
        except OSError:
            pass
        os._exit(0)

    def _tick(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            try:
                self._link.beat(_encode(Here()))
            except LinkError:
                return
            if self._silence.tick(pulse="not seen from here"):
                tell("orcaserve relay: nothing is heard of the host")
                os._exit(EXIT_LOST)


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    os._exit(code)
