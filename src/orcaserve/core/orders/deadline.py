"""`deadline`: the earliest deadline first, inside a class of priority."""

from __future__ import annotations

from orcaserve.core.order import Order, OrderOptions
from orcaserve.core.request import Request


class DeadlineOptions(OrderOptions, frozen=True, kw_only=True):
    """default: seconds until the first token is due where a request does not say. preempt: see `Order.preempts`."""

    default: float = 60.0
    preempt: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.default < float("inf"):
            raise ValueError("default is a number of seconds from 0")


class Deadline(Order):
    """Earliest deadline first (Liu and Layland, JACM 1973).

        lane = priority, key = arrived + deadline

    A class with a lower `NewRequest.priority` goes before all others, however late those are. In a class nobody is
    overtaken by a request whose deadline is later than his own, so that each waits for a bounded time. On one machine,
    with preemption that costs nothing, this order meets all deadlines if any does; an engine is not quite that.
    """

    Options = DeadlineOptions

    def __init__(self, options: DeadlineOptions) -> None:
        super().__init__(options)
        self._default = options.default
        self.preempts = options.preempt

    def lane(self, request: Request) -> str:
        return str(request.new.priority)

    def rank(self, lane: str) -> float:
        return float(lane)

    def key(self, request: Request, now: float) -> float:
        within = request.new.deadline
        return request.arrived + (self._default if within is None else within)
