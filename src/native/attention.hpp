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
constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// How keys and values lie in the caches (`Cache`), and what meets them (`Operand`): queries and shares.
//
// In the dtype of the activations, operands are as they come.
template <class T>
struct Plain {
    static constexpr bool BYTES = false;
    static constexpr int PAIR = Type<T>::PAIR, TURNS = Type<T>::TURNS;
    using Cache = T;
    using Operand = typename Type<T>::Left;
    using Sum = Vec;
    static Sum nothing() { return zero(); }
    static auto broadcast(const Operand* p, int turn) { return Type<T>::broadcast(p, turn); }
    static auto take(const Cache* p, int turn) { return Type<T>::take(p, turn); }
    template <class One, class Right>
    static Sum multiply(One a, Right b, Sum c) { return Type<T>::multiply(a, b, c); }
    static Vec floats(Sum a) { return a; }
};

// In 8 bits, operands are brought to 16: both are whole numbers, so that sums are exact in whatever order, and operands
// lose less than by rounding to bfloat16. What one of them means (a scale) is multiplied in behind the sum; the scales
// of values, which differ from position to position, go into the shares before.
struct Bytes {
    static constexpr bool BYTES = true;
    static constexpr int PAIR = 2, TURNS = 1;
    using Cache = std::int8_t;
    using Operand = std::int16_t;
    using Sum = Ints;
    static Sum nothing() { return no_ints(); }
    static Two broadcast(const Operand* p, int) { return broadcast_two(p); }
    static const Cache* take(const Cache* p, int) { return p; }
    static Sum multiply(Two a, const Cache* b, Sum c) { return multiply_shorts(a, b, c); }
    static Vec floats(Sum a) { return to_floats(a); }
};
constexpr float kMostOfQuery = 16383.0f;  // 16383 * 128 * kLargestHead fits a sum
constexpr float kMostOfShare = 32767.0f;  // 32767 * 128 * kSpan too

// What will be read next, brought nearer some cache lines at a time between the steps of other work: as many as a step
// reads, of keys or values.
struct Fetch {
    const void* parts[2 * kGroups];
    std::int64_t bytes[2 * kGroups];
    int count = 0, part = 0;
    std::int64_t at = 0;

    void add(const void* data, std::int64_t size) {
        parts[count] = data;
        bytes[count++] = size;
    }
    template <int lines>
    void some() {
        if (part == count) return;
        const char* next = static_cast<const char*>(parts[part]) + at;
        ORCA_UNROLL for (int line = 0; line < lines; ++line) __builtin_prefetch(next + line * 64, 0, 2);
        at += lines * 64;
        if (at < bytes[part]) return;
        at = 0;
        ++part;
    }
};

inline Vec scales_behind(const void* data) { return load(static_cast<const float*>(data)); }

