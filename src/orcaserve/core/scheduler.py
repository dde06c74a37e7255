"""`Scheduler`: decides after every iteration who takes part in the next one (Orca, OSDI 2022, section 3.1)."""

from __future__ import annotations

from bisect import insort

import msgspec

from orcaserve.core.batch import Batch, RowResult, ScheduledRequest, StepResult
from orcaserve.core.budget import Budget
from orcaserve.core.config import SwapSpace
from orcaserve.core.decisions import Decisions, Reason, Waits
from orcaserve.core.kv_cache import KVCacheManager
from orcaserve.core.order import Order, Waiting
from orcaserve.core.pace import LEAST_SHARE
from orcaserve.core.policy import Policy, Shape
from orcaserve.core.pressure import Headroom
from orcaserve.core.request import FinishReason, NewRequest, Output, Request
from orcaserve.core.sealing import Sealer
from orcaserve.core.timing import Timing

MOST_HOLDERS = 3  # of KV blocks, of those that are named when blocks lack


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a scheduler may use.

    max_batch_size: rows of an iteration (the paper's max_bs), besides chunks of prompts that another batch in flight
        carries, too. max_batch_tokens: tokens of an iteration, where the policy cuts prompts; at least max_batch_size,
        so that every running request can decode.
    num_blocks, block_size: the KV cache; their product is the paper's n_slots.
    depth: most batches in flight (the paper's n_workers).
    overlap: the second of two batches in flight is scheduled ahead, while the first runs on the one device. So depth is
        2, and rows are not dealt out. Not for policies that are request_level.
    max_itl: seconds between two tokens of a stream, which chunks of prompts beside it are cut to; None: they are not.
    prompt_share: of the time that decodes take alone, chunks get at least so much, whatever max_itl says.
    swap: where the KV of preempted requests may be moved to; None: it is computed again.
    """

    policy: Policy
    max_batch_size: int
    max_batch_tokens: int
    num_blocks: int
    block_size: int
    depth: int = 1
    overlap: bool = False
    max_itl: float | None = None
    prompt_share: float = LEAST_SHARE
    swap: SwapSpace | None = None


class RequestTooLarge(ValueError):
    """A request that could never run: it would block the queue for ever."""


class Scheduler:
    """Sole owner of every Request, from `add` to the output with its finish reason.

    A request is waiting (no KV, or swapped out) or running (KV held). It is in at most one batch in flight, since the
    next one needs its token. Chunks of a prompt need nothing of each other's results: several batches may carry one
    each, and every stage meets them in order. `schedule` makes a batch, `update` takes its results in; batches come
    back in the order in which they were made.

    With `overlap` a request may be in the next batch, too, if its draws are plain: one position ahead of what is known
    of it. Whose end by max_tokens is certain does not go ahead. Who ends otherwise has computed one position too many,
    which is dropped when it is back.

    now: seconds of the caller's clock, real, virtual or recorded; it never goes back. The same calls at the same times
    give the same batches.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        if config.max_batch_size < 1 or config.depth < 1:
            raise ValueError("max_batch_size and depth must be at least 1")
        size, tokens = config.max_batch_size, config.max_batch_tokens
        if config.policy.chunked and tokens < size:
            raise ValueError(f"max_batch_tokens ({tokens}) must be at least max_batch_size ({size})")
        if config.overlap and config.depth != 2:
            raise ValueError(f"overlap is for one device: depth must be 2, not {config.depth}")
        if config.overlap and config.policy.request_level:
            raise ValueError(f"overlap needs a policy that schedules iterations, not {config.policy.name!r}")
        if config.max_itl is not None and not config.policy.cuts_prompts:
            raise ValueError(f"max_itl needs a policy that cuts prompts; {config.policy.name!r} takes them whole")
        self.config = config
        self.policy = config.policy
        self.kv = KVCacheManager(config.num_blocks, config.block_size, config.policy.prefix_cache, config.swap)
        self.headroom = Headroom(config.policy.risk, config.block_size)
        self.order = config.policy.make_order()
        self._hears_service = type(self.order).served is not Order.served
        self.requests: dict[int, Request] = {}
        lanes = 1 if config.overlap else config.depth
        self.budget = Budget(config.policy, lanes, size, tokens, config.max_itl, config.prompt_share)
        self.waiting = Waiting(self.order)
        self.running: list[Request] = []  # in order, unless that has moved since the last schedule()
        self.sealer = Sealer(config.block_size)
        self.num_preemptions = 0
        self.decisions: Decisions | None = None  # since somebody listens
        self._num_arrivals = 0
        self._held: list[Output] = []  # what a request-level batch returns at its end
        self._yielding: list[Request] = []  # who does not go ahead now, to be in no batch when the next one is made
        self.passed: list[Request] = []  # by whom others passed in the last schedule(), as it waits for their prefix

    @property
    def num_steps(self) -> int:
        """Batches made so far."""
        return self.sealer.num_steps

    def listen(self) -> Decisions:
        """Where it says from now on who is left out of an iteration, and why. It decides the same as before."""
        self.decisions = Decisions()
        return self.decisions

    def stop_telling(self) -> None:
        """Nobody listens any more."""
        self.decisions = None

    def add(self, new: NewRequest, now: float = 0.0, waited: float = 0.0) -> None:
        """Takes a request in. waited: seconds that it was there before, which only its timing counts.

        RequestTooLarge: its KV can never fit. ValueError: a known id, or no tokens.
        """
        if new.id in self.requests:
            raise ValueError(f"request {new.id} is here already")
        if not new.token_ids:
            raise ValueError(f"request {new.id} has no tokens")
        request = Request(new, self._num_arrivals, now, waited)
        if request.max_total > self.kv.num_slots:
            raise RequestTooLarge(
                f"prompt and output may reach {request.max_total} tokens, but the KV cache holds {self.kv.num_slots}"
            )
        self._num_arrivals += 1
        if self.config.overlap and request.is_plain:
            request.ahead_below = request.max_total - 1
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
        request.quiet_below = 0
        if not request.num_in_flight:
            self._drop(request)

    def schedule(self, now: float = 0.0) -> Batch | None:
        """The next iteration, or None if nothing can run now: nothing is ready, or memory waits for a batch's end."""
        self._put_in_order()
        self._yielding.clear()
        self.passed.clear()
        if self.order.preempts:
            self._make_way(now)
            self._put_in_order()
        tokens_left = self._token_limit()
        request_level = self.policy.request_level
        has_begun = request_level and bool(self.running)
        closed = has_begun
        num_preemptions = self.num_preemptions
        row_limit = self.budget.rows(self.running)
        # Rows of requests that no other batch carries: only they count on several stages, as chunks even batches out.
        num_own = 0
        is_alone = self.budget.lanes == 1
        alike, block_size, yielding = self.policy.alike, self.kv.block_size, self._yielding
        # Prompts are read in order, whether their requests run yet or not: who waits may come before one that runs.
        head = self.waiting.head if self.policy.cuts_prompts else None
        ready, quiet = self._ready(), list[Request]()  # who is chosen, and not told to the sealer yet
        for request in ready:
            if tokens_left == 0:
                break
            own = 1 if is_alone or not request.num_in_flight else 0
            if own and num_own >= row_limit:
                continue
            start, num_tokens = request.num_computed, 1
            if start < request.quiet_below and start < request.num_known_slots:  # as for most
                quiet.append(request)
                num_own += own
                tokens_left -= 1
                continue
            if quiet:
                self.sealer.add_quiet(quiet)
                quiet.clear()
            if not request.block_table or request in yielding:  # for an older one, a moment ago
                continue
            if request_level or len(request.token_ids) - start > 1:
                if head is not None and head < request.entry and not closed and self.num_preemptions == num_preemptions:
                    num_own, tokens_left, closed = self._let_in(num_own, tokens_left, now, request.entry)
                    self._put_in_order()
                    head = self.waiting.head
                    if tokens_left == 0 or (own and num_own >= row_limit):
                        continue
                start, num_tokens = self._shape(request, tokens_left)
            if alike and not self._joins((start, num_tokens)):
                continue
            # Few decodes need a new block: the others are spared the question.
            end = start + num_tokens
            if end > len(request.block_table) * block_size and not self._make_room(request, end, now):
                closed = True  # it waits for an older one's end; those that need no memory go on
                continue
            self.sealer.add(request, start, num_tokens, now)
            num_own += own
            tokens_left -= num_tokens
        self.sealer.add_quiet(quiet)
        # Who was preempted just now would be let in again at once, and the memory was not for him.
        if not closed and self.num_preemptions == num_preemptions:
            num_own, tokens_left, _ = self._let_in(num_own, tokens_left, now)
        for request in self.passed:
            self.order.passed_over(request)
            self.waiting.add(request)
        if self.decisions is not None:
            self._say_who_waits(self.decisions, ready, num_own, tokens_left, has_begun)
        if not self.sealer.rows:
            return None
        batch = self.sealer.seal(() if self.kv.swap is None else self.kv.swap.take_copies())
        self.budget.submitted(batch, now)
        return batch

    def update(self, batch: Batch, result: StepResult, now: float = 0.0) -> tuple[Output, ...]:
        """Takes in what a batch gave; a request whose output has a finish reason is gone from here."""
        outputs: list[Output] = []
        self.budget.returned(batch, now)
        keep, block_size = outputs.append, self.kv.block_size
        for request, row, got in zip(self.sealer.unseal(batch), batch.rows, result.rows, strict=True):
            request.num_in_flight -= 1
            token_ids, token_id = request.token_ids, got.token_id
            known = len(token_ids)
            is_quiet = known <= request.quiet_below and got.error is None
            if is_quiet and token_id is not None and token_id not in request.end_token_ids:
                if known % block_size == 0:
                    self.kv.publish(request, known)
                token_ids.append(token_id)
                fresh = (token_id,)
                request.unsaid = request.unsaid + fresh if request.unsaid else fresh
                keep(Output(id=request.id, token_ids=fresh))
                continue
            if request.finish_reason is None and (output := self._take_in(request, row, got, now)) is not None:
                keep(output)
            reason = request.finish_reason
            stays = self.policy.request_level and reason != "abort"
            if reason is not None and not request.num_in_flight and not stays:
                self._drop(request)
        return self._return_together(outputs) if self.policy.request_level else tuple(outputs)

    # -- deciding ------------------------------------------------------------------------------------------------

    def _let_in(
        self,
        num_own: int,
        tokens_left: int,
        now: float,
        before: tuple[float, float, int] | None = None,
    ) -> tuple[int, int, bool]:
        """Admits who waits, in order, and gives each a row. Who waits for a prefix is passed over, out of the queue.

        before: where the running request stands that would read its prompt otherwise: only those that come before that
        place, and as long as all that run can have rows. Nobody is passed over then: the prefix may be what it reads.
        Returns how many rows there are and tokens are left then, and whether the first that waits cannot run now.
        """
        most = self.config.max_batch_size
        while self.waiting and num_own < most and tokens_left > 0:
            request = self.waiting.first
            if before is not None and (
                self._place(request) > before
                or len(self.running) >= most * self.budget.lanes
                or self.kv.awaits(request)
            ):
                break
            if len(self.passed) < most and self.kv.awaits(request):
                self.waiting.remove(request)
                self.passed.append(request)
                continue
            if not self._joins(self._first_shape(request, tokens_left)) or not self._admit(request, now):
                return num_own, tokens_left, True  # stop, not skip: nobody overtakes
            start, num_tokens = self._shape(request, tokens_left)
            self.sealer.add(request, start, num_tokens, now)
            num_own += 1
            tokens_left -= num_tokens
        return num_own, tokens_left, False

    def _ready(self) -> list[Request]:
        """Running requests with something to compute that the host need not know, in the order in which they choose."""
        if self.policy.request_level:
            return self._ready_together()
        ready: list[Request] = []
        after = [] if self.policy.decodes_first else ready  # the policy's order remains inside each half
        for request in self.running:
            known = len(request.token_ids)
            lag = known - request.num_computed
            if request.finish_reason is not None:
                continue
            if lag == 1 or (not lag and known < request.ahead_below):
                ready.append(request)
            elif lag > 1:
                after.append(request)
        return ready if after is ready else ready + after

    def _ready_together(self) -> list[Request]:
        """The same of a request-level batch, whose ended members keep their rows busy."""
        ready = [request for request in self.running if not request.num_in_flight]
        # A batch that is over but for what is in flight: ended members would keep it going for ever, in turns.
        if len(ready) < len(self.running) and all(request.finish_reason is not None for request in self.running):
            return []
        if self.policy.decodes_first:
            ready.sort(key=lambda request: request.lag > 1)
        return ready

    def _token_limit(self) -> int:
        return self.budget.tokens(self.running, self.waiting, self.kv)

    def _shape(self, request: Request, tokens_left: int) -> Shape:
        """The row that a running request gets: its first position, its number of tokens."""
        if request.finish_reason is not None:  # a request-level batch: the ended member computes for nothing
            return request.num_computed - 1, 1
        start = request.num_computed
        return start, self.policy.grant(len(request.token_ids) - start, tokens_left)

    def _first_shape(self, request: Request, tokens_left: int) -> Shape:
        """The same of a waiting one, if it were admitted now."""
        start = self.kv.known_prefix(request) if self.policy.alike else 0
        return start, self.policy.grant(request.num_tokens - start, tokens_left)

    def _joins(self, shape: Shape) -> bool:
        """Whether a row may travel with those that are chosen."""
        rows = self.sealer.rows
        return self.policy.joins((rows[0].start, rows[0].num_tokens) if rows else None, shape)

    def _make_room(self, request: Request, num_tokens: int, now: float) -> bool:
        """Grows a running request's KV, preempting the last in order that may be until it fits.

        With overlap that is the last of all: if it is in flight, it yields, and makes room when the next batch is made.
        """
        while not self.kv.grow(request, num_tokens):
            victim = next((other for other in reversed(self.running) if self._may_give(other)), None)
            if victim is not None and self._place(victim) <= self._place(request):
                victim = None
            if victim is not None and not victim.num_in_flight:
                self._preempt_for(request, victim, now)
                continue
            if victim is not None:
                self._yield(victim, request)
            if self.decisions is not None:
                missing = self.kv.blocks_for(num_tokens) - len(request.block_table)
                self.decisions.lacks(request.id, missing - self.kv.pool.num_free)
            return False
        return True

    def _may_give(self, request: Request) -> bool:
        """Whether a running request can be preempted: now, or, with overlap, when it is in no batch if it is not ahead.

        Else one would be preempted that comes before those in flight, who go on for ever if nobody stops them.
        """
        return request.finish_reason is None if self.config.overlap else not request.num_in_flight

    def _yield(self, victim: Request, request: Request) -> None:
        if victim in self._yielding:
            return
        self._yielding.append(victim)
        victim.quiet_below = 0
        if self.decisions is not None:
            self.decisions.waits(Waits(id=victim.id, why="yields", runs=True, by=request.id))

    def _preempt_for(self, request: Request, victim: Request, now: float) -> None:
        num_computed = victim.num_computed
        self._preempt(victim, now)
        if self.decisions is not None:
            self.decisions.preempted(victim.id, request.id, num_computed - victim.num_computed)

    def _preempt(self, request: Request, now: float) -> None:
        """Takes a request's KV away, to the swap space or for good.

        Its tokens stay, so that it can be recomputed, and it goes on as if nothing had been.
        """
        self.num_preemptions += 1
        self.running.remove(request)
        request.quiet_below = 0
        request.timer.preempted(now, request.num_computed)
        if self.kv.swap_out(request):
            self.sealer.forget(request)
        else:
            self._forget(request)
        self._wait(request, now)

    def _make_way(self, now: float) -> None:
        """Lets who waits go before those that run and come after it, in their place if need be; not if that is in vain.

        This is done before rows are chosen, so that no decision is taken back. Who is in flight stays; with overlap all
        who are to go yield first, so that none is in flight when the next batch is made.
        """
        while self.waiting and self.running:
            request = self.waiting.first
            place = self._place(request)
            if self._place(self.running[-1]) < place:
                return
            others = [other for other in self.running if self._may_give(other)]
            after = [other for other in reversed(others) if self._place(other) > place]
            own = min(sum(other.due > 0 for other in others), self.budget.rows(self.running))
            rows = max(0, own + 1 - self.config.max_batch_size)
            spare = self.headroom.spare(self.running, request)
            left = [self.headroom.left_for(other) for other in after]
            victims = self.kv.who_gives(request, self.policy.room(request), spare, after, left, rows)
            if victims is None:
                return
            before = sum(other.due for other in others if other.due == 1 or self._place(other) < place)
            if before - sum(victim.due == 1 for victim in victims) >= self._token_limit():
                return  # it would get no token now
            if any(victim.num_in_flight for victim in victims):
                for victim in victims:
                    self._yield(victim, request)
                return
            for victim in victims:
                self._preempt_for(request, victim, now)
            if not self._admit(request, now):
                return

    def _admit(self, request: Request, now: float) -> bool:
        """Lets the first in the queue run, if its KV fits and leaves to those that run what they may need."""
        spare = 0 if self.policy.reserve else self.headroom.spare(self.running, request)
        num_swapped = request.num_computed
        if not self.kv.admit(request, self.policy.room(request), spare):
            return False
        request.timer.returning = max(0, num_swapped - request.num_published * self.kv.block_size)
        request.entry = self._place(request)
        self.order.started(request, now)
        if request.num_cached is None:
            request.num_cached = request.num_computed
            request.num_served = request.num_computed
            request.timer.admitted(request.num_computed)
        self.waiting.remove(request)
        self._run(request)
        return True

    def _place(self, request: Request) -> tuple[float, float, int]:
        """Among all requests; the least goes first, the greatest is preempted first."""
        return self.waiting.place(request)

    def _wait(self, request: Request, now: float) -> None:
        request.key = self.order.key(request, now)
        self.waiting.add(request)

    def _run(self, request: Request) -> None:
        running = self.running
        # As nearly always it is the last; and if they have moved, they are put in order before the next batch anyway.
        if self.order.moved or not running or self._place(running[-1]) < self._place(request):
            running.append(request)
        else:
            insort(running, request, key=self._place)

    def _put_in_order(self) -> None:
        if self.order.moved:
            ranks = {lane: self.order.rank(lane) for lane in dict.fromkeys(request.lane for request in self.running)}
            self.running.sort(key=lambda request: (ranks[request.lane], request.key, request.arrival))
            self.order.moved = False

    def _say_who_waits(
        self, decisions: Decisions, ready: list[Request], num_own: int, tokens_left: int, has_begun: bool
    ) -> None:
        """For who listens. has_begun: a request-level batch was under way."""
        is_full = num_own >= self.config.max_batch_size
        if self.budget.lanes == 1:  # else who is left out of one batch goes with the next in flight
            taking_part = {row.id for row in self.sealer.rows}
            why: Reason = "rows" if is_full else "shape" if tokens_left else "tokens"
            for request in ready:
                if request.block_table and request.id not in taking_part and not decisions.is_left_out(request.id):
                    decisions.waits(Waits(id=request.id, why=why, runs=True))
        if self.waiting:
            id = self.waiting.first.id
            if decisions.preempted_for is not None:
                decisions.waits(Waits(id=id, why="preemption", by=decisions.preempted_for))
            elif has_begun:
                decisions.waits(Waits(id=id, why="closed"))
            elif self.kv.awaits(self.waiting.first):
                decisions.waits(Waits(id=id, why="prefix"))
            elif decisions.lacking is not None:
                decisions.waits(Waits(id=id, why="memory", by=decisions.lacking))
            elif is_full or tokens_left <= 0:
                decisions.waits(Waits(id=id, why="rows" if is_full else "tokens"))
            elif not self._joins(self._first_shape(self.waiting.first, tokens_left)):
                decisions.waits(Waits(id=id, why="shape"))
            else:
                decisions.waits(self._lacks_blocks(self.waiting.first))
        decisions.seal()

    def _lacks_blocks(self, request: Request) -> Waits:
        spare = 0 if self.policy.reserve else self.headroom.spare(self.running, request)
        holders = sorted(self.running, key=lambda other: -len(other.block_table))[:MOST_HOLDERS]
        return Waits(
            id=request.id,
            why="blocks",
            blocks=self.kv.lacking(request, self.policy.room(request), spare),
            holders=tuple([(other.id, len(other.block_table)) for other in holders]),
        )

    # -- taking results in ---------------------------------------------------------------------------------------

    def _take_in(self, request: Request, row: ScheduledRequest, got: RowResult, now: float) -> Output | None:
        """One row's result. None if there is nothing to tell yet."""
        token_id, error, end = got.token_id, got.error, row.start + row.num_tokens
        request.quiet_below = 0
        if error is None and row.samples and token_id is None:
            error = "the model gave no token"
        if error is not None:
            request.finish_reason = "error"
            return Output(id=request.id, finish_reason="error", error=error, timing=self._timing(request, now))
        if end >= (request.num_published + 1) * self.kv.block_size:
            self.kv.publish(request, end)
        if self._hears_service and (fresh := end - request.num_served) > 0:
            request.num_served = end
            self.order.served(request, fresh, int(token_id is not None))
        if not request.timer.decodes:
            request.timer.computed(row.start, end, token_id is not None or request.num_generated > 0, now)
        prompt_logprobs = request.prompt_logprobs
        if prompt_logprobs is not None:
            prompt_logprobs.extend(got.prompt_logprobs)
        if end < len(request.token_ids):
            return None  # still prefilling
        if token_id is not None:
            request.token_ids.append(token_id)
            request.unsaid += (token_id,)
        reason = request.finish_reason = self._finish_reason(request, token_id)
        is_plain = request.num_cached == 0 and prompt_logprobs is None and not request.new.timed
        if reason is None and token_id is not None and is_plain:
            # As nearly always: one more token of a stream, and so it goes on to the end of its block.
            request.quiet_below = self._quiet_below(request)
            return Output(id=row.id, token_ids=(token_id,), logprobs=() if got.logprobs is None else (got.logprobs,))
        request.prompt_logprobs = None
        num_cached, request.num_cached = request.num_cached or 0, 0  # told once
        return Output(
            id=row.id,
            token_ids=() if token_id is None else (token_id,),
            logprobs=() if got.logprobs is None else (got.logprobs,),
            prompt_logprobs=tuple(prompt_logprobs or ()),
            pooled=got.pooled,
            num_cached=num_cached,
            finish_reason=reason,
            timing=self._timing(request, now) if reason is not None or request.new.timed else None,
        )

    def _quiet_below(self, request: Request) -> int:
        """Rows of one that decodes, and of whose tokens nobody else is told, are quiet up to its last."""
        if self._hears_service or self.policy.request_level or self.policy.alike or not request.timer.decodes:
            return 0
        return request.max_total - 2 if request.is_plain else 0

    def _timing(self, request: Request, now: float) -> Timing:
        self.sealer.settle()
        return request.timer.timing(now)

    def _finish_reason(self, request: Request, token_id: int | None) -> FinishReason | None:
        new = request.new
        if new.end_token_ids and token_id in new.end_token_ids:
            return "stop"
        return "length" if len(request.token_ids) - new.num_prompt >= new.max_tokens else None

    def _return_together(self, outputs: list[Output]) -> tuple[Output, ...]:
        """Request-level batching: keeps everything until the longest member has ended, then returns and frees all."""
        self._held.extend(outputs)
        if any(request.finish_reason is None or request.num_in_flight for request in self.running):
            return ()
        together = tuple([output for output in self._held if output.id in self.requests])
        self._held.clear()
        for request in list(self.running):
            self._drop(request)
        return together

    def _drop(self, request: Request) -> None:
        del self.requests[request.id]
        self.order.ended(request)
        if request.finish_reason in ("stop", "length"):
            self.headroom.ended(request)
        if request.block_table:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        """Frees the KV and lets the workers know."""
        self.kv.free(request)
        self.sealer.forget(request)
        if request.prompt_logprobs:
            request.prompt_logprobs = []
