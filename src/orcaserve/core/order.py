"""Who goes first: `Order`, the base of all orders, is first come, first served, as the paper publishes it.

An order is asked for three things. Requests wait in *lanes* (one for all, or one for each tenant); the lane of the
least `rank` goes first, and in it the request of the least `key`. Equal ones go by arrival. The same order says who is
preempted first when memory is short: the last. It learns of work that is done by `served`, and of nothing else, so
that the same calls at the same times give the same decisions.

To plug in an order of one's own, subclass `Order` and name it as an entry point of the group "orcaserve.orders".
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

import msgspec

from orcaserve.core.request import Request

GROUP = "orcaserve.orders"


class OrderOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an order can be told. Subclasses have a field, with a default, for each option."""


class Order:
    """First come, first served. Owner of what it has learnt; one for each scheduler.

    Options: the fields that `--policy NAME,field=value` may set; they come to __init__ as one frozen value.
    preempts: whether who waits may take the place of one that runs and comes after it.
    moves: whether ranks or keys of running requests change, so that they have to be put in order again.
    """

    Options: type[OrderOptions] = OrderOptions
    preempts = False
    moves = False

    def __init__(self, options: OrderOptions) -> None:
        self.options = options

    def lane(self, request: Request) -> str:
        """Where a request waits; the same for its whole life."""
        return ""

    def rank(self, lane: str) -> float:
        """Place of a lane now."""
        return 0.0

    def key(self, request: Request, now: float) -> float:
        """Place in its lane, asked when the request begins to wait, first or again; `now` in seconds."""
        return 0.0

    def arrived(self, request: Request, lane_waits: bool) -> None:
        """A new request is about to wait. lane_waits: whether others wait or run in its lane already."""

    def served(self, request: Request, num_computed: int, num_generated: int) -> None:
        """An iteration has computed so many tokens that nobody had computed before, and generated so many.

        It may set `request.key`, if `moves`.
        """

    def ended(self, request: Request) -> None:
        """A request is gone: it has all its tokens, failed, or was aborted."""


class OrderError(ValueError):
    """There is no such order, or it has no such option; the message is one clear line."""


class Waiting:
    """The requests that wait, in lanes, each sorted by key and arrival. Owned by the scheduler."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._lanes: dict[str, list[Request]] = {}
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
        lanes = self._lanes
        if len(lanes) == 1:
            return next(iter(lanes.values()))[0]
        return min((lane[0] for lane in lanes.values()), key=self._place)

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

    def remove(self, request: Request) -> None:
        lane = self._lanes[request.lane]
        del lane[_find(lane, (request.key, request.arrival))]
        if not lane:
            del self._lanes[request.lane]
        self._count -= 1

    def _place(self, request: Request) -> tuple[float, float, int]:
        return self._order.rank(request.lane), request.key, request.arrival


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


ORDERS: dict[str, type[Order]] = {"fcfs": Order}


def find_order(name: str) -> type[Order]:
    """An order by its name: one of ours, or one that another package has as an entry point. OrderError if none."""
    if name in ORDERS:
        return ORDERS[name]
    plugged = {point.name: point for point in entry_points(group=GROUP)}
    if name not in plugged:
        raise OrderError(f"there is no order {name!r}; there are {', '.join([*ORDERS, *plugged])}")
    found = plugged[name].load()
    if not (isinstance(found, type) and issubclass(found, Order)):
        raise OrderError(f"the entry point {name!r} is no subclass of orcaserve.core.order.Order")
    return found


def make_order(name: str, options: tuple[tuple[str, str], ...]) -> Order:
    """An order with its options, which are checked here. OrderError says what is wrong."""
    of = find_order(name)
    try:
        return of(msgspec.convert(dict(options), of.Options, strict=False))
    except (msgspec.ValidationError, ValueError) as error:
        known = ", ".join(of.Options.__struct_fields__) or "none"
        raise OrderError(f"order {name!r}: {error}; its options: {known}") from None
