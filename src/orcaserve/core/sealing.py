"""`Sealer`: turns the scheduler's decisions into the message to the workers, row by row as they are taken."""

from __future__ import annotations

from orcaserve.core.batch import Batch, ScheduledRequest, Swap
from orcaserve.core.request import NewRequest, Request
from orcaserve.core.timing import Timer


class Sealer:
    """Says only what workers cannot know. Owner of what they were told, and are yet to be told.

    rows: of the batch that is being made. freed: requests that it tells workers to forget.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.rows: list[ScheduledRequest] = []
        self._timers: list[Timer] = []
        self._new: list[NewRequest] = []
        self.freed: list[int] = []

    def add(self, request: Request, start: int, num_tokens: int, now: float) -> None:
        """A row of the next batch: it computes `num_tokens` positions of a request from `start` on."""
        token_ids, end, described = request.token_ids, start + num_tokens, request.num_described
        known = len(token_ids)
        unsaid: tuple[int, ...] = ()
        if described < known:
            if described == known - 1 and described:  # as for most
                unsaid = (token_ids[-1],)
            elif described:
                unsaid = tuple(token_ids[described:])
            else:
                self._new.append(request.describe())
                request.timer.described(now)
            request.num_described = known
        table = request.block_table
        blocks: tuple[int, ...] = ()
        if len(table) > request.num_known_blocks:
            blocks = tuple(table[request.num_known_blocks :])
            request.num_known_blocks = len(table)
        samples = end >= known and request.max_tokens > 0
        self.rows.append(ScheduledRequest(request.id, start, num_tokens, blocks, unsaid, samples))
        self._timers.append(request.timer)
        if end > request.num_computed:
            request.num_computed = end
        request.num_in_flight += 1

    def seal(self, swaps: tuple[Swap, ...] = ()) -> Batch:
        """All rows since the last call, in their order, as one batch, before which `swaps` are made."""
        mates = len(self.rows) - 1
        for timer in self._timers:
            timer.iterations += 1
            timer.mates += mates
            if mates > timer.most_mates:
                timer.most_mates = mates
        self.num_steps += 1
        batch = Batch(
            step=self.num_steps,
            rows=tuple(self.rows),
            new=tuple(self._new),
            freed=tuple(self.freed),
            swaps=swaps,
        )
        self.rows, self._timers, self._new, self.freed = [], [], [], []
        return batch

    def forget(self, request: Request) -> None:
        """Workers forget a request with the next batch; one that was preempted is described again when it is back."""
        if request.num_described > 0:
            self.freed.append(request.id)
        request.num_described = 0
        request.num_known_blocks = 0
