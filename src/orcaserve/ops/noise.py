"""Gumbel noise as a pure function of (seed, choice, position, token id): a counter-based hash, no generator's state.

The hash is SplitMix64's finaliser (Steele, Lea, Flood 2014) over a counter. Seed, choice and position are folded into a
64-bit key one after the other; a token's bits are mix(key + (id + 1) * odd constant). The upper 52 bits, plus one half,
give a uniform number strictly between 0 and 1, exactly representable in float64.
"""

from __future__ import annotations

from torch import Tensor

STEP = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1

# -log(-log u) for the least and the greatest u: no noise is outside, so a token further below the best cannot win
LOWEST, HIGHEST = -3.61, 36.8


def gumbel(seed: int, choice: int, position: int, ids: Tensor) -> Tensor:
    """float64 [n] of standard Gumbel noise for token ids int64 [n] at one position of one choice."""
    return noise(noise_key(seed, choice, position), ids)


def noise_key(seed: int, choice: int, position: int) -> int:
    """The 64-bit word that the noise of one position of one choice is made of."""
    return _fold(base_key(seed, choice), position)


def base_key(seed: int, choice: int) -> int:
    """The 64-bit word of one choice that its positions are folded into: what a kernel needs besides the position."""
    return _fold(_fold(0, seed), choice)


def noise(key: int, ids: Tensor) -> Tensor:
    """float64 [n] of standard Gumbel noise for token ids int64 [n]."""
    bits = _mix_all((ids + 1) * signed(STEP) + signed(key))
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_().log_().neg_()


def signed(word: int) -> int:
    """The 64-bit word as torch's int64 holds it."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def _fold(key: int, part: int) -> int:
    return _mix(key + STEP ^ (part & _MASK))


def _mix(z: int) -> int:
    z &= _MASK
    z = (z ^ z >> 30) * FACTORS[0] & _MASK
    z = (z ^ z >> 27) * FACTORS[1] & _MASK
    return z ^ z >> 31


def _mix_all(z: Tensor) -> Tensor:
    """_mix of each element; int64 multiplication wraps, as a 64-bit word should."""
    z = (z ^ _shift(z, 30)) * signed(FACTORS[0])
    z = (z ^ _shift(z, 27)) * signed(FACTORS[1])
    return z ^ _shift(z, 31)


def _shift(z: Tensor, n: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (z >> n) & ((1 << (64 - n)) - 1)
