"""`fair`: tenants share the engine by what they have got, not by how much they ask for."""

from __future__ import annotations

from heapq import heappop, heappush

import msgspec

from orcaserve.core.order import Order, OrderOptions, Waiting
from orcaserve.core.request import Request

MOST_GONE = 1024  # tenants without a request whose counters are kept


class FairOptions(OrderOptions, frozen=True, kw_only=True):
    """input, output: what a token of a prompt that the cache does not hold, and a generated one, count.

    credit: so much of what somebody has got less than others before he comes back is kept for him. 0: as published.
    weights: alice:2+bob:1 entitles alice to twice as much as bob; who is not named has 1.
    """

    input: float = 1.0
    output: float = 2.0
    credit: float = 1024.0
    weights: str = ""

    def __post_init__(self) -> None:
        if not (0 <= self.input < float("inf") and 0 <= self.output < float("inf") and self.input + self.output > 0):
            raise ValueError("input and output are numbers from 0, and one of them is above")
        if not 0 <= self.credit < float("inf"):
            raise ValueError("credit is a number from 0")
        self.shares()

    def shares(self) -> dict[str, float]:
        """Weights by tenant. ValueError if they cannot be read."""
        found: dict[str, float] = {}
        for part in self.weights.split("+") if self.weights else ():
            name, _, weight = part.rpartition(":")
            try:
                found[name] = float(weight)
            except ValueError:
                found[name] = 0.0
            if not 0 < found[name] < float("inf"):
                raise ValueError(f"weights: {part!r} is no tenant:weight with a weight above 0")
        return found


class _Tenant(msgspec.Struct, gc=False):
    """counter: service so far, over the tenant's weight. requests: of this tenant, that wait or run."""

    counter: float
    cost: float  # of a unit of service: 1 / weight
    requests: int = 0


class Fair(Order):
    """The virtual token counter (VTC: Sheng et al., OSDI 2024, Algorithm 2), with weights (section 4.3).

    A tenant's counter grows by input × (prompt tokens to compute) / weight when a request of his is first admitted, and
    by output / weight with each token that he gets. The tenant of the least counter who waits goes first; his requests
    go by arrival. When somebody comes who does not wait, his counter is lifted to `credit` below the least of those who
    do, or, if nobody does, to that of the one who was admitted last: what somebody has used of an engine that nobody
    waited for is no credit of others. (In both cases the level counts, too: the greatest counter that somebody had when
    he was admitted.) Without credit (0, as published) who asks for less than his share waits for a turn of all others
    with each request; with it he waits for none.

    Bound (theorem 4.4): of two tenants that both wait all through an interval, neither gets more than 2 U + credit of
    service over weight more than the other; U = input × (longest prompt) + output × (tokens that one tenant's running
    requests still generate), over the least weight. Where admission reserves, and output ≥ input, the published
    U = max(input × (longest prompt), output × (slots of the KV cache)) is enough. For a counter of those who wait is at
    most U above the level, where it was at its last admission, and at most `credit` below; once both wait, the lesser
    goes first, so that they only come closer until they are U apart.

    A tenant without requests is forgotten as soon as his counter would be lifted anyway, or when MOST_GONE others are
    gone, the least counter first. Then who is unknown begins at the greatest counter that was forgotten so: to be
    forgotten is no gain.
    """

    Options = FairOptions

    def __init__(self, options: FairOptions) -> None:
        super().__init__(options)
        self.told = options
        self._shares = options.shares()
        self._tenants: dict[str, _Tenant] = {}
        self._gone: list[tuple[float, str]] = []  # a heap of those without requests; some have come back since
        self._last: _Tenant | None = None  # whose request was admitted last
        self._level = 0.0  # the greatest counter that somebody had when he was admitted, before it grew
        self._forgotten = 0.0

    def lane(self, request: Request) -> str:
        return request.new.tenant

    def rank(self, lane: str) -> float:
        return self._tenants[lane].counter

    def arrived(self, request: Request, waiting: Waiting) -> None:
        name = request.lane
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(self._forgotten, 1.0 / self._shares.get(name, 1.0))
        tenant.requests += 1
        if waiting.has_lane(name):
            return
        if waiting:
            level = max(self._level, self.rank(waiting.first.lane)) - self.told.credit
        else:
            level = self._level if self._last is None else max(self._level, self._last.counter)
        tenant.counter = max(tenant.counter, level)
        self.moved = True

    def key(self, request: Request, now: float) -> float:
        self._lift(request)  # a tenant who only ran, and is preempted now, has not waited either
        return 0.0

    def passed_over(self, request: Request) -> None:
        self._lift(request)

    def _lift(self, request: Request) -> None:
        tenant, least = self._tenants[request.lane], self._level - self.told.credit
        if tenant.counter < least:
            tenant.counter = least
            self.moved = True

    def started(self, request: Request, now: float) -> None:
        if request.num_cached is not None:  # it was preempted, and had been paid for
            return
        tenant = self._last = self._tenants[request.lane]
        self._level = max(self._level, tenant.counter)
        tenant.counter += self.told.input * (request.num_tokens - request.num_computed) * tenant.cost
        self.moved = True
        self._forget()

    def served(self, request: Request, num_computed: int, num_generated: int) -> None:
        if num_generated:
            tenant = self._tenants[request.lane]
            tenant.counter += self.told.output * num_generated * tenant.cost
            self.moved = True

    def ended(self, request: Request) -> None:
        tenant = self._tenants[request.lane]
        tenant.requests -= 1
        if not tenant.requests:
            heappush(self._gone, (tenant.counter, request.lane))
            self._forget()

    def _forget(self) -> None:
        gone, least = self._gone, self._level - self.told.credit
        while gone and (gone[0][0] <= least or len(gone) > MOST_GONE):
            counter, name = heappop(gone)
            tenant = self._tenants.get(name)
            if tenant is not None and not tenant.requests and tenant.counter == counter:
                del self._tenants[name]
                if counter > least:
                    self._forgotten = max(self._forgotten, counter)
