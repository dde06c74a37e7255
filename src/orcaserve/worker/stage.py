"""`StageWorker`: one rank of several. It runs its layers over a batch, between the stage before and the one behind."""

from __future__ import annotations

import time
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
    """The data plane between stages: hidden values [ΣL, H], in the order of the batches.

    is_first, is_last: whether there is no stage before, and none behind.
    """

    @property
    def is_first(self) -> bool: ...
    @property
    def is_last(self) -> bool: ...

    def receive(self, num_tokens: int) -> Tensor:
        """Waits for those of the stage before."""
        ...

    def send(self, hidden: Tensor) -> None:
        """Gives them to the stage behind, without waiting for it."""
        ...


class NoPipe:
    """Of a model that is one stage."""

    is_first = is_last = True

    def receive(self, num_tokens: int) -> Tensor:
        raise ValueError("there is no stage before")

    def send(self, hidden: Tensor) -> None:
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

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult | None:
        """One iteration; its results in the last stage, None in others.

        Rows that make no sense do so on every rank, and fail alone. What raises here raises: the ranks of an iteration
        cannot agree to try its rows one by one, which is left to whoever starts them again.
        """
        began = self._clock()
        if self._swapper is not None:
            self._swapper.run(batch.swaps)
        jobs = self._requests.take(batch)
        if not jobs:
            return in_order(batch, {}) if self._pipe.is_last else None
        if self._grammars is not None:
            self._grammars.look(under_grammar(jobs))
        layout = self._requests.layout(jobs)
        if self._pipe.is_first:
            x = token_ids(jobs)
        else:
            waits = self._clock()
            x = self._pipe.receive(layout.num_tokens)
            began += self._clock() - waits
        hidden = self._model.forward(x, layout, self._kv)
        result = None
        if self._pipe.is_last:
            result = in_order(batch, {row.id: row for row in answer(self._model, hidden, layout, jobs)})
        else:
            self._pipe.send(hidden)
        self.busy_seconds += self._clock() - began
        return result
