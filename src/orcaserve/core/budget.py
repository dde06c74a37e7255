"""`Budget`: how many rows and tokens the next batch may have."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil

from orcaserve.core.batch import Batch
from orcaserve.core.kv_cache import KVCacheManager
from orcaserve.core.order import Waiting
from orcaserve.core.pace import SMALLEST_CHUNK, Pace
from orcaserve.core.policy import Policy
from orcaserve.core.request import Request

TURNS = 8  # of the pipe, over which prompts are spread where all rows decode


class Budget:
    """Owner of the pace, if there is a limit of time, and of the number of tokens in flight.

    lanes: batches in flight that do not share a request; rows and tokens are dealt out over them. The others are as in
        SchedulerConfig.
    """

    def __init__(
        self,
        policy: Policy,
        lanes: int,
        max_batch_size: int,
        max_batch_tokens: int,
        max_itl: float | None,
        prompt_share: float,
    ) -> None:
        self.lanes = lanes
        self.pace = None if max_itl is None else Pace(max_itl, lanes, prompt_share)
        self._most_rows = max_batch_size
        self._most_tokens = max_batch_tokens
        self._is_chunked = policy.chunked
        self._deals = policy.deal and lanes > 1
        self._tokens_in_flight = 0

    def rows(self, running: Sequence[Request]) -> int:
        """Rows for running requests. Dealt out over the depth, or the first batch takes all and the pipe runs empty."""
        return min(self._most_rows, -(-len(running) // self.lanes)) if self._deals else self._most_rows

    def tokens(self, running: Sequence[Request], waiting: Waiting, kv: KVCacheManager) -> int:
        """Tokens of a batch. Dealt out over the depth, too: stages wait for each other where batches are unequal."""
        if not self._is_chunked:
            return sys.maxsize
        most = min(self._most_tokens, self._share(running, waiting)) if self._deals else self._most_tokens
        return most if self.pace is None else self._in_time(self.pace, most, running, waiting, kv)

    def submitted(self, batch: Batch, now: float) -> None:
        """A batch is made."""
        if self._deals:
            self._tokens_in_flight += batch.num_tokens
        if self.pace is not None:
            self.pace.submitted(batch, now)

    def returned(self, batch: Batch, now: float) -> None:
        """The oldest batch is back."""
        if self._deals:
            self._tokens_in_flight -= batch.num_tokens
        if self.pace is not None:
            self.pace.returned(now)

    def _share(self, running: Sequence[Request], waiting: Waiting) -> int:
        """A lane's part of what is in flight and of what may go: decodes at once, prompts over several turns.

        Batches that decode only go before and after those with prompts. So the more rows decode, the more thinly
        prompts are spread; where none does, nobody waits for them, and the first token comes soonest in one turn.
        """
        decodes = ready = prompts = 0
        for request in running:
            lag = request.lag
            if lag > 1:
                prompts += lag
            else:
                decodes += 1
                ready += lag
        rows = self.lanes * self._most_rows
        turns = 1 + (TURNS - 1) * min(1.0, decodes / rows)
        enough = turns * self.lanes * self._most_tokens
        for request in islice(waiting, max(0, rows - len(running))):
            if prompts >= enough:
                break
            prompts += request.num_tokens
        return max(SMALLEST_CHUNK, ceil((self._tokens_in_flight + ready + prompts / turns) / self.lanes))

    def _in_time(self, pace: Pace, most: int, running: Sequence[Request], waiting: Waiting, kv: KVCacheManager) -> int:
        """Of so many tokens of a batch, as many as streams that run may wait for; all of them where none runs."""
        decodes = context = streams = 0
        for request in running:
            due = request.due
            if due <= 1:
                streams += 1
                decodes += due
                context += due * (request.num_computed + 1)
        if not streams or (streams == len(running) and not waiting):
            return most
        if decodes > (limit := self.rows(running)):
            decodes, context = limit, context * limit // decodes
        prompts = self._prompts(running, waiting, kv)
        return decodes + pace.prompt_tokens(decodes, context, prompts, most - decodes)

    def _prompts(self, running: Sequence[Request], waiting: Waiting, kv: KVCacheManager) -> Iterator[tuple[int, int]]:
        """Where the prompts stand that come next, and how many tokens of each are left; in order, but for lanes."""
        reading = [request for request in running if request.lag > 1 and request.finish_reason is None]
        num_free = max(0, self._most_rows - len(running))
        head = waiting.head if reading and num_free else None
        if head is not None and head < reading[0].entry:
            start = kv.known_prefix(waiting.first)
            yield start, waiting.first.num_tokens - start
        for request in reading:
            yield request.num_computed, request.lag
        for request in islice(waiting, num_free):
            start = kv.known_prefix(request)
            yield start, request.num_tokens - start
