// Products with packed weights. Every element of the result is summed over K by one accumulator in one order, for one
// row as for five hundred.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.hpp"
#include "vec.hpp"

namespace orca {
namespace ORCA_ISA {

constexpr int kMostSegments = 64;
constexpr int kMostGroup = 256;          // values that share a scale, of 4 bits
constexpr int kRows = 6;                  // rows of a register tile
constexpr std::int64_t kChunk = 16;       // panels that one piece of work takes
constexpr std::int64_t kShort = 16 << 10;  // bytes of a row that needs no packing
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

// Values that one step of a product takes from a row.
template <class W>
constexpr std::int64_t pair_of = 4 / sizeof(W);

// R rows of activations, `row` values apart; one step further is `step` values on.
template <class W>
struct Rows {
    const W* data;
    std::int64_t row, step;
};

// out [R][64] = a [R][steps][PAIR] times b [steps][64][PAIR].
template <class T, int R>
void tile(Rows<T> a, const T* b, std::int64_t steps, float* out, Ahead ahead) {
    constexpr int P = Type<T>::PAIR;
    for (int column = 0; column < 4; column += WIDE) {
        Vec sums[R][WIDE];
        ORCA_UNROLL for (int r = 0; r < R; ++r)
            ORCA_UNROLL for (int j = 0; j < WIDE; ++j) sums[r][j] = zero();
        const T* left = a.data;
        const T* right = b + column * 16 * P;
        int due = 0;
        for (std::int64_t s = 0; s < steps; ++s, left += a.step, right += kBlock * P) {
            if (column == 0) {
                for (due += ahead.lines; due >= 64; due -= 64, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
            }
            ORCA_UNROLL for (int r = 0; r < R; ++r) {
                const auto one = Type<T>::broadcast(left + r * a.row);
                ORCA_UNROLL for (int j = 0; j < WIDE; ++j) sums[r][j] = Type<T>::multiply(one, right + j * 16 * P, sums[r][j]);
            }
        }
        ORCA_UNROLL for (int r = 0; r < R; ++r)
            ORCA_UNROLL for (int j = 0; j < WIDE; ++j) store(out + r * kBlock + (column + j) * 16, sums[r][j]);
    }
}

// The same of steps [first, first + steps) of coded weights, decoded on the way: the shuffles run beside the products and
// cost nothing, not even by panels of six rows. patch: the block's next; moves along.
template <int R>
void tile_of_codes(Rows<bf16> a, const std::uint8_t* codes, std::int64_t first, std::int64_t steps, const Code& code,
                   const Patch*& patch, float* out, Ahead ahead);

#if defined(__AVX512BF16__)
template <int R>
void tile_of_codes(Rows<bf16> a, const std::uint8_t* codes, std::int64_t first, std::int64_t steps, const Code& code,
                   const Patch*& patch, float* out, Ahead ahead) {
    const Upper upper = load_upper(code.upper);
    Vec sums[R][4];
    ORCA_UNROLL for (int r = 0; r < R; ++r)
        ORCA_UNROLL for (int j = 0; j < 4; ++j) sums[r][j] = zero();
    int due = 0;
    std::int64_t patched = patch->step;
    const bf16* left = a.data;
    for (std::int64_t s = first; s < first + steps; ++s, left += a.step, codes += kCodedStep) {
        for (due += ahead.lines; due >= 64; due -= 64, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
        Words words = decode(codes, upper);
        if (__builtin_expect(s == patched, 0)) {
            alignas(64) bf16 some[kBlock * 2];
            store_words(some, words);
            for (; patch->step == s; ++patch) some[patch->at] = patch->word;
            patched = patch->step;
            words = load_words(some);
        }
        ORCA_UNROLL for (int r = 0; r < R; ++r) {
            const auto one = Type<bf16>::broadcast(left + r * a.row);
            ORCA_UNROLL for (int j = 0; j < 4; ++j) sums[r][j] = Type<bf16>::multiply(one, words.v[j], sums[r][j]);
        }
    }
    ORCA_UNROLL for (int r = 0; r < R; ++r)
        ORCA_UNROLL for (int j = 0; j < 4; ++j) store(out + r * kBlock + j * 16, sums[r][j]);
}
#endif

// The same of bytes: sums [R][64] of a [steps][R][4], which stand 128 too high, times b [steps][64][4].
template <int R>
void tile_of_bytes(const std::uint8_t* a, const std::int8_t* b, std::int64_t steps, const float* row_scales,
                   std::int64_t row_stride, const float* scales, const std::int32_t* above, float* out, Ahead ahead) {
    for (int column = 0; column < 4; column += WIDE) {
        Ints sums[R][WIDE];
        ORCA_UNROLL for (int r = 0; r < R; ++r)
            ORCA_UNROLL for (int j = 0; j < WIDE; ++j) sums[r][j] = no_ints();
        const std::uint8_t* left = a;
        const std::int8_t* right = b + column * 64;
        int due = 0;
        for (std::int64_t s = 0; s < steps; ++s, left += R * 4, right += kBlock * 4) {
            if (column == 0) {
                for (due += ahead.lines; due >= 64; due -= 64, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
            }
            ORCA_UNROLL for (int r = 0; r < R; ++r) {
                const Four one = broadcast_four(left + r * 4);
                ORCA_UNROLL for (int j = 0; j < WIDE; ++j) sums[r][j] = multiply_bytes(one, right + j * 64, sums[r][j]);
            }
        }
        ORCA_UNROLL for (int j = 0; j < WIDE; ++j) {
            const Ints off = load_ints(above + (column + j) * 16);
            const Vec scale = load(scales + (column + j) * 16);
            ORCA_UNROLL for (int r = 0; r < R; ++r) {
                const Vec of_both = scale * set1(row_scales[r * row_stride]);
                store(out + r * kBlock + (column + j) * 16, to_floats(sums[r][j] - off) * of_both);
            }
        }
    }
}

// The same of 4 bits: bytes a [steps][R][4] times `groups` groups of b, whose values stand 8 too high; below: -8 times the
// sums of a row's groups. From three rows on half as wide, so that the sums of a group and of all groups both stay in
// registers; with fewer it takes the whole width to have sums enough, each of which waits for itself.
template <int R>
void tile_of_halves(const std::int8_t* a, const std::uint8_t* b, std::int64_t groups, int group, const float* row_scales,
                    std::int64_t row_stride, const std::int32_t* below, std::int64_t below_stride, float* out,
                    Ahead ahead) {
    constexpr int N = WIDE > 1 && R > 2 ? WIDE / 2 : WIDE;
    const int pairs = group / 8;
    for (int column = 0; column < 4; column += N) {
        Vec totals[R][N];
        ORCA_UNROLL for (int r = 0; r < R; ++r)
            ORCA_UNROLL for (int j = 0; j < N; ++j) totals[r][j] = zero();
        const std::int8_t* left = a;
        const std::uint8_t* right = b + column * 64;
        int due = 0;
        for (std::int64_t g = 0; g < groups; ++g) {
            Ints sums[R][N];
            ORCA_UNROLL for (int r = 0; r < R; ++r)
                ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = set_ints(below[r * below_stride + g]);
            for (int s = 0; s < pairs; ++s, left += 2 * R * 4, right += kBlock * 4) {
                if (column == 0) {
                    for (due += 2 * ahead.lines; due >= 64; due -= 64, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
                }
                Halves lower[N], upper[N];
                ORCA_UNROLL for (int j = 0; j < N; ++j) lower[j] = lower_halves(right + j * 64);
                ORCA_UNROLL for (int j = 0; j < N; ++j) upper[j] = upper_halves(right + j * 64);
                ORCA_UNROLL for (int r = 0; r < R; ++r) {
                    const Four one = broadcast_four(reinterpret_cast<const std::uint8_t*>(left) + r * 4);
                    ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = multiply_halves(lower[j], one, sums[r][j]);
                }
                ORCA_UNROLL for (int r = 0; r < R; ++r) {
                    const Four one = broadcast_four(reinterpret_cast<const std::uint8_t*>(left) + (R + r) * 4);
                    ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = multiply_halves(upper[j], one, sums[r][j]);
                }
            }
            const bf16* scales = reinterpret_cast<const bf16*>(right - column * 64) + column * 16;
            right += kBlock * 2;
            ORCA_UNROLL for (int j = 0; j < N; ++j) {
                const Vec scale = load_bf16(scales + j * 16);
                ORCA_UNROLL for (int r = 0; r < R; ++r) totals[r][j] = fma(to_floats(sums[r][j]), scale, totals[r][j]);
            }
        }
        ORCA_UNROLL for (int r = 0; r < R; ++r) {
            const Vec scale = set1(row_scales[r * row_stride]);
            ORCA_UNROLL for (int j = 0; j < N; ++j) store(out + r * kBlock + (column + j) * 16, totals[r][j] * scale);
        }
    }
}

// What weights of 8 and of 4 bits are multiplied with.
using Byte = std::uint8_t;   // 128 above what it means
using Signed = std::int8_t;

// Activations: as they came, or packed in panels of up to six rows, [steps][rows][PAIR] each; of bytes with a scale per
// row and segment.
template <class W>
struct Left {
    const W* data;
    W* panels;            // the same place, or null
    float* scales;        // [m][segments], of bytes
    std::int32_t* below;  // [m][groups]: -8 times the sum of a row's group, of signed bytes
};

// Six rows at most against one block, over all of K, as a balanced tree over its segments. sums: room for [5][R][64].
template <class W, int R>
void product(const Left<W>& a, std::int64_t row, const Packed& packed, std::int64_t block, std::int64_t padded,
             std::int64_t steps, float* sums, Ahead ahead) {
    constexpr std::int64_t P = pair_of<W>;
    const std::int64_t part = steps / packed.segments;
    const W* left = a.data + row * steps * P;
    const std::int64_t next_row = a.panels == nullptr ? steps * P : P, next_step = a.panels == nullptr ? P : R * P;
    const char* right = static_cast<const char*>(packed.data) + block * block_bytes(packed, steps * P, P);
    const Code* code = reinterpret_cast<const Code*>(right);
    const Patch* patch = packed.format == Format::coded ? packed.patches + code->first : nullptr;
    int depth = 0;
    for (int segment = 0; segment < packed.segments; ++segment) {
        const std::int64_t at = segment * part;
        const Rows<W> rows{left + at * next_step, next_row, next_step};
        float* out = sums + depth * R * kBlock;
        if constexpr (std::is_same_v<W, Byte>) {
            tile_of_bytes<R>(left + at * R * P, reinterpret_cast<const std::int8_t*>(right) + at * kBlock * P, part,
                             a.scales + row * packed.segments + segment, packed.segments,
                             packed.scales + segment * padded + block * kBlock,
                             packed.sums + segment * padded + block * kBlock, out, ahead.after(at));
        } else if constexpr (std::is_same_v<W, Signed>) {
            const std::int64_t groups = steps * P / packed.group, first = at * P / packed.group;
            tile_of_halves<R>(left + at * R * P, reinterpret_cast<const std::uint8_t*>(right) + first * group_bytes(packed.group),
                              part * P / packed.group, packed.group, a.scales + row * packed.segments + segment,
                              packed.segments, a.below + row * groups + first, groups, out, ahead.after(at));
        } else if (packed.format == Format::plain) {
            tile<W, R>(rows, reinterpret_cast<const W*>(right) + at * kBlock * P, part, out, ahead.after(at));
        } else if constexpr (kCodes && std::is_same_v<W, bf16>) {
            tile_of_codes<R>(rows, reinterpret_cast<const std::uint8_t*>(code + 1) + at * kCodedStep, at, part, *code, patch,
                             out, ahead.after(at));
        }
        ++depth;
        for (int done = segment; done & 1; done >>= 1) {
            --depth;
            float* into = sums + (depth - 1) * R * kBlock;
            const float* from = into + R * kBlock;
            for (int i = 0; i < R * kBlock; i += 16) store(into + i, load(into + i) + load(from + i));
        }
    }
}

template <class W>
void product_of(int rows, const Left<W>& a, std::int64_t row, const Packed& packed, std::int64_t block,
                std::int64_t padded, std::int64_t steps, float* sums, Ahead ahead) {
    switch (rows) {
        case 1: return product<W, 1>(a, row, packed, block, padded, steps, sums, ahead);
        case 2: return product<W, 2>(a, row, packed, block, padded, steps, sums, ahead);
        case 3: return product<W, 3>(a, row, packed, block, padded, steps, sums, ahead);
        case 4: return product<W, 4>(a, row, packed, block, padded, steps, sums, ahead);
        case 5: return product<W, 5>(a, row, packed, block, padded, steps, sums, ahead);
        default: return product<W, 6>(a, row, packed, block, padded, steps, sums, ahead);
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
                store_some(static_cast<float*>(g.out) + (row + r) * g.n + at, x, left);
            } else {
                store_some(static_cast<T*>(g.out) + (row + r) * g.n + at, x, left);
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

// Rows [first, first + rows) of a as a panel.
template <class T>
void make_panel(const Gemm& g, std::int64_t first, int rows, std::int64_t steps, const Left<T>& left) {
    constexpr std::int64_t P = pair_of<T>;
    T* panel = left.panels + first * steps * P;
    const std::int64_t whole = g.k / P;
    for (int r = 0; r < rows; ++r) {
        const T* from = static_cast<const T*>(g.a) + (first + r) * g.k;
        T* to = panel + r * P;
        for (std::int64_t s = 0; s < whole; ++s, to += rows * P) std::memcpy(to, from + s * P, P * sizeof(T));
        if (whole * P < g.k) {
            to[0] = from[whole * P];
            to[P - 1] = 0;
        }
    }
}

// The same in bytes, of one segment: a row's values by 127th parts of the greatest of them. The scale is NaN if a value is
// NaN or infinite, for bytes cannot say so.
template <class T, class W>
void make_panel_of_bytes(const Gemm& g, std::int64_t first, int rows, int segment, std::int64_t steps, const Left<W>& left) {
    constexpr bool is_signed = std::is_same_v<W, Signed>;
    const std::int64_t part = steps / g.packed.segments * 4, begin = segment * part, n = std::min(part, g.k - begin);
    for (int r = 0; r < rows; ++r) {
        const T* row = static_cast<const T*>(g.a) + (first + r) * g.k + begin;
        Vec greatest = zero(), strange = zero();
        for (std::int64_t i = 0; i < n; i += 16) {
            const Vec x = load_some(row + i, n - i);
            greatest = max(greatest, max(x, zero() - x));
            strange = strange + x * zero();
        }
        const float most = largest(greatest);
        left.scales[(first + r) * g.packed.segments + segment] = most / 127.0f + sum(strange);
        const Vec per_part = set1(most > 0.0f ? 127.0f / most : 0.0f);
        W* to = left.panels + (first * steps + begin / 4 * rows + r) * 4;
        std::int32_t* below = is_signed ? left.below + ((first + r) * steps * 4 + begin) / g.packed.group : nullptr;
        int total = 0, in_group = 0;
        for (std::int64_t i = 0; i < part; i += 16) {
            std::uint8_t bytes[16];
            store_bytes(bytes, (i < n ? load_some(row + i, n - i) : zero()) * per_part);
            if constexpr (is_signed) {
                std::int32_t of_eight[2];
                lower(bytes, of_eight);
                for (std::int64_t j = 0; j < std::min<std::int64_t>(2, (part - i) / 8); ++j) {
                    total += of_eight[j];
                    in_group += 8;
                    if (in_group < g.packed.group) continue;
                    *below++ = -8 * total;
                    total = in_group = 0;
                }
            }
            const std::int64_t fours = std::min<std::int64_t>(4, (part - i) / 4);
            for (std::int64_t j = 0; j < fours; ++j, to += rows * 4) std::memcpy(to, bytes + j * 4, 4);
        }
    }
}

template <class T, class W>
void pack_left(Pool& pool, const Gemm& g, const Panels& panels, std::int64_t steps, const Left<W>& left) {
    constexpr bool of_bytes = sizeof(W) == 1;
    // Bytes have scales by segments, each of which can be packed alone; a piece is worth a thread's while.
    const std::int64_t segments = of_bytes ? g.packed.segments : 1, pieces = panels.count * segments;
    const std::int64_t at_once = std::max<std::int64_t>(1, 4096 * segments / (steps * pair_of<W> * panels.rows(0)));
    pool.run(static_cast<std::uint32_t>(ceil_div(pieces, at_once)), [&](std::uint32_t item, int) {
        const std::int64_t end = std::min<std::int64_t>(pieces, (item + 1) * at_once);
        for (std::int64_t piece = item * at_once; piece < end; ++piece) {
            const std::int64_t p = piece / segments;
            if constexpr (of_bytes) {
                const int segment = static_cast<int>(piece % segments);
                make_panel_of_bytes<T>(g, panels.first(p), panels.rows(p), segment, steps, left);
            } else {
                make_panel<T>(g, panels.first(p), panels.rows(p), steps, left);
            }
        }
    });
}

template <class T, class W>
void gemm_of(Pool& pool, const Gemm& g) {
    constexpr std::int64_t P = pair_of<W>;
    constexpr bool of_bytes = sizeof(W) == 1;
    if (g.m == 0) return;
    const std::int64_t steps = padded_depth(g.packed, g.k, P) / P;
    const std::int64_t blocks = ceil_div(g.n, g.gated ? kBlock / 2 : kBlock);
    const Panels panels(g.m);
    // Short rows are read as they are; of long ones, side by side, too many would fall into one set of the cache.
    const bool packs = of_bytes || g.k % P != 0 || g.k * static_cast<std::int64_t>(sizeof(W)) > kShort;
    const std::size_t panel_bytes = packs ? ceil_div(g.m * steps * P * sizeof(W), 64) * 64 : 0;
    const std::size_t scale_bytes = of_bytes ? ceil_div(g.m * g.packed.segments * sizeof(float), 64) * 64 : 0;
    const std::size_t below_bytes = std::is_same_v<W, Signed> ? g.m * (steps * P / g.packed.group) * sizeof(std::int32_t) : 0;
    char* scratch = static_cast<char*>(pool.shared(panel_bytes + scale_bytes + below_bytes));
    W* const room = packs ? reinterpret_cast<W*>(scratch) : nullptr;
    const Left<W> left{packs ? room : static_cast<const W*>(g.a), room, reinterpret_cast<float*>(scratch + panel_bytes),
                       reinterpret_cast<std::int32_t*>(scratch + panel_bytes + scale_bytes)};
    if (packs) pack_left<T>(pool, g, panels, steps, left);
    const std::int64_t chunks = ceil_div(panels.count, kChunk);
    const std::int64_t size = block_bytes(g.packed, g.k, P);
    const int threads = pool.threads();
    pool.run(static_cast<std::uint32_t>(blocks * chunks), [&](std::uint32_t item, int) {
        const std::int64_t block = item / chunks, chunk = item % chunks;
        alignas(64) float sums[5 * kRows * kBlock];
        const std::int64_t begin = chunk * kChunk, end = std::min(panels.count, begin + kChunk);
        // The block that this thread will most likely get next, fetched bit by bit while it computes this one.
        const std::int64_t later = block + threads;
        const char* next = later < blocks ? static_cast<const char*>(g.packed.data) + later * size
                                          : static_cast<const char*>(g.then) + (later - blocks) * g.then_block;
        const bool early = g.m <= kAhead && (later < blocks || g.then != nullptr);
        // Spread over the panels, so that memory is never idle.
        const int lines = early ? static_cast<int>(ceil_div(size / steps, panels.count)) : 0;
        Ahead ahead{next, lines};
        for (std::int64_t p = begin; p < end; ++p, ahead = ahead.after(steps)) {
            product_of<W>(panels.rows(p), left, panels.first(p), g.packed, block, blocks * kBlock, steps, sums, ahead);
            finish<T>(g, sums, panels.first(p), panels.rows(p), block);
        }
    });
}

template <class T>
void gemm(Pool& pool, const Gemm& g) {
    switch (g.packed.format) {
        case Format::plain:
        case Format::coded: return gemm_of<T, T>(pool, g);
        case Format::int8: return gemm_of<T, Byte>(pool, g);
        case Format::int4: return gemm_of<T, Signed>(pool, g);
    }
}

inline std::int64_t column_of(std::int64_t row, int half) {
    if (half == 0) return row;
    constexpr std::int64_t width = kBlock / 2;
    return row / width * kBlock + row % width + (half == 2 ? width : 0);
}

// Calls put(k, value) for every value of a row of the weight.
template <class T, class Put>
void each_value(const Pack& w, std::int64_t row, const Put& put) {
    const T* from = static_cast<const T*>(w.weight) + row * w.row_stride;
    for (std::int64_t k = 0; k < w.k; ++k) put(k, from[k * w.column_stride]);
}

template <class T>
void pack_plain(const Pack& w, std::int64_t row) {
    constexpr std::int64_t P = pair_of<T>;
    const std::int64_t column = column_of(w.first + row, w.half), steps = ceil_div(w.k, P);
    T* to = static_cast<T*>(w.packed.data) + column / kBlock * steps * kBlock * P + column % kBlock * P;
    each_value<T>(w, row, [&](std::int64_t k, T value) { to[k / P * kBlock * P + k % P] = value; });
}

template <class T>
void pack_bytes(const Pack& w, std::int64_t row) {
    const std::int64_t column = column_of(w.first + row, w.half), steps = ceil_div(w.k, 4);
    const std::int64_t padded = ceil_div(w.n, w.half > 0 ? kBlock / 2 : kBlock) * kBlock;
    const std::int64_t part = steps / w.packed.segments * 4;
    float greatest[kMostSegments] = {};
    each_value<T>(w, row, [&](std::int64_t k, T value) {
        const float size = __builtin_fabsf(Type<T>::to(value));
        if (!(size <= greatest[k / part])) greatest[k / part] = size;
    });
    std::int32_t total[kMostSegments] = {};
    std::int8_t* to = static_cast<std::int8_t*>(w.packed.data) + column / kBlock * steps * kBlock * 4 + column % kBlock * 4;
    each_value<T>(w, row, [&](std::int64_t k, T value) {
        const float most = greatest[k / part];
        const int rounded = most > 0.0f ? static_cast<int>(__builtin_rintf(Type<T>::to(value) * (127.0f / most))) : 0;
        to[k / 4 * kBlock * 4 + k % 4] = static_cast<std::int8_t>(rounded);
        total[k / part] += rounded;
    });
    for (int segment = 0; segment < w.packed.segments; ++segment) {
        w.packed.scales[segment * padded + column] = greatest[segment] / 127.0f;
        w.packed.sums[segment * padded + column] = 128 * total[segment];
    }
}

// A group's scale, and what each of its values becomes: the greatest in size is -8 or 7 scales, whichever comes nearer
// to all of them.
inline float halves_of(const float* x, int n, std::uint8_t* halves) {
    float extreme = 0.0f;
    for (int i = 0; i < n; ++i)
        if (!(__builtin_fabsf(x[i]) <= __builtin_fabsf(extreme))) extreme = x[i];
    float best = 0.0f, least = __builtin_inff();
    for (const float steps : {-8.0f, 7.0f}) {
        const float scale = widen(narrow(extreme / steps)), per_scale = scale != 0.0f ? 1.0f / scale : 0.0f;
        std::uint8_t found[kMostGroup];
        float error = 0.0f;
        for (int i = 0; i < n; ++i) {
            const float value = std::clamp(__builtin_rintf(x[i] * per_scale), -8.0f, 7.0f);
            found[i] = static_cast<std::uint8_t>(static_cast<int>(value) + 8);
            error += (value * scale - x[i]) * (value * scale - x[i]);
        }
        if (error < least) {
            least = error;
            best = scale;
            std::copy(found, found + n, halves);
        }
    }
    return best;
}

template <class T>
void pack_halves(const Pack& w, std::int64_t row) {
    const int group = w.packed.group;
    const std::int64_t column = column_of(w.first + row, w.half);
    std::uint8_t* block = static_cast<std::uint8_t*>(w.packed.data) + column / kBlock * block_bytes(w.packed, w.k, 1);
    float values[kMostGroup] = {};
    const auto store_group = [&](std::int64_t g) {
        std::uint8_t halves[kMostGroup];
        std::uint8_t* to = block + g * group_bytes(group);
        const bf16 scale = narrow(halves_of(values, group, halves));
        std::memcpy(to + group / 8 * kBlock * 4 + column % kBlock * 2, &scale, 2);
        for (int i = 0; i < group; i += 8)
            for (int j = 0; j < 4; ++j) {
                to[i / 8 * kBlock * 4 + column % kBlock * 4 + j] = static_cast<std::uint8_t>(halves[i + j] | halves[i + 4 + j] << 4);
            }
        std::fill(values, values + group, 0.0f);
    };
    each_value<T>(w, row, [&](std::int64_t k, T value) {
        values[k % group] = Type<T>::to(value);
        if (k % group == group - 1 || k == w.k - 1) store_group(k / group);
    });
}

template <class T>
void pack(Pool& pool, const Pack& w) {
    pool.run(static_cast<std::uint32_t>(ceil_div(w.rows, 16)), [&](std::uint32_t item, int) {
        const std::int64_t end = std::min<std::int64_t>(w.rows, (item + 1) * 16);
        for (std::int64_t row = item * 16; row < end; ++row) {
            switch (w.packed.format) {
                case Format::plain: pack_plain<T>(w, row); break;
                case Format::coded: break;  // made of plain ones: coding.hpp
                case Format::int8: pack_bytes<T>(w, row); break;
                case Format::int4: pack_halves<T>(w, row); break;
            }
        }
    });
}

// One value of packed weights, of coded ones before patches; block: that of the column.
template <class T>
T value_at(const Packed& w, const char* block, std::int64_t n, std::int64_t depth, std::int64_t column, std::int64_t k) {
    constexpr std::int64_t P = pair_of<T>;
    const std::int64_t own = column % kBlock;
    switch (w.format) {
        case Format::plain: return reinterpret_cast<const T*>(block)[k / P * kBlock * P + own * P + k % P];
        case Format::coded: {
            const Code* head = reinterpret_cast<const Code*>(block);
            const auto* step = reinterpret_cast<const std::uint8_t*>(block + sizeof(Code)) + k / 2 * kCodedStep;
            const int at = static_cast<int>(own * 2 + k % 2), place = place_of_word(at);
            const int half = place < 64 ? step[128 + place] & 15 : step[64 + place] >> 4;
            return static_cast<T>(head->upper[half] << 8 | step[place]);
        }
        case Format::int8: {
            const float scale = w.scales[k / (depth / w.segments) * ceil_div(n, kBlock) * kBlock + column];
            return Type<T>::from(static_cast<float>(reinterpret_cast<const std::int8_t*>(block)[k / 4 * kBlock * 4 + own * 4 + k % 4]) * scale);
        }
        case Format::int4: {
            const char* group = block + k / w.group * group_bytes(w.group);
            const std::int64_t i = k % w.group;
            const auto byte = static_cast<std::uint8_t>(group[i / 8 * kBlock * 4 + own * 4 + i % 4]);
            bf16 scale;
            std::memcpy(&scale, group + w.group / 8 * kBlock * 4 + own * 2, 2);
            return Type<T>::from(static_cast<float>((i % 8 < 4 ? byte & 15 : byte >> 4) - 8) * widen(scale));
        }
    }
    return {};
}

template <class T>
void gather(Pool& pool, const Gather& g) {
    const std::int64_t depth = padded_depth(g.packed, g.k, pair_of<T>), size = block_bytes(g.packed, g.k, pair_of<T>);
    pool.run(static_cast<std::uint32_t>(ceil_div(g.m, 16)), [&](std::uint32_t item, int) {
        const std::int64_t end = std::min<std::int64_t>(g.m, (item + 1) * 16);
        for (std::int64_t i = item * 16; i < end; ++i) {
            T* to = static_cast<T*>(g.out) + i * g.k;
            const char* block = static_cast<const char*>(g.packed.data) + g.ids[i] / kBlock * size;
            for (std::int64_t k = 0; k < g.k; ++k) to[k] = value_at<T>(g.packed, block, g.n, depth, g.ids[i], k);
            if (g.packed.format != Format::coded) continue;
            const Patch* patch = g.packed.patches + reinterpret_cast<const Code*>(block)->first;
            for (; patch->step < depth; ++patch)
                if (patch->at / 2 == g.ids[i] % kBlock) to[patch->step * 2 + patch->at % 2] = static_cast<T>(patch->word);
        }
    });
}

}  // namespace ORCA_ISA
}  // namespace orca
