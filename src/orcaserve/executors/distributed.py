"""`DistributedExecutor`: runs a batch on worker processes, tensor × pipeline of them, on one host or several.

The control plane is a tree of its own: the engine sends a batch to every host, whose first worker passes it on at once
to the next stage and to its own, before any kernel runs; only the last stage answers (Orca, OSDI 2022, section 4.1).
Activations travel beside it (`parallel.world`). A worker that is gone takes all with it: the group is started again as
a whole.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec

from orcaserve.core.batch import Batch, StepResult
from orcaserve.core.config import BudgetLine, EngineInfo, EngineOptions, ModelError
from orcaserve.core.request import NewRequest
from orcaserve.engine.executor import WorkerLost
from orcaserve.engine.framing import encode
from orcaserve.executors.hosts import Host, gather_hosts
from orcaserve.executors.measure import measure
from orcaserve.executors.messages import (
    Alive,
    FromWorker,
    Loaded,
    MakeCache,
    Place,
    Prepare,
    Prepared,
    Progress,
    Refused,
    Release,
    Result,
    Serving,
    Span,
    WhileServing,
)
from orcaserve.model.config import ModelConfig, read_config
from orcaserve.model.plan import shared
from orcaserve.model.shape import shape_of
from orcaserve.parallel.split import Split
from orcaserve.sim import stages
from orcaserve.sim.hardware import hardware

OnProgress = Callable[[str, int, int], None]
OnLost = Callable[[str], None]
UNTOLD = 4096  # batches of each rank whose seconds are kept until somebody asks


class DistributedExecutor:
    """Owner of the hosts, and through them of the workers. submit and result are called by one thread.

    grammars: compiled by the rank that answers. pids: of the workers on this host.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        arrived: queue.SimpleQueue[StepResult | WorkerLost],
        busy: list[float],
        took: Sequence[deque[float]],
        grammars: _RemoteGrammars,
    ) -> None:
        self._hosts = tuple(hosts)
        self.grammars = grammars
        self._arrived = arrived
        self._busy = busy
        self._took = took
        self._known: dict[int, None] = {}  # requests that the workers have been told of
        self.pids = hosts[0].pids

    def submit(self, batch: Batch) -> _Awaited:
        for id in batch.freed:
            self._known.pop(id, None)
        self._known.update((new.id, None) for new in batch.new)
        data = encode(batch)
        for host in self._hosts:
            host.run(data)
        return _Awaited(self._arrived)

    def forget_all(self) -> None:
        """Makes ready for a new scheduler over the same workers."""
        self.submit(Batch(step=0, rows=(), freed=tuple(self._known))).result()

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """Of each rank, as it said last: a quarter of a second ago at most."""
        return tuple(self._busy)

    def take_seconds(self) -> list[list[float]]:
        """Seconds that each rank worked at each of the latest batches, since somebody last asked; as `busy_seconds`."""
        return [[took.popleft() for _ in range(len(took))] for took in self._took]

    def close(self) -> None:
        """Ends the workers. They end with this process, too."""
        for host in self._hosts:
            host.close()


class _RemoteGrammars:
    """`Preparing`, by the rank that answers. prepared: by each request that it knows, who hears that it is done."""

    def __init__(self, tell: Callable[[WhileServing], None], prepared: dict[int, Callable[[], None]]) -> None:
        self._tell = tell
        self._prepared = prepared

    def prepare(self, request: NewRequest, ready: Callable[[], None]) -> None:
        self._prepared[request.id] = ready
        self._tell(Prepare(msgspec.structs.replace(request, token_ids=())))

    def release(self, id: int) -> None:
        if self._prepared.pop(id, None) is not None:
            self._tell(Release(id))


class _Awaited:
    """A batch that the workers have."""

    def __init__(self, arrived: queue.SimpleQueue[StepResult | WorkerLost]) -> None:
        self._arrived = arrived

    def result(self) -> StepResult:
        """Raises WorkerLost."""
        result = self._arrived.get()
        if isinstance(result, WorkerLost):
            self._arrived.put(result)  # for whoever asks next
            raise result
        return result


