"""The scheduler's executable specification: what must hold after every call, whatever the policy and the load."""

from __future__ import annotations

from collections import deque

import msgspec

from orcaserve.core.batch import Batch, ScheduledRequest, StepResult
from orcaserve.core.kv_cache import KVCacheManager
from orcaserve.core.orders.fair import Fair
from orcaserve.core.orders.gap import ServiceGap
from orcaserve.core.request import NewRequest, Output, Request, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig


class InvariantError(AssertionError):
    """A statement of the specification that does not hold."""


def require(holds: bool, statement: str) -> None:
    if not holds:
        raise InvariantError(statement)


def check(scheduler: Scheduler) -> None:
    """Everything that can be read off the scheduler's state alone."""
    _check_pool(scheduler)
    _check_swap(scheduler)
    _check_requests(scheduler)


def _check_pool(scheduler: Scheduler) -> None:
    pool = scheduler.kv.pool
    held = [0] * pool.num_blocks
    for request in scheduler.running:
        for block in request.block_table:
            held[block] += 1
    require(held == pool.counts, "a block's count is the number of block tables it stands in")
    require(
        set(pool.free) == {block for block, count in enumerate(held) if count == 0},
        "a block is free exactly when nobody holds it: nothing leaks",
    )
    published = {prefix[0]: block for block, prefix in enumerate(pool.prefixes) if prefix is not None}
    require(published == pool.index, "the prefix index and the blocks' prefixes say the same")
    _check_readers(scheduler)


def _check_readers(scheduler: Scheduler) -> None:
    kv = scheduler.kv
    if not kv.prefix_cache:
        return
    for request in scheduler.running:
        is_reader = kv.readers.get(request.id) is request
        behind = request.num_published < (request.num_tokens - 1) // kv.block_size
        require(is_reader or not behind, "who runs and has yet to publish full blocks is known to read them")
    for reader in kv.readers.values():
        behind = reader.num_published < reader.num_tokens // kv.block_size
        require(bool(reader.block_table) and behind, "who is known to read full blocks runs and has yet to publish one")


def _check_swap(scheduler: Scheduler) -> None:
    swap = scheduler.kv.swap
    if swap is None:
        return
    held = [0] * swap.slots.num_blocks
    for request in scheduler.requests.values():
        for slot in request.swap_slots:
            held[slot] += 1
    require(held == swap.slots.counts, "a slot's count is the number of swapped requests that it belongs to")
    require(
        set(swap.slots.free) == {slot for slot, count in enumerate(held) if count == 0},
        "a slot is free exactly when it is nobody's: nothing leaks",
    )


def _check_requests(scheduler: Scheduler) -> None:
    size = scheduler.kv.block_size
    waiting = list(scheduler.waiting)
    ids = [request.id for request in waiting + scheduler.running]
    require(len(waiting) == len(scheduler.waiting), "the queue knows how many wait")
    require(sorted(ids) == sorted(scheduler.requests), "a request is waiting or running, and never both")
    places = [(request.lane, request.key, request.arrival) for request in waiting]
    for lane in {request.lane for request in waiting}:
        keys = [place for place in places if place[0] == lane]
        require(keys == sorted(keys), "lanes are in the policy's order")
    if not scheduler.order.moved:
        running = [scheduler._place(request) for request in scheduler.running]
        require(running == sorted(running), "who runs is in the policy's order")
    for request in waiting:
        require(not request.block_table, "who waits holds no KV")
        swapped = len(request.swap_slots)
        require(swapped == scheduler.kv.blocks_for(request.num_computed), "what who waits has computed is swapped out")
        require(not request.num_in_flight, "who waits is in no batch")
    for request in scheduler.running:
        require(not request.swap_slots, "who runs has nothing in the swap space")
        computed, blocks = request.num_computed, len(request.block_table)
        ahead = computed - request.num_tokens
        require(computed >= 0 and ahead <= scheduler.config.overlap, "K and V exist only for tokens that exist")
        require(ahead <= 0 or request.num_in_flight > 0, "who is ahead is in flight")
        require(request.num_in_flight <= scheduler.config.depth, "nobody is in more batches than are in flight")
        require(scheduler.kv.blocks_for(computed) <= blocks, "every stored token has a slot")
        room = request.max_total if scheduler.policy.reserve else max(computed, request.num_tokens)
        require(blocks <= scheduler.kv.blocks_for(room), "nobody holds more KV than the policy gives")
        require(request.num_generated <= request.new.max_tokens, "nobody generates more than max_tokens")
        published = request.num_published * size
        require(published <= min(computed, request.num_tokens), "only stored tokens that are known are published")
        for i in range(request.num_published):
            prefix = scheduler.kv.pool.prefixes[request.block_table[i]]
            tokens = tuple(request.token_ids[i * size : (i + 1) * size])
            require(prefix is None or prefix[1] == tokens, "a published block holds what it says")
    if scheduler.policy.reserve:
        reserved = sum(scheduler.kv.blocks_for(request.max_total) for request in scheduler.running)
        require(reserved <= scheduler.kv.pool.num_blocks, "reservations never exceed the slots")
        require(scheduler.num_preemptions == 0, "who has reserved is never preempted")


