"""`priority`: the client says how urgent a request is; who waits gets more urgent with time."""

from __future__ import annotations

from orcaserve.core.order import Order, OrderOptions
from orcaserve.core.request import Request


class PriorityOptions(OrderOptions, frozen=True, kw_only=True):
    """ageing: seconds of waiting that make up for one level of priority; inf: none do.

    preempt: see `Order.preempts`.
    """

    ageing: float = 30.0
    preempt: bool = True

    def __post_init__(self) -> None:
        if not self.ageing >= 0:
            raise ValueError("ageing is a number of seconds from 0, or inf")


class Priority(Order):
    """The least `NewRequest.priority` first, with linear ageing, as schedulers of processes have it.

    Who has waited for w seconds counts as priority − w / ageing. All get older at the same pace, so that this is

        key = arrived + ageing × priority

    once and for all: nobody is overtaken by a request that arrives more than ageing × (difference of priorities)
    later. With ageing=inf the key is the priority alone, and a low one may wait for ever.
    """

    Options = PriorityOptions

    def __init__(self, options: PriorityOptions) -> None:
        super().__init__(options)
        self._ageing = options.ageing
        self.preempts = options.preempt

    def key(self, request: Request, now: float) -> float:
        if self._ageing == float("inf"):
            return float(request.new.priority)
        return request.arrived + self._ageing * request.new.priority