def start_workers(
    options: EngineOptions, progress: OnProgress | None, on_lost: OnLost | None
) -> tuple[DistributedExecutor, EngineInfo]:
    """Starts a process for each rank, on this host and on those that join it. See `build` for the rest.

    options.device: "cuda" has each rank take a GPU of its host, in turn; else they compute on the CPU.
    """
    started = time.monotonic()
    config = read_config(options.model)
    places = make_places(config, options)
    heard: queue.SimpleQueue[tuple[int, FromWorker] | WorkerLost] = queue.SimpleQueue()
    arrived: queue.SimpleQueue[StepResult | WorkerLost] = queue.SimpleQueue()
    busy = [0.0] * len(places)
    took: list[deque[float]] = [deque(maxlen=UNTOLD) for _ in places]
    prepared: dict[int, Callable[[], None]] = {}
    serving = threading.Event()

    def on_frame(rank: int, frame: FromWorker) -> None:
        if isinstance(frame, Result):
            busy[rank] = frame.busy_seconds
            arrived.put(frame.result)
        elif isinstance(frame, Alive):
            busy[rank] = frame.busy_seconds
            took[rank].extend(frame.took)
        elif isinstance(frame, Prepared):
            if (ready := prepared.get(frame.id)) is not None:
                ready()
        else:
            heard.put((rank, frame))

    def lost(why: str) -> None:
        heard.put(WorkerLost(why))
        arrived.put(WorkerLost(why))
        if on_lost is not None and serving.is_set():
            on_lost(why)

    with _closed_unless_done(gather_hosts(options, places, progress, on_frame, lost)) as hosts:
        loaded = [frame for frame in _each(Loaded, len(places), heard, progress) if isinstance(frame, Loaded)]
        if len({one.profile for one in loaded}) > 1:
            raise ModelError("the hosts compute other bits than each other: they need the same processors and versions")
        num_blocks, num_slots = min(one.num_blocks for one in loaded), min(one.num_slots for one in loaded)
        max_model_len = min(min(one.max_model_len for one in loaded), num_blocks * options.block_size)
        for host in hosts:
            for place in host.places:
                host.tell(place.rank, MakeCache(num_blocks, num_slots))
        at = time.monotonic()
        _each(Serving, len(places), heard, None)
        last = next(place for place in places if place.stage == places[-1].stage)  # the rank that answers
        [host] = [host for host in hosts if last in host.places]
        executor = DistributedExecutor(
            hosts, arrived, busy, took, _RemoteGrammars(partial(host.tell, last.rank), prepared)
        )
        swap = measure(
            executor,
            num_slots=num_slots,
            num_blocks=num_blocks,
            block_size=options.block_size,
            max_model_len=max_model_len,
            stages=options.pipeline_parallel,
        )
    serving.set()
    info = EngineInfo(
        architecture=config.architecture,
        dtype=loaded[0].dtype,
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        block_size=options.block_size,
        num_blocks=num_blocks,
        profile=loaded[0].profile,
        deterministic=loaded[0].deterministic,
        device="gpu" if options.device == "cuda" else "cpu",
        swap=swap,
        threads=sum(one.threads for one in loaded),
        budget=_budget(places, loaded),
        timings=(("load weights", at - started), ("make KV cache", time.monotonic() - at)),
    )
    return executor, info


@contextmanager
def _closed_unless_done(hosts: Sequence[Host]) -> Iterator[Sequence[Host]]:
    try:
        yield hosts
    except BaseException:
        for host in hosts:
            host.close()
        raise


def make_places(config: ModelConfig, options: EngineOptions) -> tuple[Place, ...]:
    """One for each rank. Raises ModelError if there are more stages than layers, or another backend is asked for."""
    if options.backend == "transformers":
        raise ModelError("the transformers backend runs in one process; leave out the parallel sizes")
    tensor, pipeline = options.tensor_parallel, options.pipeline_parallel
    shared(config, Split(0, tensor))  # refuses
    if options.nnodes > 1 and options.control_plane == "mixed":
        raise ModelError("the planes can be mixed on one host only")
    if tensor * pipeline % options.nnodes:
        raise ModelError(f"{tensor * pipeline} ranks cannot be spread evenly over {options.nnodes} hosts")
    try:
        cut: tuple[Span, ...]
        if options.stage_split == "equal":
            cut = stages.equal(config.num_layers, pipeline)
        else:
            shape = shape_of(config, Path(options.model).name, quantization=options.quantization)
            on = hardware("H100" if options.device == "cuda" else "zen4-core")
            cut = stages.balanced(shape, on, pipeline, tensor)
    except ValueError as error:
        raise ModelError(f"the model cannot be cut into {pipeline} stages: {error}") from error
    return tuple(Place(rank, tensor, cut) for rank in range(len(cut) * tensor))


def _each(
    kind: type[FromWorker],
    count: int,
    heard: queue.SimpleQueue[tuple[int, FromWorker] | WorkerLost],
    progress: OnProgress | None,
) -> list[FromWorker]:
    """A frame of this kind from each rank, in order. Raises ModelError if one refuses, WorkerLost once one is lost."""
    found: dict[int, FromWorker] = {}
    done: dict[int, tuple[int, int]] = {}
    while len(found) < count:
        item = heard.get()
        if isinstance(item, WorkerLost):
            raise WorkerLost(f"{item}, while the model was loading")
        rank, frame = item
        if isinstance(frame, Refused):
            raise ModelError(frame.message)
        if isinstance(frame, Progress):
            done[rank] = frame.done, frame.total
            if progress is not None and len(done) == count:
                progress("weights", sum(a for a, _ in done.values()), sum(b for _, b in done.values()))
        elif isinstance(frame, kind):
            found[rank] = frame
    return [found[rank] for rank in range(count)]


def _budget(places: Sequence[Place], loaded: Sequence[Loaded]) -> tuple[BudgetLine, ...]:
    """The memory table of all ranks together."""
    tensor, cut = places[0].tensor, places[0].stages
    note = f"{len(places)} ranks: TP {tensor} x PP {len(cut)}, layers {', '.join(f'{a}-{b - 1}' for a, b in cut)}"
    lines = []
    for same in zip(*(one.budget for one in loaded), strict=True):
        said = note if same[0].name == "weights" else min(same, key=lambda line: line.num_bytes).note
        lines.append(BudgetLine(same[0].name, sum(line.num_bytes for line in same), said))
    return tuple(lines)
