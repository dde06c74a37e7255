// Reductions over the vocabulary: pieces of fixed size, then the pieces in order.
#pragma once

#include "gemm.hpp"

namespace orca {
namespace ORCA_ISA {

constexpr std::int64_t kPiece = 16384;

// Calls work(row, piece, logits of the piece, their number) for every piece of every row.
template <class Work>
void by_pieces(Pool& pool, const Vocabulary& g, const Work& work) {
    const std::int64_t pieces = ceil_div(g.vocab, kPiece);
    pool.run(static_cast<std::uint32_t>(g.rows * pieces), [&](std::uint32_t item, int) {
        const std::int64_t row = item / pieces, piece = item % pieces;
        const std::int64_t begin = piece * kPiece;
        work(row, item, g.logits + row * g.vocab + begin, std::min(kPiece, g.vocab - begin));
    });
}

inline void peaks(Pool& pool, const Vocabulary& g) {
    const std::lock_guard<std::mutex> lock(pool.mutex());
    const std::int64_t pieces = ceil_div(g.vocab, kPiece);
    float* found = static_cast<float*>(pool.shared(g.rows * pieces * sizeof(float)));
    by_pieces(pool, g, [&](std::int64_t, std::int64_t item, const float* logits, std::int64_t n) {
        const Vec lowest = set1(-__builtin_inff());
        Vec highest = lowest, strange = zero();
        for (std::int64_t i = 0; i < n; i += 16) {
            const int left = static_cast<int>(std::min<std::int64_t>(16, n - i));
            const Vec x = first(left, load_some(logits + i, left), lowest);
            highest = max(highest, x);
            strange = strange + where_ge(x, x, zero(), set1(1.0f));
        }
        found[item] = sum(strange) > 0.0f ? __builtin_nanf("") : largest(highest);
    });
    for (std::int64_t row = 0; row < g.rows; ++row) {
        const float* of = found + row * pieces;
        std::int64_t best = 0;
        bool strange = of[0] != of[0];
        for (std::int64_t piece = 1; piece < pieces; ++piece) {
            strange |= of[piece] != of[piece];
            if (of[piece] > of[best]) best = piece;
        }
        g.peaks[row] = strange ? __builtin_nanf("") : of[best];
        std::int64_t id = best * kPiece;
        while (!strange && g.logits[row * g.vocab + id] != of[best]) ++id;
        g.ids[row] = id;
    }
}

inline void masses(Pool& pool, const Vocabulary& g) {
    const std::lock_guard<std::mutex> lock(pool.mutex());
    const std::int64_t pieces = ceil_div(g.vocab, kPiece);
    double* found = static_cast<double*>(pool.shared(g.rows * pieces * sizeof(double)));
    by_pieces(pool, g, [&](std::int64_t row, std::int64_t item, const float* logits, std::int64_t n) {
        const Vec peak = set1(g.peaks[row]);
        double total = 0.0;
        for (std::int64_t begin = 0; begin < n; begin += 1024) {
            Vec mass = zero();
            for (std::int64_t i = begin; i < std::min(n, begin + 1024); i += 16) {
                const int left = static_cast<int>(std::min<std::int64_t>(16, n - i));
                mass = mass + first(left, exp(load_some(logits + i, left) - peak), zero());
            }
            total += sum(mass);
        }
        found[item] = total;
    });
    for (std::int64_t row = 0; row < g.rows; ++row) {
        g.masses[row] = 0.0;
        for (std::int64_t piece = 0; piece < pieces; ++piece) g.masses[row] += found[row * pieces + piece];
    }
}

}  // namespace ORCA_ISA
}  // namespace orca
