// Gumbel noise as ops/noise.py has it: a hash of a counter, the same in every instruction set.
#pragma once

#include <cmath>

#include "vec.hpp"

namespace orca {
namespace ORCA_ISA {

constexpr std::uint64_t kStep = 0x9E3779B97F4A7C15u;
constexpr std::uint64_t kFactors[] = {0xBF58476D1CE4E5B9u, 0x94D049BB133111EBu};
constexpr float kHighest = 36.8f;  // no noise is greater

// The counter of token `id`.
inline std::uint64_t counter(std::uint64_t key, std::int64_t id) {
    return key + (static_cast<std::uint64_t>(id) + 1) * kStep;
}

inline std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * kFactors[0];
    z = (z ^ (z >> 27)) * kFactors[1];
    return z ^ (z >> 31);
}

// -log(-log(u)) of the uniform number u that the counter gives.
inline double gumbel(std::uint64_t counter) {
    const double uniform = (static_cast<double>(mix(counter) >> 12) + 0.5) * 0x1p-52;
    return -std::log(-std::log(uniform));
}

// 1 - u, rounded down to a multiple of 2**-31 and then to float32, of the counters of sixteen neighbouring tokens.
#if defined(__AVX512F__)
inline __m512i mix_eight(__m512i z) {
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64(kFactors[0]));
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64(kFactors[1]));
    return _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
}
inline Vec complements(std::uint64_t counter) {
    const __m512i lanes = _mm512_setr_epi64(0, kStep, 2 * kStep, 3 * kStep, 4 * kStep, 5 * kStep, 6 * kStep, 7 * kStep);
    const __m512i low = mix_eight(_mm512_add_epi64(_mm512_set1_epi64(counter), lanes));
    const __m512i high = mix_eight(_mm512_add_epi64(_mm512_set1_epi64(counter + 8 * kStep), lanes));
    const __m512i upper = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512i words = _mm512_permutex2var_epi32(low, upper, high);
    const __m512i others = _mm512_srli_epi32(_mm512_xor_si512(words, _mm512_set1_epi32(-1)), 1);
    return Vec{_mm512_cvtepi32_ps(others)} * set1(0x1p-31f);
}
#elif defined(__AVX2__)
inline __m256i times(__m256i z, std::uint64_t factor) {
    const __m256i low = _mm256_set1_epi64x(static_cast<std::int64_t>(factor));
    const __m256i high = _mm256_set1_epi64x(static_cast<std::int64_t>(factor >> 32));
    const __m256i crossed = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(z, 32), low), _mm256_mul_epu32(z, high));
    return _mm256_add_epi64(_mm256_mul_epu32(z, low), _mm256_slli_epi64(crossed, 32));
}
inline __m256i mix_four(std::uint64_t counter) {
    const __m256i lanes = _mm256_setr_epi64x(0, static_cast<std::int64_t>(kStep), static_cast<std::int64_t>(2 * kStep),
                                             static_cast<std::int64_t>(3 * kStep));
    __m256i z = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<std::int64_t>(counter)), lanes);
    z = times(_mm256_xor_si256(z, _mm256_srli_epi64(z, 30)), kFactors[0]);
    z = times(_mm256_xor_si256(z, _mm256_srli_epi64(z, 27)), kFactors[1]);
    return _mm256_xor_si256(z, _mm256_srli_epi64(z, 31));
}
inline __m256 complements_half(std::uint64_t counter) {
    const __m256 low = _mm256_castsi256_ps(mix_four(counter)), high = _mm256_castsi256_ps(mix_four(counter + 4 * kStep));
    const __m256i upper = _mm256_castps_si256(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1)));
    const __m256i words = _mm256_permute4x64_epi64(upper, 0xd8);
    const __m256i others = _mm256_srli_epi32(_mm256_xor_si256(words, _mm256_set1_epi32(-1)), 1);
    return _mm256_mul_ps(_mm256_cvtepi32_ps(others), _mm256_set1_ps(0x1p-31f));
}
inline Vec complements(std::uint64_t counter) {
    return {complements_half(counter), complements_half(counter + 8 * kStep)};
}
#else
inline Vec complements(std::uint64_t counter) {
    float out[16];
    for (int i = 0; i < 16; ++i)
        out[i] = static_cast<float>(static_cast<std::int32_t>(~mix(counter + i * kStep) >> 33)) * 0x1p-31f;
    return load(out);
}
#endif

}  // namespace ORCA_ISA
}  // namespace orca
