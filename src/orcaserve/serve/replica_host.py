"""A host that runs a replica's engine for a frontend elsewhere (`serve.relay`): joins it, starts the engine, passes on.

Whatever ends (the engine, the link), the engine ends; then the host offers itself again.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess  # an argument list, never a shell
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from orcaserve.engine.framing import FrameReader, encode
from orcaserve.engine.silence import Silence
from orcaserve.executors.link import Link, LinkError, connect
from orcaserve.serve.flight_recorder import FlightRecorder
from orcaserve.serve.frames import BEAT_SECONDS, Start, ToEngine
from orcaserve.serve.relay import Data, Ended, FromReplicaHost, Here, Offer, ToReplicaHost
from orcaserve.worker.receiver import Receiver

COMMAND = (sys.executable, "-m", "orcaserve.serve.engine_process")
PAUSE_SECONDS = 0.5

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToReplicaHost).decode


def offer(
    model: str,
    address: tuple[str, int],
    secret: bytes,
    say: Callable[[str], None],
    command: Sequence[str] = COMMAND,
) -> None:
    """Serves for ever. model: this host's copy. say: told, in a line, what happens. command: the engine process's argv.

    Runs in a thread that lives as long as the engine shall, which asks Linux to die with it.
    """
    said, joined = "", f"joined {address[0]}:{address[1]}"
    while True:
        try:
            link = connect(address, secret)
        except OSError as error:
            line = f"waiting for a frontend at {address[0]}:{address[1]} ({error})"
        else:
            session = _Session(model, link, command, lambda: say(joined))
            line = f"left the frontend: {session.run()}"
        if line != said:
            say(line)
        said = line
        time.sleep(PAUSE_SECONDS)


class _Session:
    """From the offer to the end of the engine or of the link. Owner of the engine process and of its socket."""

    def __init__(self, model: str, link: Link, command: Sequence[str], on_joined: Callable[[], None]) -> None:
        self._model, self._link, self._command = model, link, command
        self._silence = Silence()
        self._ended = threading.Event()
        self._reader = FrameReader(ToEngine)
        self._why = ""
        self._on_joined: Callable[[], None] | None = on_joined

    def run(self) -> str:
        """Why it ended."""
        ours, theirs = socket.socketpair()
        recorder = FlightRecorder.create()
        process: subprocess.Popen[bytes] | None = None
        try:
            self._send(Offer())
            threading.Thread(target=self._tick, daemon=True).start()
            while True:
                frame = _decode(self._link.read())
                self._silence.end()
                self._has_joined()
                if not isinstance(frame, Data):
                    continue
                if process is not None:
                    ours.sendall(frame.data)
                elif (start := self._begun(frame.data)) is not None:
                    process = subprocess.Popen(  # noqa: S603
                        [*self._command, str(theirs.fileno()), str(recorder.fd)],
                        pass_fds=(theirs.fileno(), recorder.fd),
                        stdin=subprocess.DEVNULL,
                        stdout=2,
                    )
                    theirs.close()
                    ours.sendall(start)
                    threading.Thread(target=self._pass_on, args=(ours, process, recorder), daemon=True).start()
        except (LinkError, OSError, msgspec.MsgspecError) as error:
            return self._why or str(error)
        finally:
            self._ended.set()
            self._link.close()
            if process is not None:
                process.kill()
                process.wait()
            for sock in (ours, theirs):
                sock.close()
            recorder.close()

    def _begun(self, data: bytes) -> bytes | None:
        """What has come, once the first frame is whole: the frontend's start, with this host's copy of the model."""
        frames = cast("list[msgspec.Struct]", self._reader.feed(data))
        if not frames:
            return None
        first, *others = frames
        if not isinstance(first, Start):
            raise LinkError("the first frame is no start")
        options = msgspec.structs.replace(first.options, model=self._model)
        return b"".join(encode(frame) for frame in (Start(options), *others)) + self._reader.rest

    def _pass_on(self, ours: socket.socket, process: subprocess.Popen[bytes], recorder: FlightRecorder) -> None:
        """From the engine to the frontend, and at last how it ended."""
        with contextlib.suppress(OSError):
            receiver = Receiver(ours)
            while data := receiver.receive():
                self._send(Data(bytes(data)))
        if not self._ended.is_set():
            code = process.wait()
            self._why = f"the engine has ended ({code})"
            self._send(Ended(code, recorder.read()))
            self._link.close()

    def _has_joined(self) -> None:
        """With the first frame: before that the other side may still find that the secret is another."""
        if self._on_joined is not None:
            self._on_joined()
            self._on_joined = None

    def _tick(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(LinkError):
                self._link.beat(_encode(Here()))
            if self._silence.tick(pulse="not seen from here") and not self._why:
                self._why = "nothing is heard of the frontend"
                self._link.close()

    def _send(self, frame: FromReplicaHost) -> None:
        with contextlib.suppress(LinkError):
            self._link.send(_encode(frame))
