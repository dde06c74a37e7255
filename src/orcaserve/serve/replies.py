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
_TOKEN_BYTES = 16  # of a token's text
_ID_BYTES = 48  # of a token's id, where they are returned
_LOGPROB_BYTES = 300  # a token and its log-probability
_FLOAT_BYTES = 60  # of a vector


class Replies:
    """Owner of the count of bytes that whole responses hold so far.

    most: of them. A response that may come to more by itself must be a stream. While all hold more, only the oldest
    goes on to take what its engine gives; the choices of the others are paused, as those of slow readers are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_bytes = 0
        self._open: dict[Reply, None] = {}  # in order of arrival
        self._ended = asyncio.Event()

    def check(self, job: Job) -> None:
        """Raises ApiError for a job whose response could become too large to be kept."""
        tokens = entries = 0
        for prompt in job.prompts:
            params = prompt.params
            generated = params.n * (params.max_tokens or 0)
            tokens += generated
            if params.logprobs is not None:
                entries += generated * (1 + params.logprobs)
            if params.prompt_logprobs is not None:
                entries += params.n * len(prompt.ids) * (1 + params.prompt_logprobs)
        most = (_TOKEN_BYTES + _ID_BYTES * job.return_token_ids) * tokens + _LOGPROB_BYTES * entries
        if most > self._most:
            raise errors.invalid(
                f"The response could take {most} bytes of memory, more than the {self._most} of one that is not a "
                "stream. Set 'stream', or lower 'n', 'max_tokens' or 'logprobs'.",
                "stream",
            )

    @contextmanager
    def reply(self, *, keeps_ids: bool) -> Iterator[Reply]:
        """One more response. keeps_ids: of its tokens."""
        reply = Reply(self, keeps_ids)
        self._open[reply] = None
        try:
            yield reply
        finally:
            del self._open[reply]
            self._num_bytes -= reply.num_bytes
            self._ended.set()
            self._ended = asyncio.Event()

    async def grown(self, reply: Reply, num_bytes: int) -> None:
        """Waits until it may grow again."""
        self._num_bytes += num_bytes
        while self._num_bytes > self._most and next(iter(self._open)) is not reply:
            await self._ended.wait()


class Reply:
    """One whole response. num_bytes: that it holds so far."""

    def __init__(self, replies: Replies, keeps_ids: bool) -> None:
        self._replies = replies
        self._keeps_ids = keeps_ids
        self.num_bytes = 0

    async def take(self, piece: Piece) -> None:
        """It keeps a piece. Returns when it may have the next one."""
        num_bytes = size_of(piece, self._keeps_ids)
        self.num_bytes += num_bytes
        await self._replies.grown(self, num_bytes)


def size_of(piece: Piece, keeps_ids: bool) -> int:
    """Bytes that a response takes for it."""
    ids = len(piece.token_ids) if keeps_ids else 0
    entries = sum(1 + len(entry.top) for entry in (*piece.logprobs, *piece.prompt_logprobs))
    vector = len(piece.pooled) // 4
    return _TEXT_BYTES * len(piece.text) + _ID_BYTES * ids + _LOGPROB_BYTES * entries + _FLOAT_BYTES * vector
