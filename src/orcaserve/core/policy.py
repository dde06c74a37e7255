"""The scheduler's policies, as data: what admission promises, how much of a prompt one iteration takes, in what order.

Orca exactly as published (OSDI 2022, Algorithm 1) is one named combination, request-level batching another, and
iteration-level scheduling without selective batching a third.
"""

from __future__ import annotations

import msgspec

from orcaserve.core.order import Order, OrderError
from orcaserve.core.orders import ORDERS, make_order, order_names
from orcaserve.core.request import Request

Shape = tuple[int, int]  # of a row: its first position, its number of tokens


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """One way to schedule.

    request_level: static batching. A batch is closed when it starts; members that have ended keep their row busy
        until the longest ends, and everything is returned then.
    reserve: admission sets aside room for prompt + max_tokens for the request's whole life (the paper), so that
        nothing is ever preempted. Else blocks are taken as tokens come, and the youngest is preempted when they lack.
    chunked: an iteration takes at most `max_batch_tokens` tokens and cuts prompts to fit. Else prompts go whole.
    decodes_first: requests that lag by one token go before those that prefill. Else strictly by arrival.
    prefix_cache: full blocks of equal prefixes are shared.
    deal: rows are dealt out over the batches that may be in flight, instead of all going into the first.
    alike: a batch holds only rows that can be stacked to one tensor [B, L, H], as without selective batching (paper,
        section 3.2): they begin at the same position and take as many tokens. The first row decides; the others wait.
        Not for request_level, whose members stay together.
    risk: admission leaves free what those that run are expected to need until their end, so that each of them needs
        more with this probability (above 0, below 1). None: a block for each. Not for reserve, which sets aside all.
    order, options: who goes first, and what that order is told; see `orcaserve.core.order`. Orders that preempt go with
        neither request_level nor reserve.
    """

    name: str
    request_level: bool = False
    reserve: bool = False
    chunked: bool = True
    decodes_first: bool = True
    prefix_cache: bool = True
    deal: bool = True
    alike: bool = False
    risk: float | None = None
    order: str = "fcfs"
    options: tuple[tuple[str, str], ...] = ()

    @property
    def cuts_prompts(self) -> bool:
        """Whether what decodes leave decides how much of a prompt an iteration takes."""
        return self.chunked and self.decodes_first

    def make_order(self) -> Order:
        """A new one, for one scheduler. Raises OrderError."""
        order = make_order(self.order, self.options)
        if order.preempts and (self.reserve or self.request_level):
            why = "a batch stays together to its end" if self.request_level else "who runs has reserved its room"
            raise OrderError(f"policy {self.name!r}: {why}, but order {self.order!r} preempts")
        return order

    def room(self, request: Request) -> int:
        """Tokens for which admission must find KV slots."""
        return request.max_total if self.reserve else request.num_tokens

    def grant(self, lag: int, tokens_left: int) -> int:
        """How many of the `lag` tokens that a request needs computed this iteration takes."""
        return min(lag, tokens_left) if self.chunked else lag

    def joins(self, first: Shape | None, row: Shape) -> bool:
        """Whether a row may travel with the batch's first row; None: it would be the first."""
        return not self.alike or first is None or first == row


DEFAULT = Policy(name="default")
ORCA = Policy(name="orca", reserve=True, chunked=False, decodes_first=False, prefix_cache=False, deal=False)
STATIC = Policy(
    name="static", request_level=True, reserve=True, chunked=False, decodes_first=False, prefix_cache=False, deal=False
)
STACKED = Policy(
    name="stacked", alike=True, reserve=True, chunked=False, decodes_first=False, prefix_cache=False, deal=False
)
POLICIES = {policy.name: policy for policy in (DEFAULT, ORCA, STATIC, STACKED)}


def parse_policy(text: str) -> Policy:
    """NAME[,option=value…]: a policy of `POLICIES`, or the default with another order. OrderError is one clear line.

    A policy's own options are `order`, another order than first come, first served, and `risk`; the others are that
    order's.
    """
    name, *pairs = text.split(",")
    options = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not equals:
            raise OrderError(f"policy {text!r}: {pair!r} is no option; write NAME,option=value")
        options[option.strip()] = value.strip()
    name = name.strip()
    base = POLICIES.get(name, DEFAULT)
    risk = _risk(options.pop("risk")) if "risk" in options else base.risk
    order = options.pop("order", base.order) if name in POLICIES else name
    if name not in POLICIES and name not in ORDERS and name not in (known := order_names()):
        raise OrderError(f"there is no policy {name!r}; there are {', '.join([*POLICIES, *known])}")
    if risk is not None and base.reserve:
        raise OrderError(f"policy {text!r} sets aside all that a request may need: it has no risk")
    if order == base.order and not options and risk == base.risk:
        return base
    policy = msgspec.structs.replace(base, name=text, order=order, options=tuple(options.items()), risk=risk)
    policy.make_order()
    return policy


def _risk(value: str) -> float:
    try:
        risk = float(value)
    except ValueError:
        risk = 0.0
    if not 0 < risk < 1:
        raise OrderError(f"risk is a probability above 0 and below 1, not {value.strip()!r}")
    return risk
