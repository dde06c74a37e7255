"""`SwapSlots`: whose KV is in the swap space and where, and the copies that the next batch has to make."""

from __future__ import annotations

from orcaserve.core.batch import Swap
from orcaserve.core.block_pool import BlockPool
from orcaserve.core.config import SwapSpace
from orcaserve.core.pressure import swap_pays
from orcaserve.core.request import Request


class SwapSlots:
    """Sole owner of the swap space's slots and of the copies that no batch carries yet. Sets `Request.swap_slots`.

    A slot holds a whole block. Slots are counted like blocks: prefixes that several requests share are there once, and
    one that was there before and has not been overwritten need not be copied again.
    """

    def __init__(self, space: SwapSpace, block_size: int) -> None:
        """ValueError if the space has no slot."""
        self.slots = BlockPool(space.num_slots)
        self.num_swapped = 0  # requests moved out so far
        self._space = space
        self._block_size = block_size
        self._copies: list[Swap] = []

    def put(self, request: Request, pool: BlockPool) -> bool:
        """Copies a request's computed blocks, which it still holds. False if that does not pay or there is no room."""
        table, slots = request.block_table, self.slots
        count = -(-request.num_computed // self._block_size)
        found = [self._find(request, i, pool) for i in range(count)]
        missing = [i for i, slot in enumerate(found) if slot is None]
        revived = sum(1 for slot in found if slot is not None and slots.counts[slot] == 0)
        shared = sum(1 for block in table[:count] if pool.counts[block] > 1)
        lost = max(0, request.num_computed - shared * self._block_size)
        if len(missing) + revived > slots.num_free:
            return False
        if not swap_pays(lost, len(missing) + count - shared, self._space):
            return False
        for slot in found:
            if slot is not None:
                slots.hold(slot)
        request.swap_slots = [self._take(table[i], pool) if slot is None else slot for i, slot in enumerate(found)]
        if missing:
            copied = tuple([request.swap_slots[i] for i in missing])
            self._copies.append(Swap(True, tuple([table[i] for i in missing]), copied))
        self.num_swapped += 1
        return True

    def bring_back(self, request: Request, first: int) -> None:
        """Copies what a request has here into its new block table, but for the `first` blocks, which are there."""
        slots = tuple(request.swap_slots[first:])
        if slots:
            self._copies.append(Swap(False, tuple(request.block_table[first : first + len(slots)]), slots))
        self.drop(request)

    def drop(self, request: Request) -> None:
        """Takes a request's slots back. Like blocks, those of the end of a sequence are used again first."""
        for slot in reversed(request.swap_slots):
            self.slots.release(slot)
        request.swap_slots = []

    def take_copies(self) -> tuple[Swap, ...]:
        """Those decided on since this was asked last, in order."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def _take(self, block: int, pool: BlockPool) -> int:
        """A slot for a block, which is known by what the prefix cache knows of the block."""
        slot = self.slots.take()
        if (prefix := pool.prefixes[block]) is not None:
            self.slots.publish(slot, *prefix)
        return slot

    def _find(self, request: Request, i: int, pool: BlockPool) -> int | None:
        """The slot that holds the request's block i already."""
        prefix = pool.prefixes[request.block_table[i]]
        return None if prefix is None else self.slots.find(*prefix)
