"""`BlockPool`: which KV blocks are held, in what order the free ones are reused, and which hold a known prefix."""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """Sole owner of the reference counts, the order of reuse and the prefix index of `num_blocks` KV blocks.

    A block is held (its count is the number of block tables it stands in) or free. A free block may still hold a
    published prefix: it can be held again by its key until it is taken for something else, which happens to the
    least recently used one, and only when no free block without a prefix is left.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a KV cache needs at least one block, not {num_blocks}")
        self.counts = [0] * num_blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be taken first
        self.prefixes: list[tuple[bytes, tuple[int, ...]] | None] = [None] * num_blocks
        self.index: dict[bytes, int] = {}

    @property
    def num_blocks(self) -> int:
        return len(self.counts)

    @property
    def num_free(self) -> int:
        return len(self.free)

    @property
    def num_held(self) -> int:
        return len(self.counts) - len(self.free)

    def take(self) -> int:
        """Gives a free block to its first holder and forgets what it held. Raises KeyError if none is free."""
        block, _ = self.free.popitem(last=False)
        prefix = self.prefixes[block]
        if prefix is not None:
            del self.index[prefix[0]]
            self.prefixes[block] = None
        self.counts[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more holder of a block found by `find`."""
        if self.counts[block] == 0:
            del self.free[block]
        self.counts[block] += 1

    def release(self, block: int) -> None:
        """One holder fewer; the last one frees the block, with its prefix still known."""
        self.counts[block] -= 1
        if self.counts[block] == 0:
            self.free[block] = None
            if self.prefixes[block] is None:
                self.free.move_to_end(block, last=False)

    def publish(self, block: int, key: bytes, token_ids: tuple[int, ...]) -> None:
        """Makes a full, held block findable. Where another block holds the same prefix already, nothing changes."""
        if key not in self.index:
            self.index[key] = block
            self.prefixes[block] = (key, token_ids)

    def find(self, key: bytes, token_ids: tuple[int, ...]) -> int | None:
        """The block that holds the prefix `key`, if its tokens are really `token_ids`."""
        block = self.index.get(key)
        if block is None:
            return None
        prefix = self.prefixes[block]
        return block if prefix is not None and prefix[1] == token_ids else None
