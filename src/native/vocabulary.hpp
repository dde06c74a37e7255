// Looks at the whole vocabulary: pieces of fixed size, then the pieces in order.
//
// Containers hold types of this namespace only: others' templates would be compiled once per instruction set under one
// name, and the linker would keep any of them.
#pragma once

#include <cmath>
#include <vector>

#include "gemm.hpp"

namespace orca {
namespace ORCA_ISA {

constexpr std::int64_t kPiece = 16384;
constexpr std::int64_t kStretch = 512;  // values that sixteen maxima stand for

// Lanes of sixteen values of which `left` are there, as bits.
inline unsigned lanes(std::int64_t left) { return left >= 16 ? 0xffffu : (1u << left) - 1; }

// One row of logits and what is looked at in it: (logit - peak) / divisor - shift.
//
// allowed: a bit for each token, or null; the others' logits are -inf here, whatever they are.
struct View {
    const float* logits;
    float peak, divisor, shift;
    const std::uint32_t* allowed = nullptr;

    // Sixteen values from i on, a multiple of sixteen.
    Vec at(std::int64_t i, std::int64_t left) const {
        const unsigned bits = open(i, left);
        const Vec none = set1(-__builtin_inff());
        if (bits == 0) return none;
        return pick(bits, (load_some(logits + i, left) - set1(peak)) / set1(divisor) - set1(shift), none);
    }
    float operator[](std::int64_t i) const {
        return has(i) ? (logits[i] - peak) / divisor - shift : -__builtin_inff();
    }
    // The same of the logits themselves.
    Vec logits_at(std::int64_t i, std::int64_t left) const {
        const unsigned bits = open(i, left);
        const Vec none = set1(-__builtin_inff());
        return bits == 0 ? none : pick(bits, load_some(logits + i, left), none);
    }
    float logit(std::int64_t i) const { return has(i) ? logits[i] : -__builtin_inff(); }

private:
    bool has(std::int64_t i) const { return allowed == nullptr || (allowed[i / 32] >> (i % 32) & 1) != 0; }
    unsigned open(std::int64_t i, std::int64_t left) const {
        return allowed == nullptr ? lanes(left) : lanes(left) & (allowed[i / 32] >> (i % 32));
    }
};

struct Found {
    float value;
    std::int64_t id;
};
inline bool ahead(const Found& a, const Found& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

struct Sum {
    double value;
};

struct Range {
    float low, high;
};

// Calls work(row, item, begin, end) for every piece of every row.
template <class Work>
void by_pieces(Pool& pool, std::size_t rows, std::int64_t vocab, const Work& work) {
    const std::int64_t pieces = ceil_div(vocab, kPiece);
    pool.run(static_cast<std::uint32_t>(rows * pieces), [&](std::uint32_t item, int) {
        const std::int64_t begin = item % pieces * kPiece;
        work(item / pieces, item, begin, std::min(begin + kPiece, vocab));
    });
}

// The greatest of each row and the lowest id that has it; NaN if the row has one that is allowed.
inline std::vector<Found> find_peaks(Pool& pool, const std::vector<View>& rows, std::int64_t vocab) {
    const std::int64_t pieces = ceil_div(vocab, kPiece);
    std::vector<Found> found(rows.size() * pieces), peaks(rows.size());
    by_pieces(pool, rows.size(), vocab, [&](std::size_t row, std::size_t item, std::int64_t begin, std::int64_t end) {
        const Vec lowest = set1(-__builtin_inff());
        Vec highest = lowest, strange = zero();
        for (std::int64_t i = begin; i < end; i += 16) {
            const Vec x = rows[row].logits_at(i, end - i);
            highest = max(highest, x);
            strange = strange + where_ge(x, x, zero(), set1(1.0f));
        }
        found[item] = {sum(strange) > 0.0f ? __builtin_nanf("") : largest(highest), begin};
    });
    for (std::size_t row = 0; row < rows.size(); ++row) {
        Found best = found[row * pieces];
        for (std::int64_t piece = 1; piece < pieces; ++piece) {
            const Found& other = found[row * pieces + piece];
            if (other.value > best.value || other.value != other.value) best = other;
            if (best.value != best.value) break;
        }
        while (best.value == best.value && rows[row].logit(best.id) != best.value) ++best.id;
        peaks[row] = best;
    }
    return peaks;
}

// Of each row the sum of e ** value.
inline std::vector<Sum> find_masses(Pool& pool, const std::vector<View>& rows, std::int64_t vocab) {
    const std::int64_t pieces = ceil_div(vocab, kPiece);
    std::vector<Sum> found(rows.size() * pieces), masses(rows.size());
    by_pieces(pool, rows.size(), vocab, [&](std::size_t row, std::size_t item, std::int64_t begin, std::int64_t end) {
        const View view = rows[row];
        double total = 0.0;
        for (; begin < end; begin += 1024) {
            Vec mass = zero();
            for (std::int64_t i = begin; i < std::min(end, begin + 1024); i += 16) mass = mass + exp(view.at(i, end - i));
            total += sum(mass);
        }
        found[item] = {total};
    });
    for (std::size_t row = 0; row < rows.size(); ++row) {
        masses[row] = {0.0};
        for (std::int64_t piece = 0; piece < pieces; ++piece) masses[row].value += found[row * pieces + piece].value;
    }
    return masses;
}

// Of each row the values for which keep(row, value) holds, in the order of their ids; none outside of ranges[row] is asked.
template <class Keep>
std::vector<std::vector<Found>> collect(Pool& pool, const std::vector<View>& rows, std::int64_t vocab,
                                        const std::vector<Range>& ranges, const Keep& keep) {
    const std::int64_t pieces = ceil_div(vocab, kPiece);
    std::vector<std::vector<Found>> found(rows.size() * pieces), out(rows.size());
    by_pieces(pool, rows.size(), vocab, [&](std::size_t row, std::size_t item, std::int64_t begin, std::int64_t end) {
        const View view = rows[row];
        const Vec low = set1(ranges[row].low), high = set1(ranges[row].high);
        for (std::int64_t i = begin; i < end; i += 16) {
            const Vec x = view.at(i, end - i);
            unsigned bits = at_least(x, low) & at_least(high, x) & lanes(end - i);
            for (; bits != 0; bits &= bits - 1) {
                const std::int64_t id = i + __builtin_ctz(bits);
                const float value = view[id];
                if (keep(row, value)) found[item].push_back({value, id});
            }
        }
    });
    for (std::size_t row = 0; row < rows.size(); ++row)
        for (std::int64_t piece = 0; piece < pieces; ++piece) {
            const std::vector<Found>& some = found[row * pieces + piece];
            out[row].insert(out[row].end(), some.begin(), some.end());
        }
    return out;
}

// Of each row the count(row) greatest values, the last of them last, ties to the lower id; the others as they come.
//
// The k-th greatest of the maxima of disjoint chunks is reached by k values at least, and by few more if k is small.
template <class Count>
std::vector<std::vector<Found>> likeliest(Pool& pool, const std::vector<View>& rows, std::int64_t vocab,
                                          const Count& count) {
    const std::int64_t maxima = ceil_div(vocab, kStretch) * 16;
    float* const shared = static_cast<float*>(pool.shared(rows.size() * maxima * sizeof(float)));
    by_pieces(pool, rows.size(), vocab, [&](std::size_t row, std::size_t, std::int64_t begin, std::int64_t end) {
        const View view = rows[row];
        for (; begin < end; begin += kStretch) {
            Vec highest = set1(-__builtin_inff());
            for (std::int64_t i = begin; i < std::min(end, begin + kStretch); i += 16)
                highest = max(highest, view.at(i, end - i));
            store(shared + row * maxima + begin / kStretch * 16, highest);
        }
    });
    std::vector<Range> ranges(rows.size());
    pool.run(static_cast<std::uint32_t>(rows.size()), [&](std::uint32_t row, int) {
        float* const of = shared + row * maxima;
        const std::int64_t k = std::min<std::int64_t>(count(row), vocab);
        ranges[row] = {-__builtin_inff(), __builtin_inff()};
        if (k < 1 || k > maxima) return;
        std::nth_element(of, of + k - 1, of + maxima, [](float a, float b) { return a > b; });
        ranges[row].low = of[k - 1];
    });
    auto found = collect(pool, rows, vocab, ranges, [](std::size_t, float) { return true; });
    pool.run(static_cast<std::uint32_t>(rows.size()), [&](std::uint32_t row, int) {
        std::vector<Found>& of = found[row];
        const auto end = of.begin() + std::min<std::int64_t>(count(row), of.size());
        if (end != of.begin()) std::nth_element(of.begin(), end - 1, of.end(), ahead);
        of.erase(end, of.end());
    });
    return found;
}

inline void peaks(Pool& pool, const Peaks& g) {
    const std::lock_guard<std::mutex> lock(pool.mutex());
    std::vector<View> rows;
    for (std::int64_t row = 0; row < g.rows; ++row) rows.push_back({g.logits + row * g.vocab, 0.0f, 1.0f, 0.0f});
    const std::vector<Found> found = find_peaks(pool, rows, g.vocab);
    for (std::int64_t row = 0; row < g.rows; ++row) {
        g.peaks[row] = found[row].value;
        g.ids[row] = found[row].id;
    }
}

inline void logprobs(Pool& pool, const Logprobs& g) {
    const std::lock_guard<std::mutex> lock(pool.mutex());
    std::vector<View> rows;
    for (std::int64_t i = 0; i < g.count; ++i)
        rows.push_back({g.logits + g.rows[i] * g.vocab, g.peaks[g.rows[i]], 1.0f, 0.0f});
    const std::vector<Sum> masses = find_masses(pool, rows, g.vocab);
    for (std::int64_t i = 0; i < g.count; ++i) {
        rows[i].shift = static_cast<float>(std::log(masses[i].value));
        g.own[i] = rows[i][g.tokens[i]];
    }
    const std::int64_t pieces = ceil_div(g.vocab, kPiece);
    std::vector<Found> before(rows.size() * pieces);
    by_pieces(pool, rows.size(), g.vocab, [&](std::size_t row, std::size_t item, std::int64_t begin, std::int64_t end) {
        const View view = rows[row];
        const Vec own = set1(g.own[row]);
        std::int64_t count = 0;
        for (std::int64_t i = begin; i < end; i += 16) {
            const Vec x = view.at(i, end - i);
            const unsigned earlier = lanes(std::max<std::int64_t>(0, g.tokens[row] - i));
            const unsigned greater = ~at_least(own, x) & lanes(end - i);
            count += __builtin_popcount(greater | (at_least(x, own) & earlier));
        }
        before[item].id = count;
    });
    for (std::int64_t i = 0; i < g.count; ++i) {
        g.ranks[i] = 1;
        for (std::int64_t piece = 0; piece < pieces; ++piece) g.ranks[i] += before[i * pieces + piece].id;
    }
    if (g.top == 0) return;
    auto found = likeliest(pool, rows, g.vocab, [&](std::size_t) { return g.top; });
    for (std::int64_t i = 0; i < g.count; ++i) {
        std::sort(found[i].begin(), found[i].end(), ahead);
        for (std::int64_t n = 0; n < g.top; ++n) {
            g.ids[i * g.top + n] = found[i][n].id;
            g.logprobs[i * g.top + n] = found[i][n].value;
        }
    }
}

}  // namespace ORCA_ISA
}  // namespace orca
