// Sixteen floats at a time, in the instruction set that this translation unit is compiled for.
//
// Everything here works lane by lane, and products are fused exactly where `fma` is written (contraction is off), so a
// value's bits never depend on the lane or the loop that it is computed in.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Of loops over a register tile: rolled up, the compiler would keep the tile in memory.
#if defined(__clang__)
#define ORCA_UNROLL _Pragma("unroll")
#else
#define ORCA_UNROLL _Pragma("GCC unroll 8")
#endif

// Of functions that are one loop over a register tile: inside of another, it would have to share the registers.
#define ORCA_APART __attribute__((noinline))

namespace orca {
namespace ORCA_ISA {

using bf16 = std::uint16_t;

inline float widen(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

#if defined(__AVX512F__)

struct Vec {
    __m512 v;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a where x >= y, else b
inline Vec where_ge(Vec x, Vec y, Vec a, Vec b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_GE_OQ), b.v, a.v)};
}
// One bit for each lane, the first lane's the lowest: x >= y
inline unsigned at_least(Vec x, Vec y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_GE_OQ); }
// a in the lanes [0, n), else b
inline Vec first(int n, Vec a, Vec b) {
    const __mmask16 mask = n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
    return {_mm512_mask_blend_ps(mask, b.v, a.v)};
}
// a in the lanes whose bits are set, else b
inline Vec pick(unsigned bits, Vec a, Vec b) {
    return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.v, a.v)};
}
// 2**n for whole n in [-126, 127]
inline Vec power_of_two(Vec n) {
    const __m512i i = _mm512_cvtps_epi32(n.v);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(127)), 23))};
}
inline Vec load_bf16(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
#if defined(__AVX512BF16__)
inline void store_bf16(bf16* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
#else
inline void store_bf16(bf16* p, Vec a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i out = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}
#endif

#elif defined(__AVX2__)

struct Vec {
    __m256 a, b;
};
inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Vec operator/(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Vec fma(Vec x, Vec y, Vec z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Vec round(Vec x) {
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
inline Vec where_ge(Vec x, Vec y, Vec a, Vec b) {
    return {_mm256_blendv_ps(b.a, a.a, _mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ)),
            _mm256_blendv_ps(b.b, a.b, _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ))};
}
inline unsigned at_least(Vec x, Vec y) {
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ));
    return static_cast<unsigned>(low | high << 8);
}
inline Vec first(int n, Vec x, Vec y) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
    const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane);
    return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(low)),
            _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(high))};
}
inline __m256 pick_half(unsigned bits, __m256 x, __m256 y) {
    const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), own);
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, own)));
}
inline Vec pick(unsigned bits, Vec x, Vec y) { return {pick_half(bits, x.a, y.a), pick_half(bits >> 8, x.b, y.b)}; }
inline __m256 power_of_two_half(__m256 n) {
    const __m256i i = _mm256_cvtps_epi32(n);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23));
}
inline Vec power_of_two(Vec n) { return {power_of_two_half(n.a), power_of_two_half(n.b)}; }
inline __m256 load_bf16_half(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec load_bf16(const bf16* p) { return {load_bf16_half(p), load_bf16_half(p + 8)}; }
inline __m256i round_bf16_half(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(_mm256_srli_epi32(up, 16)),
                                                _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc0)), nan));
}
inline void store_bf16(bf16* p, Vec x) {
    const __m256i both = _mm256_packus_epi32(round_bf16_half(x.a), round_bf16_half(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
}

#else

typedef float floats16 __attribute__((vector_size(64)));
typedef std::int32_t ints16 __attribute__((vector_size(64)));
typedef std::uint32_t words16 __attribute__((vector_size(64)));

struct Vec {
    floats16 v;
};
inline Vec zero() { return {floats16{}}; }
inline Vec set1(float x) { return {floats16{} + x}; }
inline Vec load(const float* p) {
    Vec out;
    std::memcpy(&out.v, p, 64);
    return out;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.v, 64); }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// Not fused: two roundings, the same on every machine of this path.
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline floats16 pick(ints16 mask, floats16 a, floats16 b) {
    return (floats16)(((words16)mask & (words16)a) | (~(words16)mask & (words16)b));
}
inline Vec max(Vec a, Vec b) { return {pick(a.v > b.v, a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {pick(a.v < b.v, a.v, b.v)}; }
inline Vec round(Vec a) {
    const floats16 shift = floats16{} + 12582912.0f;  // 1.5 * 2**23: what is added to it is rounded to a whole number
    return {(a.v + shift) - shift};
}
inline Vec where_ge(Vec x, Vec y, Vec a, Vec b) { return {pick(x.v >= y.v, a.v, b.v)}; }
inline unsigned at_least(Vec x, Vec y) {
    const ints16 lanes = x.v >= y.v;
    unsigned bits = 0;
    for (int i = 0; i < 16; ++i) bits |= static_cast<unsigned>(lanes[i] & 1) << i;
    return bits;
}
inline Vec first(int n, Vec a, Vec b) {
    const ints16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return {pick(lane < n, a.v, b.v)};
}
inline Vec pick(unsigned bits, Vec a, Vec b) {
    const ints16 own = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    const ints16 set = (own & (ints16{} + static_cast<int>(bits))) != 0;
    return {pick(set, a.v, b.v)};
}
inline Vec power_of_two(Vec n) {
    const ints16 i = __builtin_convertvector(n.v, ints16);
    return {(floats16)((i + 127) << 23)};
}
inline Vec load_bf16(const bf16* p) {
    words16 bits;
    for (int i = 0; i < 16; ++i) bits[i] = static_cast<std::uint32_t>(p[i]) << 16;
    return {(floats16)bits};
}
inline void store_bf16(bf16* p, Vec a) {
    const words16 bits = (words16)a.v;
    const words16 up = (bits + (((bits >> 16) & 1u) + 0x7fffu)) >> 16;
    const ints16 nan = a.v != a.v;
    const words16 out = ((words16)nan & 0x7fc0u) | (~(words16)nan & up);
    for (int i = 0; i < 16; ++i) p[i] = static_cast<bf16>(out[i]);
}

#endif

inline bf16 narrow(float x) {
    bf16 out[16];
    store_bf16(out, set1(x));
    return out[0];
}

// One type's way through memory: T is how a value is stored, PAIR how many of them one step of a product takes.
//
// A product takes a step in TURNS. In each, what was made of a row's values, `Left`, is broadcast to all lanes, `One`, and
// meets `Right`, sixteen lanes of the other side.
template <class T>
struct Type;

template <>
struct Type<float> {
    static constexpr int PAIR = 1, TURNS = 1;
    using Left = float;
    static Vec broadcast(const float* p, int) { return set1(*p); }
    static Vec take(const float* p, int) { return load(p); }
    static Vec multiply(Vec a, Vec b, Vec c) { return fma(a, b, c); }
    static Vec load16(const float* p) { return load(p); }
    static void store16(float* p, Vec a) { store(p, a); }
    static void store_left16(float* p, Vec a) { store(p, a); }
    static float left(float x) { return x; }
    static float from(float x) { return x; }
    static float to(float x) { return x; }
};

template <>
struct Type<bf16> {
#if defined(__AVX512BF16__)
    static constexpr int PAIR = 2, TURNS = 1;
    using Left = bf16;
    struct One {
        __m512bh v;
    };
    static One broadcast(const bf16* p, int) {
        std::int32_t both;
        std::memcpy(&both, p, 4);
        return {(__m512bh)_mm512_set1_epi32(both)};
    }
    static __m512i take(const bf16* p, int) { return _mm512_loadu_si512(p); }
    static Vec multiply(One a, __m512i b, Vec c) { return {_mm512_dpbf16_ps(c.v, a.v, (__m512bh)b)}; }
    static void store_left16(bf16* p, Vec a) { store_bf16(p, a); }
    static bf16 left(bf16 x) { return x; }
#elif defined(__AVX512F__)
    static constexpr int PAIR = 2, TURNS = 1;
    using Left = bf16;
    struct One {
        Vec even, odd;
    };
    static One broadcast(const bf16* p, int) { return {set1(widen(p[0])), set1(widen(p[1]))}; }
    static __m512i take(const bf16* p, int) { return _mm512_loadu_si512(p); }
    static Vec multiply(One a, __m512i b, Vec c) {
        const Vec even = {_mm512_castsi512_ps(_mm512_slli_epi32(b, 16))};
        const Vec odd = {_mm512_castsi512_ps(_mm512_and_epi32(b, _mm512_set1_epi32(0xffff0000)))};
        return fma(a.odd, odd, fma(a.even, even, c));
    }
    static void store_left16(bf16* p, Vec a) { store_bf16(p, a); }
    static bf16 left(bf16 x) { return x; }
#else
    // Rows are widened once; of the other side even values in one turn, odd ones in the next, so that both and a tile of
    // sums fit sixteen registers.
    static constexpr int PAIR = 2, TURNS = 2;
    using Left = float;
    static Vec broadcast(const float* p, int turn) { return set1(p[turn]); }
#if defined(__AVX2__)
    static __m256 widen_half(const bf16* p, int turn) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        const __m256i upper = _mm256_set1_epi32(static_cast<std::int32_t>(0xffff0000));
        return _mm256_castsi256_ps(turn == 0 ? _mm256_slli_epi32(both, 16) : _mm256_and_si256(both, upper));
    }
    static Vec take(const bf16* p, int turn) { return {widen_half(p, turn), widen_half(p + 16, turn)}; }
#else
    static Vec take(const bf16* p, int turn) {
        words16 both;
        std::memcpy(&both, p, 64);
        return {(floats16)(turn == 0 ? both << 16 : both & 0xffff0000u)};
    }
#endif
    static Vec multiply(Vec a, Vec b, Vec c) { return fma(a, b, c); }
    static void store_left16(float* p, Vec a) {
        bf16 rounded[16];
        store_bf16(rounded, a);
        store(p, load_bf16(rounded));
    }
    static float left(bf16 x) { return widen(x); }
#endif
    static Vec load16(const bf16* p) { return load_bf16(p); }
    static void store16(bf16* p, Vec a) { store_bf16(p, a); }
    static bf16 from(float x) { return narrow(x); }
    static float to(bf16 x) { return widen(x); }
};

// --- coded weights (kernels.hpp): the 128 words of one step ---
//
// Only where there are products of bfloat16: widening words as well takes the registers and ports that decoding needs.

#if defined(__AVX512BF16__)
constexpr bool kCodes = true;
struct Upper {  // what the halves stand for
    __m512i v;
};
struct Words {
    __m512i v[4];
};
inline Upper load_upper(const std::uint8_t* p) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Words decode(const std::uint8_t* p, Upper upper) {
    const __m512i halves = _mm512_loadu_si512(p + 128), half = _mm512_set1_epi8(15);
    const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + 64);
    const __m512i of_low = _mm512_shuffle_epi8(upper.v, _mm512_and_si512(halves, half));
    const __m512i of_high = _mm512_shuffle_epi8(upper.v, _mm512_and_si512(_mm512_srli_epi16(halves, 4), half));
    return {{_mm512_unpacklo_epi8(low, of_low), _mm512_unpackhi_epi8(low, of_low), _mm512_unpacklo_epi8(high, of_high),
             _mm512_unpackhi_epi8(high, of_high)}};
}
inline Words load_words(const bf16* p) {
    return {{_mm512_loadu_si512(p), _mm512_loadu_si512(p + 32), _mm512_loadu_si512(p + 64), _mm512_loadu_si512(p + 96)}};
}
inline void store_words(bf16* p, const Words& w) {
    ORCA_UNROLL for (int j = 0; j < 4; ++j) _mm512_storeu_si512(p + j * 32, w.v[j]);
}
#else
constexpr bool kCodes = false;
#endif

// --- products of bytes: sixteen sums of four products each; exact in whatever order ---
//
// multiply_bytes: activations from 0 to 255 with weights from -127 to 127; multiply_halves: activations from -127 to 127
// with weights from 0 to 15; multiply_sixes: with weights from 0 to 63. with_upper_bits: the j-th of a step's vectors of 64
// weights, of which the lower four bits are known.

#if defined(__AVX512F__)
struct Ints {
    __m512i v;
};
inline Ints no_ints() { return {_mm512_setzero_si512()}; }
inline Vec to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints load_ints(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
// 128 + round(a) for a in [-127, 127].
inline void store_bytes(std::uint8_t* p, Vec a) {
    const __m512i up = _mm512_add_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(128));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(up));
}
struct Four {
    __m512i v;
};
inline Four broadcast_four(const std::uint8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return {_mm512_set1_epi32(four)};
}
constexpr int kByteTurns = 1;
using ByteLeft = std::uint8_t;
inline Four broadcast_bytes(const ByteLeft* p, int) { return broadcast_four(p); }
inline __m512i take_bytes(const std::int8_t* p, int) { return _mm512_loadu_si512(p); }
inline Ints multiply_bytes(Four a, __m512i bytes, Ints c) {
#if defined(__AVX512VNNI__)
    // The intrinsic makes GCC copy the sums to and fro: twice as slow.
    asm("vpdpbusd %2, %1, %0" : "+v"(c.v) : "v"(a.v), "v"(bytes));
    return c;
#else
    const __m512i low = _mm512_set1_epi32(0x00ff00ff);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(a.v, low), _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a.v, 8), _mm512_srai_epi16(bytes, 8));
    return {_mm512_add_epi32(c.v, _mm512_add_epi32(even, odd))};
