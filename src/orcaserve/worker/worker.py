"""`Worker`: turns a `Batch` into tensors, runs the model over them, samples, and tells what every row gave."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from orcaserve.core.batch import Batch, RowResult, ScheduledRequest, StepResult
from orcaserve.core.request import NewRequest, TokenLogprobs
from orcaserve.ops.kernels import Kernels, KVCache
from orcaserve.ops.layout import Layout
from orcaserve.ops.sampler import SamplingState, prompt_logprobs, sample

FAILED = "the model failed on this request"
_LOGIT_ROWS = 32  # rows whose logits exist at a time: a bound on memory, where a vocabulary is large

_log = logging.getLogger(__name__)


class Model(Protocol):
    """What a worker needs of a decoder: a row of `forward` and `logits` depends on its own request alone."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def kernels(self) -> Kernels: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...

    def forward(self, x: Tensor, layout: Layout, kv: Sequence[KVCache]) -> Tensor:
        """Token ids int64 [ΣL] -> hidden values [ΣL, H]; writes the keys and values of these tokens."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> float32 [R, V]."""
        ...


class Worker:
    """Owner of the KV tensors and, per request, of its tokens and block table. One thread calls `run`."""

    def __init__(self, model: Model, *, num_blocks: int, block_size: int) -> None:
        self._model = model
        self._limits = _Limits(model.vocab_size, num_blocks)
        self._block_size = block_size
        self._requests: dict[int, _Request] = {}
        self._kv = [
            model.kernels.kv_cache(num_blocks, block_size, model.num_kv_heads, model.head_dim, model.dtype)
            for _ in range(model.num_layers)
        ]

    def forget_all(self) -> None:
        """As if no request had ever been described; for a new scheduler, which knows of none."""
        self._requests.clear()

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """One iteration. What is wrong with one row fails that row (`RowResult.error`), not another, not the call."""
        for id in batch.freed:
            self._requests.pop(id, None)
        for new in batch.new:
            self._requests[new.id] = _Request(new, self._limits)
        jobs, results = [], {}
        for row in batch.rows:
            job = self._take_in(row)
            if job is None:
                results[row.id] = RowResult(id=row.id, error=FAILED)
            else:
                jobs.append(job)
        results |= {result.id: result for result in self._attempt(jobs)}
        return StepResult(tuple(results[row.id] for row in batch.rows))

    def _take_in(self, row: ScheduledRequest) -> _Job | None:
        """Brings what is known of the request up to date; None if the row makes no sense."""
        request = self._requests.get(row.id)
        if request is None:
            _log.error("row for request %d, which was never described", row.id)
            return None
        request.take(row.token_ids, row.new_blocks)
        end, known = row.start + row.num_tokens, len(request.token_ids)
        if not 0 <= row.start < end <= known or (row.samples and end != known):
            _log.error("row %s of a request with %d tokens", row, known)
            return None
        # Kernels trust what they are given: a token or a block that does not exist must not reach them.
        if not request.sound:
            _log.error("row %s of a request with tokens or blocks that do not exist", row)
            return None
        return _Job(row, request)

    def _attempt(self, jobs: Sequence[_Job]) -> list[RowResult]:
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

    def _compute(self, jobs: Sequence[_Job]) -> list[RowResult]:
        layout = Layout.build(
            [(job.row.start, job.row.num_tokens, job.request.blocks) for job in jobs], self._block_size
        )
        token_ids = torch.tensor([token for job in jobs for token in job.token_ids], dtype=torch.int64)
        hidden = self._model.forward(token_ids, layout, self._kv)
        ends = [(job, row.first + row.num_tokens - 1) for job, row in zip(jobs, layout.rows, strict=True)]
        sampled = self._sample(hidden, [(job, last) for job, last in ends if job.row.samples])
        results = []
        for job, row in zip(jobs, layout.rows, strict=True):
            outcome = sampled.get(job.row.id, (None, None))
            scores = self._score_prompt(hidden[row.first : row.first + row.num_tokens], job)
            if isinstance(outcome, str):
                results.append(RowResult(id=job.row.id, error=outcome))
            elif isinstance(scores, str):
                results.append(RowResult(id=job.row.id, error=scores))
            else:
                token_id, logprobs = outcome
                results.append(RowResult(id=job.row.id, token_id=token_id, logprobs=logprobs, prompt_logprobs=scores))
        return results

    def _sample(
        self, hidden: Tensor, asking: Sequence[tuple[_Job, int]]
    ) -> dict[int, tuple[int, TokenLogprobs | None] | str]:
        """What each job that samples got, by request; with each comes the row of `hidden` behind its last token."""
        sampled: dict[int, tuple[int, TokenLogprobs | None] | str] = {}
        for first in range(0, len(asking), _LOGIT_ROWS):
            some = asking[first : first + _LOGIT_ROWS]
            logits = self._model.logits(hidden[[last for _, last in some]])
            outcomes = sample(logits, [job.request.sampling_state() for job, _ in some], self._model.kernels)
            sampled |= {job.row.id: outcome for (job, _), outcome in zip(some, outcomes, strict=True)}
        return sampled

    def _score_prompt(self, hidden: Tensor, job: _Job) -> tuple[TokenLogprobs, ...] | str:
        """Log-probabilities of the prompt tokens that follow the row's own tokens, if the request asks for them."""
        new = job.request.new
        if new.params.prompt_logprobs is None:
            return ()
        following = job.request.token_ids[job.row.start + 1 : min(job.end + 1, new.num_prompt)]
        scores: tuple[TokenLogprobs, ...] = ()
        for first in range(0, len(following), _LOGIT_ROWS):
            some = following[first : first + _LOGIT_ROWS]
            logits = self._model.logits(hidden[first : first + len(some)])
            found = prompt_logprobs(logits, some, new.params.prompt_logprobs, self._model.kernels)
            if isinstance(found, str):
                return found
            scores += found
        return scores


