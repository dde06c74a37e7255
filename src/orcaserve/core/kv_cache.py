"""`KVCacheManager`: gives requests the KV blocks their tokens need, shares known prefixes, takes everything back."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from struct import pack

from orcaserve.core.block_pool import BlockPool
from orcaserve.core.config import SwapSpace
from orcaserve.core.request import Request
from orcaserve.core.swap import SwapSlots


class KVCacheManager:
    """Changes the KV fields of a Request (`block_table`, `swap_slots`, `block_keys`, `num_published`, `num_computed` on
    admission).

    swap: where KV may be moved to; None: nowhere.

    A prefix is known by a SHA-256 chain over whole blocks of token ids, begun by the request's salt; on a hit the
    block's tokens are compared as well.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool, swap: SwapSpace | None = None) -> None:
        if block_size < 1:
            raise ValueError(f"a KV block holds at least one token, not {block_size}")
        self.pool = BlockPool(num_blocks)
        self.swap = None if swap is None else SwapSlots(swap, block_size)
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.readers: dict[int, Request] = {}  # who has blocks, and knows full ones that are yet to be published
        self.num_queries = 0  # tokens looked up in the prefix cache
        self.num_hits = 0  # tokens found there

    @property
    def num_slots(self) -> int:
        """The paper's n_slots: tokens whose K and V fit, rounded down to whole blocks."""
        return self.pool.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def admit(self, request: Request, num_tokens: int, spare: int = 0) -> bool:
        """Gives a request without blocks all that `num_tokens` tokens need, cached prefix first; all or nothing.

        spare: free blocks that must be left over. What was swapped out and is not in the cache comes back. Sets
        `num_computed` to the tokens that this spared.
        """
        hits = self._cached_prefix(request)
        if self._taken(hits, num_tokens) + spare > self.pool.num_free:
            return False
        fresh = self.blocks_for(num_tokens) - len(hits)
        for block in hits:
            self.pool.hold(block)
        request.block_table = hits + [self.pool.take() for _ in range(fresh)]
        cached = len(hits) * self.block_size
        if self.swap is not None:
            self.swap.bring_back(request, len(hits))
        request.num_computed = max(request.num_computed, cached)
        request.num_published = len(hits)
        if self.prefix_cache:
            self.num_queries += request.num_tokens
            self.num_hits += cached
            if request.num_published < request.num_tokens // self.block_size:
                self.readers[request.id] = request
        return True

    def who_gives(
        self,
        request: Request,
        num_tokens: int,
        spare: int,
        others: Sequence[Request],
        left_for: Sequence[int],
        least: int,
    ) -> Sequence[Request] | None:
        """The first of the `others`, `least` or as many as must lose their blocks before `admit` can succeed.

        spare: as in `admit`; of these blocks so many are `left_for` each of the others. None: all are too few.
        """
        hits = set(self._cached_prefix(request))
        left: dict[int, int] = {}  # holders of a block when the others are gone
        lacking = self.blocks_for(num_tokens) - len(hits) + spare - self.pool.num_free
        lacking += sum(1 for block in hits if self.pool.counts[block] == 0)
        given = 0
        while lacking > 0 or given < least:
            if given == len(others):
                return None
            for block in others[given].block_table:
                left[block] = left.get(block, self.pool.counts[block]) - 1
                if left[block] == 0 and block not in hits:
                    lacking -= 1
            lacking -= left_for[given]
            given += 1
        return others[:given]

    def lacking(self, request: Request, num_tokens: int, spare: int = 0) -> int:
        """How many more blocks would have to be free for `admit`; not above 0: it would succeed."""
        return self._taken(self._cached_prefix(request), num_tokens) + spare - self.pool.num_free

    def known_prefix(self, request: Request) -> int:
        """Tokens of a request without blocks that the prefix cache or the swap space would spare it now."""
        return max(request.num_computed, len(self._cached_prefix(request)) * self.block_size)

    def awaits(self, request: Request) -> bool:
        """Whether one that runs is reading the next full block that a request without blocks needs.

        Then it will be in the prefix cache, unless that one is preempted or ends before.
        """
        if not self.prefix_cache or request.needs_every_token or request.swap_slots:
            return False
        count = (request.num_tokens - 1) // self.block_size
        # Keys are chained: who will publish a later block that both need has the same key at its next one.
        readers = self.readers.values()
        alike = [other for other in readers if self._will_publish(other, other.num_published, request, count)]
        if not alike:  # as nearly always, and then the prefix need not be looked up
            return False
        at = len(self._cached_prefix(request))
        return any(self._will_publish(other, at, request, count) for other in alike)

    def swap_out(self, request: Request) -> bool:
        """Moves a request's KV to the swap space, if there is room and that is cheaper than to compute it again.

        It keeps `num_computed`. False, and nothing changed, if it is to be computed again: so is a mean that workers
        have half of, since they forget who is preempted.
        """
        if self.swap is None or request.new.params.pooling == "mean" or not self.swap.put(request, self.pool):
            return False
        self._release(request)
        return True

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Extends the block table to `num_tokens` tokens; False, and nothing changed, if blocks are lacking."""
        missing = self.blocks_for(num_tokens) - len(request.block_table)
        if missing <= 0:  # as for most decodes
            return True
        if missing > self.pool.num_free:
            return False
        for _ in range(missing):
            request.block_table.append(self.pool.take())
        return True

    def publish(self, request: Request, num_tokens: int) -> None:
        """Makes the full blocks of the first `num_tokens` tokens findable: those that no batch in flight writes."""
        if not self.prefix_cache:
            return
        full = num_tokens // self.block_size
        if full <= request.num_published:
            return
        keys = request.block_keys
        for i in range(request.num_published, full):
            block = self._block_tokens(request, i)
            if i == len(keys):  # as for blocks that decodes fill
                keys.append(next_key(keys[-1] if keys else first_key(request.new.cache_salt), block))
            self.pool.publish(request.block_table[i], keys[i], block)
        request.num_published = full
        if full == request.num_tokens // self.block_size:
            self.readers.pop(request.id, None)

    def free(self, request: Request) -> None:
        """Takes all blocks back, and its room in the swap space."""
        self._release(request)
        if self.swap is not None:
            self.swap.drop(request)
        request.num_computed = 0

    def _release(self, request: Request) -> None:
        """The end of a sequence is reused before its beginning, which more prompts share."""
        for block in reversed(request.block_table):
            self.pool.release(block)
        request.block_table = []
        request.num_published = 0
        self.readers.pop(request.id, None)

    def _taken(self, hits: list[int], num_tokens: int) -> int:
        """Free blocks that go to a request of so many tokens whose prefix is known in `hits`."""
        revived = sum(1 for block in hits if self.pool.counts[block] == 0)
        return self.blocks_for(num_tokens) - len(hits) + revived

    def _cached_prefix(self, request: Request) -> list[int]:
        """Blocks that hold the longest known prefix, short of the last token: that one must give the next."""
        if not self.prefix_cache or request.needs_every_token:
            return []
        count = (request.num_tokens - 1) // self.block_size
        self._extend_keys(request, count)
        hits: list[int] = []
        for i in range(count):
            block = self.pool.find(request.block_keys[i], self._block_tokens(request, i))
            if block is None:
                break
            hits.append(block)
        return hits

    def _will_publish(self, reader: Request, i: int, request: Request, count: int) -> bool:
        """Whether a running request has yet to publish its block i, which is one of the first `count` of another."""
        if reader.finish_reason is not None or i >= count:
            return False
        if not reader.num_published <= i < reader.num_tokens // self.block_size:
            return False
        self._extend_keys(reader, i + 1)
        self._extend_keys(request, i + 1)
        return reader.block_keys[i] == request.block_keys[i]

    def _block_tokens(self, request: Request, i: int) -> tuple[int, ...]:
        return tuple(request.token_ids[i * self.block_size : (i + 1) * self.block_size])

    def _extend_keys(self, request: Request, count: int) -> None:
        keys = request.block_keys
        while len(keys) < count:
            parent = keys[-1] if keys else first_key(request.new.cache_salt)
            keys.append(next_key(parent, self._block_tokens(request, len(keys))))


def first_key(salt: str) -> bytes:
    """What a chain of keys begins with."""
    return sha256(salt.encode()).digest()


def next_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a block of tokens, and with its parent's of everything before it."""
    return sha256(parent + pack(f"={len(token_ids)}q", *token_ids)).digest()