#endif
}
struct Halves {  // 64 bytes whose lower halves are values in [0, 15]
    __m512i v;
};
inline Halves lower_halves(const std::uint8_t* p) {
    return {_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15))};
}
inline Halves upper_halves(const std::uint8_t* p) {
    return {_mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15))};
}
inline Ints multiply_halves(Halves w, Four a, Ints c) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(c.v) : "v"(w.v), "v"(a.v));
    return c;
#else
    return {_mm512_add_epi32(c.v, _mm512_madd_epi16(_mm512_maddubs_epi16(w.v, a.v), _mm512_set1_epi16(1)))};
#endif
}
using HalfSums = Ints;
inline HalfSums start_halves(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints start_sixes(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Halves with_upper_bits(Halves lower, const std::uint8_t* p, int j) {
    typedef unsigned short Words32 __attribute__((vector_size(64)));
    const auto bits = (Words32)_mm512_loadu_si512(p);
    const auto moved = (__m512i)(j < 2 ? bits << (4 - 2 * j) : bits >> (2 * j - 4));
    return {_mm512_ternarylogic_epi32(lower.v, moved, _mm512_set1_epi8(48), 0xf8)};  // lower | moved & 48
}
inline Ints multiply_sixes(Halves w, Four a, Ints c) { return multiply_halves(w, a, c); }
#elif defined(__AVX2__)
struct Ints {
    __m256i a, b;
};
inline Ints no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Vec to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Ints load_ints(const std::int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline Ints operator-(Ints x, Ints y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline void store_bytes(std::uint8_t* p, Vec x) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i up = _mm256_add_epi16(_mm256_permute4x64_epi64(words, 0xd8), _mm256_set1_epi16(128));
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
struct Four {
    __m256i v;
};
inline Four broadcast_four(const std::uint8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return {_mm256_set1_epi32(four)};
}
// Of 16 bits; in one turn the first and third of four, in the next the others.
constexpr int kByteTurns = 2;
using ByteLeft = std::int16_t;
struct Shorts {
    __m256i a, b;
};
inline __m256i broadcast_bytes(const ByteLeft* p, int turn) {
    std::int32_t two;
    std::memcpy(&two, p + 2 * turn, 4);
    return _mm256_set1_epi32(two);
}
inline __m256i widen_bytes(const std::int8_t* p, int turn) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_srai_epi16(turn == 0 ? _mm256_slli_epi16(bytes, 8) : bytes, 8);
}
inline Shorts take_bytes(const std::int8_t* p, int turn) { return {widen_bytes(p, turn), widen_bytes(p + 32, turn)}; }
// As an instruction of its own: else the compiler adds up turns first, for which there are no registers.
inline void add_here(__m256i& sum, __m256i x) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }
inline Ints multiply_bytes(__m256i a, Shorts b, Ints c) {
    add_here(c.a, _mm256_madd_epi16(a, b.a));
    add_here(c.b, _mm256_madd_epi16(a, b.b));
    return c;
}
inline void store_four(ByteLeft* p, const std::uint8_t* bytes) {
    for (int i = 0; i < 4; ++i) p[i / 2 + i % 2 * 2] = bytes[i];
}
struct Halves {
    __m256i a, b;
};
inline Halves lower_halves(const std::uint8_t* p) {
    const __m256i mask = _mm256_set1_epi8(15);
    const auto* from = reinterpret_cast<const __m256i*>(p);
    return {_mm256_and_si256(_mm256_loadu_si256(from), mask), _mm256_and_si256(_mm256_loadu_si256(from + 1), mask)};
}
inline Halves upper_halves(const std::uint8_t* p) {
    const __m256i mask = _mm256_set1_epi8(15);
    const auto* from = reinterpret_cast<const __m256i*>(p);
    return {_mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256(from), 4), mask),
            _mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256(from + 1), 4), mask)};
}
// Sums of 16 bits, side by side the halves of one of 32: those of a group of 32 values fit, for a sum of sixteen values of
// 8 bits, each times one of [-8, 7], does, and so does what the other sixteen are too high.
struct HalfSums {
    __m256i a, b;
};
inline HalfSums start_halves(std::int32_t x) {
    const __m256i one = _mm256_set1_epi32(x & 0xffff);
    return {one, one};
}
inline HalfSums multiply_halves(Halves w, Four a, HalfSums c) {
    asm("vpaddw %1, %0, %0" : "+x"(c.a) : "x"(_mm256_maddubs_epi16(w.a, a.v)));
    asm("vpaddw %1, %0, %0" : "+x"(c.b) : "x"(_mm256_maddubs_epi16(w.b, a.v)));
    return c;
}
inline Vec to_floats(HalfSums x) {
    const __m256i ones = _mm256_set1_epi16(1);
    return to_floats(Ints{_mm256_madd_epi16(x.a, ones), _mm256_madd_epi16(x.b, ones)});
}
inline Ints start_sixes(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Halves with_upper_bits(Halves lower, const std::uint8_t* p, int j) {
    typedef unsigned short Words16 __attribute__((vector_size(32)));
    const auto moved = [p, j](int i) {
        const auto bits = (Words16)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
        return _mm256_and_si256((__m256i)(j < 2 ? bits << (4 - 2 * j) : bits >> (2 * j - 4)), _mm256_set1_epi8(48));
    };
    return {_mm256_or_si256(lower.a, moved(0)), _mm256_or_si256(lower.b, moved(1))};
}
inline Ints multiply_sixes(Halves w, Four a, Ints c) {
    const __m256i ones = _mm256_set1_epi16(1);
    add_here(c.a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, a.v), ones));
    add_here(c.b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, a.v), ones));
    return c;
}
#else
struct Ints {
    ints16 v;
};
inline Ints no_ints() { return {ints16{}}; }
inline Vec to_floats(Ints a) { return {__builtin_convertvector(a.v, floats16)}; }
inline Ints load_ints(const std::int32_t* p) {
    Ints out;
    std::memcpy(&out.v, p, 64);
    return out;
}
inline Ints operator-(Ints a, Ints b) { return {a.v - b.v}; }
inline void store_bytes(std::uint8_t* p, Vec a) {
    const Vec whole = round(a);
    for (int i = 0; i < 16; ++i) {
        const float value = whole.v[i];
        p[i] = static_cast<std::uint8_t>(value >= -127.0f && value <= 127.0f ? 128 + static_cast<int>(value) : 128);
    }
}
struct Four {
    std::int32_t at[4];
};
inline Four broadcast_four(const std::uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
constexpr int kByteTurns = 1;
using ByteLeft = std::uint8_t;
inline Four broadcast_bytes(const ByteLeft* p, int) { return broadcast_four(p); }
inline const std::int8_t* take_bytes(const std::int8_t* p, int) { return p; }
inline Ints multiply_bytes(Four a, const std::int8_t* b, Ints c) {
    for (int lane = 0; lane < 16; ++lane) {
        const std::int8_t* of = b + lane * 4;
        c.v[lane] += a.at[0] * of[0] + a.at[1] * of[1] + a.at[2] * of[2] + a.at[3] * of[3];
    }
    return c;
}
struct Halves {
    std::uint8_t at[64];
};
inline Halves lower_halves(const std::uint8_t* p) {
    Halves out;
    for (int i = 0; i < 64; ++i) out.at[i] = p[i] & 15;
    return out;
}
inline Halves upper_halves(const std::uint8_t* p) {
    Halves out;
    for (int i = 0; i < 64; ++i) out.at[i] = p[i] >> 4;
    return out;
}
inline Ints multiply_halves(const Halves& w, Four a, Ints c) {
    for (int lane = 0; lane < 16; ++lane)
        for (int i = 0; i < 4; ++i) c.v[lane] += w.at[lane * 4 + i] * static_cast<std::int8_t>(a.at[i]);
    return c;
}
using HalfSums = Ints;
inline HalfSums start_halves(std::int32_t x) { return {ints16{} + x}; }
inline Ints start_sixes(std::int32_t x) { return {ints16{} + x}; }
inline Halves with_upper_bits(Halves lower, const std::uint8_t* p, int j) {
    for (int i = 0; i < 64; ++i) lower.at[i] = static_cast<std::uint8_t>(lower.at[i] | (p[i] >> 2 * j & 3) << 4);
    return lower;
}
inline Ints multiply_sixes(const Halves& w, Four a, Ints c) { return multiply_halves(w, a, c); }
#endif

template <class Byte>
void store_four(Byte* p, const std::uint8_t* bytes) { std::memcpy(p, bytes, 4); }

// Sixteen bytes that stand 128 too high become what they mean; sums: of the first eight and of the others.
inline void lower(std::uint8_t* p, std::int32_t* sums) {
#if defined(__AVX2__)
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i both = _mm_sad_epu8(high, _mm_setzero_si128());
    sums[0] = _mm_cvtsi128_si32(both) - 8 * 128;
    sums[1] = _mm_extract_epi16(both, 4) - 8 * 128;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(high, _mm_set1_epi8(-128)));
#else
    sums[0] = sums[1] = 0;
    for (int i = 0; i < 16; ++i) {
        sums[i / 8] += p[i] - 128;
        p[i] ^= 128;
    }
#endif
}

