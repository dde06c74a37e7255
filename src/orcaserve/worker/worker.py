"""`Worker`: turns a `Batch` into tensors, runs a whole model over them, and tells what every row gave."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from orcaserve.core.batch import Batch, RowResult, StepResult
from orcaserve.ops.kernels import KVCache
from orcaserve.worker.answers import Model, answer
from orcaserve.worker.grammars import Grammars
from orcaserve.worker.requests import Job, Requests, under_grammar
from orcaserve.worker.swap import Swapper

FAILED = "the model failed on this request"

_log = logging.getLogger(__name__)


class Worker:
    """Owner of the KV tensors, the swap space and of what is known of each request. One thread calls `run`.

    grammars: None: requests that follow one fail.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int = 0,
        swap_dir: str | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """num_slots: blocks that the swap space holds. Raises ModelError, in one line, if it cannot be made."""
        self._model = model
        self.grammars = grammars
        self._requests = Requests(model.vocab_size, num_blocks, block_size)
        self._kv = make_caches(model, num_blocks, block_size)
        self._swapper = Swapper(self._kv, num_slots, swap_dir) if num_slots else None

    def forget_all(self) -> None:
        """As if no request had ever been described; for a new scheduler, which knows of none."""
        self._requests.forget_all()

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """One iteration. What is wrong with one row fails that row (`RowResult.error`), not another, not the call."""
        if self._swapper is not None:
            self._swapper.run(batch.swaps)
        results = {result.id: result for result in self._attempt(self._requests.take(batch))}
        return in_order(batch, results)

    def _attempt(self, jobs: Sequence[Job]) -> list[RowResult]:
        """Computes the jobs together; if that raises, one by one, so that only the one at fault fails.

        Computing again is harmless: it writes the same keys and values to the same slots.
        """
        if not jobs:
            return []
        try:
            return self._compute(jobs)
        except Exception:
            _log.exception("an iteration of %d rows failed", len(jobs))
        if len(jobs) == 1:
            return [RowResult(id=jobs[0].row.id, error=FAILED)]
        return [result for job in jobs for result in self._attempt([job])]

    def _compute(self, jobs: Sequence[Job]) -> list[RowResult]:
        if self.grammars is not None:
            self.grammars.look(under_grammar(jobs))
        layout = self._requests.layout(jobs)
        hidden = self._model.forward(token_ids(jobs), layout, self._kv)
        return answer(self._model, hidden, layout, jobs)


def make_caches(model: Model, num_blocks: int, block_size: int) -> list[KVCache]:
    """One for each layer."""
    return [
        model.kernels.kv_cache(num_blocks, block_size, model.num_kv_heads, model.head_dim, model.dtype)
        for _ in range(model.num_layers)
    ]


def token_ids(jobs: Sequence[Job]) -> torch.Tensor:
    """int64 [ΣL]."""
    return torch.tensor([token for job in jobs for token in job.token_ids], dtype=torch.int64)


def in_order(batch: Batch, results: Mapping[int, RowResult]) -> StepResult:
    """A result for each row of the batch; a row without one has failed."""
    return StepResult(tuple([results.get(row.id) or RowResult(id=row.id, error=FAILED) for row in batch.rows]))
