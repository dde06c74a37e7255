"""`shortest`: the least work first, as far as it can be guessed, and nobody waits much longer than in turn."""

from __future__ import annotations

from orcaserve.core.lengths import Histogram, Lengths
from orcaserve.core.order import Order, OrderOptions, Waiting
from orcaserve.core.request import Request

DECAY = 1 - 1 / 64  # what a start counts less with each one after it


class ShortestOptions(OrderOptions, frozen=True, kw_only=True):
    """output: work of a generated token, where a token of a prompt is 1.

    guard: who is long lets others pass that arrive within so many times the wait that he finds. preempt: see
    `Order.preempts`.
    """

    output: float = 8.0
    guard: float = 1.0
    preempt: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.output < float("inf") and 0 <= self.guard < float("inf")):
            raise ValueError("output and guard are numbers from 0")


class Shortest(Order):
    """Shortest job first with predicted lengths, and a guard against starvation.

        work = prompt + output × expected tokens
        key  = arrived + guard × queue × (share of recent requests whose work was less)

    Expected tokens are `Lengths` of the tenant and the prompt's length, at most max_tokens. queue: seconds that those
    who wait take when the request comes, which is their work over the work that was started in a second of late: the
    wait that it would have in turn. The shortest has its arrival for a key, the longest lets pass who arrives within
    `queue`, and no one else: it waits for what stood before it, and for what comes in that time, about twice what it
    would wait first come, first served. A request keeps its place when it is preempted.
    """

    Options = ShortestOptions

    def __init__(self, options: ShortestOptions) -> None:
        super().__init__(options)
        self._told = options
        self.preempts = options.preempt
        self._lengths = Lengths()
        self._works = Histogram()
        self._open: dict[int, float] = {}  # work of those that have not started
        self._backlog = 0.0
        self._started_work = 0.0  # while others waited, in so many seconds; both decay
        self._seconds = 0.0
        self._last: tuple[float, float] | None = None  # when a request started, and its work, if others waited then

    def arrived(self, request: Request, waiting: Waiting) -> None:
        work = self._work(request)
        self._works.learn(work)
        share = self._works.below(work)
        queue = self._backlog * self._seconds / self._started_work if self._started_work else 0.0
        request.key = request.arrived + self._told.guard * queue * share
        self._open[request.id] = work
        self._backlog += work

    def key(self, request: Request, now: float) -> float:
        return request.key

    def started(self, request: Request, now: float) -> None:
        work = self._open.pop(request.id, None)
        if work is None:  # it was preempted
            return
        self._backlog = self._backlog - work if self._open else 0.0
        if self._last is not None:
            when, before = self._last
            self._started_work = self._started_work * DECAY + before
            self._seconds = self._seconds * DECAY + now - when
        self._last = (now, work) if self._open else None

    def ended(self, request: Request) -> None:
        self._backlog -= self._open.pop(request.id, 0.0)
        if request.finish_reason in ("stop", "length"):
            self._lengths.learn(request.new.tenant, request.new.num_prompt, request.num_generated)

    def _work(self, request: Request) -> float:
        new = request.new
        left = new.num_prompt + new.max_tokens - request.num_tokens
        expected = self._lengths.expected(new.tenant, new.num_prompt)
        tokens = left if expected is None else min(left, max(1.0, expected - request.num_generated))
        return request.num_tokens + self._told.output * tokens
