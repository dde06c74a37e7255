"""One rank of a model that several share: meets the others, loads its part, and runs batches for ever.

On a CPU, or on a GPU of its own.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from orcaserve.core.batch import Batch
from orcaserve.core.config import EngineOptions, ModelError
from orcaserve.executors.loading import Part, load_part
from orcaserve.executors.messages import (
    Alive,
    Begin,
    FromWorker,
    Loaded,
    MakeCache,
    Place,
    Prepare,
    Prepared,
    Progress,
    Release,
    Result,
    Serving,
    WhileServing,
)
from orcaserve.parallel.group import Group
from orcaserve.parallel.world import Hidden, World
from orcaserve.worker.grammars import Grammars
from orcaserve.worker.process import in_one_line, keep_freed_memory, tell
from orcaserve.worker.stage import StageWorker

if TYPE_CHECKING:
    from orcaserve.executors.device_part import DevicePart
    from orcaserve.worker.gpu.stage import DeviceStage

EXIT_ITERATION = 70

Put = Callable[[FromWorker], None]
OnServing = Callable[[Callable[[], Alive], Callable[[Batch], None]], None]


def serve(
    begin: Begin,
    commands: queue.SimpleQueue[MakeCache | WhileServing],
    batches: queue.SimpleQueue[Batch],
    put: Put,
    on_serving: OnServing,
) -> int:
    """Returns the exit code, if an iteration fails; raises ModelError if the model cannot be served.

    commands: brings MakeCache first. put: what the engine is to hear. on_serving: is given, once, what tells how
    busy this rank is, and who is to be told of each batch before it can be taken.
    """
    options, place, device = begin.options, begin.place, _device_of(begin)
    world = World(_meet(begin), place.rank, place.tensor, len(place.stages), device, begin.shared)
    if begin.shared is not None:
        os.close(begin.shared)
    part = _load(begin, device, world.group, lambda done, total: put(Progress(done, total)))
    model, budget = part.model, part.budget
    put(
        Loaded(
            num_blocks=budget.num_blocks,
            num_slots=budget.num_slots,
            max_model_len=budget.max_model_len,
            budget=budget.lines,
            profile=part.profile,
            dtype=part.dtype,
            deterministic=model.deterministic,
            threads=begin.threads,
        )
    )
    hidden = Hidden(world, model.config.hidden_size, model.dtype)
    size = cast(MakeCache, commands.get())
    answers = world.is_last and place.is_first_of_stage
    grammars = Grammars(Path(options.model), model.config.vocab_size) if answers else None
    worker = _make_worker(part, options, size, grammars, hidden)
    if grammars is not None:
        threading.Thread(target=_prepare, args=(commands, grammars, put), name="prepare", daemon=True).start()
    on_serving(lambda: Alive(worker.busy_seconds, worker.take_seconds()), worker.expect)
    keep_freed_memory()
    put(Serving())
    take = batches.get if options.control_plane == "separate" else _Mixed(world, place, batches).take
    try:
        while True:
            result = worker.run(take())
            if answers and result is not None:
                put(Result(result, worker.busy_seconds))
    except Exception as error:
        tell(f"orcaserve worker {place.rank}: an iteration failed: {in_one_line(error)}")
        return EXIT_ITERATION


def _device_of(begin: Begin) -> torch.device:
    """Raises ModelError if the host has no such GPU."""
    device = torch.device(begin.device)
    if device.type == "cuda":
        if device.index >= (count := torch.cuda.device_count()):
            raise ModelError(f"rank {begin.place.rank} is to have GPU {device.index} of its host, which has {count}")
        torch.cuda.set_device(device)
    return device


def _load(begin: Begin, device: torch.device, group: Group, progress: Callable[[int, int], None]) -> Part | DevicePart:
    options, layers = begin.options, begin.place.layers
    if options.device != "cuda":
        return load_part(
            options,
            available=begin.available,
            threads=begin.threads,
            progress=progress,
            layers=layers,
            group=group,
        )
    from orcaserve.executors.device_part import DevicePart  # Triton comes with it, an extra

    torch.set_num_threads(begin.threads)
    return DevicePart.load(options, device, progress, layers, group)


def _make_worker(
    part: Part | DevicePart, options: EngineOptions, size: MakeCache, grammars: Grammars | None, pipe: Hidden
) -> StageWorker | DeviceStage:
    if not isinstance(part, Part):
        from orcaserve.executors.device import build_rank

        return build_rank(part, size.num_blocks, size.num_slots, grammars, pipe)
    return StageWorker(
        part.model,
        pipe,
        num_blocks=size.num_blocks,
        block_size=options.block_size,
        num_slots=size.num_slots,
        swap_dir=options.swap_dir,
        grammars=grammars,
    )


def _prepare(commands: queue.SimpleQueue[MakeCache | WhileServing], grammars: Grammars, put: Put) -> None:
    """Does what the engine says about grammars, for ever."""
    while True:
        match commands.get():
            case Prepare(request):
                grammars.prepare(request, partial(put, Prepared(request.id)))
            case Release(id):
                grammars.release(id)


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
