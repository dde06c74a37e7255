"""`StageWorker`: one rank of several. It runs its layers over a batch, between the stage before and the one behind."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from orcaserve.core.batch import Batch, StepResult
from orcaserve.worker.answers import Model, answer
from orcaserve.worker.grammars import Grammars
from orcaserve.worker.requests import Requests, under_grammar
from orcaserve.worker.swap import Swapper
from orcaserve.worker.worker import in_order, make_caches, token_ids


class Pipe(Protocol):
    """The data plane between stages: hidden values [tokens of a batch, H], in the order of the batches.

    is_first, is_last: whether there is no stage before, and none behind.
    """

    @property
    def is_first(self) -> bool: ...
    @property
    def is_last(self) -> bool: ...

    def expect(self, num_tokens: int) -> None:
        """Makes room for the next of the stage before, which come when they are there. Any one thread may say so."""
        ...

    def receive(self, num_tokens: int) -> Tensor:
        """Waits for those of the stage before."""
        ...

    def send(self, hidden: Tensor | None, num_tokens: int) -> None:
        """Gives so many to the stage behind, without waiting for it; zeros where there are none."""
        ...


class NoPipe:
    """Of a model that is one stage."""

    is_first = is_last = True

    def expect(self, num_tokens: int) -> None:
        raise ValueError("there is no stage before")

    def receive(self, num_tokens: int) -> Tensor:
        raise ValueError("there is no stage before")

    def send(self, hidden: Tensor | None, num_tokens: int) -> None:
        raise ValueError("there is no stage behind")


class StageWorker:
    """Owner of the KV tensors of its layers, the swap space and what is known of each request. One thread calls `run`.

    grammars: of the rank that samples, and of no other.
    busy_seconds: time spent at work, not in waiting for the stage before.
    """

    def __init__(
        self,
        model: Model,
        pipe: Pipe,
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int = 0,
        swap_dir: str | None = None,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """num_slots: blocks that the swap space holds. Raises ModelError, in one line, if it cannot be made."""
        self._model = model
        self._grammars = grammars
        self._pipe = pipe
        self._requests = Requests(model.vocab_size, num_blocks, block_size)
        self._kv = make_caches(model, num_blocks, block_size)
        self._swapper = Swapper(self._kv, num_slots, swap_dir) if num_slots else None
        self._clock = clock
        self.busy_seconds = 0.0
        self._took: deque[float] = deque()

    def take_seconds(self) -> tuple[float, ...]:
        """Of `busy_seconds` the part of each batch since somebody last asked, as one has to. For any one thread."""
        return tuple([self._took.popleft() for _ in range(len(self._took))])

    def expect(self, batch: Batch) -> None:
        """This one will be run, after those that are expected already. Another thread than that of `run` may say so."""
        if batch.rows and not self._pipe.is_first:
            self._pipe.expect(batch.num_tokens)

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult | None:
        """One iteration; its results in the last stage, None in others.

        Rows that make no sense do so on every rank, and fail alone; their tokens travel as zeros behind the others',
        since the stage behind has made room for them before it knew. What raises here raises: the ranks of an
        iteration cannot agree to try its rows one by one, which is left to whoever starts them again.
        """
        began = self._clock()
        if self._swapper is not None:
            self._swapper.run(batch.swaps)
        jobs = self._requests.take(batch)
        if self._grammars is not None:
            self._grammars.look(under_grammar(jobs))
        received = hidden = None
        if not self._pipe.is_first and batch.rows:
            waits = self._clock()
            received = self._pipe.receive(batch.num_tokens)
            began += self._clock() - waits
        result = in_order(batch, {}) if self._pipe.is_last else None
        if jobs:
            layout = self._requests.layout(jobs)
            x = token_ids(jobs) if received is None else received[: layout.num_tokens]
            hidden = self._model.forward(x, layout, self._kv)
            if self._pipe.is_last:
                result = in_order(batch, {row.id: row for row in answer(self._model, hidden, layout, jobs)})
        if not self._pipe.is_last and batch.rows:
            self._pipe.send(hidden, batch.num_tokens)
        seconds = self._clock() - began
        self.busy_seconds += seconds
        self._took.append(seconds)
        return result
