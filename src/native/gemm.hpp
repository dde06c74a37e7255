// Products with packed weights. Every element of the result is summed over K by one accumulator in one order, for one
// row as for five hundred.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.hpp"
#include "tiles.hpp"
#include "vec.hpp"

namespace orca {
namespace ORCA_ISA {

constexpr int kMostSegments = 64;
constexpr int kMostGroup = 32;           // values that share a scale, of 4 bits
constexpr int kRows = 6;                 // rows of a register tile

// With 32 registers a panel of six rows passes over all columns of a block at once, and walks all of K by itself. With 16
// it takes a pass for every vector of columns, so panels pass together: over some steps of the block, which stay near,
// while the next are brought in.
#if defined(__AVX512F__)
constexpr int kPass = 4;                   // vectors of columns of a pass
constexpr std::int64_t kChunk = 32;        // panels that one piece of work takes
constexpr std::int64_t kTogether = 1;      // panels
constexpr std::int64_t kShort = 16 << 10;  // bytes of a row that needs no packing
#else
constexpr int kPass = 1;
constexpr std::int64_t kChunk = 16;
constexpr std::int64_t kTogether = kChunk;
constexpr std::int64_t kShort = 0;  // there are no registers for where six rows are
#endif
constexpr std::int64_t kPassSteps = 128;  // of plain weights, that panels pass over together

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
        case Activation::relu: return max(zero(), x);  // in this order: what is no number stays so
        case Activation::relu2: {
            const Vec kept = max(zero(), x);
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

// What weights of 8, of 4 and of 6 bits are multiplied with.
using Byte = std::uint8_t;   // 128 above what it means
using Signed = std::int8_t;
enum class Six : std::int8_t {};  // signed, too

// What is made of a row's values to meet weights.
template <class W>
struct LeftOf {
    using type = W;
};
template <>
struct LeftOf<bf16> {
    using type = Type<bf16>::Left;
};
template <>
struct LeftOf<Byte> {
    using type = ByteLeft;
};
template <>
struct LeftOf<Six> {
    using type = Signed;
};
template <class W>
using LeftOf_t = typename LeftOf<W>::type;

// Whether products are made by tiles (AMX), and the rows of a panel.
template <class W>
constexpr bool kTiled = kTiles && (std::is_same_v<W, bf16> || std::is_same_v<W, Byte>);
template <class W>
constexpr int kPanel = kTiled<W> ? kTileRows : kRows;

// R rows of activations, `row` values apart; one step further is `step` values on.
template <class L>
struct Rows {
    const L* data;
    std::int64_t row, step;
};

// How far weights stand above what they mean, of those that signed bytes are multiplied with; and how many values along K
// are put right together.
template <class W>
constexpr int kAbove = std::is_same_v<W, Six> ? 32 : 8;
template <class W>
std::int64_t group_of(const Packed& packed, std::int64_t depth) {
    return std::is_same_v<W, Six> ? depth / packed.segments : packed.group;
}

// Where the sums [R][64] of a segment of K go: into a level of their own; or, if the segment ends branches of the tree, they
// are first added to the levels below, one after the other, while they are still in registers.
struct Branch {
    float* out;
    std::int64_t level;  // values from one level to the next
    int ends;

    void put(std::int64_t at, Vec sum) const {
        float* to = out + at;
        for (int i = 0; i < ends; ++i) {
            to -= level;
            sum = load(to) + sum;
        }
        store(to, sum);
    }
    // Of rows that stand in the level of their own already.
    void settle(int rows) const {
        if (ends == 0) return;
        for (std::int64_t at = 0; at < rows * kBlock; at += 16) put(at, load(out + at));
    }
};

// a [R][steps][PAIR] times b [steps][64][PAIR], added to what stands in the branch's own level unless it is fresh; of the
// vectors of columns from `from` on, as many as a pass takes.
template <class T, int R>
ORCA_APART void tile(Rows<typename Type<T>::Left> a, const T* b, std::int64_t steps, int from, bool fresh, Branch branch,
                     Ahead ahead) {
    constexpr int P = Type<T>::PAIR, N = wide_of(R);
    if (from % N != 0) return;
    Vec sums[R][N];
    ORCA_UNROLL for (int r = 0; r < R; ++r)
        ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = fresh ? zero() : load(branch.out + r * kBlock + (from + j) * 16);
    const std::int64_t row = kShort == 0 ? P : a.row, step = kShort == 0 ? R * P : a.step;
    const auto* left = a.data;
    const T* right = b + from * 16 * P;
    int due = 0;
    for (std::int64_t s = 0; s < steps; ++s, left += step, right += kBlock * P) {
        for (due += ahead.lines; due >= 64; due -= 64, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
        ORCA_UNROLL for (int turn = 0; turn < Type<T>::TURNS; ++turn) {
            decltype(Type<T>::take(right, turn)) other[N];
            ORCA_UNROLL for (int j = 0; j < N; ++j) other[j] = Type<T>::take(right + j * 16 * P, turn);
            ORCA_UNROLL for (int r = 0; r < R; ++r) {
                const auto one = Type<T>::broadcast(left + r * row, turn);
                ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = Type<T>::multiply(one, other[j], sums[r][j]);
            }
        }
    }
    ORCA_UNROLL for (int r = 0; r < R; ++r)
        ORCA_UNROLL for (int j = 0; j < N; ++j) branch.put(r * kBlock + (from + j) * 16, sums[r][j]);
}

// The same of steps [first, first + steps) of coded weights, decoded on the way: the shuffles run beside the products and
// cost nothing, not even by panels of six rows. patch: the block's next; moves along.
template <int R>
void tile_of_codes(Rows<bf16> a, const std::uint8_t* codes, std::int64_t first, std::int64_t steps, const Code& code,
                   const Patch*& patch, Branch branch, Ahead ahead);

#if defined(__AVX512BF16__)
template <int R>
void tile_of_codes(Rows<bf16> a, const std::uint8_t* codes, std::int64_t first, std::int64_t steps, const Code& code,
                   const Patch*& patch, Branch branch, Ahead ahead) {
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
            const auto one = Type<bf16>::broadcast(left + r * a.row, 0);
            ORCA_UNROLL for (int j = 0; j < 4; ++j) sums[r][j] = Type<bf16>::multiply(one, words.v[j], sums[r][j]);
        }
    }
    ORCA_UNROLL for (int r = 0; r < R; ++r)
        ORCA_UNROLL for (int j = 0; j < 4; ++j) branch.put(r * kBlock + j * 16, sums[r][j]);
}
#endif

// The same of bytes: sums [R][64] of a [R][steps][4], which stand 128 too high, times b [steps][64][4]; always fresh.
template <int R>
ORCA_APART void tile_of_bytes(Rows<ByteLeft> a, const std::int8_t* b, std::int64_t steps, const float* row_scales,
                              std::int64_t row_stride, const float* scales, const std::int32_t* above, int from,
                              Branch branch, Ahead ahead) {
    constexpr int N = wide_of(R);
    if (from % N != 0) return;
    Ints sums[R][N];
    ORCA_UNROLL for (int r = 0; r < R; ++r)
        ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = no_ints();
    const std::int64_t row = kShort == 0 ? 4 : a.row, step = kShort == 0 ? R * 4 : a.step;
    const ByteLeft* left = a.data;
    const std::int8_t* right = b + from * 64;
    int due = 0;
    for (std::int64_t s = 0; s < steps; ++s, left += step, right += kBlock * 4) {
        for (due += ahead.lines; due >= 64; due -= 64, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
        ORCA_UNROLL for (int turn = 0; turn < kByteTurns; ++turn) {
            decltype(take_bytes(right, turn)) other[N];
            ORCA_UNROLL for (int j = 0; j < N; ++j) other[j] = take_bytes(right + j * 64, turn);
            ORCA_UNROLL for (int r = 0; r < R; ++r) {
                const auto one = broadcast_bytes(left + r * row, turn);
                ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = multiply_bytes(one, other[j], sums[r][j]);
            }
        }
    }
    ORCA_UNROLL for (int j = 0; j < N; ++j) {
        const Ints off = load_ints(above + (from + j) * 16);
        const Vec scale = load(scales + (from + j) * 16);
        ORCA_UNROLL for (int r = 0; r < R; ++r) {
            const Vec of_both = scale * set1(row_scales[r * row_stride]);
            branch.put(r * kBlock + (from + j) * 16, to_floats(sums[r][j] - off) * of_both);
        }
    }
}

// The same of 4 bits: bytes a [R][steps][4] times `groups` groups of b, whose values stand 8 too high; below: -8 times the
// sums of a row's groups. From three rows on half as wide, so that the sums of a group and of all groups both stay in
// registers; with fewer it takes the whole width to have sums enough, each of which waits for itself.
template <int R>
ORCA_APART void tile_of_halves(Rows<std::int8_t> a, const std::uint8_t* b, std::int64_t groups, int group,
                               const float* row_scales, std::int64_t row_stride, const std::int32_t* below,
                               std::int64_t below_stride, int from, Branch branch, Ahead ahead) {
    constexpr int N = wide_of(R) == 4 && R > 2 ? 2 : wide_of(R);
    if (from % N != 0) return;
    const int pairs = group / 8;
    const std::int64_t row = kShort == 0 ? 4 : a.row, step = kShort == 0 ? R * 4 : a.step;
    for (int column = from; column < from + std::max(N, kPass); column += N) {
        Vec totals[R][N];
        ORCA_UNROLL for (int r = 0; r < R; ++r)
            ORCA_UNROLL for (int j = 0; j < N; ++j) totals[r][j] = zero();
        const std::int8_t* left = a.data;
        const std::uint8_t* right = b + column * 64;
        int due = 0;
        for (std::int64_t g = 0; g < groups; ++g) {
            HalfSums sums[R][N];
            ORCA_UNROLL for (int r = 0; r < R; ++r)
                ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = start_halves(below[r * below_stride + g]);
            for (int s = 0; s < pairs; ++s, left += 2 * step, right += kBlock * 4) {
                if (column == from) {
                    for (due += 2 * ahead.lines; due >= 64; due -= 64, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
                }
                Halves lower[N], upper[N];
                ORCA_UNROLL for (int j = 0; j < N; ++j) lower[j] = lower_halves(right + j * 64);
                ORCA_UNROLL for (int j = 0; j < N; ++j) upper[j] = upper_halves(right + j * 64);
                ORCA_UNROLL for (int r = 0; r < R; ++r) {
                    const Four one = broadcast_four(reinterpret_cast<const std::uint8_t*>(left + r * row));
                    ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = multiply_halves(lower[j], one, sums[r][j]);
                }
                ORCA_UNROLL for (int r = 0; r < R; ++r) {
                    const Four one = broadcast_four(reinterpret_cast<const std::uint8_t*>(left + step + r * row));
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
            ORCA_UNROLL for (int j = 0; j < N; ++j) branch.put(r * kBlock + (column + j) * 16, totals[r][j] * scale);
        }
    }
}

// The same of 6 bits, which have scales as bytes do: a [R][steps][4] times `eights` times eight values along K. below: -32
// times the sum of a row's segment.
template <int R>
ORCA_APART void tile_of_sixes(Rows<std::int8_t> a, const std::uint8_t* b, std::int64_t eights, const float* row_scales,
                              std::int64_t row_stride, const float* scales, const std::int32_t* below, int from,
                              Branch branch, Ahead ahead) {
    constexpr int N = wide_of(R);
    if (from % N != 0) return;
    if constexpr (N == 4) from = 0;  // as it is; shifts are constants then
    const std::int64_t row = kShort == 0 ? 4 : a.row, step = kShort == 0 ? R * 4 : a.step;
    Ints sums[R][N];
    ORCA_UNROLL for (int r = 0; r < R; ++r)
        ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = start_sixes(below[r * row_stride]);
    const std::int8_t* left = a.data;
    const std::uint8_t* right = b;
    int due = 0;
    for (std::int64_t s = 0; s < eights; ++s, left += 2 * step, right += kSixes) {
        for (due += 2 * ahead.lines; due >= 64; due -= 64, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
        ORCA_UNROLL for (int half = 0; half < 2; ++half) {
            Halves other[N];
            ORCA_UNROLL for (int j = 0; j < N; ++j) {
                const std::uint8_t* four_bits = right + (from + j) * 64;
                other[j] = with_upper_bits(half == 0 ? lower_halves(four_bits) : upper_halves(four_bits),
                                           right + kBlock * 4 + half * 64, from + j);
            }
            ORCA_UNROLL for (int r = 0; r < R; ++r) {
                const Four one = broadcast_four(reinterpret_cast<const std::uint8_t*>(left + half * step + r * row));
                ORCA_UNROLL for (int j = 0; j < N; ++j) sums[r][j] = multiply_sixes(other[j], one, sums[r][j]);
            }
        }
    }
    ORCA_UNROLL for (int j = 0; j < N; ++j) {
        const Vec scale = load(scales + (from + j) * 16);
        ORCA_UNROLL for (int r = 0; r < R; ++r) {
            const Vec of_both = scale * set1(row_scales[r * row_stride]);
            branch.put(r * kBlock + (from + j) * 16, to_floats(sums[r][j]) * of_both);
        }
    }
}

// By tiles: sums [rows][64] of a [rows][steps][4 bytes], whose rows lie `row` bytes apart, times what right(s, n) gives of
// steps [s, s + n), [n][64][4 bytes]. The shapes are those of `shape_tiles`. Every row is summed by itself, in one order.
template <class W, class Right>
void sum_tiles(const char* a, std::int64_t row, std::int64_t steps, const Right& right, void* out, Ahead ahead);

// Steps [first, first + steps) of coded weights as plain ones. patch: the block's next; moves along.
inline void decode_steps(const std::uint8_t* codes, std::int64_t first, std::int64_t steps, const Code& code,
                         const Patch*& patch, bf16* out);

// A block of coded weights, decoded to `room`, as plain ones of a single block.
inline Packed decoded_block(const Packed& coded, std::int64_t block, std::int64_t steps, void* room);

#if defined(__AMX_TILE__)
// Adds the products of as many steps as tiles A and B have.
template <class W, int A, int B>
void add_tiles(const char* a, std::int64_t row, const void* b) {
    const char* right = static_cast<const char*>(b);
    load_tile<A>(a, row);
    load_tile<B>(right, kBlock * 4);
    multiply_tiles<0, A, B>(W{});
    load_tile<B>(right + 64, kBlock * 4);
    multiply_tiles<1, A, B>(W{});
    load_tile<B>(right + 128, kBlock * 4);
    multiply_tiles<2, A, B>(W{});
    load_tile<B>(right + 192, kBlock * 4);
    multiply_tiles<3, A, B>(W{});
}

template <class W, class Right>
void sum_tiles(const char* a, std::int64_t row, std::int64_t steps, const Right& right, void* out, Ahead ahead) {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    int due = 0;
    std::int64_t s = 0;
    for (; s + kTileSteps <= steps; s += kTileSteps) {
        for (due += ahead.lines * kTileSteps; due >= 64; due -= 64, ahead.next += 64) __builtin_prefetch(ahead.next, 0, 2);
        add_tiles<W, 4, 5>(a + s * 4, row, right(s, kTileSteps));
    }
    if (s < steps) add_tiles<W, 6, 7>(a + s * 4, row, right(s, steps - s));
    char* to = static_cast<char*>(out);
    store_tile<0>(to, kBlock * 4);
    store_tile<1>(to + 64, kBlock * 4);
    store_tile<2>(to + 128, kBlock * 4);
    store_tile<3>(to + 192, kBlock * 4);
}

inline void decode_steps(const std::uint8_t* codes, std::int64_t first, std::int64_t steps, const Code& code,
                         const Patch*& patch, bf16* out) {
    const Upper upper = load_upper(code.upper);
    for (std::int64_t s = first; s < first + steps; ++s, codes += kCodedStep, out += kBlock * 2) {
        store_words(out, decode(codes, upper));
        for (; patch->step == s; ++patch) out[patch->at] = patch->word;
    }
}

inline Packed decoded_block(const Packed& coded, std::int64_t block, std::int64_t steps, void* room) {
    const char* data = static_cast<const char*>(coded.data) + block * block_bytes(coded, steps * 2, 2);
    const auto* code = reinterpret_cast<const Code*>(data);
    const Patch* patch = coded.patches + code->first;
    decode_steps(reinterpret_cast<const std::uint8_t*>(code + 1), 0, steps, *code, patch, static_cast<bf16*>(room));
    Packed plain = coded;
    plain.data = room;
    plain.format = Format::plain;
    return plain;
}
#endif

// Activations: row by row, as they came or brought to bytes; or packed in panels of up to six rows, [steps][rows][PAIR]
// each. Bytes have a scale per row and segment.
template <class W>
struct Left {
    const LeftOf_t<W>* data;
    std::int64_t row;      // values from one row to the next; 0: in panels
    LeftOf_t<W>* room;     // the same place, unless they are as they came
    float* scales;         // [m][segments], of bytes
    std::int32_t* below;   // [m][groups]: -kAbove times the sum of a row's group, of signed bytes
};

// Rows of a panel are as equal as can be: of at most 6, 16 rows are 6, 5 and 5.
struct Panels {
    std::int64_t count, base, extra;
    Panels(std::int64_t m, int most) : count(ceil_div(m, most)), base(m / count), extra(m % count) {}
    std::int64_t first(std::int64_t panel) const { return panel * base + std::min(panel, extra); }
    int rows(std::int64_t panel) const { return static_cast<int>(base + (panel < extra)); }
};

// A product with one block of columns.
template <class W>
struct Product {
    const Left<W>& a;
    const Packed& packed;
    std::int64_t block, padded, steps;
    const char* data;  // of the block

    Product(const Left<W>& a, const Packed& packed, std::int64_t block, std::int64_t padded, std::int64_t steps)
        : a(a), packed(packed), block(block), padded(padded), steps(steps),
          data(static_cast<const char*>(packed.data) + block * block_bytes(packed, steps * P, P)) {}

    // Panels [begin, end), over all of K, as a balanced tree over its segments. sums: room for [5][end - begin][kPanel][64].
    void run(const Panels& panels, std::int64_t begin, std::int64_t end, float* sums, Ahead ahead) const {
        const std::int64_t part = steps / packed.segments;
        const std::int64_t at_once = kPass < 4 && packed.format == Format::plain ? kPassSteps : part;
        const std::int64_t level = (end - begin) * kPanel<W> * kBlock;
        const Patch* patch = packed.format == Format::coded ? packed.patches + code()->first : nullptr;
        int depth = 0;
        for (int segment = 0; segment < packed.segments; ++segment) {
            const int ends = __builtin_ctz(~segment);
            const Patch* next = patch;
            for (std::int64_t first = 0; first < part; first += at_once) {
                const Span span{segment, segment * part + first, std::min(at_once, part - first), first == 0};
                const bool is_last = first + at_once >= part;
                Branch branch{sums + depth * level, level, is_last ? ends : 0};
                Ahead share = share_of(span, ahead, end - begin);
                for (int from = 0; from < 4; from += kPass)
                    for (std::int64_t p = begin; p < end; ++p, share = share.after(span.count)) {
                        next = patch;
                        branch.out = sums + depth * level + (p - begin) * kPanel<W> * kBlock;
                        pass_of(panels.rows(p), panels.first(p), span, from, next, branch, share);
                    }
            }
            patch = next;
            depth += 1 - ends;
        }
    }

private:
    static constexpr std::int64_t P = pair_of<W>;

    // Steps [at, at + count), the segment's first ones if fresh.
    struct Span {
        int segment;
        std::int64_t at, count;
        bool fresh;
    };

    // What the first of a span's passes brings in: of the next block, where each panel walks all of this one by itself;
    // else of the span that comes next, to which every pass adds its share.
    Ahead share_of(Span span, Ahead block, std::int64_t panels) const {
        if (kTogether == 1) return block.after(span.at);
        const std::int64_t end = span.at + span.count, bytes = block_bytes(packed, steps * P, P) / steps;
        if (end == steps && block.lines == 0) return block;
        return {end < steps ? data + end * bytes : block.next, static_cast<int>(ceil_div(bytes, 4 / kPass * panels))};
    }

    const Code* code() const { return reinterpret_cast<const Code*>(data); }

    template <int R>
    void pass(std::int64_t row, Span span, int from, const Patch*& patch, Branch branch, Ahead ahead) const {
        const LeftOf_t<W>* left = a.data + row * (a.row == 0 ? steps * P : a.row);
        const std::int64_t next_row = a.row == 0 ? P : a.row, next_step = a.row == 0 ? R * P : P;
        const std::int64_t at = span.at;
        const Rows<LeftOf_t<W>> rows{left + at * next_step, next_row, next_step};
        if constexpr (std::is_same_v<W, Byte>) {
            tile_of_bytes<R>(rows, reinterpret_cast<const std::int8_t*>(data) + at * kBlock * P, span.count,
                             a.scales + row * packed.segments + span.segment, packed.segments,
                             packed.scales + span.segment * padded + block * kBlock,
                             packed.sums + span.segment * padded + block * kBlock, from, branch, ahead);
        } else if constexpr (std::is_same_v<W, Signed>) {
            const std::int64_t groups = steps * P / packed.group, first = at * P / packed.group;
            tile_of_halves<R>(rows, reinterpret_cast<const std::uint8_t*>(data) + first * group_bytes(packed.group),
                              span.count * P / packed.group, packed.group, a.scales + row * packed.segments + span.segment,
                              packed.segments, a.below + row * groups + first, groups, from, branch, ahead);
        } else if constexpr (std::is_same_v<W, Six>) {
            const std::int64_t scale = span.segment * padded + block * kBlock;
            tile_of_sixes<R>(rows, reinterpret_cast<const std::uint8_t*>(data) + at / 2 * kSixes, span.count / 2,
                             a.scales + row * packed.segments + span.segment, packed.segments, packed.scales + scale,
                             a.below + row * packed.segments + span.segment, from, branch, ahead);
        } else if (packed.format == Format::plain) {
            const W* right = reinterpret_cast<const W*>(data) + at * kBlock * P;
            tile<W, R>(rows, right, span.count, from, span.fresh, branch, ahead);
        } else if constexpr (kCodes && std::is_same_v<W, bf16>) {
            tile_of_codes<R>(rows, reinterpret_cast<const std::uint8_t*>(code() + 1) + at * kCodedStep, at, span.count,
                             *code(), patch, branch, ahead);
        }
    }

    // Of as many rows as the tiles have.
    void pass_of_tiles(int rows, std::int64_t row, Span span, const Patch*& patch, Branch branch, Ahead ahead) const {
        const auto* left = reinterpret_cast<const char*>(a.data + row * a.row + span.at * P);
        const std::int64_t next_row = a.row * static_cast<std::int64_t>(sizeof(LeftOf_t<W>));
        const char* right = data + span.at * kBlock * 4;
        const auto as_they_lie = [&](std::int64_t s, std::int64_t) { return right + s * kBlock * 4; };
        if constexpr (std::is_same_v<W, Byte>) {
            alignas(64) std::int32_t sums[kTileRows * kBlock];
            sum_tiles<W>(left, next_row, span.count, as_they_lie, sums, ahead);
            const std::int64_t column = span.segment * padded + block * kBlock;
            for (int j = 0; j < kBlock; j += 16) {
                const Ints off = load_ints(packed.sums + column + j);
                const Vec scale = load(packed.scales + column + j);
                for (int r = 0; r < rows; ++r) {
                    const Vec of_both = scale * set1(a.scales[(row + r) * packed.segments + span.segment]);
                    branch.put(r * kBlock + j, to_floats(load_ints(sums + r * kBlock + j) - off) * of_both);
                }
            }
        } else if (packed.format == Format::plain) {
            sum_tiles<W>(left, next_row, span.count, as_they_lie, branch.out, ahead);
            branch.settle(rows);
        } else {
            alignas(64) bf16 words[kTileSteps * kBlock * 2];
            const auto* codes = reinterpret_cast<const std::uint8_t*>(code() + 1) + span.at * kCodedStep;
            const auto decoded = [&](std::int64_t s, std::int64_t n) {
                decode_steps(codes + s * kCodedStep, span.at + s, n, *code(), patch, words);
                return words;
            };
            sum_tiles<W>(left, next_row, span.count, decoded, branch.out, ahead);
            branch.settle(rows);
        }
    }

    void pass_of(int rows, std::int64_t row, Span span, int from, const Patch*& patch, Branch branch, Ahead ahead) const {
        if constexpr (kTiled<W>) return pass_of_tiles(rows, row, span, patch, branch, ahead);
        switch (rows) {
            case 1: return pass<1>(row, span, from, patch, branch, ahead);
            case 2: return pass<2>(row, span, from, patch, branch, ahead);
            case 3: return pass<3>(row, span, from, patch, branch, ahead);
            case 4: return pass<4>(row, span, from, patch, branch, ahead);
            case 5: return pass<5>(row, span, from, patch, branch, ahead);
            default: return pass<6>(row, span, from, patch, branch, ahead);
        }
    }
};

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

// Rows [first, first + rows) of a as a panel; for tiles row by row.
template <class T>
void make_panel(const Gemm& g, std::int64_t first, int rows, std::int64_t steps, const Left<T>& left) {
    constexpr std::int64_t P = pair_of<T>;
    LeftOf_t<T>* panel = left.room + first * (kTiled<T> ? left.row : steps * P);
    const std::int64_t whole = g.k / P;
    for (int r = 0; r < rows; ++r) {
        const T* from = static_cast<const T*>(g.a) + (first + r) * g.k;
        LeftOf_t<T>* to = panel + r * (kTiled<T> ? left.row : P);
        for (std::int64_t s = 0; s < whole; ++s, to += kTiled<T> ? P : rows * P)
            for (int i = 0; i < P; ++i) to[i] = Type<T>::left(from[s * P + i]);
        if (whole * P < g.k) {
            to[0] = Type<T>::left(from[whole * P]);
            to[P - 1] = 0;
        }
    }
}

// The same in bytes, of one segment: a row's values by 127th parts of the greatest of them. The scale is NaN if a value is
// NaN or infinite, for bytes cannot say so.
template <class T, class W>
void make_panel_of_bytes(const Gemm& g, std::int64_t first, int rows, int segment, std::int64_t steps, const Left<W>& left) {
    constexpr bool is_signed = !std::is_same_v<W, Byte>;
    const std::int64_t group = group_of<W>(g.packed, steps * 4);
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
        LeftOf_t<W>* to = left.room + (left.row == 0 ? (first * steps + begin / 4 * rows + r) * 4 : (first + r) * left.row + begin);
        std::int32_t* below = is_signed ? left.below + ((first + r) * steps * 4 + begin) / group : nullptr;
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
                    if (in_group < group) continue;
                    *below++ = -kAbove<W> * total;
                    total = in_group = 0;
                }
            }
            if constexpr (kShort > 0) {
                if (part - i >= 16) std::memcpy(to + i, bytes, 16);
                else std::copy(bytes, bytes + (part - i), to + i);
            } else {
                const std::int64_t fours = std::min<std::int64_t>(4, (part - i) / 4);
                for (std::int64_t j = 0; j < fours; ++j, to += rows * 4) store_four(to, bytes + j * 4);
            }
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
    static_assert(!kTiled<W> || (kTogether == 1 && kPass == 4));  // a panel walks all of K, in the shapes of its rows
    constexpr std::int64_t P = pair_of<W>;
    constexpr bool of_bytes = sizeof(W) == 1;
    if (g.m == 0) return;
    const std::int64_t steps = padded_depth(g.packed, g.k, P) / P;
    const std::int64_t blocks = ceil_div(g.n, g.gated ? kBlock / 2 : kBlock);
    const Panels panels(g.m, kPanel<W>);
    // Short rows are read as they are; of long ones, side by side, too many would fall into one set of the cache. Those
    // brought to bytes have room between them, so that they never do. Tiles take a cache line of a row at once, whatever
    // is long; those packed for them had no second value in their last step.
    constexpr bool can_be_rows = kShort > 0 && (of_bytes || std::is_same_v<LeftOf_t<W>, T>);
    const bool is_short = g.k % P == 0 && (kTiled<W> || g.k * static_cast<std::int64_t>(sizeof(W)) <= kShort);
    const bool packs = of_bytes || !can_be_rows || !is_short;
    const std::int64_t with_room = ceil_div(steps * P, 64) * 64 + 64;
    const std::int64_t apart = !can_be_rows ? 0 : of_bytes ? with_room : is_short ? g.k : kTiled<W> ? with_room : 0;
    const std::size_t left_bytes = packs ? ceil_div(g.m * std::max(apart, steps * P) * sizeof(LeftOf_t<W>), 64) * 64 : 0;
    const std::size_t scale_bytes = of_bytes ? ceil_div(g.m * g.packed.segments * sizeof(float), 64) * 64 : 0;
    const bool has_below = of_bytes && !std::is_same_v<W, Byte>;
    const std::size_t below_bytes = has_below ? g.m * (steps * P / group_of<W>(g.packed, steps * P)) * sizeof(std::int32_t) : 0;
    char* scratch = static_cast<char*>(pool.shared(left_bytes + scale_bytes + below_bytes));
    LeftOf_t<W>* const room = packs ? reinterpret_cast<LeftOf_t<W>*>(scratch) : nullptr;
    const Left<W> left{packs ? room : static_cast<const LeftOf_t<W>*>(g.a), apart, room,
                       reinterpret_cast<float*>(scratch + left_bytes),
                       reinterpret_cast<std::int32_t*>(scratch + left_bytes + scale_bytes)};
    if (packs) pack_left<T>(pool, g, panels, steps, left);
    constexpr std::int64_t chunk = kChunk * kRows / kPanel<W>;
    const std::int64_t chunks = ceil_div(panels.count, chunk);
    const std::int64_t size = block_bytes(g.packed, g.k, P);
    const int threads = pool.threads();
    // All blocks for some rows, then for the next: rows stay near, and of weights there are the more bytes to bring.
    const std::int64_t items = blocks * chunks;
    pool.run(static_cast<std::uint32_t>(items), [&](std::uint32_t item, int thread) {
        const std::int64_t block = item % blocks, begin = item / blocks * chunk, end = std::min(panels.count, begin + chunk);
        // Coded weights that several panels meet by tiles are decoded once, for decoding takes longer than such a product.
        const bool decodes = kTiled<W> && g.packed.format == Format::coded && end - begin > 1;
        constexpr std::size_t sum_bytes = 5 * kTogether * kPanel<W> * kBlock * sizeof(float);
        const std::size_t decoded_bytes = decodes ? steps * kBlock * P * sizeof(W) : 0;
        auto* sums = static_cast<float*>(pool.scratch(thread, sum_bytes + decoded_bytes));
        // The block that this thread will most likely get next, fetched bit by bit while it computes this one: spread over
        // the panels, so that memory is never idle.
        const std::int64_t later = static_cast<std::int64_t>(item) + threads;
        const char* next = later < items ? static_cast<const char*>(g.packed.data) + later % blocks * size
                                         : static_cast<const char*>(g.then) + (later - items) * g.then_block;
        const bool early = later < items || g.then != nullptr;
        const int lines = early ? static_cast<int>(ceil_div(size / steps, end - begin)) : 0;
        Ahead ahead{next, lines};
        std::conditional_t<kTiled<W>, Packed, const Packed&> packed = g.packed;
        if constexpr (kTiled<W> && std::is_same_v<W, bf16>) {
            if (decodes) packed = decoded_block(packed, block, steps, sums + sum_bytes / sizeof(float));
        }
        const Product<W> product(left, packed, decodes ? 0 : block, blocks * kBlock, steps);
        for (std::int64_t p = begin; p < end; p += kTogether, ahead = ahead.after(steps)) {
            const std::int64_t last = std::min(end, p + kTogether);
            if constexpr (kTiled<W>) shape_tiles(panels.rows(p), static_cast<int>(steps / packed.segments % kTileSteps));
            product.run(panels, p, last, sums, ahead);
            for (std::int64_t i = p; i < last; ++i)
                finish<T>(g, sums + (i - p) * kPanel<W> * kBlock, panels.first(i), panels.rows(i), block);
        }
        if constexpr (kTiled<W>) release_tiles();
    });
}

template <class T>
void gemm(Pool& pool, const Gemm& g) {
    switch (g.packed.format) {
        case Format::plain:
        case Format::coded: return gemm_of<T, T>(pool, g);
        case Format::int8: return gemm_of<T, Byte>(pool, g);
        case Format::int4: return gemm_of<T, Signed>(pool, g);
        case Format::int6: return gemm_of<T, Six>(pool, g);
    }
}

}  // namespace ORCA_ISA
}  // namespace orca
