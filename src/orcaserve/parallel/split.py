"""`Split`: which part of a whole belongs to a rank of a tensor-parallel group. Pure arithmetic.

Megatron's cuts (Shoeybi et al., 2019, section 3): heads, the MLP's inner values and the vocabulary lie in `size`
contiguous parts. A number of experts is dealt out whole.
"""

from __future__ import annotations

import msgspec

SIZES = (1, 2, 4, 8)  # the segments of K can be shared by so many

Span = tuple[int, int]  # [first, last)


class Split(msgspec.Struct, frozen=True):
    """One of `size` equal ranks."""

    rank: int = 0
    size: int = 1

    def of(self, n: int) -> Span:
        """This rank's part of n things; parts differ by one at most."""
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    def kv_heads(self, n: int) -> Span:
        """This rank's key-value heads: a part of them, or one that others have too, where they are fewer than ranks."""
        first, last = self.of(n)
        return first, max(last, first + 1)

    def padded(self, n: int) -> Span:
        """This rank's part of n things in parts of one size, of which the last ones may fall short or be empty."""
        width = self.width(n)
        return min(n, width * self.rank), min(n, width * (self.rank + 1))

    def width(self, n: int) -> int:
        """Size of the parts that `padded` makes."""
        return -(-n // self.size)

    def owner(self, n: int) -> tuple[int, ...]:
        """The rank whose part, as `of` cuts it, each of n things belongs to."""
        return tuple(rank for rank in range(self.size) for _ in range(*Split(rank, self.size).of(n)))
