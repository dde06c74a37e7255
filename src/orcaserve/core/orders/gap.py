"""`ServiceGap`: the bound on what one waiting tenant may get more than another, as something that can be checked."""

from __future__ import annotations

from collections.abc import Iterable

from orcaserve.core.orders.fair import Fair
from orcaserve.core.request import Request


class ServiceGap:
    """Theorem 4.4 of VTC, kept apart from the counters: it is told of service and of who waits, and nothing else.

    Owner of the service of every tenant, over his weight, and of how far two of them have gone apart since both wait.
    The bound is `Fair`'s, with the greatest numbers that were seen; slots: of the KV cache, if admission reserves.
    """

    def __init__(self, order: Fair, slots: int | None) -> None:
        self._told = order.told
        self._shares = self._told.shares()
        self._slots = slots
        self._service: dict[str, float] = {}
        self._pairs: dict[tuple[str, str], tuple[float, float]] = {}  # least and greatest difference while both wait
        self.widest = 0.0  # how far two have gone apart at most
        self._longest = 0  # prompt tokens of an admitted request
        self._generating = 0  # tokens that one tenant's running requests still generate
        self._least_share = 1.0

    @property
    def bound(self) -> float:
        """2 U + credit, in units of service over weight."""
        told = self._told
        most = told.input * self._longest + told.output * self._generating
        if self._slots is not None and told.output >= told.input:
            most = min(most, max(told.input * self._longest, told.output * self._slots))
        return 2 * most / self._least_share + told.credit

    def admitted(self, request: Request, is_first: bool, running: Iterable[Request]) -> None:
        """A request runs, first or again; running: with it."""
        name = request.new.tenant
        self._least_share = min(self._least_share, self._shares.get(name, 1.0))
        if is_first:
            prompt = request.num_tokens - request.num_computed
            self._longest = max(self._longest, prompt)
            self._add(name, self._told.input * prompt)
        left = (other.max_total - other.num_tokens for other in running if other.new.tenant == name)
        self._generating = max(self._generating, sum(left))

    def generated(self, request: Request, num_tokens: int) -> None:
        self._add(request.new.tenant, self._told.output * num_tokens)

    def look(self, waiting: Iterable[str]) -> None:
        """These tenants wait now, and those among them that waited when it looked last have done so all the time.

        Who waits for a prefix, so that others pass by, is not among them.
        """
        names = sorted(waiting)
        pairs = {}
        for i, one in enumerate(names):
            for other in names[:i]:
                apart = self._service.get(one, 0.0) - self._service.get(other, 0.0)
                least, most = self._pairs.get((one, other), (apart, apart))
                least, most = pairs[one, other] = min(least, apart), max(most, apart)
                self.widest = max(self.widest, most - least)
        self._pairs = pairs

    def _add(self, name: str, service: float) -> None:
        self._service[name] = self._service.get(name, 0.0) + service / self._shares.get(name, 1.0)