// --- products of 16 bits with 8: sixteen sums of two products each; exact in whatever order ---
//
// The left values are whole numbers in [-32767, 32767], the right ones bytes, [16][2] of them in a step.

#if defined(__AVX512F__)
// round(a) for a in [-32767, 32767].
inline void store_shorts(std::int16_t* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
struct Two {
    __m512i v;
};
inline Two broadcast_two(const std::int16_t* p) {
    std::int32_t two;
    std::memcpy(&two, p, 4);
    return {_mm512_set1_epi32(two)};
}
inline Ints multiply_shorts(Two a, const std::int8_t* b, Ints c) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
#if defined(__AVX512VNNI__)
    asm("vpdpwssd %2, %1, %0" : "+v"(c.v) : "v"(a.v), "v"(wide));
    return c;
#else
    return {_mm512_add_epi32(c.v, _mm512_madd_epi16(a.v, wide))};
#endif
}
#elif defined(__AVX2__)
inline void store_shorts(std::int16_t* p, Vec x) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
}
struct Two {
    __m256i v;
};
inline Two broadcast_two(const std::int16_t* p) {
    std::int32_t two;
    std::memcpy(&two, p, 4);
    return {_mm256_set1_epi32(two)};
}
inline Ints multiply_shorts(Two a, const std::int8_t* b, Ints c) {
    const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
    const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 16)));
    return {_mm256_add_epi32(c.a, _mm256_madd_epi16(a.v, low)), _mm256_add_epi32(c.b, _mm256_madd_epi16(a.v, high))};
}
#else
inline void store_shorts(std::int16_t* p, Vec a) {
    const Vec whole = round(a);
    for (int i = 0; i < 16; ++i) {
        const float value = whole.v[i];
        p[i] = static_cast<std::int16_t>(value >= -32767.0f && value <= 32767.0f ? static_cast<int>(value) : 0);
    }
}
struct Two {
    std::int32_t at[2];
};
inline Two broadcast_two(const std::int16_t* p) { return {{p[0], p[1]}}; }
inline Ints multiply_shorts(Two a, const std::int8_t* b, Ints c) {
    for (int lane = 0; lane < 16; ++lane) c.v[lane] += a.at[0] * b[lane * 2] + a.at[1] * b[lane * 2 + 1];
    return c;
}
#endif

