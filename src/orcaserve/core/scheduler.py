"""`Scheduler`: decides after every iteration who takes part in the next one (Orca, OSDI 2022, section 3.1)."""

from __future__ import annotations

import sys
from bisect import insort
from itertools import islice
from typing import NamedTuple

import msgspec

from orcaserve.core.batch import Batch, RowResult, ScheduledRequest, StepResult
from orcaserve.core.kv_cache import KVCacheManager
from orcaserve.core.order import Waiting
from orcaserve.core.policy import Policy
from orcaserve.core.request import FinishReason, NewRequest, Output, Request

SMALLEST_CHUNK = 32  # tokens: less of a prompt is not worth an iteration of its own


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a scheduler may use.

    max_batch_size: rows of an iteration (the paper's max_bs), besides chunks of prompts that another batch in flight
        carries, too. max_batch_tokens: tokens of an iteration, where the policy cuts prompts; at least max_batch_size,
        so that every running request can decode.
    num_blocks, block_size: the KV cache; their product is the paper's n_slots.
    depth: most batches in flight (the paper's n_workers).
    """

    policy: Policy
    max_batch_size: int
    max_batch_tokens: int
    num_blocks: int
    block_size: int
    depth: int = 1


class RequestTooLarge(ValueError):
    """A request that could never run: it would block the queue for ever."""


class Scheduler:
    """Sole owner of every Request, from `add` to the output with its finish reason.

    A request is waiting (no KV) or running (KV held). It is in at most one batch in flight, since the next one needs
    its token. Chunks of a prompt need nothing of each other's results: several batches may carry one each, and every
    stage meets them in order. `schedule` makes a batch, `update` takes its results in; batches come back in the order
    in which they were made.

    now: seconds of the caller's clock, real, virtual or recorded; it never goes back. The same calls at the same times
    give the same batches.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        if config.max_batch_size < 1 or config.depth < 1:
            raise ValueError("max_batch_size and depth must be at least 1")
        size, tokens = config.max_batch_size, config.max_batch_tokens
        if config.policy.chunked and tokens < size:
            raise ValueError(f"max_batch_tokens ({tokens}) must be at least max_batch_size ({size})")
        self.config = config
        self.policy = config.policy
        self.kv = KVCacheManager(config.num_blocks, config.block_size, config.policy.prefix_cache)
        self.order = config.policy.make_order()
        self.requests: dict[int, Request] = {}
        self.waiting = Waiting(self.order)
        self.running: list[Request] = []  # in order, unless that has moved since the last schedule()
        self.num_preemptions = 0
        self.num_steps = 0
        self._num_arrivals = 0
        self._freed: list[int] = []  # what the next batch tells the workers to forget
        self._tokens_in_flight = 0
        self._held: list[Output] = []  # what a request-level batch returns at its end

    def add(self, new: NewRequest, now: float = 0.0) -> None:
        """Takes a request in. RequestTooLarge: its KV can never fit. ValueError: a known id, or no tokens."""
        if new.id in self.requests:
            raise ValueError(f"request {new.id} is here already")
        if not new.token_ids:
            raise ValueError(f"request {new.id} has no tokens")
        request = Request(new, self._num_arrivals, now)
        if request.max_total > self.kv.num_slots:
            raise RequestTooLarge(
                f"prompt and output may reach {request.max_total} tokens, but the KV cache holds {self.kv.num_slots}"
            )
        self._num_arrivals += 1
        request.lane = self.order.lane(request)
        self.order.arrived(request, self.waiting)
        self.requests[new.id] = request
        self._wait(request, now)

    def abort(self, id: int) -> None:
        """Forgets a request; its KV is freed as soon as no batch in flight carries it. Unknown ids are ignored."""
        request = self.requests.get(id)
        if request is None:
            return
        request.finish_reason = "abort"
        if not request.num_in_flight:
            self._drop(request)

    def schedule(self, now: float = 0.0) -> Batch | None:
        """The next iteration, or None if nothing can run now: nothing is ready, or memory waits for a batch's end."""
        self._put_in_order()
        if self.order.preempts:
            self._make_way(now)
            self._put_in_order()
        rows: list[Row] = []
        tokens_left = self._token_limit()
        closed = self.policy.request_level and bool(self.running)
        num_preemptions = self.num_preemptions
        row_limit = self._row_limit()
        num_own = 0  # rows of requests that no other batch carries: only they count, since chunks even batches out
        for request in self._ready():
            if tokens_left == 0:
                break
            is_own = not request.num_in_flight
            if is_own and num_own == row_limit:
                continue
            if not request.block_table:  # preempted for an older one, a moment ago
                continue
            row = self._row(request, tokens_left)
            if not self._joins(rows, row):
                continue
            if not self._make_room(row, now):
                closed = True  # it waits for an older one's end; those that need no memory go on
                continue
            rows.append(row)
            num_own += is_own
            tokens_left -= row.num_tokens
        # Who was preempted just now would be let in again at once, and the memory was not for him.
        closed = closed or self.num_preemptions > num_preemptions
        while not closed and self.waiting and num_own < self.config.max_batch_size and tokens_left > 0:
            request = self.waiting.first
            if not self._joins(rows, self._first_row(request, tokens_left)) or not self._admit(request, now):
                break  # stop, not skip: nobody overtakes
            rows.append(self._row(request, tokens_left))
            num_own += 1
            tokens_left -= rows[-1].num_tokens
        return self._seal(rows) if rows else None

    def update(self, batch: Batch, result: StepResult, now: float = 0.0) -> tuple[Output, ...]:
        """Takes in what a batch gave; a request whose output has a finish reason is gone from here."""
        outputs = []
        self._tokens_in_flight -= batch.num_tokens
        for row, got in zip(batch.rows, result.rows, strict=True):
            request = self.requests[row.id]
            request.num_in_flight -= 1
            if request.finish_reason is None and (output := self._take_in(request, row, got)) is not None:
                outputs.append(output)
            stays = self.policy.request_level and request.finish_reason != "abort"
            if request.finish_reason is not None and not request.num_in_flight and not stays:
                self._drop(request)
        return self._return_together(outputs) if self.policy.request_level else tuple(outputs)

    # -- deciding ------------------------------------------------------------------------------------------------

    def _ready(self) -> list[Request]:
        """Running requests with something to compute that awaits no result, in the order in which they may choose."""
        if not self.policy.request_level:
            ready = [request for request in self.running if request.lag and request.finish_reason is None]
        else:
            ready = [request for request in self.running if not request.num_in_flight]
        if self.policy.request_level and len(ready) < len(self.running):
            # A batch that is over but for what is in flight: ended members would keep it going for ever, in turns.
            is_over = all(request.finish_reason is not None for request in self.running)
            ready = [] if is_over else ready
        if self.policy.decodes_first:
            ready.sort(key=lambda request: request.lag > 1)  # stable: the policy's order remains inside each half
        return ready

    def _row_limit(self) -> int:
        """Rows for running requests. Dealt out over the depth, or the first batch takes all and the pipe runs empty."""
        most, depth = self.config.max_batch_size, self.config.depth
        if not self.policy.deal or depth == 1:
            return most
        return min(most, -(-len(self.running) // depth))

    def _token_limit(self) -> int:
        """Tokens of a batch. Dealt out over the depth, too: stages wait for each other where batches are unequal."""
        if not self.policy.chunked:
            return sys.maxsize
        most = self.config.max_batch_tokens
        if not self.policy.deal or self.config.depth == 1:
            return most
        depth = self.config.depth
        work = self._tokens_in_flight + sum(request.lag for request in self.running)
        for request in islice(self.waiting, max(0, depth * self.config.max_batch_size - len(self.running))):
            if work >= most * depth:
                break
            work += request.num_tokens
        return min(most, max(SMALLEST_CHUNK, -(-work // depth)))

    def _row(self, request: Request, tokens_left: int) -> Row:
        if request.finish_reason is not None:  # a request-level batch: the ended member computes for nothing
            return Row(request, request.num_computed - 1, 1)
        return Row(request, request.num_computed, self.policy.grant(request.lag, tokens_left))

    def _first_row(self, request: Request, tokens_left: int) -> Row:
        """The row that a waiting request would get if it were admitted now."""
        start = self.kv.known_prefix(request) if self.policy.alike else 0
        return Row(request, start, self.policy.grant(request.num_tokens - start, tokens_left))

    def _joins(self, rows: list[Row], row: Row) -> bool:
        return self.policy.joins(rows[0][1:] if rows else None, row[1:])

    def _make_room(self, row: Row, now: float) -> bool:
        """Grows a running request's KV, preempting the last in order that may be until it fits."""
        while not self.kv.grow(row.request, row.start + row.num_tokens):
            victim = next((request for request in reversed(self.running) if not request.num_in_flight), None)
            if victim is None or self._place(victim) <= self._place(row.request):
                return False
            self._preempt(victim, now)
        return True

    def _preempt(self, request: Request, now: float) -> None:
        """Takes a request's KV away. Its tokens stay, so that it is recomputed and goes on as if nothing had been."""
        self.num_preemptions += 1
        self.running.remove(request)
        self._forget(request)
        self._wait(request, now)

    def _make_way(self, now: float) -> None:
        """Lets who waits go before those that run and come after it, in their place if need be; not if that is in vain.

        This is done before rows are chosen, so that no decision is taken back. Who is in flight stays.
        """
        while self.waiting and self.running:
            request = self.waiting.first
            place = self._place(request)
            if self._place(self.running[-1]) < place:
                return
            free = [other for other in self.running if not other.num_in_flight]
            after = [other for other in reversed(free) if self._place(other) > place]
            own = min(sum(other.lag > 0 for other in free), self._row_limit())
            rows = max(0, own + 1 - self.config.max_batch_size)
            victims = self.kv.who_gives(request, self.policy.room(request), len(self.running), after, rows)
            if victims is None:
                return
            ahead = sum(other.lag for other in free if other.lag == 1 or self._place(other) < place)
            if ahead - sum(victim.lag == 1 for victim in victims) >= self._token_limit():
                return  # it would get no token now
            for victim in victims:
                self._preempt(victim, now)
            if not self._admit(request, now):
                return

    def _admit(self, request: Request, now: float) -> bool:
        """Lets the first in the queue run, if its KV fits and leaves a block to spare for each that runs."""
        spare = 0 if self.policy.reserve else len(self.running)
        if not self.kv.admit(request, self.policy.room(request), spare):
            return False
        self.order.started(request, now)
        if request.num_cached is None:
            request.num_cached = request.num_computed
            request.num_served = request.num_computed
        self.waiting.remove(request)
        self._run(request)
        return True

    def _place(self, request: Request) -> tuple[float, float, int]:
        """Among all requests; the least goes first, the greatest is preempted first."""
        return self.order.rank(request.lane), request.key, request.arrival

    def _wait(self, request: Request, now: float) -> None:
        request.key = self.order.key(request, now)
        self.waiting.add(request)

    def _run(self, request: Request) -> None:
        if self.order.moved:  # they are put in order before the next batch anyway
            self.running.append(request)
        else:
            insort(self.running, request, key=self._place)

    def _put_in_order(self) -> None:
        if self.order.moved:
            ranks = {lane: self.order.rank(lane) for lane in dict.fromkeys(request.lane for request in self.running)}
            self.running.sort(key=lambda request: (ranks[request.lane], request.key, request.arrival))
            self.order.moved = False

    def _seal(self, rows: list[Row]) -> Batch:
        """Turns decisions into the message: only what the workers cannot know."""
        new = []
        scheduled = []
        for request, start, num_tokens in rows:
            if request.num_described == 0:
                new.append(request.describe())
            end, known, table = start + num_tokens, request.num_tokens, request.block_table
            scheduled.append(
                ScheduledRequest(
                    request.new.id,
                    start,
                    num_tokens,
                    new_blocks=tuple(table[request.num_known_blocks :]),
                    token_ids=tuple(request.token_ids[request.num_described :]) if request.num_described else (),
                    samples=end == known and request.new.max_tokens > 0,
                )
            )
            request.num_described = known
            request.num_known_blocks = len(table)
            if end > request.num_computed:
                request.num_computed = end
            request.num_in_flight += 1
        self.num_steps += 1
        batch = Batch(step=self.num_steps, rows=tuple(scheduled), new=tuple(new), freed=tuple(self._freed))
        self._tokens_in_flight += batch.num_tokens
        self._freed.clear()
        return batch

    # -- taking results in ---------------------------------------------------------------------------------------

    def _take_in(self, request: Request, row: ScheduledRequest, got: RowResult) -> Output | None:
        """One row's result. None if there is nothing to tell yet."""
        error = got.error
        if error is None and row.samples and got.token_id is None:
            error = "the model gave no token"
        if error is not None:
            request.finish_reason = "error"
            return Output(id=request.id, finish_reason="error", error=error)
        self.kv.publish(request, row.start + row.num_tokens)
        fresh = row.start + row.num_tokens - request.num_served
        if fresh > 0:
            request.num_served += fresh
            self.order.served(request, fresh, int(got.token_id is not None))
        if request.prompt_logprobs is not None:
            request.prompt_logprobs.extend(got.prompt_logprobs)
        if row.start + row.num_tokens < request.num_tokens:
            return None  # still prefilling
        if got.token_id is not None:
            request.token_ids.append(got.token_id)
        request.finish_reason = self._finish_reason(request, got.token_id)
        prompt_logprobs = tuple(request.prompt_logprobs or ())
        request.prompt_logprobs = None
        num_cached, request.num_cached = request.num_cached or 0, 0  # told once
        return Output(
            id=request.id,
            token_ids=() if got.token_id is None else (got.token_id,),
            logprobs=() if got.logprobs is None else (got.logprobs,),
            prompt_logprobs=prompt_logprobs,
            num_cached=num_cached,
            finish_reason=request.finish_reason,
        )

    def _finish_reason(self, request: Request, token_id: int | None) -> FinishReason | None:
        if request.new.end_token_ids and token_id in request.new.end_token_ids:
            return "stop"
        return "length" if request.num_generated >= request.new.max_tokens else None

    def _return_together(self, outputs: list[Output]) -> tuple[Output, ...]:
        """Request-level batching: keeps everything until the longest member has ended, then returns and frees all."""
        self._held.extend(outputs)
        if any(request.finish_reason is None or request.num_in_flight for request in self.running):
            return ()
        together = tuple(output for output in self._held if output.id in self.requests)
        self._held.clear()
        for request in list(self.running):
            self._drop(request)
        return together

    def _drop(self, request: Request) -> None:
        del self.requests[request.id]
        self.order.ended(request)
        if request.block_table:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        """Frees the KV and lets the workers know; a preempted request is described to them again when it comes back."""
        self.kv.free(request)
        if request.num_described > 0:
            self._freed.append(request.id)
        request.num_described = 0
        request.num_known_blocks = 0
        if request.prompt_logprobs:
            request.prompt_logprobs = []


class Row(NamedTuple):
    """A decision: compute `num_tokens` positions from `start` on."""

    request: Request
    start: int
    num_tokens: int
