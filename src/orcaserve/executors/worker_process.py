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
from pathlib import Path
from typing import TypeVar, cast

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from orcaserve.core.batch import Batch
from orcaserve.core.config import ModelError
from orcaserve.engine.framing import FrameReader, encode
from orcaserve.executors.loading import load_part
from orcaserve.executors.messages import (
    Alive,
    Begin,
    FromWorker,
    Loaded,
    MakeCache,
    Place,
    Progress,
    Refused,
    Result,
    Serving,
    ToWorker,
)
from orcaserve.parallel.world import Hidden, World
from orcaserve.worker.grammars import Grammars
from orcaserve.worker.process import die_with_parent, dump_when_told, in_one_line, keep_freed_memory, tell
from orcaserve.worker.stage import StageWorker

BEAT_SECONDS = 0.25
RECEIVE_BYTES = 1 << 18
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
    make: queue.SimpleQueue[MakeCache] = queue.SimpleQueue()
    batches: queue.SimpleQueue[Batch] = queue.SimpleQueue()

    def on_command(frame: ToWorker) -> None:
        begin.put(frame) if isinstance(frame, Begin) else make.put(frame)

    _read_in_background(sock, cast(type[ToWorker], ToWorker), on_command, (), lambda: os._exit(0))
    worker: list[StageWorker] = []
    threading.Thread(target=_beat, args=(report, worker), name="beat", daemon=True).start()
    try:
        first = begin.get()
        outs = [socket.socket(fileno=fd) for fd in out_fds] if first.options.control_plane == "separate" else []
        # A neighbour that is gone is the engine's business, which ends everybody.
        _read_in_background(socket.socket(fileno=inbox_fd), Batch, batches.put, outs, lambda: None)
        return _serve(first, make, batches, report, worker)
    except ModelError as error:
        report.put(Refused(str(error)))
        return EXIT_MODEL


def _serve(
    begin: Begin,
    make: queue.SimpleQueue[MakeCache],
    batches: queue.SimpleQueue[Batch],
    report: Report,
    beating: list[StageWorker],
) -> int:
    options, place = begin.options, begin.place
    world = World(_meet(begin), place.rank, place.tensor, len(place.stages))
    part = load_part(
        options,
        available=begin.available,
        threads=begin.threads,
        progress=lambda done, total: report.put(Progress(done, total)),
        layers=place.layers,
        group=world.group,
    )
    model, budget = part.model, part.budget
    report.put(
        Loaded(
            num_blocks=budget.num_blocks,
            num_slots=budget.num_slots,
            max_model_len=budget.max_model_len,
            budget=budget.lines,
            profile=part.profile,
            dtype=part.dtype,
            threads=begin.threads,
        )
    )
    hidden = Hidden(world, model.config.hidden_size, model.dtype)
    size = make.get()
    answers = world.is_last and place.is_first_of_stage
    worker = StageWorker(
        model,
        hidden,
        num_blocks=size.num_blocks,
        block_size=options.block_size,
        num_slots=size.num_slots,
        swap_dir=options.swap_dir,
        grammars=Grammars(Path(options.model), model.config.vocab_size) if answers else None,
    )
    beating.append(worker)
    keep_freed_memory()
    report.put(Serving())
    take = batches.get if options.control_plane == "separate" else _Mixed(world, place, batches).take
    try:
        while True:
            result = worker.run(take())
            if answers and result is not None:
                report.put(Result(result, worker.busy_seconds))
    except Exception as error:
        tell(f"orcaserve worker {place.rank}: an iteration failed: {in_one_line(error)}")
        return EXIT_ITERATION


def _meet(begin: Begin) -> dist.Store:
    """Where the ranks find each other."""
    at, place = begin.store, begin.place
    world = len(place.stages) * place.tensor
    if not at.host:
        return dist.FileStore(f"/proc/self/fd/{at.fd}", world)
    if place.rank:
        return dist.TCPStore(at.host, at.port, world, is_master=False)
    return dist.TCPStore(at.host, at.port, world, is_master=True, wait_for_workers=False, master_listen_fd=at.fd)


class _Mixed:
    """Batches that travel with the activations, for comparison: each stage waits for one, sends it on, then works.

    What the first stage has comes from the engine all the same.
    """

    def __init__(self, world: World, place: Place, batches: queue.SimpleQueue[Batch]) -> None:
        self._world, self._place, self._batches = world, place, batches
        self._decoder = msgspec.msgpack.Decoder(Batch)

    def take(self) -> Batch:
        world = self._world
        data = torch.empty(0, dtype=torch.uint8)
        length = torch.zeros(1, dtype=torch.int64)
        if self._place.is_first_of_stage:
            if world.is_first:
                data = torch.from_numpy(np.frombuffer(msgspec.msgpack.encode(self._batches.get()), np.uint8).copy())
            else:
                data = world.receive_bytes(int(world.receive_bytes(8).view(torch.int64)))
            length[0] = data.shape[0]
        world.share_bytes(length.view(torch.uint8))
        if not self._place.is_first_of_stage:
            data = torch.empty(int(length), dtype=torch.uint8)
        world.share_bytes(data)
        if self._place.is_first_of_stage and not world.is_last:
            world.send_bytes(length.view(torch.uint8))
            world.send_bytes(data)
        return self._decoder.decode(data.numpy().tobytes())


def _beat(report: Report, worker: Sequence[StageWorker]) -> None:
    with contextlib.suppress(OSError):  # the engine is gone
        while True:
            report.put(Alive(worker[0].busy_seconds if worker else 0.0))
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
            reader = FrameReader(kind)
            while data := sock.recv(RECEIVE_BYTES):
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
