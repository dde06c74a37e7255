"""`Replies`: responses that are no streams are kept until they are whole; here they share one bound of memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from orcaserve.serve import errors
from orcaserve.serve.choice import Piece
from orcaserve.serve.job import Job

# What a part takes until the response has been sent: as Python has it, and as JSON.
_TEXT_BYTES = 4  # of a character
_ID_BYTES = 48  # of a token's id, where they are returned
_LOGPROB_BYTES = 350  # a token and its log-probability
_FLOAT_BYTES = 60  # of a vector, and of one in base64
_PACKED_BYTES = 16


class Replies:
    """Owner of the count of bytes that whole responses hold so far.

    most: of them. A response that comes to more by itself ends in an error. While all hold more, only the oldest goes
    on to take what its engine gives; the choices of the others are paused, as those of slow readers are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_bytes = 0
        self._open: dict[Reply, None] = {}  # in order of arrival
        self._ended = asyncio.Event()

    def check(self, job: Job) -> None:
        """Raises ApiError for a job whose response is certain to become too large, by what it says of its prompts."""
        if job.prompts[0].params.prompt_logprobs is not None and _LOGPROB_BYTES * job.prompt_entries > self._most:
            raise errors.response_too_large(self._most)

    @contextmanager
    def reply(self, job: Job) -> Iterator[Reply]:
        """One more response. job: what it answers."""
        reply = Reply(self, job)
        self._open[reply] = None
        try:
            yield reply
        finally:
            del self._open[reply]
            self._num_bytes -= reply.num_bytes
            self._ended.set()
            self._ended = asyncio.Event()

    async def grown(self, reply: Reply, num_bytes: int) -> None:
        """Waits until it may grow again. Raises ApiError if it has become too large."""
        self._num_bytes += num_bytes
        if reply.num_bytes > self._most:
            raise errors.response_too_large(self._most)
        while self._num_bytes > self._most and next(iter(self._open)) is not reply:
            await self._ended.wait()


class Reply:
    """One whole response. num_bytes: that it holds so far."""

    def __init__(self, replies: Replies, job: Job) -> None:
        self._replies = replies
        self._job = job
        self.num_bytes = 0

    async def take(self, piece: Piece) -> None:
        """It keeps a piece. Returns when it may have the next one. Raises ApiError if it has become too large."""
        num_bytes = size_of(piece, self._job)
        self.num_bytes += num_bytes
        await self._replies.grown(self, num_bytes)


def size_of(piece: Piece, job: Job) -> int:
    """Bytes that the job's response takes for it."""
    ids = len(piece.token_ids) if job.return_token_ids else 0
    entries = sum(1 + len(entry.top) for entry in (*piece.logprobs, *piece.prompt_logprobs))
    vector = len(piece.pooled) // 4 * (_PACKED_BYTES if job.packs_vectors else _FLOAT_BYTES)
    return _TEXT_BYTES * len(piece.text) + _ID_BYTES * ids + _LOGPROB_BYTES * entries + vector
