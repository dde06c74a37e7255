"""`Router`: which of several equal engines (replicas) gets a prompt, so that prefixes are found and nobody is overrun.

A prompt is a chain of keys, one for every block, and each key stands for all that is before it (`kv_cache`). Routers
are pure: what they choose follows from what they have been told, in its order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from math import ceil
from typing import Protocol

from orcaserve.core.kv_cache import first_key, next_key

FACTOR = 1.25  # of the mean load, beyond which nothing may bring a replica (bounded loads, Mirrokni et al. 2016)
Keys = tuple[bytes, ...]


class Router(Protocol):
    """Chooses among replicas, which are numbers. Owner of what it has been told about them."""

    def keys(self, token_ids: Sequence[int], salt: str) -> Keys:
        """What `choose` and `sent` need to know of a prompt."""
        ...

    def choose(self, keys: Keys, loads: Mapping[int, int]) -> int:
        """One of the replicas in `loads`: those that can be had, and how many requests each has. Changes nothing.

        ValueError if there is none.
        """
        ...

    def sent(self, keys: Keys, replica: int) -> None:
        """A replica has been given a prompt."""
        ...

    def begin(self, replica: int, num_blocks: int) -> None:
        """A replica has started, with an empty cache of so many blocks."""
        ...


class RoundRobin:
    """Replicas in turn, whatever the prompt and the load. `last` is who had his turn."""

    def __init__(self) -> None:
        self.last = -1

    def keys(self, token_ids: Sequence[int], salt: str) -> Keys:
        return ()

    def choose(self, keys: Keys, loads: Mapping[int, int]) -> int:
        if not loads:
            raise ValueError("there is no replica to choose")
        return min(loads, key=lambda replica: (replica <= self.last, replica))

    def sent(self, keys: Keys, replica: int) -> None:
        self.last = replica

    def begin(self, replica: int, num_blocks: int) -> None:
        pass


class PrefixRouter:
    """The replica whose cache gains most by the prompt, unless that has its share of the load.

    A gain is what it should hold of the prompt, less what it would forget for the rest. What it should hold is what it
    has been sent, the least recently used forgotten first, as in its own cache.
    A share is `factor` times the mean, this request included, rounded up; so there is always one that has less.
    Among equals the least loaded one comes first, then the order of rendezvous hashing, that of a hash of prompt and
    replica: so one replica more or less moves only prompts of its own.
    """

    def __init__(self, block_size: int, factor: float = FACTOR) -> None:
        if factor < 1:
            raise ValueError(f"not all requests have a place if no replica may have {factor} times the mean load")
        self._block_size = block_size
        self._factor = factor
        self._caches: dict[int, OrderedDict[bytes, None]] = {}  # of each replica, the next to be forgotten first
        self._capacities: dict[int, int] = {}

    def keys(self, token_ids: Sequence[int], salt: str) -> Keys:
        """One key for every block of tokens, the last of which may not be full."""
        key, keys = first_key(salt), []
        for start in range(0, len(token_ids), self._block_size):
            key = next_key(key, token_ids[start : start + self._block_size])
            keys.append(key)
        return tuple(keys)

    def choose(self, keys: Keys, loads: Mapping[int, int]) -> int:
        if not loads:
            raise ValueError("there is no replica to choose")
        share = ceil(self._factor * (sum(loads.values()) + 1) / len(loads))
        within = [replica for replica, load in loads.items() if load < share]
        name = keys[-1] if keys else b""
        return max(within, key=lambda replica: (self.gain(keys, replica), -loads[replica], weight(name, replica)))

    def gain(self, keys: Keys, replica: int) -> int:
        """Blocks that the replica's cache would spare, less those that it would forget for the others."""
        held = self.held(keys, replica)
        filled = len(self._caches.get(replica, ())) + len(keys) - held
        return held - max(0, filled - self._capacities.get(replica, 0))

    def held(self, keys: Keys, replica: int) -> int:
        """How many blocks of the prompt, from its beginning, the replica should hold."""
        cache = self._caches.get(replica, OrderedDict())
        return next((i for i, key in enumerate(keys) if key not in cache), len(keys))

    def sent(self, keys: Keys, replica: int) -> None:
        cache = self._caches.setdefault(replica, OrderedDict())
        for key in reversed(keys):  # the end of a prompt is forgotten before its beginning, which more prompts share
            cache[key] = None
            cache.move_to_end(key)
        while len(cache) > self._capacities.get(replica, 0):
            cache.popitem(last=False)

    def begin(self, replica: int, num_blocks: int) -> None:
        self._caches[replica] = OrderedDict()
        self._capacities[replica] = num_blocks


def weight(name: bytes, replica: int) -> bytes:
    """Rendezvous hashing: the greatest weight wins."""
    return sha256(name + replica.to_bytes(8, "little")).digest()


ROUTERS: dict[str, Callable[[int], Router]] = {
    "prefix": PrefixRouter,
    "round-robin": lambda block_size: RoundRobin(),
}