// How many vectors side by side a register tile of so many rows has: as many as the registers hold, and of few rows enough
// that sums do not wait for themselves.
#if defined(__AVX512F__)
constexpr int wide_of(int) { return 4; }
#else
constexpr int wide_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// --- functions of one variable ---

// Sum and maximum over the lanes, in one fixed order.
inline float sum(Vec a) {
    float x[16];
    store(x, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}
inline float largest(Vec a) {
    float x[16];
    store(x, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}

// e**x to about one unit in the last place; 0 below -87.3, +inf is not reached (x is cut at 88.3).
inline Vec exp(Vec x) {
    const Vec lowest = set1(-87.33654f);
    const Vec inside = min(max(x, lowest), set1(88.3f));
    const Vec n = round(inside * set1(1.44269504f));
    Vec r = fma(n, set1(-0.693359375f), inside);
    r = fma(n, set1(2.12194440e-4f), r);
    Vec p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r + set1(1.0f));
    const Vec out = p * power_of_two(n);
    // NaN must come out as NaN, and it compares as nothing: the last choice keeps it.
    return where_ge(x, lowest, out, where_ge(lowest, x, zero(), x));
}
inline Vec tanh(Vec x) {
    // The odd series near zero, where the difference from one would lose its digits.
    const Vec square = x * x;
    Vec p = set1(-5.70498872745e-3f);
    p = fma(p, square, set1(2.06390887954e-2f));
    p = fma(p, square, set1(-5.37397155531e-2f));
    p = fma(p, square, set1(1.33314422036e-1f));
    p = fma(p, square, set1(-3.33332819422e-1f));
    const Vec near = fma(p * square, x, x);
    const Vec far = set1(1.0f) - set1(2.0f) / (exp(x + x) + set1(1.0f));
    return where_ge(square, set1(0.625f * 0.625f), far, near);
}
// Abramowitz and Stegun 7.1.26: at most 1.5e-7 off.
inline Vec erf(Vec x) {
    const Vec size = max(x, zero() - x);
    const Vec t = set1(1.0f) / fma(set1(0.3275911f), size, set1(1.0f));
    Vec p = set1(1.061405429f);
    p = fma(p, t, set1(-1.453152027f));
    p = fma(p, t, set1(1.421413741f));
    p = fma(p, t, set1(-0.284496736f));
    p = fma(p, t, set1(0.254829592f));
    const Vec out = set1(1.0f) - p * t * exp(zero() - x * x);
    return where_ge(x, zero(), out, zero() - out);
}
inline Vec sigmoid(Vec x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }

}  // namespace ORCA_ISA
}  // namespace orca