@dataclass(frozen=True, slots=True)
class _Limits:
    """Token ids lie in [0, vocab_size), blocks in [0, num_blocks)."""

    vocab_size: int
    num_blocks: int


class _Request:
    """What the worker knows of a request. sound: all of its tokens and blocks exist."""

    __slots__ = ("_blocks", "_limits", "_num_blocks", "new", "sound", "token_ids")

    def __init__(self, new: NewRequest, limits: _Limits) -> None:
        self.new = new
        self.token_ids: list[int] = []
        self.sound = True
        self._limits = limits
        self._blocks = np.empty(16, dtype=np.int64)
        self._num_blocks = 0
        self.take(new.token_ids, ())

    @property
    def blocks(self) -> np.ndarray:
        """The block table, int64."""
        return self._blocks[: self._num_blocks]

    def take(self, token_ids: Sequence[int], blocks: Sequence[int]) -> None:
        """Takes in tokens and blocks that follow those it has."""
        self.token_ids.extend(token_ids)
        self.sound &= _within(token_ids, self._limits.vocab_size) and _within(blocks, self._limits.num_blocks)
        if not blocks:
            return
        have, need = self._num_blocks, self._num_blocks + len(blocks)
        if need > self._blocks.shape[0]:
            self._blocks = np.concatenate([self.blocks, np.empty(need, dtype=np.int64)])
        self._blocks[have:need] = blocks
        self._num_blocks = need

    def sampling_state(self) -> SamplingState:
        new = self.new
        return SamplingState(new.params, new.seed, new.choice, new.num_prompt, self.token_ids, new.end_token_ids)


@dataclass(frozen=True, slots=True)
class _Job:
    """A row that makes sense, and its request."""

    row: ScheduledRequest
    request: _Request

    @property
    def end(self) -> int:
        return self.row.start + self.row.num_tokens

    @property
    def token_ids(self) -> list[int]:
        return self.request.token_ids[self.row.start : self.end]


def _within(ids: Sequence[int], end: int) -> bool:
    return not ids or (min(ids) >= 0 and max(ids) < end)
