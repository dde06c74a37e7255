"""Gumbel noise inside kernels: the hash of `ops.noise`, bit for bit, and float32 logarithms of it.

With u the uniform number of the hash, the noise is -log(E), E = -log(u). Noise decides a draw where it is great: where
u is next to 1 and float32 keeps few of its bits. So u's distance from the nearer end of (0, 1) is made from the hash to
full relative precision, and near 1 the inner logarithm is taken of that distance.

The logarithms are made of additions and multiplications, so that no library's approximation is part of a draw.
"""

import triton
import triton.language as tl

from orcaserve.ops.noise import FACTORS, STEP

_STEP = tl.constexpr(STEP)
_FIRST, _SECOND = tl.constexpr(FACTORS[0]), tl.constexpr(FACTORS[1])
_MINUS_LOG_2 = tl.constexpr(-0.6931471805599453)
_TWO_THIRDS = tl.constexpr(0x3F2AAAAB)  # bits of 2/3: mantissas are taken from there to 4/3


@triton.jit
def noise_key(base, position):
    """uint64: `base_key` (int64 holds its bits) folded over the position (int32, at least 0)."""
    return _mix((base.to(tl.uint64, bitcast=True) + _STEP) ^ position.to(tl.uint64))


@triton.jit
def gumbel(key, ids):
    """float32 noise, within (-3.61, 36.8), for int32 token ids under a `noise_key`."""
    bits = _mix((ids + 1).to(tl.uint32, bitcast=True).to(tl.uint64) * _STEP + key)
    high, low = (bits >> 32).to(tl.uint32), bits.to(tl.uint32)
    is_upper = high >= 0x80000000
    flip = tl.where(is_upper, 0xFFFFFFFF, 0).to(tl.uint32)
    high, low = high ^ flip, (low ^ flip) >> 12
    # from the nearer end: the upper 52 bits, plus one half, over 2^52
    distance = tl.fma(high.to(tl.float32), 2.0**-32, tl.fma(low.to(tl.float32), 2.0**-52, 2.0**-53))
    exponent, lacking = _split(tl.where(is_upper, 1.0 - distance, distance))
    lacking = tl.where(exponent == 0, distance, lacking)  # exponent 0: u is above 2/3, and 1 - u is the distance
    exponent, lacking = _split(_minus_log(exponent, lacking))
    return _minus_log(exponent, lacking)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    return z ^ (z >> 31)


@triton.jit
def _split(x):
    """int32 e and float32 f in [-1/3, 1/3] such that positive x is (1 - f) * 2^e."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _TWO_THIRDS) >> 23
    return exponent, 1.0 - (bits - (exponent << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _minus_log(exponent, f):
    """-log((1 - f) * 2^exponent): a polynomial fitted to -log(1 - f) = f + f^2 * q(f), with relative error 3e-8."""
    q = tl.fma(f, 0.14026351, 0.15388541)
    q = tl.fma(f, q, 0.13995808)
    q = tl.fma(f, q, 0.16415961)
    q = tl.fma(f, q, 0.20011169)
    q = tl.fma(f, q, 0.25007820)
    q = tl.fma(f, q, 0.33333197)
    q = tl.fma(f, q, 0.49999937)
    return tl.fma(exponent.to(tl.float32), _MINUS_LOG_2, tl.fma(f * f, q, f))
