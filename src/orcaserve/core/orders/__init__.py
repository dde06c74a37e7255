"""The orders there are, by name: ours, and those that other packages bring along.

To plug in an order of one's own, subclass `orcaserve.core.order.Order` and name it as an entry point of the group
"orcaserve.orders".
"""

from __future__ import annotations

from importlib.metadata import entry_points

import msgspec

from orcaserve.core.order import Order, OrderError
from orcaserve.core.orders.deadline import Deadline
from orcaserve.core.orders.fair import Fair
from orcaserve.core.orders.levels import Levels
from orcaserve.core.orders.priority import Priority
from orcaserve.core.orders.shortest import Shortest

GROUP = "orcaserve.orders"
ORDERS: dict[str, type[Order]] = {
    "fcfs": Order,
    "priority": Priority,
    "fair": Fair,
    "deadline": Deadline,
    "shortest": Shortest,
    "mlfq": Levels,
}


def order_names() -> list[str]:
    """Ours, and those that other packages have as entry points."""
    return list(dict.fromkeys([*ORDERS, *(point.name for point in entry_points(group=GROUP))]))


def find_order(name: str) -> type[Order]:
    """An order by one of these names. OrderError if there is none, or it is no order."""
    if name in ORDERS:
        return ORDERS[name]
    plugged = {point.name: point for point in entry_points(group=GROUP)}
    if name not in plugged:
        raise OrderError(f"there is no order {name!r}; there are {', '.join(order_names())}")
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
