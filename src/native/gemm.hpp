// Products with packed weights. Every element of the result is summed over K by one accumulator in one order, for one
// row as for five hundred.
#pragma once

#include <algorithm>

#include "kernels.hpp"
#include "vec.hpp"

namespace orca {
namespace ORCA_ISA {

constexpr int kRows = 6;                  // rows of a register tile
constexpr std::int64_t kChunk = 16;       // panels that one piece of work takes
constexpr std::int64_t kAhead = 8 * kRows;  // up to so many rows, memory is the limit and the next block is fetched early

inline Vec activate(Activation how, Vec x) {
    switch (how) {
        case Activation::none: return x;
        case Activation::silu: return x * sigmoid(x);
        case Activation::gelu: return set1(0.5f) * x * (set1(1.0f) + erf(x * set1(0.70710678f)));
        case Activation::gelu_tanh: {
            const Vec inner = fma(x * x * x, set1(0.044715f), x) * set1(0.79788456f);
            return set1(0.5f) * x * (set1(1.0f) + tanh(inner));
        }
        case Activation::gelu_quick: return x * sigmoid(x * set1(1.702f));
        case Activation::relu: return max(x, zero());
        case Activation::relu2: {
            const Vec kept = max(x, zero());
            return kept * kept;
        }
        case Activation::tanh: return tanh(x);
        case Activation::sigmoid: return sigmoid(x);
    }
    return x;
}

template <class T>
Vec load_some(const T* p, std::int64_t n) {
    if (n >= 16) return Type<T>::load16(p);
    T some[16] = {};
    std::copy(p, p + n, some);
    return Type<T>::load16(some);
}
template <class T>
void store_some(T* p, Vec a, std::int64_t n) {
    if (n >= 16) return Type<T>::store16(p, a);
    T some[16];
    Type<T>::store16(some, a);
    std::copy(some, some + n, p);
}

// What to bring into the cache while computing: `lines` cache lines in every 64 steps, from `next` on.
struct Ahead {
    const char* next;
    int lines;
    // What is left to bring after so many steps.
    Ahead after(std::int64_t steps) const { return {next + steps * lines / 64 * 64, lines}; }
};

// out [R][64] = a [steps][R][PAIR] times b [steps][64][PAIR].
template <class T, int R>
void tile(const T* a, const T* b, std::int64_t steps, float* out, Ahead ahead) {
    constexpr int P = Type<T>::PAIR;
    for (int column = 0; column < 4; column += WIDE) {
        Vec sums[R][WIDE];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < WIDE; ++j) sums[r][j] = zero();
        const T* left = a;
        const T* right = b + column * 16 * P;
        int due = 0;
        for (std::int64_t s = 0; s < steps; ++s, left += R * P, right += kBlock * P) {
            if (column == 0) {
                for (due += ahead.lines; due >= 64; due -= 64, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
            }
            for (int r = 0; r < R; ++r) {
                const auto one = Type<T>::broadcast(left + r * P);
                for (int j = 0; j < WIDE; ++j) sums[r][j] = Type<T>::multiply(one, right + j * 16 * P, sums[r][j]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < WIDE; ++j) store(out + r * kBlock + (column + j) * 16, sums[r][j]);
    }
}

// The same over all of K, as a balanced tree over its segments. sums: room for [5][R][64].
template <class T, int R>
void product(const T* a, const T* b, std::int64_t steps, int segments, float* sums, Ahead ahead) {
    constexpr int P = Type<T>::PAIR;
    const std::int64_t part = steps / segments;
    int depth = 0;
    for (int segment = 0; segment < segments; ++segment) {
        const std::int64_t at = segment * part;
        tile<T, R>(a + at * R * P, b + at * kBlock * P, part, sums + depth * R * kBlock, ahead.after(at));
        ++depth;
        for (int done = segment; done & 1; done >>= 1) {
            --depth;
            float* into = sums + (depth - 1) * R * kBlock;
            const float* from = into + R * kBlock;
            for (int i = 0; i < R * kBlock; i += 16) store(into + i, load(into + i) + load(from + i));
        }
    }
}

template <class T>
void product_of(int rows, const T* a, const T* b, std::int64_t steps, int segments, float* sums, Ahead ahead) {
    switch (rows) {
        case 1: return product<T, 1>(a, b, steps, segments, sums, ahead);
        case 2: return product<T, 2>(a, b, steps, segments, sums, ahead);
        case 3: return product<T, 3>(a, b, steps, segments, sums, ahead);
        case 4: return product<T, 4>(a, b, steps, segments, sums, ahead);
        case 5: return product<T, 5>(a, b, steps, segments, sums, ahead);
        default: return product<T, 6>(a, b, steps, segments, sums, ahead);
    }
}

// What happens to a tile [rows][64] on its way out.
template <class T>
void finish(const Gemm& g, const float* sums, std::int64_t row, int rows, std::int64_t block) {
    const std::int64_t width = g.gated ? kBlock / 2 : kBlock;
    const std::int64_t column = block * width;
    const std::int64_t columns = std::min(width, g.n - column);
    const float* bias = g.bias == nullptr ? nullptr : g.bias + block * kBlock;
    for (int r = 0; r < rows; ++r) {
        const float* from = sums + r * kBlock;
        for (std::int64_t j = 0; j < columns; j += 16) {
            Vec x = load(from + j);
            if (bias != nullptr) x = x + load(bias + j);
            x = activate(g.activation, x);
            if (g.gated) {
                Vec other = load(from + width + j);
                if (bias != nullptr) other = other + load(bias + width + j);
                x = x * other;
            }
            const std::int64_t at = column + j, left = columns - j;
            if (g.residual != nullptr) {
                x = x + load_some(static_cast<const T*>(g.residual) + (row + r) * g.n + at, left);
            }
            if (g.wide) {
                store_some(static_cast<float*>(g.out) + (row + r) * g.out_stride + at, x, left);
            } else {
                store_some(static_cast<T*>(g.out) + (row + r) * g.out_stride + at, x, left);
            }
        }
    }
}

// Rows of a panel are as equal as can be: 16 rows are 6, 5 and 5.
struct Panels {
    std::int64_t count, base, extra;
    explicit Panels(std::int64_t m) : count(ceil_div(m, kRows)), base(m / count), extra(m % count) {}
    std::int64_t first(std::int64_t panel) const { return panel * base + std::min(panel, extra); }
    int rows(std::int64_t panel) const { return static_cast<int>(base + (panel < extra)); }
};

// Rows [first, first + rows) of a as a panel [steps][rows][PAIR].
template <class T>
void make_panel(const Gemm& g, std::int64_t first, int rows, T* panel) {
    constexpr std::int64_t P = Type<T>::PAIR;
    const T* a = static_cast<const T*>(g.a) + first * g.a_stride;
    const std::int64_t whole = g.k / P;
    for (int r = 0; r < rows; ++r) {
        const T* from = a + r * g.a_stride;
        T* to = panel + r * P;
        for (std::int64_t s = 0; s < whole; ++s, to += rows * P) std::memcpy(to, from + s * P, P * sizeof(T));
        if (whole * P < g.k) {
            to[0] = from[whole * P];
            to[P - 1] = 0;
        }
    }
}

template <class T>
void gemm(Pool& pool, const Gemm& g) {
    constexpr std::int64_t P = Type<T>::PAIR;
    if (g.m == 0) return;
    const std::int64_t steps = ceil_div(g.k, P);
    const Panels panels(g.m);
    T* packed_a = static_cast<T*>(pool.shared(g.m * steps * P * sizeof(T)));
    const std::int64_t at_once = std::max<std::int64_t>(1, 8192 / (steps * P));
    pool.run(ceil_div(panels.count, at_once), [&](std::uint32_t item, int) {
        const std::int64_t end = std::min<std::int64_t>(panels.count, (item + 1) * at_once);
        for (std::int64_t p = item * at_once; p < end; ++p) {
            make_panel(g, panels.first(p), panels.rows(p), packed_a + panels.first(p) * steps * P);
        }
    });
    const std::int64_t blocks = ceil_div(g.n, g.gated ? kBlock / 2 : kBlock);
    const std::int64_t chunks = ceil_div(panels.count, kChunk);
    const std::int64_t block_size = steps * kBlock * P;
    const T* weights = static_cast<const T*>(g.packed);
    const int threads = pool.threads();
    pool.run(static_cast<std::uint32_t>(blocks * chunks), [&](std::uint32_t item, int) {
        const std::int64_t block = item / chunks, chunk = item % chunks;
        const T* b = weights + block * block_size;
        float sums[5 * kRows * kBlock];
        const std::int64_t begin = chunk * kChunk, end = std::min(panels.count, begin + kChunk);
        // The block that this thread will most likely get next, fetched bit by bit while it computes this one.
        const std::int64_t later = block + threads;
        const char* next = later < blocks ? reinterpret_cast<const char*>(weights + later * block_size)
                                          : static_cast<const char*>(g.then) + (later - blocks) * g.then_block;
        const bool early = g.m <= kAhead && (later < blocks || g.then != nullptr);
        // Spread over the panels, so that memory is never idle.
        const int lines = early ? static_cast<int>(ceil_div(64 * (kBlock * P * sizeof(T) / 64), panels.count)) : 0;
        Ahead ahead{next, lines};
        for (std::int64_t p = begin; p < end; ++p, ahead = ahead.after(steps)) {
            product_of<T>(panels.rows(p), packed_a + panels.first(p) * steps * P, b, steps, g.segments, sums, ahead);
            finish<T>(g, sums, panels.first(p), panels.rows(p), block);
        }
    });
}

inline std::int64_t column_of(std::int64_t row, int half) {
    if (half == 0) return row;
    constexpr std::int64_t width = kBlock / 2;
    return row / width * kBlock + row % width + (half == 2 ? width : 0);
}

template <class T>
void pack(Pool& pool, const Pack& w) {
    constexpr std::int64_t P = Type<T>::PAIR;
    const std::int64_t steps = ceil_div(w.k, P);
    const T* weight = static_cast<const T*>(w.weight);
    T* packed = static_cast<T*>(w.packed);
    pool.run(static_cast<std::uint32_t>(ceil_div(w.rows, 16)), [&](std::uint32_t item, int) {
        const std::int64_t end = std::min<std::int64_t>(w.rows, (item + 1) * 16);
        for (std::int64_t row = item * 16; row < end; ++row) {
            const std::int64_t column = column_of(w.first + row, w.half);
            T* to = packed + column / kBlock * steps * kBlock * P + column % kBlock * P;
            const T* from = weight + row * w.row_stride;
            for (std::int64_t k = 0; k < w.k; ++k) to[k / P * kBlock * P + k % P] = from[k * w.column_stride];
        }
    });
}

template <class T>
void gather(Pool& pool, const Gather& g) {
    constexpr std::int64_t P = Type<T>::PAIR;
    const std::int64_t steps = ceil_div(g.k, P);
    const T* packed = static_cast<const T*>(g.packed);
    pool.run(static_cast<std::uint32_t>(ceil_div(g.m, 16)), [&](std::uint32_t item, int) {
        const std::int64_t end = std::min<std::int64_t>(g.m, (item + 1) * 16);
        for (std::int64_t i = item * 16; i < end; ++i) {
            const std::int64_t column = g.ids[i];
            const T* from = packed + column / kBlock * steps * kBlock * P + column % kBlock * P;
            T* to = static_cast<T*>(g.out) + i * g.k;
            for (std::int64_t k = 0; k < g.k; ++k) to[k] = from[k / P * kBlock * P + k % P];
        }
    });
}

}  // namespace ORCA_ISA
}  // namespace orca
