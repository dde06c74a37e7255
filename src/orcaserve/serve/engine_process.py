"""The engine process: reads commands from an inherited socket, runs the EngineLoop, and writes what it gives.

Started by the frontend as `python -m orcaserve.serve.engine_process SOCKET_FD RECORDER_FD`. Its threads: the main one
runs the loop; a reader fills the inbox and ends the process when the frontend is gone; a writer empties the outbox; a
heart beat says that the process is alive.

Exit codes: 0 after Stop or the frontend's end, 1 if the model cannot be served, 70 if the loop failed or a worker of
this process is gone.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from orcaserve.core.config import EngineInfo, EngineOptions, ModelError
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.order import OrderError
from orcaserve.core.pace import LEAST_SHARE
from orcaserve.core.policy import parse_policy
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.executor import Executor, Guided, Timekeeping, WorkerLost
from orcaserve.engine.framing import FrameReader, encode
from orcaserve.engine.loop import EngineLoop, Outbox
from orcaserve.engine.messages import Command, Submit
from orcaserve.engine.step_log import Header, StepLog, log_clock
from orcaserve.serve.flight_recorder import FlightRecorder, RecordingExecutor
from orcaserve.serve.frames import (
    BEAT_SECONDS,
    Beat,
    Failed,
    FromEngine,
    Loading,
    Ready,
    Start,
    ToEngine,
    Watch,
)
from orcaserve.serve.inbox import Releasing, SocketInbox
from orcaserve.serve.step_log_file import StepLogFile
from orcaserve.worker.machine import cpu_name
from orcaserve.worker.process import (
    die_with_parent,
    dump_when_told,
    in_one_line,
    keep_freed_memory,
    tell,
)
from orcaserve.worker.receiver import Receiver

FLUSH_SECONDS = 1.0
# Where --max-itl is not given. A person reads some four tokens a second; a model that takes as long for a decode alone
# must not wait for its prompts.
CPU_MAX_ITL = 0.25
CPU_PROMPT_SHARE = 3.0
EXIT_MODEL, EXIT_LOOP = 1, 70

Progress = Callable[[str, int, int], None]
Lost = Callable[[str], None]
Build = Callable[[EngineOptions, Progress, Lost], tuple[Executor, EngineInfo]]


YIELDS = 5  # niceness: where the frontend has no core of its own it must still answer, if only to refuse


class SocketOutbox:
    """Frames on their way to the frontend, written by a thread of their own: a slow reader never blocks the loop.

    What waits here is bounded by the tokens that the accepted requests may still generate.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
        self._thread.start()

    def put(self, step: FromEngine) -> None:
        self._frames.put(step)

    @property
    def is_empty(self) -> bool:
        return self._frames.empty()

    def close(self) -> None:
        """Gives the frames that are still here a moment to leave."""
        self._frames.put(None)
        self._thread.join(FLUSH_SECONDS)

    def _write(self) -> None:
        while (frame := self._frames.get()) is not None:
            try:
                self._sock.sendall(encode(frame))
            except OSError:
                return  # the frontend is gone; the reader ends the process