class _CheckedKV(KVCacheManager):
    def publish(self, request: Request, num_tokens: int) -> None:
        require(request.finish_reason is None, "nothing is published of who has ended")
        super().publish(request, num_tokens)


class CheckedScheduler(Scheduler):
    """A Scheduler that verifies the whole specification around every call (`--check`, and every test).

    Owner of where the rows in flight start, by request and in order, and of what tenants get, where the order is fair.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._starts: dict[int, deque[int]] = {}
        self.kv = _CheckedKV(config.num_blocks, config.block_size, config.policy.prefix_cache, config.swap)
        self._owes = False  # somebody was preempted, and nobody was let in since
        self.gap: ServiceGap | None = None
        if isinstance(self.order, Fair):
            self.gap = ServiceGap(self.order, self.kv.num_slots if self.policy.reserve else None)

    def schedule(self, now: float = 0.0) -> Batch | None:
        num_running = len(self.running)
        batch = super().schedule(now)
        check(self)
        self._check_gap()
        if batch is not None:
            self._check_batch(batch, num_running)
            self._check_yields(batch)
            for row in batch.rows:
                self._starts.setdefault(row.id, deque()).append(row.start)
        elif self.requests:
            in_flight = any(request.num_in_flight for request in self.running)
            require(in_flight, "progress: where work is left and no batch is in flight, one can be made")
        return batch

    def update(self, batch: Batch, result: StepResult, now: float = 0.0) -> tuple[Output, ...]:
        generated = [(self.requests[row.id], self.requests[row.id].num_generated) for row in batch.rows]
        ended = {row.id for row in batch.rows if self.requests[row.id].finish_reason is not None}
        outputs = super().update(batch, result, now)
        check(self)
        if self.gap is not None:
            for known, before in generated:
                self.gap.generated(known, known.num_generated - before)
        self._check_gap()
        for row in batch.rows:
            starts = self._starts[row.id]
            starts.popleft()
            request = self.requests.get(row.id)
            if not starts:
                del self._starts[row.id]
            elif request is not None and request.finish_reason is None:
                published = request.num_published * self.kv.block_size
                require(published <= starts[0], "nobody publishes what a batch in flight writes")
        for output in outputs:
            request = self.requests.get(output.id)
            in_flight = request is not None and request.num_in_flight > 0
            has_ended = request is None or (request.finish_reason is not None and in_flight)
            told = output.finish_reason is not None
            require(has_ended == told or self.policy.request_level, "who has ended is gone, or in flight")
            is_late = in_flight and told and output.finish_reason != "error"
            require(not is_late or (request is not None and request.ahead_below > 0), "only who is ahead ends too late")
            require(output.id not in ended or self.policy.request_level, "who has ended says nothing more")
        return outputs

    def add(self, new: NewRequest, now: float = 0.0, waited: float = 0.0) -> None:
        super().add(new, now, waited)
        check(self)
        self._check_gap()

    def abort(self, id: int) -> None:
        super().abort(id)
        check(self)
        self._check_gap()

    def _admit(self, request: Request, now: float) -> bool:
        """Those who wait for a prefix are not in the queue while others are admitted."""
        require(request is min(self.waiting, key=self._place), "nobody overtakes in the queue")
        is_first = request.num_cached is None
        admitted = super()._admit(request, now)
        self._owes = self._owes and not admitted
        if admitted and self.gap is not None:
            self.gap.admitted(request, is_first, self.running)
        return admitted

    def _make_way(self, now: float) -> None:
        self._owes = False
        super()._make_way(now)
        require(not self._owes, "nobody makes way in vain")

    def _preempt(self, request: Request, now: float) -> None:
        require(not request.num_in_flight, "who is in flight is not preempted")
        free = [other for other in self.running if not other.num_in_flight]
        if self.config.overlap:  # who is in flight is waited for
            free = [other for other in self.running if other.finish_reason is None]
        require(self.order.moved or request is max(free, key=self._place), "the last in order is preempted")
        super()._preempt(request, now)
        self._owes = True

    def _check_gap(self) -> None:
        if self.gap is not None:
            self.gap.look({one.new.tenant for one in self.waiting} - {one.new.tenant for one in self.passed})
            require(self.gap.widest <= self.gap.bound + 1e-6, "tenants that wait get about the same")

    def _check_batch(self, batch: Batch, num_running: int) -> None:
        rows = batch.rows
        require(len({row.id for row in rows}) == len(rows), "a request has one row in a batch")
        own = sum(self.config.overlap or self.requests[row.id].num_in_flight == 1 for row in rows)
        require(len(rows) > 0 and own <= self.config.max_batch_size, "a batch has 1 … max_batch_size rows of its own")
        if self.policy.chunked:
            require(batch.num_tokens <= self.config.max_batch_tokens, "a batch keeps to its token budget")
        if self.policy.request_level and num_running:
            require(len(self.running) == num_running and len(rows) == num_running, "a static batch is closed")
        if self.policy.alike:
            require(len({(row.start, row.num_tokens) for row in rows}) == 1, "only rows of one shape are stacked")
        require({new.id for new in batch.new} <= {row.id for row in rows}, "who is described takes part")
        written: set[int] = set()
        for row in rows:
            self._check_row(row.id, row.start, row.num_tokens, written)
            samples = row.start + row.num_tokens >= self.requests[row.id].num_tokens
            require(row.samples <= samples, "only who has caught up samples")
            if row.start == self.requests[row.id].num_tokens:
                self._check_ahead(row)

    def _check_ahead(self, row: ScheduledRequest) -> None:
        request = self.requests[row.id]
        params = request.new.params
        require(self.config.overlap, "nobody goes ahead without overlap")
        require(row.num_tokens == 1 and row.samples, "one goes ahead by one token, which samples")
        require(request.num_in_flight == 2, "who goes ahead is in the batch before, and in no other")
        require(request.num_generated + 1 < request.new.max_tokens, "who is certain to end does not go ahead")
        plain = SamplingParams(
            temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
        )
        needs_no_host = msgspec.structs.replace(
            params, max_tokens=None, seed=None, n=1, stop=(), stop_token_ids=(), ignore_eos=False
        )
        require(needs_no_host == plain, "who goes ahead draws plainly")

    def _check_yields(self, batch: Batch) -> None:
        """Else who is first would wait for memory as long as those after it run."""
        open = [request for request in self.running if request.finish_reason is None]
        if not self.config.overlap or self.policy.alike or self.order.moved or not open:
            return
        first, last = min(open, key=self._place), max(open, key=self._place)
        makes_way = self.order.preempts and self.waiting and self._place(self.waiting.first) < self._place(first)
        taking_part = {row.id for row in batch.rows}
        lacks_memory = first.due == 1 and first.id not in taking_part and not makes_way
        require(not lacks_memory or last.id not in taking_part, "the last in order yields to the first")

    def _check_row(self, id: int, start: int, num_tokens: int, written: set[int]) -> None:
        request: Request = self.requests[id]
        require(num_tokens > 0, "every row computes something")
        ended = request.finish_reason is not None
        require(not ended or self.policy.request_level, "who has ended takes no part")
        require(request.num_in_flight > 0, "a row's request is in flight")
        require(start + num_tokens == request.num_computed or ended, "a row goes on where the request stands")
        for i in range(start // self.kv.block_size, (start + num_tokens - 1) // self.kv.block_size + 1):
            block = request.block_table[i]
            require(self.kv.pool.counts[block] == 1, "nobody writes into a block that others read")
            require(self.kv.pool.prefixes[block] is None or ended, "nobody writes into a published block")
            require(block not in written, "two rows never write into one block")
            written.add(block)
