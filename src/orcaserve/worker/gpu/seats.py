"""`Seats`: where the device keeps what it knows of a request: its block table and the token that it drew last."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from orcaserve.core.request import NewRequest
from orcaserve.ops.noise import base_key, signed
from orcaserve.ops.sampler import COLDEST


class Seats:
    """Owner of the seats, and of how the requests on them are sampled, as arrays [seats].

    bases: int64, keys of the noise. temperatures, top_p, min_p: float32. top_k: int32.
    """

    def __init__(self, num_seats: int) -> None:
        self.bases = np.zeros(num_seats, dtype=np.int64)
        self.temperatures = np.zeros(num_seats, dtype=np.float32)
        self.top_k = np.zeros(num_seats, dtype=np.int32)
        self.top_p = np.ones(num_seats, dtype=np.float32)
        self.min_p = np.zeros(num_seats, dtype=np.float32)
        self._by_id: dict[int, int] = {}
        self._free = list(range(num_seats - 1, -1, -1))

    def __getitem__(self, id: int) -> int:
        """The seat of a request that has one."""
        return self._by_id[id]

    def take(self, new: NewRequest) -> None:
        """Gives a request a seat; one that is described again keeps its own. RuntimeError if all are taken."""
        if new.id not in self._by_id:
            if not self._free:
                raise RuntimeError(f"all {len(self.bases)} seats are taken")
            self._by_id[new.id] = self._free.pop()
        seat, params = self._by_id[new.id], new.params
        self.bases[seat] = signed(base_key(new.seed, new.choice))
        self.temperatures[seat] = max(params.temperature, COLDEST) if params.temperature else 0.0
        self.top_k[seat] = params.top_k
        self.top_p[seat] = params.top_p
        self.min_p[seat] = params.min_p

    def leave(self, ids: Iterable[int]) -> None:
        """Frees the seats of requests, whether they have one or not."""
        for id in ids:
            if (seat := self._by_id.pop(id, None)) is not None:
                self._free.append(seat)

    def clear(self) -> None:
        self.leave(list(self._by_id))
