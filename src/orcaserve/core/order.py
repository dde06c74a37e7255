"""Who goes first: `Order`, the base of all orders, is first come, first served, as the paper publishes it.

An order is asked for three things. Requests wait in *lanes* (one for all, or one for each tenant); the lane of the
least `rank` goes first, and in it the request of the least `key`. Equal ones go by arrival. The same order says who is
preempted first when memory is short: the last. It learns only what the calls below tell it, so that the same calls at
the same times give the same decisions.

Orders stand in `orcaserve.core.orders`; docs/policies.md shows how to plug in one of your own.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace

import msgspec

from orcaserve.core.request import Request


class OrderOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an order can be told. Subclasses have a field, with a default, for each option."""


class Order:
    """First come, first served. Owner of what it has learnt; one for each scheduler.

    Options: the fields that `--policy NAME,field=value` may set; they come to __init__ as one frozen value.
    preempts: whether who waits may take the place of one that runs and comes after it.
    moved: an order sets it where ranks or keys of running requests have changed; the scheduler puts them in order
        again and clears it.

    Where an order preempts, one that has been preempted must come after whom it made way for until that one has
    generated something: then they cannot take turns in preempting each other.
    """

    Options: type[OrderOptions] = OrderOptions
    preempts = False

    def __init__(self, options: OrderOptions) -> None:
        self.options = options
        self.moved = False

    def lane(self, request: Request) -> str:
        """Where a request waits; the same for its whole life."""
        return ""

    def rank(self, lane: str) -> float:
        """Place of a lane now. While somebody waits there it may rise, but never fall."""
        return 0.0

    def key(self, request: Request, now: float) -> float:
        """Place in its lane, asked when the request begins to wait, first or again; `now` in seconds."""
        return 0.0

    def arrived(self, request: Request, waiting: Waiting) -> None:
        """A new request is about to wait with those that wait now (only to be looked at)."""

    def started(self, request: Request, now: float) -> None:
        """A request is about to run, first (its `num_cached` is None) or again; `num_computed` were in the cache."""

    def served(self, request: Request, num_computed: int, num_generated: int) -> None:
        """An iteration has computed so many tokens that nobody had computed before, and generated so many.

        It may set `request.key`, and then `moved`.
        """

    def passed_over(self, request: Request) -> None:
        """Others may have been admitted before a request that waits for a prefix which one that runs computes."""

    def ended(self, request: Request) -> None:
        """A request is gone: it has all its tokens, failed, or was aborted."""


class OrderError(ValueError):
    """There is no such order, or it has no such option; the message is one clear line."""


class Waiting:
    """The requests that wait, in lanes, each sorted by key and arrival. Owned by the scheduler.

    The first of the first lane is found by a heap of what lanes begin with. Entries that are out of date are dropped or
    put right when they come to its top, which is right as long as ranks only rise.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._lanes: dict[str, list[Request]] = {}
        self._heads: list[tuple[float, float, int, str]] = []  # rank, key and arrival of its first, lane
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        """Lane by lane, each in its order."""
        for lane in self._lanes.values():
            yield from lane

    @property
    def first(self) -> Request:
        """Who goes next. IndexError if nobody waits."""
        lanes, heads = self._lanes, self._heads
        while True:
            rank, key, arrival, lane = heads[0]
            head = lanes[lane][0] if lane in lanes else None
            if head is None or head.arrival != arrival or head.key != key:
                heappop(heads)
            elif (risen := self._order.rank(lane)) != rank:
                heapreplace(heads, (risen, key, arrival, lane))
            else:
                return head

    @property
    def head(self) -> tuple[float, float, int] | None:
        """The place of who goes next; None if nobody waits."""
        return self.place(self.first) if self._count else None

    def place(self, request: Request) -> tuple[float, float, int]:
        """Of a request among all; the least goes first."""
        return self._order.rank(request.lane), request.key, request.arrival

    def has_lane(self, name: str) -> bool:
        return name in self._lanes

    def add(self, request: Request) -> None:
        lane = self._lanes.setdefault(request.lane, [])
        place = (request.key, request.arrival)
        if not lane or (lane[-1].key, lane[-1].arrival) < place:  # as nearly always
            lane.append(request)
        else:
            lane.insert(_find(lane, place), request)
        self._count += 1
        if lane[0] is request:
            self._begin(request)

    def remove(self, request: Request) -> None:
        lane = self._lanes[request.lane]
        at = 0 if lane[0] is request else _find(lane, (request.key, request.arrival))
        del lane[at]
        self._count -= 1
        if not lane:
            del self._lanes[request.lane]
        elif at == 0:
            self._begin(lane[0])

    def _begin(self, head: Request) -> None:
        """A lane begins with this request now."""
        heappush(self._heads, self._entry(head))
        if len(self._heads) > 4 * len(self._lanes) + 16:  # many are out of date, and none comes to the top
            self._heads = [self._entry(lane[0]) for lane in self._lanes.values()]
            heapify(self._heads)

    def _entry(self, head: Request) -> tuple[float, float, int, str]:
        return self._order.rank(head.lane), head.key, head.arrival, head.lane


def _find(lane: list[Request], place: tuple[float, int]) -> int:
    """Where in its lane a request of that place is, or belongs."""
    low, high = 0, len(lane)
    while low < high:
        middle = (low + high) // 2
        if (lane[middle].key, lane[middle].arrival) < place:
            low = middle + 1
        else:
            high = middle
    return low
