"""`KVCacheManager`: gives requests the KV blocks their tokens need, shares known prefixes, takes everything back."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256

from orcaserve.core.block_pool import BlockPool
from orcaserve.core.request import Request


class KVCacheManager:
    """Changes the KV fields of a Request (`block_table`, `block_keys`, `num_published`, `num_computed` on admission).

    A prefix is known by a SHA-256 chain over whole blocks of token ids, begun by the request's salt; on a hit the
    block's tokens are compared as well.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        if block_size < 1:
            raise ValueError(f"a KV block holds at least one token, not {block_size}")
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.prefix_cache = prefix_cache
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

        spare: free blocks that must be left over. Sets `num_computed` to the tokens that the cache spared.
        """
        hits = self._cached_prefix(request)
        fresh = self.blocks_for(num_tokens) - len(hits)
        revived = sum(1 for block in hits if self.pool.counts[block] == 0)
        if fresh + revived + spare > self.pool.num_free:
            return False
        for block in hits:
            self.pool.hold(block)
        request.block_table = hits + [self.pool.take() for _ in range(fresh)]
        request.num_computed = len(hits) * self.block_size
        request.num_published = len(hits)
        if self.prefix_cache:
            self.num_queries += request.num_tokens
            self.num_hits += request.num_computed
        return True

    def who_gives(
        self, request: Request, num_tokens: int, spare: int, others: Sequence[Request], least: int
    ) -> Sequence[Request] | None:
        """The first of the `others`, `least` or as many as must lose their blocks before `admit` can succeed.

        spare: as in `admit`; one block less for each of the others that goes. None: all of them are too few.
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
            given += 1
            lacking -= 1
        return others[:given]

    def known_prefix(self, request: Request) -> int:
        """Tokens of a request without blocks that the prefix cache would spare it now."""
        return len(self._cached_prefix(request)) * self.block_size

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Extends the block table to `num_tokens` tokens; False, and nothing changed, if blocks are lacking."""
        missing = self.blocks_for(num_tokens) - len(request.block_table)
        if missing <= 0:  # as for most decodes
            return True
        if missing > self.pool.num_free:
            return False
        request.block_table.extend(self.pool.take() for _ in range(missing))
        return True

    def publish(self, request: Request, num_tokens: int) -> None:
        """Makes the full blocks of the first `num_tokens` tokens findable: those that no batch in flight writes."""
        if not self.prefix_cache:
            return
        full = num_tokens // self.block_size
        if full <= request.num_published:
            return
        self._extend_keys(request, full)
        for i in range(request.num_published, full):
            self.pool.publish(request.block_table[i], request.block_keys[i], self._block_tokens(request, i))
        request.num_published = full

    def free(self, request: Request) -> None:
        """Takes all blocks back. The end of a sequence is reused before its beginning, which more prompts share."""
        for block in reversed(request.block_table):
            self.pool.release(block)
        request.block_table = []
        request.num_computed = 0
        request.num_published = 0

    def _cached_prefix(self, request: Request) -> list[int]:
        """Blocks that hold the longest known prefix, short of the last token: that one must give the next."""
        if not self.prefix_cache or request.prompt_logprobs is not None:
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
    return sha256(parent + array("q", token_ids).tobytes()).digest()
