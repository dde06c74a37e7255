"""Slopes of ALiBi ("Train Short, Test Long", Press et al., 2022): a number of heads in, numbers out. No torch."""

from __future__ import annotations


def alibi_slopes(num_heads: int, most: float = 8.0) -> tuple[float, ...]:
    """What each head adds to a score for every position that the key lies behind the query, negated.

    Of n heads, a power of two, the i-th (from 1) has 2 ** (-most * i / n). Others have those of the power below, then
    every other one of the power above.
    """
    power = 1 << (num_heads.bit_length() - 1)

    def slopes(n: int) -> list[float]:
        return [2.0 ** (-most * i / n) for i in range(1, n + 1)]

    return tuple(slopes(power) + slopes(2 * power)[::2][: num_heads - power])