def main(socket_fd: int, recorder_fd: int, build: Build | None = None) -> int:
    """Serves until Stop or until the frontend is gone; returns the exit code.

    build: makes the executor; None: `orcaserve.executors.build.build`. A test passes its own.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's Ctrl-C reaches everyone; the frontend decides
        signal.signal(number, signal.SIG_IGN)
    for fd in (socket_fd, recorder_fd):
        os.set_inheritable(fd, False)
    die_with_parent()
    dump_when_told()
    os.nice(YIELDS)
    sock = socket.socket(fileno=socket_fd)
    start: queue.SimpleQueue[EngineOptions] = queue.SimpleQueue()
    inbox = SocketInbox()
    outbox = SocketOutbox(sock)
    watched = threading.Event()
    recorder = FlightRecorder(recorder_fd)
    recorder.hear(0)
    threading.Thread(target=_read, args=(sock, start, recorder, inbox, watched), name="reader", daemon=True).start()
    try:
        return _serve(start.get(), recorder, inbox, outbox, watched, build)
    finally:
        outbox.close()


def _serve(
    options: EngineOptions,
    recorder: FlightRecorder,
    inbox: SocketInbox,
    outbox: SocketOutbox,
    watched: threading.Event,
    build: Build | None,
) -> int:
    pulse = _Pulse(outbox)
    try:
        build = build or _default_build()
        executor, info = build(options, lambda stage, done, total: outbox.put(Loading(stage, done, total)), _end)
        recording = RecordingExecutor(executor, recorder)
        answers: Outbox = outbox
        if isinstance(executor, Guided) and executor.grammars is not None:
            inbox.grammars = executor.grammars
            answers = Releasing(outbox, executor.grammars)
        scheduler = (CheckedScheduler if options.check else Scheduler)(_scheduler_config(options, info))
        file = None if options.step_log is None else StepLogFile(Path(options.step_log))
        log = file and StepLog(_header(options, info), file.write, secrets.token_bytes(32))
        loop = EngineLoop(scheduler, recording, inbox, answers, log_clock(time.monotonic), log, watched.is_set)
    except ModelError as error:
        outbox.put(Failed(str(error)))
        return EXIT_MODEL
    except WorkerLost as error:  # as if this process had died: the next one may do better
        tell(f"orcaserve engine: {error}")
        return EXIT_LOOP
    except Exception as error:
        outbox.put(Failed(f"the engine could not start: {in_one_line(error)}"))
        return EXIT_MODEL
    keep_freed_memory()
    pulse.watch(lambda: Beat(recording.num_tokens, loop.stats(), _busy_seconds(executor)))
    outbox.put(Ready(info))
    try:
        loop.run()
    except Exception as error:
        tell(f"orcaserve engine: the loop failed: {in_one_line(error)}")
        return EXIT_LOOP
    finally:
        if file is not None:
            file.close(FLUSH_SECONDS)
    return 0


def _busy_seconds(executor: Executor) -> tuple[float, ...]:
    return executor.busy_seconds if isinstance(executor, Timekeeping) else ()


def _end(why: str) -> None:
    """The executor is lost, and with it this process: the supervisor starts everything again."""
    tell(f"orcaserve engine: {why}")
    os._exit(EXIT_LOOP)


def _default_build() -> Build:
    from orcaserve.executors.build import build  # late, so that its failure is a frame

    return build


class _Pulse:
    """The heart beat, apart from the loop: it goes on while the loop is inside a kernel."""

    def __init__(self, outbox: SocketOutbox) -> None:
        self._outbox = outbox
        self._read: Callable[[], Beat] = Beat
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def watch(self, read: Callable[[], Beat]) -> None:
        """Reports this from now on. It only reads numbers that the loop owns."""
        self._read = read

    def _beat(self) -> None:
        while True:
            if self._outbox.is_empty:  # else the frontend is behind, and what waits for it says that we live
                self._outbox.put(self._read())
            time.sleep(BEAT_SECONDS)


def _read(
    sock: socket.socket,
    start: queue.SimpleQueue[EngineOptions],
    recorder: FlightRecorder,
    inbox: SocketInbox,
    watched: threading.Event,
) -> None:
    """Turns the socket's bytes into commands; when the frontend is gone, the process is too, even inside a kernel.

    Being watched is no command: the loop must not wake up for it, nor take it for a time that a step log should have.
    """
    try:
        reader = FrameReader(ToEngine)
        receiver = Receiver(sock)
        while data := receiver.receive():
            for frame in reader.feed(data):
                if isinstance(frame, Start):
                    start.put(frame.options)
                elif isinstance(frame, Watch):
                    (watched.set if frame.on else watched.clear)()
                else:
                    if isinstance(frame, Submit):
                        recorder.hear(frame.request.id)
                    inbox.put(cast(Command, frame))
    except Exception as error:
        tell(f"orcaserve engine: the link failed: {in_one_line(error)}")
    os._exit(0)


def _scheduler_config(options: EngineOptions, info: EngineInfo) -> SchedulerConfig:
    try:
        policy = parse_policy(options.policy)
    except OrderError as error:
        raise ModelError(str(error)) from None
    overlap = info.overlap and not policy.request_level
    max_itl, prompt_share = options.max_itl or None, LEAST_SHARE
    if options.max_itl is None and info.device == "cpu" and policy.cuts_prompts:
        max_itl, prompt_share = CPU_MAX_ITL, CPU_PROMPT_SHARE
    return SchedulerConfig(
        policy=policy,
        max_batch_size=options.max_batch_size,
        max_batch_tokens=max(options.max_batch_tokens, options.max_batch_size),  # room for everyone's next token
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        depth=2 if overlap else max(options.depth, options.pipeline_parallel),
        overlap=overlap,
        max_itl=max_itl,
        prompt_share=prompt_share,
        swap=info.swap,
    )


def _header(options: EngineOptions, info: EngineInfo) -> Header:
    """The first line of a step log."""
    from orcaserve.model.config import read_config
    from orcaserve.model.shape import shape_of

    try:
        config = read_config(options.model)
        shape = shape_of(config, Path(options.model).name, info.dtype, options.quantization)
    except ModelError:  # another backend's model
        shape = None
    return Header(config=_scheduler_config(options, info), model=shape, machine=cpu_name(), threads=info.threads)


if __name__ == "__main__":
    code = main(int(sys.argv[1]), int(sys.argv[2]))
    os._exit(code)  # a model's threads and caches need no tidy end
