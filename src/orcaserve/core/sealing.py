"""`Sealer`: turns the scheduler's decisions into the message to the workers, row by row as they are taken."""

from __future__ import annotations

from orcaserve.core.batch import Batch, ScheduledRequest, Swap
from orcaserve.core.request import NewRequest, Request


class Sealer:
    """Says only what workers cannot know. Owner of what they were told and are yet to be told, and of whose rows are in
    flight.

    rows: of the batch that is being made. freed: requests that it tells workers to forget.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.num_steps = 0
        self.rows: list[ScheduledRequest] = []
        self._riders: list[Request] = []  # whose the rows are
        self._in_flight: dict[int, list[Request]] = {}  # the same of the batches in flight, by step
        self._company: list[Request] = []  # the same of the last batches
        self._turns = 0  # how many of these its timers have not counted yet
        self._new: list[NewRequest] = []
        self.freed: list[int] = []

    def add(self, request: Request, start: int, num_tokens: int, now: float) -> None:
        """A row of the next batch: it computes `num_tokens` positions of a request from `start` on."""
        end = start + num_tokens
        if not request.is_described:
            request.is_described = True
            request.unsaid = ()
            self._new.append(request.describe())
            request.timer.described(now)
        unsaid, request.unsaid = request.unsaid, ()
        blocks: tuple[int, ...] = ()
        num_slots = len(request.block_table) * self._block_size
        if num_slots > request.num_known_slots:
            blocks = tuple(request.block_table[request.num_known_slots // self._block_size :])
            request.num_known_slots = num_slots
        samples = end >= len(request.token_ids) and request.max_tokens > 0
        self.rows.append(ScheduledRequest(request.id, start, num_tokens, blocks, unsaid, samples))
        self._riders.append(request)
        if end > request.num_computed:
            request.num_computed = end
        request.num_in_flight += 1

    def add_quiet(self, requests: list[Request]) -> None:
        """The next rows: the next position of each of these, of whom there is nothing else to say."""
        keep = self.rows.append
        for request in requests:
            start = request.num_computed
            keep(ScheduledRequest(request.id, start, 1, (), request.unsaid, True))
            request.unsaid = ()
            request.num_computed = start + 1
            request.num_in_flight += 1
        self._riders += requests

    def seal(self, swaps: tuple[Swap, ...] = ()) -> Batch:
        """All rows since the last call, in their order, as one batch, before which `swaps` are made."""
        if self._riders != self._company:
            self.settle()
            self._company = self._riders
        self._turns += 1
        self.num_steps += 1
        batch = Batch(
            step=self.num_steps,
            rows=tuple(self.rows),
            new=tuple(self._new),
            freed=tuple(self.freed),
            swaps=swaps,
        )
        self._in_flight[self.num_steps] = self._riders
        self.rows, self._riders, self._new, self.freed = [], [], [], []
        return batch

    def unseal(self, batch: Batch) -> list[Request]:
        """Whose the rows of a batch are, which is in flight no more."""
        return self._in_flight.pop(batch.step)

    def settle(self) -> None:
        """Brings the timers of who was in the last batches up to date. Most batches have the rows of the one before."""
        if not self._turns:
            return
        mates = len(self._company) - 1
        for request in self._company:
            timer = request.timer
            timer.iterations += self._turns
            timer.mates += self._turns * mates
            timer.most_mates = max(timer.most_mates, mates)
        self._turns = 0

    def forget(self, request: Request) -> None:
        """Workers forget a request with the next batch; one that was preempted is described again when it is back."""
        if request.is_described:
            self.freed.append(request.id)
        request.is_described = False
        request.num_known_slots = 0
