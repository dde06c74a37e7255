"""`Requests`: what a rank knows of the requests it has been told of; which rows of a batch make sense."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orcaserve.core.batch import Batch, ScheduledRequest
from orcaserve.core.request import NewRequest
from orcaserve.ops.layout import Layout
from orcaserve.ops.sampler import SamplingState
from orcaserve.worker.grammars import Allowed, GrammarError, Guide

_log = logging.getLogger(__name__)


class Requests:
    """Owner of the tokens and the block table of every request that has been described and not been freed.

    Token ids lie in [0, vocab_size), blocks of block_size tokens in [0, num_blocks).
    ahead: 1 if a row may begin behind all tokens that are known: the worker itself has the one there.
    """

    def __init__(self, vocab_size: int, num_blocks: int, block_size: int, ahead: int = 0) -> None:
        self._ahead = ahead
        self._limits = _Limits(vocab_size, num_blocks)
        self._block_size = block_size
        self._requests: dict[int, _Request] = {}

    def forget_all(self) -> None:
        """As if no request had ever been described; for a new scheduler, which knows of none."""
        self._requests.clear()

    def take(self, batch: Batch) -> list[Job]:
        """Takes in what a batch tells; gives its rows that make sense. Others are logged."""
        for id in batch.freed:
            self._requests.pop(id, None)
        for new in batch.new:
            self._requests[new.id] = _Request(new, self._limits)
        return [job for row in batch.rows if (job := self._take_in(row)) is not None]

    def layout(self, jobs: Sequence[Job]) -> Layout:
        return Layout.build([(job.row.start, job.row.num_tokens, job.request.blocks) for job in jobs], self._block_size)

    def _take_in(self, row: ScheduledRequest) -> Job | None:
        """Brings what is known of the request up to date; None if the row makes no sense."""
        request = self._requests.get(row.id)
        if request is None:
            _log.error("row for request %d, which was never described", row.id)
            return None
        request.take(row.token_ids, row.new_blocks)
        end, known = row.start + row.num_tokens, len(request.token_ids)
        if self._ahead and row.num_tokens == 1 and end == known + 1:
            known = end
        if not 0 <= row.start < end <= known or (row.samples and end != known):
            _log.error("row %s of a request with %d tokens", row, known)
            return None
        # Kernels trust what they are given: a token or a block that does not exist must not reach them.
        if not request.sound:
            _log.error("row %s of a request with tokens or blocks that do not exist", row)
            return None
        return Job(row, request)


@dataclass(frozen=True, slots=True)
class _Limits:
    """Token ids lie in [0, vocab_size), blocks in [0, num_blocks)."""

    vocab_size: int
    num_blocks: int


class _Request:
    """What the worker knows of a request. sound: all of its tokens and blocks exist."""

    __slots__ = (
        "_blocks",
        "_limits",
        "_num_blocks",
        "allowed",
        "guide",
        "is_plain",
        "new",
        "sound",
        "sums",
        "token_ids",
    )

    def __init__(self, new: NewRequest, limits: _Limits) -> None:
        self.new = new
        self.is_plain = new.params.is_plain
        self.token_ids: list[int] = []
        self.sound = True
        self.guide: Guide | None = None  # where its response is in its grammar, and what may come next there
        self.allowed: Allowed | None = None
        self.sums: dict[int, np.ndarray] = {}  # position → sum of all final values before it, where a mean is wanted
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

    @property
    def id(self) -> int:
        return self.new.id

    @property
    def grammar(self) -> str:
        return self.new.params.grammar or ""

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        return self.new.end_token_ids

    def generated(self, start: int) -> list[int]:
        return self.token_ids[self.new.num_prompt + start :]

    def sampling_state(self) -> SamplingState:
        """Raises GrammarError."""
        if self.new.params.grammar is None:
            return self.free_state()
        if self.allowed is None:
            raise GrammarError("this worker follows none")
        if isinstance(self.allowed, GrammarError):
            raise self.allowed
        return self.free_state(self.allowed)

    def free_state(self, allowed: np.ndarray | None = None) -> SamplingState:
        """Without its grammar."""
        new = self.new
        return SamplingState(
            new.params, new.seed, new.choice, new.num_prompt, self.token_ids, new.end_token_ids, allowed
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A row that makes sense, and its request."""

    row: ScheduledRequest
    request: _Request

    @property
    def end(self) -> int:
        return self.row.start + self.row.num_tokens

    @property
    def token_ids(self) -> list[int]:
        return self.request.token_ids[self.row.start : self.end]


def under_grammar(jobs: Sequence[Job]) -> list[_Request]:
    """The requests of rows that sample under a grammar."""
    return [job.request for job in jobs if job.row.samples and job.request.new.params.grammar is not None]


def _within(ids: Sequence[int], end: int) -> bool:
    return not ids or (min(ids) >= 0 and max(ids) < end)
