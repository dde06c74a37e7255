"""The net has no holes: schedulers broken on purpose, each of which the random worlds must catch."""

from __future__ import annotations

from hashlib import sha256

import msgspec
import pytest
from ledger_world import pressed_life, random_life

from orcaserve.core.batch import Batch, RowResult, ScheduledRequest, StepResult, Swap
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.order import Waiting
from orcaserve.core.policy import Shape, parse_policy
from orcaserve.core.request import NewRequest, Output, Request
from orcaserve.core.scheduler import Scheduler, SchedulerConfig

LIVES = 400


class LosesABlock(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        free = self.kv.free

        def leak(request: Request) -> None:
            request.block_table = request.block_table[1:]
            free(request)

        self.kv.free = leak


class KeepsProgressOfThePreempted(CheckedScheduler):
    def _preempt(self, request: Request, now: float) -> None:
        computed = request.num_computed
        super()._preempt(request, now)
        request.num_computed = computed


class ForgetsToTellWorkers(CheckedScheduler):
    def _forget(self, request: Request) -> None:
        super()._forget(request)
        self.sealer.freed.clear()


class TakesOneSlotTooFew(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        grow = self.kv.grow
        self.kv.grow = lambda request, num_tokens: grow(request, num_tokens - 1)


class ReadsTheWholePromptFromTheCache(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        cached = self.kv._cached_prefix

        def greedy(request: Request) -> list[int]:
            request.token_ids.append(0)
            try:
                return cached(request)
            finally:
                request.token_ids.pop()

        self.kv._cached_prefix = greedy


class ForgetsThePrefixBeforeTheBlock(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)

        def unchained(request: Request, count: int) -> None:
            for i in range(len(request.block_keys), count):
                request.block_keys.append(sha256(repr(self.kv._block_tokens(request, i)).encode()).digest())

        self.kv._extend_keys = unchained


class PublishesHalfABlock(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        publish = self.kv.publish

        def early(request: Request, num_tokens: int) -> None:
            most = len(request.block_table) * self.kv.block_size
            publish(request, min(most, num_tokens + self.kv.block_size - 1))

        self.kv.publish = early


class PublishesWhatIsInFlight(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        publish = self.kv.publish
        self.kv.publish = lambda request, num_tokens: publish(request, request.num_computed)


class KeepsThePrefixOfAReusedBlock(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        pool = self.kv.pool

        def take() -> int:
            block, _ = pool.free.popitem(last=False)
            pool.counts[block] = 1
            return block

        pool.take = take


class TakesUsedBlocksFirst(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        pool, grow = self.kv.pool, self.kv.grow

        def steal(request: Request, num_tokens: int) -> bool:
            if grow(request, num_tokens):
                return True
            other = next(other for other in self.running if other is not request or len(self.running) == 1)
            request.block_table.append(other.block_table[-1])
            pool.counts[other.block_table[-1]] += 1
            return True

        self.kv.grow = steal


class SchedulesTwice(CheckedScheduler):
    def _ready(self) -> list[Request]:
        return list(self.running)


class FreesInFlight(CheckedScheduler):
    def abort(self, id: int) -> None:
        request = self.requests.get(id)
        if request is not None:
            request.num_in_flight = 0
        super().abort(id)


class PreemptsTheOldest(CheckedScheduler):
    def _make_room(self, request: Request, num_tokens: int, now: float) -> bool:
        while not self.kv.grow(request, num_tokens):
            victim = next(other for other in self.running if not other.num_in_flight)
            if victim is request:
                return False
            self._preempt(victim, now)
        return True


class LetsTheSecondOvertake(CheckedScheduler):
    def _admit(self, request: Request, now: float) -> bool:
        if super()._admit(request, now):
            return True
        return any(super(LetsTheSecondOvertake, self)._admit(other, now) for other in list(self.waiting)[1:])


class WantsSpareForNobody(CheckedScheduler):
    def _admit(self, request: Request, now: float) -> bool:
        return self.kv.pool.num_free > self.kv.blocks_for(self.policy.room(request)) and super()._admit(request, now)


class StarvesWhenMemoryIsShort(CheckedScheduler):
    """The scheduler as it was once: a younger decode that found no memory stopped the older prefill behind it."""

    def _ready(self) -> list[Request]:
        ready = super()._ready()
        for i, request in enumerate(ready):
            short = self.kv.blocks_for(request.num_computed + 1) > len(request.block_table) + self.kv.pool.num_free
            if short and request is self.running[-1]:
                return ready[:i]
        return ready


class EndsOneTokenLate(CheckedScheduler):
    def _finish_reason(self, request: Request, token_id: int | None):
        reason = super()._finish_reason(request, token_id)
        return None if reason == "length" and request.num_generated == request.new.max_tokens > 0 else reason


class IgnoresTheBudget(CheckedScheduler):
    def _shape(self, request: Request, tokens_left: int) -> Shape:
        return super()._shape(request, 1000)


class OpensTheStaticBatch(CheckedScheduler):
    def schedule(self, now: float = 0.0):
        policy, closed = self.policy, self.policy.request_level
        if closed:
            self.policy = type(policy)(name="open", reserve=True, chunked=False, decodes_first=False)
        running = len(self.running)
        batch = Scheduler.schedule(self, now)
        self.policy = policy
        if batch is not None:
            self._check_batch(batch, running)
        return batch


class StacksTheUnequal(CheckedScheduler):
    def _joins(self, shape: Shape) -> bool:
        rows = self.sealer.rows
        return shape[1] == rows[0].num_tokens if rows else True


class JudgesBeforeThePrefixIsKnown(CheckedScheduler):
    """Only `alike` with a prefix cache sees the difference, so that it runs under that."""

    def __init__(self, config: SchedulerConfig) -> None:
        policy = msgspec.structs.replace(config.policy, alike=not config.policy.request_level)
        super().__init__(msgspec.structs.replace(config, policy=policy))
        self.kv.known_prefix = lambda request: 0


class ReservesOnlyThePrompt(CheckedScheduler):
    def _admit(self, request: Request, now: float) -> bool:
        if not self.policy.reserve:
            return super()._admit(request, now)
        if not self.kv.admit(request, request.num_tokens):
            return False
        self.order.started(request, now)
        request.num_cached = 0
        self.waiting.remove(request)
        self.running.append(request)
        return True


class PreemptsWhoIsInFlight(CheckedScheduler):
    def _make_way(self, now: float) -> None:
        if self.waiting and self.running and self._place(self.waiting.first) < self._place(self.running[-1]):
            self._preempt(self.running[-1], now)
            self._admit(self.waiting.first, now)


class MakesWayForWhoComesAfter(CheckedScheduler):
    def _make_way(self, now: float) -> None:
        if self.waiting and self.running and not self.running[-1].num_in_flight:
            request = self.waiting.first
            self._preempt(self.running[-1], now)
            self._admit(request, now)


class MakesWayInVain(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(msgspec.structs.replace(config, policy=parse_policy("priority,ageing=inf")))
        who_gives = self.kv.who_gives

        def generous(request, num_tokens, spare, others, left_for, least):
            return who_gives(request, num_tokens, 0, others, left_for, least)

        self.kv.who_gives = generous


class NeverPutsInOrder(CheckedScheduler):
    def _put_in_order(self) -> None:
        self.order.moved = False


class LetsTheFirstLaneGo(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)

        class Careless(Waiting):
            @property
            def first(self) -> Request:
                return next(iter(self))

        self.waiting = Careless(self.order)


class ForgetsThatRanksRise(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        order = self.order

        class Ranks:
            def __init__(self) -> None:
                self.known: dict[str, float] = {}

            def rank(self, lane: str) -> float:
                return self.known.setdefault(lane, order.rank(lane))

        self.waiting = Waiting(Ranks())


class SwapLosesABlock(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        if self.kv.swap is not None:
            take = self.kv.swap.take_copies
            self.kv.swap.take_copies = lambda: tuple(
                Swap(swap.out, swap.blocks[:-1], swap.slots[:-1]) if swap.out else swap for swap in take()
            )


class SwapCopiesOutTooLate(CheckedScheduler):
    """What is copied out travels with the batch after the one that may write there already."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        if self.kv.swap is None:
            return
        take, late = self.kv.swap.take_copies, []

        def copies() -> tuple[Swap, ...]:
            now = take()
            before, late[:] = tuple(late), [swap for swap in now if swap.out]
            return (*before, *(swap for swap in now if not swap.out))

        self.kv.swap.take_copies = copies


class SwapCopiesBackTooLate(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        if self.kv.swap is None:
            return
        take, late = self.kv.swap.take_copies, []

        def copies() -> tuple[Swap, ...]:
            now = take()
            before, late[:] = tuple(late), [swap for swap in now if not swap.out]
            return (*(swap for swap in now if swap.out), *before)

        self.kv.swap.take_copies = copies


class SwapKeepsItsSpace(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        if self.kv.swap is not None:
            self.kv.swap.drop = lambda request: request.swap_slots.clear()


class SwapForgetsTheHalfBlock(CheckedScheduler):
    """Only full blocks are copied, but all that was computed counts as there."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        if self.kv.swap is not None:
            put = self.kv.swap.put

            def short(request: Request, pool) -> bool:
                computed = request.num_computed
                request.num_computed -= computed % self.kv.block_size
                done = put(request, pool)
                request.num_computed = computed
                return done

            self.kv.swap.put = short


class SwapKeepsThePrefixOfAReusedSlot(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        if self.kv.swap is not None:
            slots = self.kv.swap.slots

            def take() -> int:
                slot, _ = slots.free.popitem(last=False)
                slots.counts[slot] = 1
                return slot

            slots.take = take


class ForgetsWhoReads(CheckedScheduler):
    def schedule(self, now: float = 0.0) -> Batch | None:
        self.kv.readers.clear()
        return super().schedule(now)


class RemembersWhoRead(CheckedScheduler):
    def _drop(self, request: Request) -> None:
        reads = request.id in self.kv.readers
        super()._drop(request)
        if reads:
            self.kv.readers[request.id] = request


class HoldsBackForAnybody(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.kv.awaits = lambda request: True


class LosesWhoIsHeldBack(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        add = self.waiting.add
        self.waiting.add = lambda request: None if self.kv.awaits(request) else add(request)


class CountsOnMoreThanThereIs(CheckedScheduler):
    """Admission that wants room beyond what a request can ever need: the last one would wait for ever."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        spare = self.headroom.spare
        self.headroom.spare = lambda running, request: spare(running, request) + 1


class GoesAheadOfItsEnd(CheckedScheduler):
    def add(self, new: NewRequest, now: float = 0.0, waited: float = 0.0) -> None:
        super().add(new, now, waited)
        request = self.requests[new.id]
        request.ahead_below += request.ahead_below > 0


class GoesAheadOfTheHost(CheckedScheduler):
    def add(self, new: NewRequest, now: float = 0.0, waited: float = 0.0) -> None:
        super().add(new, now, waited)
        if self.config.overlap:
            self.requests[new.id].ahead_below = self.requests[new.id].max_total - 1


class GoesAheadWithoutOverlap(CheckedScheduler):
    def add(self, new: NewRequest, now: float = 0.0, waited: float = 0.0) -> None:
        super().add(new, now, waited)
        self.requests[new.id].ahead_below = self.requests[new.id].max_total - 1


class TellsATokenTwice(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        add, add_quiet = self.sealer.add, self.sealer.add_quiet

        def untell(request: Request) -> None:
            if request.lag < 0:
                request.unsaid = tuple(request.token_ids[-1:])

        def tell(request: Request, start: int, num_tokens: int, now: float) -> None:
            add(request, start, num_tokens, now)
            untell(request)

        def tell_quiet(requests: list[Request]) -> None:
            add_quiet(requests)
            for request in requests:
                untell(request)

        self.sealer.add, self.sealer.add_quiet = tell, tell_quiet


class TakesTheTokenForTold(CheckedScheduler):
    def schedule(self, now: float = 0.0) -> Batch | None:
        for request in self.running:
            if request.num_in_flight:
                request.unsaid = ()
        return super().schedule(now)


class IsQuietAtItsEnd(CheckedScheduler):
    def _quiet_below(self, request: Request) -> int:
        quiet = super()._quiet_below(request)
        return quiet and quiet + 1


class PublishesBeyondTheEnd(CheckedScheduler):
    def update(self, batch: Batch, result: StepResult, now: float = 0.0) -> tuple[Output, ...]:
        for row in batch.rows:
            request = self.requests[row.id]
            if request.finish_reason == "stop":
                self.kv.publish(request, row.start + row.num_tokens)
        return super().update(batch, result, now)


class SaysMoreThanTheEnd(CheckedScheduler):
    def update(self, batch: Batch, result: StepResult, now: float = 0.0) -> tuple[Output, ...]:
        for row in batch.rows:
            if self.requests[row.id].finish_reason == "stop":
                self.requests[row.id].finish_reason = None
        return super().update(batch, result, now)


class FreesWhoIsAhead(CheckedScheduler):
    def _take_in(self, request: Request, row: ScheduledRequest, got: RowResult, now: float) -> Output | None:
        output = super()._take_in(request, row, got, now)
        if request.finish_reason is not None:
            request.num_in_flight = 0
        return output


class NobodyYields(CheckedScheduler):
    def _yield(self, victim: Request, request: Request) -> None:
        pass


class YieldsForEver(CheckedScheduler):
    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)

        class Kept(list):
            def clear(self) -> None:
                pass

        self._yielding = Kept()


class PreemptsWhoeverIsThere(CheckedScheduler):
    """With overlap, too, one who is in no batch now, though others come after it."""

    def _may_give(self, request: Request) -> bool:
        return not request.num_in_flight


MUTANTS = [
    value
    for value in list(globals().values())
    if isinstance(value, type) and issubclass(value, CheckedScheduler) and value is not CheckedScheduler
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(mutant: type[Scheduler]) -> None:
    life = pressed_life if mutant.__name__.startswith("Swap") else random_life
    for seed in range(LIVES):
        try:
            life(seed, scheduler=mutant)
        except (AssertionError, KeyError, IndexError, ValueError, RuntimeError):
            return
    pytest.fail(f"{mutant.__name__} lived {LIVES} lives")


def test_the_original_is_not_caught() -> None:
    for seed in range(LIVES // 8):
        random_life(seed)
        pressed_life(seed)