// scores [R][kSpan] of R query rows, each times its factor, against `count` groups of keys.
template <class S, int R>
ORCA_APART void score(const typename S::Operand* const* queries, const float* factors, const typename S::Cache* const* keys, int count,
           int d, Fetch& fetch, float* scores) {
    constexpr int P = S::PAIR, N = wide_of(R);
    for (int group = 0; group < count; group += N) {
        typename S::Sum sums[R][N];
        const typename S::Cache* k[N];
        for (int j = 0; j < N; ++j) k[j] = keys[std::min(group + j, count - 1)];
        ORCA_UNROLL for (int r = 0; r < R; ++r)
            ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = S::nothing();
        for (int i = 0; i < d; i += P) {
            fetch.some<N>();
            ORCA_UNROLL for (int turn = 0; turn < S::TURNS; ++turn) {
                decltype(S::take(k[0], turn)) other[N];
                ORCA_UNROLL for (int j = 0; j < N; ++j) other[j] = S::take(k[j] + i * kGroup, turn);
                ORCA_UNROLL for (int r = 0; r < R; ++r) {
                    const auto one = S::broadcast(queries[r] + i, turn);
                    ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = S::multiply(one, other[j], sums[r][j]);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < N && group + j < count; ++j) {
                Vec factor = set1(factors[r]);
                if constexpr (S::BYTES) factor = factor * scales_behind(k[j] + ceil_div(d, P) * P * kGroup);
                store(scores + r * kSpan + (group + j) * kGroup, S::floats(sums[r][j]) * factor);
            }
    }
}

// out [R][padded] += shares [R][kSpan] times the values of the first `positions` positions; W vectors at a time.
// factors: what a row's shares are multiples of, of 8 bits.
template <class S, int R, int W>
ORCA_APART void gather_values(const typename S::Operand* shares, const float* factors, const typename S::Cache* const* values,
                   int positions, int padded, int column, Fetch& fetch, float* out) {
    constexpr int P = S::PAIR;
    typename S::Sum sums[R][W];
    ORCA_UNROLL for (int r = 0; r < R; ++r)
        ORCA_UNROLL for (int j = 0; j < W; ++j) sums[r][j] = S::nothing();
    for (int group = 0; group * kGroup < positions; ++group) {
        const int end = std::min<int>(kGroup, positions - group * kGroup);
        const typename S::Cache* v = values[group] + column * P;
        const typename S::Operand* share = shares + group * kGroup;
        for (int at = 0; at < end; at += P, v += padded * P, share += P) {
            fetch.some<wide_of(R)>();
            ORCA_UNROLL for (int turn = 0; turn < S::TURNS; ++turn) {
                decltype(S::take(v, turn)) other[W];
                ORCA_UNROLL for (int j = 0; j < W; ++j) other[j] = S::take(v + j * 16 * P, turn);
                ORCA_UNROLL for (int r = 0; r < R; ++r) {
                    const auto one = S::broadcast(share + r * kSpan, turn);
                    ORCA_UNROLL for (int j = 0; j < W; ++j) sums[r][j] = S::multiply(one, other[j], sums[r][j]);
                }
            }
        }
    }
    ORCA_UNROLL for (int r = 0; r < R; ++r)
        ORCA_UNROLL for (int j = 0; j < W; ++j) {
            Vec all = S::floats(sums[r][j]);
            if constexpr (S::BYTES) all = all * set1(factors[r]);
            store(out + r * padded + column + j * 16, all);
        }
}

template <class S, int R>
void values_of(const typename S::Operand* shares, const float* factors, const typename S::Cache* const* values,
               int positions, int padded, Fetch& fetch, float* out) {
    constexpr int N = wide_of(R);
    int column = 0;
    for (; column + 16 * N <= padded; column += 16 * N) {
        gather_values<S, R, N>(shares, factors, values, positions, padded, column, fetch, out);
    }
    for (; column < padded; column += 16) {
        gather_values<S, R, 1>(shares, factors, values, positions, padded, column, fetch, out);
    }
}

// One piece of work: a tile of queries against one kv head.
struct Piece {
    const Tile* tile;
    int head;
};

// A piece from its first span to its last. T: of activations; S: `Plain<T>` or `Bytes`.
template <class T, class S>
class TileWork {
    using Cache = typename S::Cache;
    using Operand = typename S::Operand;
    static constexpr bool COPIES = !std::is_same_v<Operand, T>;  // queries

public:
    // next: what this thread will most likely do then; its tile may be null
    TileWork(const Attention& g, Piece piece, Piece next, void* scratch)
        : g_(g), tile_(*piece.tile), head_(piece.head), next_(next), group_(g.heads / g.kv_heads),
          rows_(piece.tile->count * group_), padded_(static_cast<int>(ceil_div(g.d, 16) * 16)) {
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
        factors_ = at;
        at += rows_;
        shares_ = reinterpret_cast<Operand*>(at);
        queries_ = shares_ + kRows * kSpan;
    }

    static std::size_t bytes(const Attention& g, int most) {
        const std::size_t rows = static_cast<std::size_t>(most) * (g.heads / g.kv_heads), padded = ceil_div(g.d, 16) * 16;
        return sizeof(float) * (rows * (padded + 3) + kRows * (kSpan + padded)) +
               sizeof(Operand) * (kRows * kSpan + (COPIES ? rows * padded : 0)) + 64;
    }

    void run() {
        begin();
        for (int r = 0; r < rows_; ++r) factors_[r] = g_.scale * prepare(r);
        for (int start = first_span(tile_); start < end(tile_); start += kSpan) meet(start, nullptr);
        finish();
    }

    // Some spans only, from the one that begins at `start` on: what comes of each goes by itself into parts [count].
    void run_apart(int start, int count, float* parts) {
        for (int r = 0; r < rows_; ++r) factors_[r] = g_.scale * prepare(r);
        for (int i = 0; i < count; ++i) meet(start + i * static_cast<int>(kSpan), parts + i * part_size());
    }

    // All spans, from what has come of each: merged in the same order as by `run`.
    void join(const float* parts) {
        begin();
        for (int i = 0; i < spans(g_, tile_); ++i, parts += part_size())
            for (int r = 0; r < rows_; ++r) {
                const float* part = parts + r * (padded_ + 2);
                merge(r, part[0], part[1], part + 2);
            }
        finish();
    }

    static int spans(const Attention& g, const Tile& tile) {
        return static_cast<int>(ceil_div(end(tile) - first_span(g, tile), kSpan));
    }
    // Values of what comes of a span: for each row its peak, its mass and its sums.
    std::int64_t part_size() const { return std::int64_t{rows_} * (padded_ + 2); }
    static std::int64_t part_size(const Attention& g, const Tile& tile) {
        return std::int64_t{tile.count} * (g.heads / g.kv_heads) * (ceil_div(g.d, 16) * 16 + 2);
    }
    static int first_span(const Attention& g, const Tile& tile) {
        return g.window > 0 ? std::max(0, tile.start - g.window + 1) / static_cast<int>(kSpan) * static_cast<int>(kSpan) : 0;
    }

private:
    void begin() {
        for (int r = 0; r < rows_; ++r) peaks_[r] = -__builtin_inff();
        std::fill(masses_, masses_ + rows_, 0.0f);
        std::fill(sums_, sums_ + rows_ * padded_, 0.0f);
    }

    void finish() {
        for (int r = 0; r < rows_; ++r) {
            T* out = static_cast<T*>(g_.out) + row_of(r) * g_.d;
            const Vec inverse = set1(1.0f / masses_[r]);
            for (int i = 0; i < g_.d; i += 16) store_some(out + i, load(sums_ + r * padded_ + i) * inverse, g_.d - i);
        }
    }

    // Of one head of one group, in values of the cache.
    std::int64_t key_size() const { return key_bytes(g_.d, S::PAIR, sizeof(Cache), S::BYTES) / sizeof(Cache); }
    std::int64_t value_size() const { return group_value_bytes(g_.d, sizeof(Cache), S::BYTES) / sizeof(Cache); }
    // Positions that a tile's queries see: from the start of a span, and to the end.
    int first_span(const Tile& tile) const { return first_span(g_, tile); }
    static int end(const Tile& tile) { return tile.start + tile.count; }
    static int seen(const Tile& tile, int start) { return std::min<int>(kSpan, end(tile) - start); }
    int position(int r) const { return tile_.start + r / group_; }
    std::int64_t row_of(int r) const {
        return static_cast<std::int64_t>(tile_.first + r / group_) * g_.heads + head_ * group_ + r % group_;
    }

    const T* query(int r) const { return static_cast<const T*>(g_.q) + row_of(r) * g_.d; }

    // Makes an operand of a query; returns what one of its numbers means.
    float prepare(int r) {
        if constexpr (S::BYTES) {
            const float most = largest_size(query(r), g_.d);
            const Vec factor = set1(most > kNothing ? kMostOfQuery / most : 0.0f);
            for (int i = 0; i < padded_; i += 16) {
                store_shorts(queries_ + r * padded_ + i, load_some(query(r) + i, g_.d - i) * factor);
            }
            return most / kMostOfQuery;
        } else if constexpr (COPIES) {
            for (int i = 0; i < padded_; i += 16) store(queries_ + r * padded_ + i, load_some(query(r) + i, g_.d - i));
        }
        return 1.0f;
    }

    // apart: where what comes of the span goes; null: it is merged into what came before.
    void meet(int start, float* apart) {
        const int positions = seen(tile_, start);
        const int groups = static_cast<int>(ceil_div(positions, kGroup));
        const Cache* keys[kGroups];
        const Cache* values[kGroups];
        find({&tile_, head_}, start, groups, keys, values);
        Fetch fetch = behind(start);
        for (int r = 0; r < rows_; r += kRows) {
            switch (std::min(kRows, rows_ - r)) {
                case 1: rows_meet<1>(r, start, positions, groups, keys, values, fetch, apart); break;
                case 2: rows_meet<2>(r, start, positions, groups, keys, values, fetch, apart); break;
                case 3: rows_meet<3>(r, start, positions, groups, keys, values, fetch, apart); break;
                case 4: rows_meet<4>(r, start, positions, groups, keys, values, fetch, apart); break;
                case 5: rows_meet<5>(r, start, positions, groups, keys, values, fetch, apart); break;
                default: rows_meet<6>(r, start, positions, groups, keys, values, fetch, apart); break;
            }
        }
    }

    // The span behind the one that begins at `start`: of this piece, or the first of the next.
    Fetch behind(int start) const {
        Fetch fetch;
        Piece piece{&tile_, head_};
        start += kSpan;
        if (start >= end(tile_)) {
            piece = next_;
            if (piece.tile == nullptr) return fetch;
            start = first_span(*piece.tile);
        }
        const int groups = static_cast<int>(ceil_div(seen(*piece.tile, start), kGroup));
        const Cache* keys[kGroups];
        const Cache* values[kGroups];
        find(piece, start, groups, keys, values);
        for (int i = 0; i < groups; ++i) fetch.add(keys[i], key_size() * sizeof(Cache));
        for (int i = 0; i < groups; ++i) fetch.add(values[i], value_size() * sizeof(Cache));
        return fetch;
    }

    void find(Piece piece, int start, int groups, const Cache** keys, const Cache** values) const {
        const std::int32_t* table = g_.tables + piece.tile->table;
        for (int i = 0; i < groups; ++i) {
            const int at = start + i * static_cast<int>(kGroup);
            const std::int64_t slot = static_cast<std::int64_t>(table[at / g_.block_size]) * g_.block_size + at % g_.block_size;
            const std::int64_t place = slot / kGroup * g_.kv_heads + piece.head;
            keys[i] = static_cast<const Cache*>(g_.k_cache) + place * key_size();
            values[i] = static_cast<const Cache*>(g_.v_cache) + place * value_size();
        }
    }

    template <int R>
    void rows_meet(int r0, int start, int positions, int groups, const Cache** keys, const Cache** values, Fetch& fetch,
                   float* apart) {
        const Operand* queries[R];
        for (int r = 0; r < R; ++r) {
            if constexpr (COPIES) {
                queries[r] = queries_ + (r0 + r) * padded_;
            } else {
                queries[r] = query(r0 + r);
            }
        }
        score<S, R>(queries, factors_ + r0, keys, groups, g_.d, fetch, scores_);
        bool any = false;
        float peaks[R];
        for (int r = 0; r < R; ++r) any |= soften(r, r0 + r, start, groups, values, fetch, &peaks[r]);
        if (any) values_of<S, R>(shares_, units_, values, positions, padded_, fetch, here_);
        for (int r = 0; r < R; ++r) {
            const float* here = here_ + r * padded_;
            if (apart == nullptr) {
                merge(r0 + r, peaks[r], mass_here_[r], here);
            } else {
                float* part = apart + (r0 + r) * (padded_ + 2);
                part[0] = peaks[r];
                part[1] = mass_here_[r];
                std::copy(here, here + padded_, part + 2);
            }
        }
    }

    // The scores of a row (the r-th of those at hand) become shares relative to the row's own greatest; false if it sees
    // none of the span.
    bool soften(int r, int row, int start, int groups, const Cache* const* values, Fetch& fetch, float* peak) {
        const int own = position(row);
        float* scores = scores_ + r * kSpan;
        Operand* shares = shares_ + r * kSpan;
        const int end = std::min<int>(groups * static_cast<int>(kGroup), own + 1 - start);
        const int begin = g_.window > 0 ? std::max(0, own - g_.window + 1 - start) : 0;
        mass_here_[r] = 0.0f;
        units_[r] = 0.0f;
        *peak = -__builtin_inff();
        if (end <= begin) {
            std::fill(shares, shares + groups * kGroup, Operand{});
            return false;
        }
        const Vec nothing = set1(-__builtin_inff());
        const float* slope = g_.slopes == nullptr ? nullptr : g_.slopes + head_ * group_ + row % group_;
        Vec highest = nothing;
        for (int at = 0; at < groups * kGroup; at += 16) {
            Vec x = load(scores + at);
            if (g_.softcap != 0.0f) x = set1(g_.softcap) * tanh(x / set1(g_.softcap));
            if (slope != nullptr) x = fma(set1(*slope), set1(static_cast<float>(start + at - own)) + load(kLanes), x);
            x = first(end - at, x, nothing);
            x = first(begin - at, nothing, x);
            store(scores + at, x);
            highest = max(highest, x);
        }
        *peak = largest(highest);
        const Vec pivot = set1(*peak);
        Vec mass = zero(), greatest = zero();
        for (int at = 0; at < groups * kGroup; at += 16) {
            fetch.some<4>();
            Vec x = exp(load(scores + at) - pivot);
            x = first(end - at, x, zero());
            x = first(begin - at, zero(), x);
            mass = mass + x;
            if constexpr (S::BYTES) {
                x = x * scales_behind(values[at / kGroup] + padded_ * kGroup);
                x = first(end - at, x, zero());  // again: a scale that no one has written may be NaN
                x = first(begin - at, zero(), x);
                mass = fma(x, zero(), mass);  // and if one that was written is, the row must become so
                store(scores + at, x);
                greatest = max(greatest, x);
            } else {
                Type<T>::store_left16(shares + at, x);
            }
        }
        mass_here_[r] = sum(mass);
        if constexpr (S::BYTES) {
            const float most = largest(greatest);
            const Vec factor = set1(most > kNothing ? kMostOfShare / most : 0.0f);
            for (int at = 0; at < groups * kGroup; at += 16) store_shorts(shares + at, load(scores + at) * factor);
            units_[r] = most / kMostOfShare;
        }
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
    Piece next_;
    int group_, rows_, padded_;
    float* scores_;
    float* here_;
    float* sums_;
    float* peaks_;
    float* masses_;
    float* factors_;    // [rows]: what scores are multiplied with
    Operand* shares_;
    Operand* queries_;  // [rows][padded], if copied
    float mass_here_[kRows];
    float units_[kRows];  // what one of a row's shares means, of 8 bits
};

// Few pieces, as of one long request on many threads: their spans are shared out, and what comes of each is merged when all
// are there. The bits are those of a piece that walks its spans itself.
template <class T, class S>
void attention_by_spans(Pool& pool, const Attention& g, std::size_t bytes) {
    using Of = TileWork<T, S>;
    struct Share {
        Piece piece;
        int start, count;
        std::int64_t at;  // of its first part
    };
    std::int64_t all = 0;
    for (std::int64_t i = 0; i < g.num_tiles; ++i) all += Of::spans(g, g.tiles[i]) * g.kv_heads;
    const int most = static_cast<int>(ceil_div(all, 4 * pool.threads()));
    std::int64_t at = 0, count = 0;
    const auto each_share = [&](const auto& take) {
        at = 0;
        for (std::int64_t i = 0; i < g.num_tiles; ++i) {
            const Tile& tile = g.tiles[i];
            const int spans = Of::spans(g, tile);
            for (int head = 0; head < g.kv_heads; ++head)
                for (int first = 0; first < spans; first += most) {
                    const int some = std::min(most, spans - first);
                    take(Share{{&tile, head}, Of::first_span(g, tile) + first * static_cast<int>(kSpan), some, at});
                    at += some * Of::part_size(g, tile);
                }
        }
    };
    each_share([&](const Share&) { ++count; });
    char* shared = static_cast<char*>(pool.shared(at * sizeof(float) + count * sizeof(Share)));
    float* parts = reinterpret_cast<float*>(shared + count * sizeof(Share));
    Share* shares = reinterpret_cast<Share*>(shared);
    each_share([&](const Share& share) { *shares++ = share; });
    shares -= count;
    pool.run(static_cast<std::uint32_t>(count), [&](std::uint32_t item, int thread) {
        const Share& share = shares[item];
        Of(g, share.piece, {nullptr, 0}, pool.scratch(thread, bytes)).run_apart(share.start, share.count, parts + share.at);
    });
    pool.run(static_cast<std::uint32_t>(g.num_tiles * g.kv_heads), [&](std::uint32_t item, int thread) {
        const Tile& tile = g.tiles[item / g.kv_heads];
        const int head = static_cast<int>(item % g.kv_heads);
        std::int64_t before = 0;
        for (const Tile* other = g.tiles; other != &tile; ++other)
            before += Of::spans(g, *other) * Of::part_size(g, *other) * g.kv_heads;
        before += Of::spans(g, tile) * Of::part_size(g, tile) * head;
        Of(g, {&tile, head}, {nullptr, 0}, pool.scratch(thread, bytes)).join(parts + before);
    });
}

template <class T, class S>
void attention_over(Pool& pool, const Attention& g) {
    int most = 0, longest = 0;
    for (std::int64_t i = 0; i < g.num_tiles; ++i) {
        most = std::max(most, g.tiles[i].count);
        longest = std::max(longest, TileWork<T, S>::spans(g, g.tiles[i]));
    }
    const std::size_t bytes = TileWork<T, S>::bytes(g, most);
    const int threads = pool.threads();
    if (threads > 1 && longest > 1 && g.num_tiles * g.kv_heads < 2 * threads) return attention_by_spans<T, S>(pool, g, bytes);
    // Neighbouring heads of a tile go to one thread where there is work enough: each fetches what the next one reads.
    const std::int64_t most_heads = g.num_tiles * g.kv_heads / (threads * 4);
    const int together = static_cast<int>(std::clamp<std::int64_t>(most_heads, 1, g.kv_heads));
    const std::int64_t parts = ceil_div(g.kv_heads, together), items = g.num_tiles * parts;
    pool.run(static_cast<std::uint32_t>(items), [&](std::uint32_t item, int thread) {
        const int begin = static_cast<int>(item % parts) * together, end = std::min(g.kv_heads, begin + together);
        const std::int64_t later = static_cast<std::int64_t>(item) + threads;
        const Piece last{later < items ? &g.tiles[later / parts] : nullptr, static_cast<int>(later % parts) * together};
        const Tile* tile = &g.tiles[item / parts];
        for (int head = begin; head < end; ++head) {
            const Piece next = head + 1 < end ? Piece{tile, head + 1} : last;
            TileWork<T, S>(g, {tile, head}, next, pool.scratch(thread, bytes)).run();
        }
    });
}

template <class T>
void attention(Pool& pool, const Attention& g) {
    if (g.bytes) {
        attention_over<T, Bytes>(pool, g);
    } else {
        attention_over<T, Plain<T>>(pool, g);
    }
}

}  // namespace ORCA_ISA
}  // namespace orca
