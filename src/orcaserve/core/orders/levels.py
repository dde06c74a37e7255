"""`mlfq`: a multi-level queue by attained service: nobody knows how long an answer gets, but all see how long it is."""

from __future__ import annotations

from math import log2

from orcaserve.core.order import Order, OrderOptions
from orcaserve.core.request import Request


class LevelsOptions(OrderOptions, frozen=True, kw_only=True):
    """quantum: service after which a request leaves the first level; each further level has twice as much.

    levels: how many. output: service of a generated token, where a token of a prompt is 1. ageing: seconds of waiting
    that make up for one level. preempt: see `Order.preempts`.
    """

    quantum: float = 1024.0
    levels: int = 6
    output: float = 8.0
    ageing: float = 30.0
    preempt: bool = True

    def __post_init__(self) -> None:
        if not self.quantum > 0 or not 1 <= self.levels <= 64 or not self.output > 0:
            raise ValueError("quantum and output are above 0, and levels from 1 to 64")
        if not 0 <= self.ageing < float("inf"):
            raise ValueError("ageing is a number of seconds from 0")


class Levels(Order):
    """Skip-join multi-level feedback queue (FastServe: Wu et al., 2023, section 4.1), with linear ageing.

        service = prompt + output × generated
        level   = floor(log2(service / quantum + 1)), at most levels − 1
        key     = arrived + ageing × level

    Levels have quanta of 1, 2, 4, … times the first. The prompt counts from the start, so that a long one joins at the
    level that it would fall to (skip-join). A request that runs falls a level when it has used up its quantum, and then
    makes way for those that wait further up. Nobody is overtaken by a request that arrives more than
    ageing × (levels − 1) later.
    """

    Options = LevelsOptions

    def __init__(self, options: LevelsOptions) -> None:
        super().__init__(options)
        self._told = options
        self.preempts = options.preempt
        self._until: dict[int, float] = {}  # tokens generated at which a request falls a level

    def key(self, request: Request, now: float) -> float:
        told, prompt, generated = self._told, request.new.num_prompt, request.num_generated
        level = min(told.levels - 1, int(log2((prompt + told.output * generated) / told.quantum + 1)))
        last = level == told.levels - 1
        self._until[request.id] = (
            float("inf") if last else (told.quantum * (2.0 ** (level + 1) - 1) - prompt) / told.output
        )
        return request.arrived + told.ageing * level

    def served(self, request: Request, num_computed: int, num_generated: int) -> None:
        if request.num_generated >= self._until[request.id]:
            request.key = self.key(request, 0.0)
            self.moved = True

    def ended(self, request: Request) -> None:
        self._until.pop(request.id, None)
