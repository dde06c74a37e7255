"""`Supervisor`: keeps one engine process alive: starts it, notices death, freezing and stuck steps, starts it again.

Death is the socket's end. Freezing is three beats missed by a process that gets no work done. A stuck step is a batch
that takes far longer than its tokens should; of both the log gets the stacks of all threads, the workers' before the
engine's. Whichever it is, the process is killed, reaped, and its owner is told who was in flight; then comes another
one, after a back-off that grows while nothing is gained in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess  # an argument list, never a shell
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.engine.framing import FrameReader, encode
from orcaserve.engine.messages import Step, Stop
from orcaserve.engine.silence import Silence
from orcaserve.serve.flight_recorder import FlightRecorder, Record
from orcaserve.serve.frames import (
    BEAT_SECONDS,
    Beat,
    Failed,
    FromEngine,
    Loading,
    Ready,
    Start,
    ToEngine,
)
from orcaserve.worker.process import DUMP_SECONDS, children, has_ended, pulse, tell_to_dump

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "orcaserve.serve.engine_process")
STUCK_SECONDS = 30.0
STUCK_FACTOR = 20.0
STOP_SECONDS = 1.0
BACKOFF_SECONDS = (0.1, 5.0)
LASTING_SECONDS = 10.0  # an engine that was ready for so long was worth its start, even if nobody asked for anything
MOST_FRUITLESS = 8


class Death(NamedTuple):
    """How an engine ended, in words for the operator, and what it had been doing, if that is known.

    from_outside: somebody who is not this process has killed it.
    """

    reason: str
    record: Record | None = None
    from_outside: bool = False


class Owner(Protocol):
    """Whom a supervisor serves. Called from the event loop; must not raise."""

    @property
    def is_busy(self) -> bool:
        """Whether the engine has been given work that it has not finished."""
        ...

    def on_loading(self, stage: str, done: int, total: int) -> None: ...

    def on_ready(self, info: EngineInfo) -> None: ...

    def on_step(self, step: Step) -> None: ...

    def on_beat(self, beat: Beat) -> None: ...

    def on_death(self, death: Death) -> bool:
        """The engine is dead. True if that settled something."""
        ...

    def on_failed(self, message: str) -> None:
        """There will be no further engine."""
        ...


class EngineProcess(asyncio.Protocol):
    """One engine process and this end of its socket. Owner of both, from `start` to the end of `reap`."""

    def __init__(self, on_frame: Callable[[FromEngine], None]) -> None:
        self._on_frame = on_frame
        self._reader = FrameReader(FromEngine)
        self._lost = asyncio.Event()
        self._recorder = FlightRecorder.create()
        self._transport: asyncio.Transport
        self._process: subprocess.Popen[bytes]

    @classmethod
    async def start(
        cls, command: Sequence[str], options: EngineOptions, on_frame: Callable[[FromEngine], None]
    ) -> EngineProcess:
        """Spawns the process; raises OSError if that cannot be done.

        Must run in a thread that lives as long as the engine shall: the engine asks Linux to die with it.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self = cls(on_frame)
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
            try:
                self._process = subprocess.Popen(  # noqa: S603
                    [*command, str(theirs.fileno()), str(self._recorder.fd)],
                    pass_fds=(theirs.fileno(), self._recorder.fd),
                    # The cores are shared with this process: compute threads must not spin for long while they wait.
                    env={"GOMP_SPINCOUNT": "5000", **os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # whatever a library prints must not get between the lines of the frontend's output
                    process_group=0,
                )
            except BaseException:
                self._transport.abort()
                self._recorder.close()
                raise
        self.send(Start(options))
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def record(self) -> Record | None:
        """What it is doing. Of an engine on another host nothing is known while it lives."""
        return self._recorder.read()

    def send(self, frame: ToEngine) -> None:
        if not self._lost.is_set():
            self._transport.write(encode(frame))

    async def is_gone(self, within: float) -> bool:
        """Waits for the end of the socket, at most so many seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._lost.wait(), within)
        return self._lost.is_set()

    def kill(self) -> None:
        self._process.kill()

    async def dump(self) -> None:
        """Has it and its workers write down what every thread is doing, of which they die; gives them a moment.

        Its workers come first, since they are killed when it ends. It is stopped meanwhile: it would go on, or exit,
        for having lost them.
        """
        if self._process.poll() is not None:
            return  # its number may be another's already
        self._process.send_signal(signal.SIGSTOP)
        workers = [worker for parent in children(self.pid) for worker in children(parent) or [parent]]
        for pid in workers:
            tell_to_dump(pid)
        end = time.monotonic() + DUMP_SECONDS
        while not all(map(has_ended, workers)) and time.monotonic() < end:
            await asyncio.sleep(0.005)
        tell_to_dump(self.pid)
        await self._exit_code(within=DUMP_SECONDS)

    async def reap(self) -> Death:
        """Makes sure that the process is dead and lets go of everything."""
        if self._lost.is_set():  # it may be about to exit by itself, with a code that says more than a signal
            await self._exit_code(within=BEAT_SECONDS)
        killed_before = self._process.poll() == -signal.SIGKILL
        self.kill()
        code = await self._exit_code()
        record = self.record
        self._recorder.close()
        self._transport.abort()
        await self._lost.wait()
        return Death(_manner(code), record, killed_before)

    async def _exit_code(self, within: float = float("inf")) -> int:
        """The exit code, waited for without blocking the event loop: the end of a large process takes a while."""
        end = time.monotonic() + within
        while (code := self._process.poll()) is None and time.monotonic() < end:
            await asyncio.sleep(0.005)
        return -1 if code is None else code

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        for frame in self._reader.feed(data):
            self._on_frame(cast(FromEngine, frame))

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set()


def backoff(fruitless: int) -> float:
    """Seconds from one start to the next, after so many starts in a row that led nowhere."""
    least, most = BACKOFF_SECONDS
    return min(most, least * 2 ** max(0, fruitless - 1))


def _manner(code: int) -> str:
    """How a process ended, for the operator."""
    if code >= 0:
        return f"exit code {code}"
    hint = ", out of memory?" if code == -signal.SIGKILL else ""
    return f"signal {-code}{hint}"


class Watch:
    """Tells from what is heard of an engine, tick by tick, whether it is frozen or stuck.

    Ticks, not seconds: when the frontend itself was held up, the frames that came meanwhile are heard before the next.
    """

    def __init__(self, now: float) -> None:
        self._silence = Silence(is_loading=True)
        self._progress = now
        self._num_tokens = 0
        self._seconds_per_token: float | None = None

    def hear(self, frame: FromEngine, now: float) -> None:
        self._silence.end()
        if isinstance(frame, Ready):
            self._silence.loaded()
        elif isinstance(frame, Beat):
            self._num_tokens = frame.num_tokens
        elif isinstance(frame, Step):
            self._progress = now
            if frame.num_tokens > 0:
                latest = frame.seconds / frame.num_tokens
                known = self._seconds_per_token
                self._seconds_per_token = latest if known is None else known + 0.1 * (latest - known)

    def tick(self, now: float, is_busy: bool, pulse: object) -> str | None:
        """Why the engine has to be killed, or None."""
        if not is_busy:
            self._progress = now
        if self._silence.tick(pulse):
            return "frozen"
        return "stuck" if now - self._progress > self.limit else None

    @property
    def limit(self) -> float:
        """Seconds that the batches in flight may take. The first one has no measure, and may be slow."""
        if self._seconds_per_token is None:
            return 10 * STUCK_SECONDS
        return max(STUCK_SECONDS, STUCK_FACTOR * self._seconds_per_token * self._num_tokens)

    def age(self, now: float) -> float:
        """Seconds since an iteration ended, while there is work."""
        return now - self._progress


class Supervisor:
    """Owner of the engine process and of the task that looks after it.

    state: "loading" until an engine was ready for the first time, then "ready" or "restarting"; "failed" is for good.
    """

    def __init__(self, options: EngineOptions, owner: Owner, command: Sequence[str] | None = None) -> None:
        self._options = options
        self._owner = owner
        self._command = COMMAND if command is None else tuple(command)
        self._engine: EngineProcess | None = None
        self._watch: Watch | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._failure: str | None = None
        self._ready_since: float | None = None
        self._is_fruitful = False
        self.state = "loading"
        self.num_starts = 0  # how often an engine got ready

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="engine supervisor")

    @property
    def pid(self) -> int | None:
        return self._engine.pid if self._engine is not None else None

    @property
    def on_record(self) -> tuple[int, ...]:
        """Requests of the engine's last batches, as far as is known."""
        record = self._engine.record if self._engine is not None else None
        return record.in_flight if record is not None else ()

    @property
    def step_age(self) -> float:
        """Seconds since the engine finished an iteration while it has work to do; 0 while it has none."""
        if not self._owner.is_busy or self._watch is None:
            return 0.0
        return self._watch.age(time.monotonic())

    def send(self, frame: ToEngine) -> None:
        """To the engine, if there is one."""
        if self._engine is not None:
            self._engine.send(frame)

    async def stop(self) -> None:
        """Ends the engine process, within a second or by force."""
        self._stopping.set()
        try:
            if self._engine is not None and self._ready_since is not None:
                self._engine.send(Stop())
                await self._engine.is_gone(within=STOP_SECONDS)
        finally:
            if self._engine is not None:
                self._engine.kill()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            await self._keep_alive()
        except Exception as error:  # a bug here must end the requests, not leave them waiting for ever
            log.exception("the supervisor failed")
            self._give_up(f"the engine's supervisor failed: {type(error).__name__}")

    async def _keep_alive(self) -> None:
        fruitless = 0
        while True:
            began = time.monotonic()
            self._is_fruitful = False
            self._ready_since = None
            self._failure = None
            death = await self._live()
            reason = death.reason
            if self._stopping.is_set():
                return
            if self._failure is not None and self.num_starts == 0:
                return self._give_up(self._failure)
            if self._owner.on_death(death):
                self._is_fruitful = True
            lasted = self._ready_since is not None and time.monotonic() - self._ready_since >= LASTING_SECONDS
            fruitless = 0 if self._is_fruitful or lasted else fruitless + 1
            if self.num_starts == 0 and fruitless > 1:
                return self._give_up(f"the engine process died while it was loading ({reason})")
            if fruitless >= MOST_FRUITLESS:
                return self._give_up(self._failure or f"the engine process died {fruitless} times in a row ({reason})")
            log.warning("the engine process died (%s); starting another", self._failure or reason)
            with contextlib.suppress(TimeoutError):
                pause = began + backoff(fruitless) - time.monotonic()
                await asyncio.wait_for(self._stopping.wait(), max(0.0, pause))
                return

    async def _live(self) -> Death:
        """One engine process, from its start to its end."""
        self._watch = watch = Watch(time.monotonic())
        verdict: str | None = None

        def on_frame(frame: FromEngine) -> None:
            if verdict is not None:
                return  # the last words of one that is given up
            watch.hear(frame, time.monotonic())
            self._hear(frame)

        try:
            engine = await EngineProcess.start(self._command, self._options, on_frame)
        except OSError as error:
            return Death(f"it could not be started: {error.strerror}")
        self._engine = engine
        if self._stopping.is_set():
            engine.kill()
        try:
            while verdict is None and not await engine.is_gone(within=BEAT_SECONDS):
                verdict = watch.tick(time.monotonic(), self._owner.is_busy, pulse(engine.pid))
        finally:
            self._engine = None
            if self.state == "ready":
                self.state = "restarting"
            record = engine.record  # of a stopped one: to write its stacks it has to go on, and hears of others then
            if verdict is not None:
                log.warning("the engine process %d is %s; its stacks:", engine.pid, verdict)
                await engine.dump()
            death = await engine.reap()
        return death if verdict is None else Death(verdict, record)

    def _hear(self, frame: FromEngine) -> None:
        match frame:
            case Step():
                self._is_fruitful = self._is_fruitful or bool(frame.outputs)
                self._owner.on_step(frame)
            case Beat():
                self._owner.on_beat(frame)
            case Loading():
                self._owner.on_loading(frame.stage, frame.done, frame.total)
            case Ready():
                self._ready_since = time.monotonic()
                self.num_starts += 1
                self.state = "ready"
                self._owner.on_ready(frame.info)
            case Failed():
                self._failure = frame.message

    def _give_up(self, message: str) -> None:
        self.state = "failed"
        self._owner.on_failed(message)
