"""What crosses between the engine, its workers and other hosts, beside batches and activations. Typed frames."""

from __future__ import annotations

import msgspec

from orcaserve.core.batch import StepResult
from orcaserve.core.config import BudgetLine, EngineOptions
from orcaserve.core.request import NewRequest

Span = tuple[int, int]  # layers [first, last)


class Place(msgspec.Struct, frozen=True):
    """Where a rank stands: rank r computes a part of stage r // tensor, which has the layers stages[r // tensor]."""

    rank: int
    tensor: int
    stages: tuple[Span, ...]

    @property
    def stage(self) -> int:
        return self.rank // self.tensor

    @property
    def layers(self) -> Span:
        return self.stages[self.stage]

    @property
    def is_first_of_stage(self) -> bool:
        return self.rank % self.tensor == 0


class Ends(msgspec.Struct, frozen=True):
    """File descriptors of a rank: where it reports, where batches come in, and those whom it passes them on to.

    files: others that it needs (StoreAt's, Begin's).
    """

    report: int
    inbox: int
    outs: tuple[int, ...]
    files: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        return (self.report, self.inbox, *self.outs, *self.files)


class Born(msgspec.Struct, frozen=True, tag=True):
    """The ranks of a host are there, with all that they import, and wait for Begin. pids: in their order."""

    pids: tuple[int, ...]


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A rank's process has ended. index: of those of its host. code: its exit code, or minus the signal."""

    index: int
    code: int


FromParent = Born | Ended


class StoreAt(msgspec.Struct, frozen=True):
    """Where the ranks find each other: in an inherited file on one host, else at a port of the head.

    fd: that file, or the head's listening socket; -1 on the other hosts.
    """

    fd: int = -1
    host: str = ""
    port: int = 0


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Load this rank's part. available: bytes of memory for this rank; threads: that it computes with.

    device: where, as torch names it. `options.device` says which kernels are used there: "cuda" means those of a GPU.
    shared: the file that the ranks of its stage share memory in; None: they are on several hosts.
    """

    options: EngineOptions
    place: Place
    store: StoreAt
    available: int
    threads: int
    device: str = "cpu"
    shared: int | None = None


class MakeCache(msgspec.Struct, frozen=True, tag=True):
    """Make a KV cache of so many blocks, and a swap space of so many slots: as many as every rank has room for."""

    num_blocks: int
    num_slots: int = 0


class Loaded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A rank has its weights. num_blocks … budget: what it has room for. profile … deterministic: its own."""

    num_blocks: int
    num_slots: int
    max_model_len: int
    budget: tuple[BudgetLine, ...]
    profile: str
    dtype: str
    deterministic: bool
    threads: int


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Bytes of weights loaded so far, and in all, of one rank."""

    done: int
    total: int


class Serving(msgspec.Struct, frozen=True, tag=True):
    """The cache is there; batches may come."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The model cannot be served, in one line."""

    message: str


class Alive(msgspec.Struct, frozen=True, tag=True):
    """busy_seconds: that this rank has worked so far. took: of these, the part of each batch since it last said so."""

    busy_seconds: float = 0.0
    took: tuple[float, ...] = ()


class Result(msgspec.Struct, frozen=True, tag=True):
    """What the oldest batch in flight gave; from the first rank of the last stage. busy_seconds: as in Alive."""

    result: StepResult
    busy_seconds: float


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Compile the grammar of a request, which comes without its tokens. To the rank that answers."""

    request: NewRequest


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """That has been done."""

    id: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """Whoever has this id needs its grammar no more."""

    id: int


WhileServing = Prepare | Release
ToWorker = Begin | MakeCache | WhileServing
FromWorker = Loaded | Progress | Serving | Refused | Alive | Result | Prepared


class Joined(msgspec.Struct, frozen=True, tag=True):
    """A host's first frame to the head."""

    node_rank: int


class Start(msgspec.Struct, frozen=True, tag=True):
    """The head's first frame: start these ranks, with the host's own copy of the model."""

    options: EngineOptions
    places: tuple[Place, ...]
    store: StoreAt


class Tell(msgspec.Struct, frozen=True, tag=True):
    rank: int
    frame: MakeCache | WhileServing


class Run(msgspec.Struct, frozen=True, tag=True):
    """A batch, as `engine.framing` has it."""

    batch: bytes


class Told(msgspec.Struct, frozen=True, tag=True):
    """What a worker of the host said."""

    rank: int
    frame: FromWorker


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The host has lost a worker, and ended the others."""

    why: str


class Here(msgspec.Struct, frozen=True, tag=True):
    """The sender is alive."""


ToHost = Start | Tell | Run | Here
FromHost = Joined | Told | Gone | Here
