"""`DeviceWorker`: puts iterations on a device's stream, and tells what each gave once it is wanted.

An iteration in which everybody decodes is one recorded graph, padded to one of a few sizes: from the tokens that the
device itself drew before to those that it draws now. Of others the layers are a recorded graph, if the tokens are not
many, and the rest is put on the stream kernel by kernel. Requests whose draws need what only the host knows (penalties,
grammars, log-probabilities) are sampled there, which waits for the device.

Of a model that several devices share a worker is one rank. Its layers wait for the stage before on the stream, and so
do ranks that share layers for each other; nothing of that is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from orcaserve.core.batch import Batch, RowResult, StepResult
from orcaserve.ops.gpu.kernels import TritonKernels
from orcaserve.ops.gpu.layout import SPAN, DeviceLayout
from orcaserve.ops.gpu.pieces import FIELDS, Cutter
from orcaserve.ops.gpu.prepare import Staged, commit, prepare
from orcaserve.ops.gpu.sampling import Scratch, Wishes, sample
from orcaserve.ops.kernels import Kernels, KVCache
from orcaserve.ops.layout import Row
from orcaserve.ops.sampler import NOT_A_NUMBER
from orcaserve.worker.answers import Model, answer
from orcaserve.worker.gpu.seats import Seats
from orcaserve.worker.gpu.staging import HostSections, Sections, Sizes
from orcaserve.worker.gpu.stream import Event, Run, Stream
from orcaserve.worker.grammars import Grammars
from orcaserve.worker.requests import Job, Requests, under_grammar
from orcaserve.worker.stage import NoPipe, Pipe
from orcaserve.worker.swap import Swapper
from orcaserve.worker.worker import in_order, make_caches

_SEATS_PER_ROW = 4  # requests may hold KV without a row in every iteration
_UPDATES = 64  # entries of block tables that a graph of decodes takes, beside one for each row
_MORE_UPDATES = 1024  # that one takes which may read prompts
_MOST_RECORDED = 2048  # tokens


def graph_sizes(max_batch_size: int) -> list[int]:
    """Rows of the decodes that are recorded: closely where iterations are short, less so where they are long."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1024, 32)]
    return [size for size in sizes if size < max_batch_size] + [max_batch_size]


def layers_sizes(max_tokens: int) -> list[int]:
    """Tokens of the iterations of any kind whose layers are recorded.

    Products have tiles of 64 tokens or more then, so that padding costs little. Of more tokens than the last of these
    the layers take longer than the host does to launch their kernels one by one.
    """
    most = min(max_tokens, _MOST_RECORDED)
    sizes = [16, *range(32, 256, 32), *range(256, 1024, 64), *range(1024, most, 128)]
    return [size for size in sizes if size < most] + [most]


@dataclass(frozen=True, eq=False, slots=True)
class _Host:
    """The host's memory for one iteration: int32 [total], and its parts."""

    flat: Tensor
    told: HostSections

    @classmethod
    def of(cls, flat: Tensor, sizes: Sizes) -> _Host:
        return cls(flat[: sizes.total], Sections.of(flat, sizes).on_host())


@dataclass(frozen=True, eq=False, slots=True)
class _Graph:
    """What is recorded of iterations up to `sizes`. staged: what the host tells it. told: the parts of that.

    hosts: where the host writes it down, in turn. out: int32 [D] of tokens drawn, where all decode; else hidden values
    [M, H].
    """

    sizes: Sizes
    staged: Tensor
    told: Sections
    hosts: Sequence[_Host]
    out: Tensor
    run: Run


@dataclass(frozen=True, eq=False, slots=True)
class DevicePending:
    """An iteration on its way. where: the place of each request's token among those drawn."""

    batch: Batch
    where: dict[int, int]
    drawn: Tensor
    known: dict[int, RowResult]
    began: Event
    ended: Event
    on_end: Callable[[float], None]

    def result(self) -> StepResult:
        self.ended.wait()
        self.on_end(self.ended.seconds_since(self.began))
        tokens = self.drawn.tolist()
        results = dict(self.known)
        for id, place in self.where.items():
            token = tokens[place]
            results[id] = RowResult(id=id, token_id=token) if token >= 0 else RowResult(id=id, error=NOT_A_NUMBER)
        return in_order(self.batch, results)


