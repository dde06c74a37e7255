// Attention of all requests of an iteration over the paged caches, in one call.
//
// A query's bits depend on its own value, its position and its own keys and values: the cache is walked in spans of 128
// positions that start at multiples of 128; a span is reduced by itself and then merged into what came before, in order
// of position. Positions that a query may not see add exactly nothing.
#pragma once

#include "rows.hpp"

namespace orca {
namespace ORCA_ISA {

constexpr int kGroups = static_cast<int>(kSpan / kGroup);

// scores [R][kSpan] of R query rows against `count` groups of keys. What lies `ahead` of what it reads is fetched, unless
// that is 0.
template <class T, int R>
void score(const T* const* queries, const T* const* keys, int count, int d, float scale, std::int64_t ahead,
           float* scores) {
    constexpr int P = Type<T>::PAIR;
    for (int group = 0; group < count; group += WIDE) {
        Vec sums[R][WIDE];
        const T* k[WIDE];
        for (int j = 0; j < WIDE; ++j) k[j] = keys[std::min(group + j, count - 1)];
        ORCA_UNROLL for (int r = 0; r < R; ++r)
            ORCA_UNROLL for (int j = 0; j < WIDE; ++j) sums[r][j] = zero();
        for (int i = 0; i < d; i += P) {
            if (ahead != 0)
                for (int j = 0; j < WIDE; ++j) __builtin_prefetch(k[j] + i * kGroup + ahead, 0, 2);
            ORCA_UNROLL for (int r = 0; r < R; ++r) {
                const auto one = Type<T>::broadcast(queries[r] + i);
                ORCA_UNROLL for (int j = 0; j < WIDE; ++j) sums[r][j] = Type<T>::multiply(one, k[j] + i * kGroup, sums[r][j]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < WIDE && group + j < count; ++j) {
                store(scores + r * kSpan + (group + j) * kGroup, sums[r][j] * set1(scale));
            }
    }
}

// out [R][padded] += shares [R][kSpan] times the values of the first `positions` positions; WIDE vectors at a time.
template <class T, int R, int W>
void gather_values(const T* shares, const T* const* values, int positions, int padded, int column, std::int64_t ahead,
                   float* out) {
    constexpr int P = Type<T>::PAIR;
    Vec sums[R][W];
    ORCA_UNROLL for (int r = 0; r < R; ++r)
        ORCA_UNROLL for (int j = 0; j < W; ++j) sums[r][j] = zero();
    for (int group = 0; group * kGroup < positions; ++group) {
        const int end = std::min<int>(kGroup, positions - group * kGroup);
        const T* v = values[group] + column * P;
        const T* share = shares + group * kGroup;
        for (int at = 0; at < end; at += P, v += padded * P, share += P) {
            if (ahead != 0)
                for (int j = 0; j < W; ++j) __builtin_prefetch(v + j * 16 * P + ahead, 0, 2);
            ORCA_UNROLL for (int r = 0; r < R; ++r) {
                const auto one = Type<T>::broadcast(share + r * kSpan);
                ORCA_UNROLL for (int j = 0; j < W; ++j) sums[r][j] = Type<T>::multiply(one, v + j * 16 * P, sums[r][j]);
            }
        }
    }
    ORCA_UNROLL for (int r = 0; r < R; ++r)
        ORCA_UNROLL for (int j = 0; j < W; ++j) store(out + r * padded + column + j * 16, sums[r][j]);
}

template <class T, int R>
void values_of(const T* shares, const T* const* values, int positions, int padded, std::int64_t ahead, float* out) {
    int column = 0;
    for (; column + 16 * WIDE <= padded; column += 16 * WIDE) {
        gather_values<T, R, WIDE>(shares, values, positions, padded, column, ahead, out);
    }
    for (; column < padded; column += 16) gather_values<T, R, 1>(shares, values, positions, padded, column, ahead, out);
}

// One tile of queries against one kv head, from its first span to its last.
template <class T>
class TileWork {
public:
    // ahead: whether the next head follows
    TileWork(const Attention& g, const Tile& tile, int head, bool ahead, void* scratch)
        : g_(g), tile_(tile), head_(head), ahead_(ahead), group_(g.heads / g.kv_heads), rows_(tile.count * group_),
          padded_(static_cast<int>(ceil_div(g.d, 16) * 16)) {
        float* at = static_cast<float*>(scratch);
        scores_ = at;
        at += kRows * kSpan;
        here_ = at;
        at += kRows * padded_;
        sums_ = at;
        at += rows_ * padded_;
        peaks_ = at;
        at += rows_;
        masses_ = at;
        at += rows_;
        shares_ = reinterpret_cast<T*>(at);
    }

    static std::size_t bytes(const Attention& g, int most) {
        const std::size_t rows = static_cast<std::size_t>(most) * (g.heads / g.kv_heads), padded = ceil_div(g.d, 16) * 16;
        return sizeof(float) * (rows * (padded + 2) + kRows * (kSpan + padded)) + sizeof(T) * kRows * kSpan + 64;
    }

    void run() {
        for (int r = 0; r < rows_; ++r) peaks_[r] = -__builtin_inff();
        std::fill(masses_, masses_ + rows_, 0.0f);
        std::fill(sums_, sums_ + rows_ * padded_, 0.0f);
        const int last = tile_.start + tile_.count - 1;
        int span = g_.window > 0 ? std::max(0, tile_.start - g_.window + 1) / static_cast<int>(kSpan) : 0;
        for (; span * kSpan <= last; ++span) meet(span * static_cast<int>(kSpan), last);
        for (int r = 0; r < rows_; ++r) {
            T* out = static_cast<T*>(g_.out) + row_of(r) * g_.d;
            const Vec inverse = set1(1.0f / masses_[r]);
            for (int i = 0; i < g_.d; i += 16) store_some(out + i, load(sums_ + r * padded_ + i) * inverse, g_.d - i);
        }
    }

private:
    // Of one head of one group.
    std::int64_t key_size() const { return ceil_div(g_.d, Type<T>::PAIR) * Type<T>::PAIR * kGroup; }
    std::int64_t value_size() const { return padded_ * kGroup; }
    int position(int r) const { return tile_.start + r / group_; }
    std::int64_t row_of(int r) const {
        return static_cast<std::int64_t>(tile_.first + r / group_) * g_.heads + head_ * group_ + r % group_;
    }

    void meet(int start, int last) {
        const int positions = std::min<int>(kSpan, last + 1 - start);
        const int groups = static_cast<int>(ceil_div(positions, kGroup));
        const T* keys[kGroups];
        const T* values[kGroups];
        find(start, groups, keys, values);
        for (int r = 0; r < rows_; r += kRows) {
            switch (std::min(kRows, rows_ - r)) {
                case 1: rows_meet<1>(r, start, positions, groups, keys, values); break;
                case 2: rows_meet<2>(r, start, positions, groups, keys, values); break;
                case 3: rows_meet<3>(r, start, positions, groups, keys, values); break;
                case 4: rows_meet<4>(r, start, positions, groups, keys, values); break;
                case 5: rows_meet<5>(r, start, positions, groups, keys, values); break;
                default: rows_meet<6>(r, start, positions, groups, keys, values); break;
            }
        }
    }

    void find(int start, int groups, const T** keys, const T** values) const {
        const std::int32_t* table = g_.tables + tile_.table;
        for (int i = 0; i < groups; ++i) {
            const int at = start + i * static_cast<int>(kGroup);
            const std::int64_t slot = static_cast<std::int64_t>(table[at / g_.block_size]) * g_.block_size + at % g_.block_size;
            const std::int64_t place = slot / kGroup * g_.kv_heads + head_;
            keys[i] = static_cast<const T*>(g_.k_cache) + place * key_size();
            values[i] = static_cast<const T*>(g_.v_cache) + place * value_size();
        }
    }

    template <int R>
    void rows_meet(int r0, int start, int positions, int groups, const T** keys, const T** values) {
        const T* queries[R];
        for (int r = 0; r < R; ++r) queries[r] = static_cast<const T*>(g_.q) + row_of(r0 + r) * g_.d;
        // The next head's keys and values lie behind this one's, group by group.
        const bool ahead = ahead_ && r0 == 0;
        score<T, R>(queries, keys, groups, g_.d, g_.scale, ahead ? key_size() : 0, scores_);
        bool any = false;
        float peaks[R];
        for (int r = 0; r < R; ++r) any |= soften(r, position(r0 + r), start, groups, &peaks[r]);
        if (!any) return;
        values_of<T, R>(shares_, values, positions, padded_, ahead ? value_size() : 0, here_);
        for (int r = 0; r < R; ++r) merge(r0 + r, peaks[r], mass_here_[r], here_ + r * padded_);
    }

    // The scores of a row become shares relative to the row's own greatest; false if it sees none of the span.
    bool soften(int r, int own, int start, int groups, float* peak) {
        float* scores = scores_ + r * kSpan;
        T* shares = shares_ + r * kSpan;
        const int end = std::min<int>(groups * static_cast<int>(kGroup), own + 1 - start);
        const int begin = g_.window > 0 ? std::max(0, own - g_.window + 1 - start) : 0;
        mass_here_[r] = 0.0f;
        *peak = -__builtin_inff();
        if (end <= begin) {
            std::fill(shares, shares + groups * kGroup, T{});
            return false;
        }
        const Vec nothing = set1(-__builtin_inff());
        Vec highest = nothing;
        for (int at = 0; at < groups * kGroup; at += 16) {
            Vec x = load(scores + at);
            if (g_.softcap != 0.0f) x = set1(g_.softcap) * tanh(x / set1(g_.softcap));
            x = first(end - at, x, nothing);
            x = first(begin - at, nothing, x);
            store(scores + at, x);
            highest = max(highest, x);
        }
        *peak = largest(highest);
        const Vec pivot = set1(*peak);
        Vec mass = zero();
        for (int at = 0; at < groups * kGroup; at += 16) {
            Vec x = exp(load(scores + at) - pivot);
            x = first(end - at, x, zero());
            x = first(begin - at, zero(), x);
            mass = mass + x;
            Type<T>::store16(shares + at, x);
        }
        mass_here_[r] = sum(mass);
        return true;
    }

    void merge(int row, float peak, float mass, const float* here) {
        if (mass == 0.0f) return;
        const float higher = peaks_[row] > peak ? peaks_[row] : peak;
        float factors[16] = {};
        factors[0] = peaks_[row] - higher;
        factors[1] = peak - higher;
        store(factors, exp(load(factors)));
        const Vec keep = set1(factors[0]), add = set1(factors[1]);
        float* sums = sums_ + row * padded_;
        for (int i = 0; i < padded_; i += 16) store(sums + i, fma(load(here + i), add, load(sums + i) * keep));
        masses_[row] = masses_[row] * factors[0] + mass * factors[1];
        peaks_[row] = higher;
    }

    const Attention& g_;
    const Tile& tile_;
    int head_;
    bool ahead_;
    int group_, rows_, padded_;
    float* scores_;
    float* here_;
    float* sums_;
    float* peaks_;
    float* masses_;
    T* shares_;
    float mass_here_[kRows];
};

template <class T>
void attention(Pool& pool, const Attention& g) {
    int most = 0;
    for (std::int64_t i = 0; i < g.num_tiles; ++i) most = std::max(most, g.tiles[i].count);
    const std::size_t bytes = TileWork<T>::bytes(g, most);
    // Neighbouring heads of a tile go to one thread where there is work enough: each fetches what the next one reads.
    const std::int64_t most_heads = g.num_tiles * g.kv_heads / (pool.threads() * 4);
    const int together = static_cast<int>(std::clamp<std::int64_t>(most_heads, 1, g.kv_heads));
    const std::int64_t parts = ceil_div(g.kv_heads, together);
    pool.run(static_cast<std::uint32_t>(g.num_tiles * parts), [&](std::uint32_t item, int thread) {
        const int begin = static_cast<int>(item % parts) * together, end = std::min(g.kv_heads, begin + together);
        for (int head = begin; head < end; ++head) {
            TileWork<T>(g, g.tiles[item / parts], head, head + 1 < end, pool.scratch(thread, bytes)).run();
        }
    });
}

}  // namespace ORCA_ISA
}  // namespace orca