def scratch_bytes(
    cutter: Cutter, max_batch_size: int, max_model_len: int, num_heads: int, head_dim: int, vocab_size: int
) -> int:
    """What a worker takes beside weights, KV and activations: the logits of a batch, and states of attention."""
    states = _most_states(cutter, max_model_len) * num_heads * (head_dim + 3)
    return 4 * (states + 2 * max_batch_size * vocab_size)


def _most_states(cutter: Cutter, max_model_len: int) -> int:
    return cutter.most_dealt * -(-max_model_len // SPAN)


class DeviceWorker:
    """Owner of the device's KV tensors, block tables and last tokens, the swap space, and what is known of requests.

    One thread calls it. At most `in_flight` iterations are submitted whose results have not been taken.
    busy_seconds: of the device, in the iterations whose results have been taken.
    """

    def __init__(
        self,
        model: Model,
        kernels: TritonKernels,
        stream: Stream,
        *,
        num_heads: int,
        num_blocks: int,
        block_size: int,
        max_batch_size: int,
        max_model_len: int,
        in_flight: int = 2,
        num_slots: int = 0,
        swap_dir: str | None = None,
        grammars: Grammars | None = None,
        pipe: Pipe | None = None,
    ) -> None:
        """num_heads: of queries. num_slots: blocks that the swap space holds; ModelError if it cannot be made.

        pipe: to the stages before and behind; None: the model is one stage.
        """
        self._model = model
        self._pipe: Pipe = NoPipe() if pipe is None else pipe
        self._stream = stream
        self.grammars = grammars
        self._block_size = block_size
        self._max_batch_size = max_batch_size
        self._requests = Requests(model.vocab_size, num_blocks, block_size, ahead=1)
        self._kv: Sequence[KVCache] = make_caches(model, num_blocks, block_size)
        self._swapper = Swapper(self._kv, num_slots, swap_dir) if num_slots else None
        self._cutter = kernels.cutter(num_heads, model.num_kv_heads, model.head_dim, model.dtype)
        num_seats = _SEATS_PER_ROW * max_batch_size
        self._seats = Seats(num_seats)
        device = stream.device
        self._tables = torch.zeros((num_seats, -(-max_model_len // block_size)), dtype=torch.int32, device=device)
        self._last_tokens = torch.zeros(num_seats, dtype=torch.int32, device=device)
        self._scratch = Scratch.make(2 * max_batch_size, model.vocab_size, device)
        kernels.reserve(_most_states(self._cutter, max_model_len), num_heads, model.head_dim)
        # One for each iteration in flight, and one to fill meanwhile.
        self._hosts = [stream.host_buffer(1 << 16) for _ in range(in_flight + 1)]
        self._drawn = [stream.host_buffer(2 * max_batch_size) for _ in range(in_flight + 1)]
        self._turn = 0
        self._graphs: dict[int, _Graph] = {}  # of decodes, by rows
        self._layers: dict[int, _Graph] = {}  # of iterations of any kind, by tokens
        self._hidden: Tensor | None = None  # where these leave their hidden values, one after the other
        self.busy_seconds = 0.0

    @property
    def caches(self) -> Sequence[KVCache]:
        """Of each layer."""
        return self._kv

    def forget_all(self) -> None:
        """As if no request had ever been described; for a new scheduler, which knows of none."""
        self._requests.forget_all()
        self._seats.clear()

    @torch.inference_mode()
    def record(self, size: int) -> None:
        """Records the iteration in which up to `size` requests decode."""
        sizes = Sizes(size, size, size + _UPDATES, size + self._cutter.most_dealt)
        staged, told = self._nobody(sizes)
        tokens = torch.zeros(size, dtype=torch.int32, device=self._stream.device)

        def run() -> None:
            self._draw(told, self._forward(told), tokens)

        self._graphs[size] = _Graph(sizes, staged, told, self._hosts_for(sizes), tokens, self._stream.record(run))

    @torch.inference_mode()
    def record_layers(self, num_tokens: int) -> None:
        """Records the layers of iterations of any kind of up to `num_tokens` tokens. The first call is for the most."""
        rows = self._max_batch_size
        tiles = num_tokens // self._cutter.tile_tokens + min(num_tokens, rows) + self._cutter.most_dealt
        sizes = Sizes(num_tokens, rows, rows + _MORE_UPDATES, tiles)
        staged, told = self._nobody(sizes)
        if self._hidden is None:
            self._hidden = torch.empty_like(self._forward(told))
        out = self._hidden[:num_tokens]
        run = self._stream.record(lambda: out.copy_(self._forward(told)))
        self._layers[num_tokens] = _Graph(sizes, staged, told, self._hosts_for(sizes), out, run)

    def _nobody(self, sizes: Sizes) -> tuple[Tensor, Sections]:
        """What an iteration is told in which there is only padding."""
        staged = torch.zeros(sizes.total, dtype=torch.int32, device=self._stream.device)
        told = Sections.of(staged, sizes)
        told.seats.fill_(-1)
        told.sample_seats.fill_(-1)
        return staged, told

    def _hosts_for(self, sizes: Sizes) -> list[_Host]:
        return [_Host.of(self._stream.host_buffer(sizes.total), sizes) for _ in self._hosts]

    @torch.inference_mode()
    def warm(self, num_tokens: int) -> None:
        """Reads a prompt of nobody: compiles what is not compiled yet, and shows that there is memory for it."""
        tiles = self._cutter.cut(np.array([0]), np.array([num_tokens]), np.array([0]), np.array([0]))
        _, told = self._nobody(Sizes(num_tokens, 1, 0, len(tiles)))
        told.tiles.copy_(torch.from_numpy(tiles))
        told.num_tiles.fill_(len(tiles))
        hidden = self._forward(told)
        if self._pipe.is_last:
            own = torch.zeros(1, dtype=torch.int32, device=self._stream.device)
            self._draw(told, hidden.index_select(0, told.sample_rows), own)

    @torch.inference_mode()
    def submit(self, batch: Batch) -> DevicePending:
        """Starts one iteration; does not wait for it, unless some of its rows are sampled on the host.

        What raises here raises: the device may be in any state.
        """
        if self._swapper is not None:
            self._swapper.run(batch.swaps)
        self._seats.leave(batch.freed)
        for new in batch.new:
            self._seats.take(new)
        plan = _Plan.of(self._requests.take(batch), self._pipe.is_last)
        updates = self._updates(plan.jobs)
        turn, self._turn = self._turn, (self._turn + 1) % len(self._hosts)
        drawn = self._drawn[turn][: len(plan.drawing)]
        known: dict[int, RowResult] = {}
        began = self._stream.mark()
        if (graph := self._graph(plan, updates)) is not None:
            self._fill(graph.hosts[turn], graph.sizes, graph.staged, plan, updates, self._cut(plan))
            graph.run()
            self._stream.copy(graph.out[: len(plan.drawing)], drawn)
        elif plan.jobs:
            hidden = self._compute(turn, plan, updates, drawn)
            known = {job.row.id: RowResult(id=job.row.id) for job in plan.jobs} | self._answer(hidden, plan)
        where = {plan.jobs[i].row.id: place for place, i in enumerate(plan.drawing)}
        return DevicePending(batch, where, drawn, known, began, self._stream.mark(), self._add_busy)

    def _add_busy(self, seconds: float) -> None:
        self.busy_seconds += seconds

    def _graph(self, plan: _Plan, updates: np.ndarray) -> _Graph | None:
        """The least recorded iteration that has room for this one; None if none has, or it is not of that kind."""
        if not plan.jobs or plan.num_decodes < len(plan.jobs) or len(plan.drawing) < len(plan.jobs):
            return None
        size = min((size for size in self._graphs if size >= plan.num_decodes), default=None)
        return None if size is None or updates.shape[0] > size + _UPDATES else self._graphs[size]

    def _updates(self, jobs: Sequence[Job]) -> np.ndarray:
        """int32 [U, 3]: the blocks that the rows bring, (seat, place in its table, block)."""
        found = [
            (self._seats[job.row.id], place, block)
            for job in jobs
            if job.row.new_blocks
            for place, block in enumerate(job.row.new_blocks, len(job.request.blocks) - len(job.row.new_blocks))
        ]
        return np.array(found, dtype=np.int32).reshape(-1, 3)

    def _compute(self, turn: int, plan: _Plan, updates: np.ndarray, drawn: Tensor) -> Tensor:
        """An iteration of any kind; the hidden values of its tokens [M, H], until the next iteration."""
        tiles = self._cut(plan)
        sizes = Sizes(sum(job.row.num_tokens for job in plan.jobs), len(plan.drawing), updates.shape[0], len(tiles))
        if (graph := self._recorded_layers(sizes)) is not None:
            self._fill(graph.hosts[turn], graph.sizes, graph.staged, plan, updates, tiles)
            graph.run()
            told, hidden = graph.told.with_samples(sizes.samples), graph.out
        else:
            staged = torch.empty(sizes.total, dtype=torch.int32, device=self._stream.device)
            if self._hosts[turn].shape[0] < sizes.total:
                self._hosts[turn] = self._stream.host_buffer(2 * sizes.total)
            self._fill(_Host.of(self._hosts[turn], sizes), sizes, staged, plan, updates, tiles)
            told = Sections.of(staged, sizes)
            hidden = self._forward(told)
        if sizes.samples:
            own = torch.empty(sizes.samples, dtype=torch.int32, device=self._stream.device)
            self._draw(told, hidden.index_select(0, told.sample_rows), own)
            self._stream.copy(own, drawn)
        return hidden

    def _recorded_layers(self, sizes: Sizes) -> _Graph | None:
        """The least that have room."""
        least = min((tokens for tokens in self._layers if tokens >= sizes.tokens), default=None)
        return None if least is None or not self._layers[least].sizes.have_room_for(sizes) else self._layers[least]

    def _forward(self, told: Sections) -> Tensor:
        """From what the host told, and the stage before, to the hidden values [M, H] of all tokens."""
        num_tokens = told.ids.shape[0]
        token_ids, positions, slots = (
            torch.empty(num_tokens, dtype=torch.int32, device=self._stream.device) for _ in range(3)
        )
        staged = Staged(told.ids, told.seats, told.starts, told.updates, told.num_updates)
        prepare(staged, self._last_tokens, self._tables, token_ids, positions, slots, block_size=self._block_size)
        layout = DeviceLayout(positions, slots, told.seats, self._tables, self._block_size, told.tiles, told.num_tiles)
        x = token_ids if self._pipe.is_first else self._pipe.receive(num_tokens)
        hidden = self._model.forward(x, layout, self._kv)
        if not self._pipe.is_last:
            self._pipe.send(hidden, num_tokens)
        return hidden

    def _draw(self, told: Sections, hidden: Tensor, tokens: Tensor) -> None:
        """A token for each of the rows [D, H], written to int32 `tokens` [D] and kept for the next iteration."""
        logits = self._model.logits(hidden)
        if logits is None:  # the first of the ranks that share the output matrix draws
            return
        wishes = Wishes(told.bases, told.sample_positions, told.temperatures, told.top_k, told.top_p, told.min_p)
        sample(logits, wishes, tokens, self._scratch, truncates=True)
        commit(tokens, told.sample_seats, self._last_tokens)

    def _cut(self, plan: _Plan) -> np.ndarray:
        """int32 [T, FIELDS]: the tiles of an iteration's attention."""
        rows = [(job.row.num_tokens, job.row.start, self._seats[job.row.id]) for job in plan.jobs]
        return self._cutter.cut(np.array(plan.firsts), *np.array(rows).T)

    def _fill(
        self, host: _Host, sizes: Sizes, staged: Tensor, plan: _Plan, updates: np.ndarray, tiles: np.ndarray
    ) -> None:
        """Writes an iteration down on the host and sends it to `staged`, padded where `sizes` allow for more."""
        told = host.told
        n, seats = plan.num_decodes, [self._seats[job.row.id] for job in plan.jobs]
        end = n
        told.ids[:n] = [_newest(job) for job in plan.jobs[:n]]
        told.seats[:n] = seats[:n]
        told.starts[:n] = [job.row.start for job in plan.jobs[:n]]
        if chunks := plan.jobs[n:]:
            firsts, begins = np.array(plan.firsts[n:]), np.array([job.row.start for job in chunks])
            counts, places = np.array([job.row.num_tokens for job in chunks]), np.array(seats[n:])
            end += int(counts.sum())
            told.ids[n:end] = [token for job in chunks for token in job.token_ids]
            told.seats[n:end] = np.repeat(places, counts)
            told.starts[n:end] = np.arange(n, end) + np.repeat(begins - firsts, counts)
        told.seats[end:] = -1
        told.num_tiles[0] = len(tiles)
        told.tiles[: len(tiles)] = tiles
        told.num_updates[0] = updates.shape[0]
        told.updates[: updates.shape[0]] = updates
        self._fill_samples(told, plan, seats)
        used = sizes.total - FIELDS * (sizes.tiles - len(tiles))
        self._stream.copy(host.flat[:used], staged[:used])

    def _fill_samples(self, told: HostSections, plan: _Plan, seats: Sequence[int]) -> None:
        r = len(plan.drawing)
        mine = np.array([seats[i] for i in plan.drawing], dtype=np.int64)
        told.sample_seats[:r], told.sample_seats[r:] = mine, -1
        told.sample_rows[:r] = [plan.firsts[i] + plan.jobs[i].row.num_tokens - 1 for i in plan.drawing]
        told.sample_positions[:r] = [plan.jobs[i].end for i in plan.drawing]
        told.bases[:r] = self._seats.bases[mine]
        told.temperatures[:r], told.temperatures[r:] = self._seats.temperatures[mine], 0.0
        told.top_k[:r], told.top_k[r:] = self._seats.top_k[mine], 0
        told.top_p[:r], told.top_p[r:] = self._seats.top_p[mine], 1.0
        told.min_p[:r], told.min_p[r:] = self._seats.min_p[mine], 0.0

    def _answer(self, hidden: Tensor, plan: _Plan) -> dict[int, RowResult]:
        """What rows gave whose sampling, scores or vectors are the host's affair."""
        jobs = [plan.jobs[i] for i in plan.on_host]
        if not jobs:
            return {}
        if self.grammars is not None:
            self.grammars.look(under_grammar(jobs))
        rows = [
            Row(plan.firsts[i], job.row.num_tokens, job.row.start, job.request.blocks)
            for i, job in zip(plan.on_host, jobs, strict=True)
        ]
        return {row.id: row for row in answer(_OnHost(self._model), hidden, _Rows(tuple(rows)), jobs)}


@dataclass(frozen=True, slots=True)
class _Plan:
    """Jobs in the order in which their tokens stand: those of one token first, then chunks.

    firsts: where each one's tokens begin. drawing, on_host: places of those that get a token on the device, and of
    those whose results the host finds; nobody's, where these layers are not the last.
    """

    jobs: Sequence[Job]
    num_decodes: int
    firsts: Sequence[int]
    drawing: Sequence[int]
    on_host: Sequence[int]

    @classmethod
    def of(cls, jobs: Sequence[Job], is_last: bool) -> _Plan:
        decodes = [job for job in jobs if job.row.num_tokens == 1]
        ordered = decodes + [job for job in jobs if job.row.num_tokens > 1]
        ends = list(accumulate((job.row.num_tokens for job in ordered), initial=0))
        last = list(enumerate(ordered)) if is_last else []
        on_host = [i for i, job in last if not job.request.is_plain]
        drawing = [i for i, job in last if job.row.samples and job.request.is_plain]
        return cls(ordered, len(decodes), ends[:-1], drawing, on_host)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What `answer` reads of a layout."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _OnHost:
    """A model whose logits come to the host."""

    model: Model

    @property
    def kernels(self) -> Kernels:
        return self.model.kernels

    def logits(self, hidden: Tensor) -> Tensor | None:
        logits = self.model.logits(hidden)
        return None if logits is None else logits.cpu()

    def final(self, hidden: Tensor) -> Tensor:
        return self.model.final(hidden)


def _newest(job: Job) -> int:
    """A decode's token, or -1 if only the device has it yet."""
    tokens = job.request.token_ids
    return tokens[job.row.start] if job.row.start < len(tokens) else -1
