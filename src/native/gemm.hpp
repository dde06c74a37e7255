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

// Rows of a panel are as equal as can be: 16 rows are 6, 5 and 5.
struct Panels {
    std::int64_t count, base, extra;
    explicit Panels(std::int64_t m) : count(ceil_div(m, kRows)), base(m / count), extra(m % count) {}
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

    // Panels [begin, end), over all of K, as a balanced tree over its segments. sums: room for [5][end - begin][6][64].
    void run(const Panels& panels, std::int64_t begin, std::int64_t end, float* sums, Ahead ahead) const {
        const std::int64_t part = steps / packed.segments;
        const std::int64_t at_once = kPass < 4 && packed.format == Format::plain ? kPassSteps : part;
        const std::int64_t level = (end - begin) * kRows * kBlock;
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
                        branch.out = sums + depth * level + (p - begin) * kRows * kBlock;
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

    void pass_of(int rows, std::int64_t row, Span span, int from, const Patch*& patch, Branch branch, Ahead ahead) const {
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

// Rows [first, first + rows) of a as a panel.
template <class T>
void make_panel(const Gemm& g, std::int64_t first, int rows, std::int64_t steps, const Left<T>& left) {
    constexpr std::int64_t P = pair_of<T>;
    LeftOf_t<T>* panel = left.room + first * steps * P;
    const std::int64_t whole = g.k / P;
    for (int r = 0; r < rows; ++r) {
        const T* from = static_cast<const T*>(g.a) + (first + r) * g.k;
        LeftOf_t<T>* to = panel + r * P;
        for (std::int64_t s = 0; s < whole; ++s, to += rows * P)
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
    constexpr std::int64_t P = pair_of<W>;
    constexpr bool of_bytes = sizeof(W) == 1;
    if (g.m == 0) return;
    const std::int64_t steps = padded_depth(g.packed, g.k, P) / P;
    const std::int64_t blocks = ceil_div(g.n, g.gated ? kBlock / 2 : kBlock);
    const Panels panels(g.m);
    // Short rows are read as they are; of long ones, side by side, too many would fall into one set of the cache. Those
    // brought to bytes have room between them, so that they never do.
    constexpr bool can_be_rows = kShort > 0 && (of_bytes || std::is_same_v<LeftOf_t<W>, T>);
    const bool is_short = g.k % P == 0 && g.k * static_cast<std::int64_t>(sizeof(W)) <= kShort;
    const bool packs = of_bytes || !can_be_rows || !is_short;
    const std::int64_t apart = !can_be_rows ? 0 : of_bytes ? ceil_div(steps * P, 64) * 64 + 64 : is_short ? g.k : 0;
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
    const std::int64_t chunks = ceil_div(panels.count, kChunk);
    const std::int64_t size = block_bytes(g.packed, g.k, P);
    const int threads = pool.threads();
    // All blocks for some rows, then for the next: rows stay near, and of weights there are the more bytes to bring.
    const std::int64_t items = blocks * chunks;
    pool.run(static_cast<std::uint32_t>(items), [&](std::uint32_t item, int thread) {
        const std::int64_t block = item % blocks, begin = item / blocks * kChunk, end = std::min(panels.count, begin + kChunk);
        auto* sums = static_cast<float*>(pool.scratch(thread, 5 * kTogether * kRows * kBlock * sizeof(float)));
        // The block that this thread will most likely get next, fetched bit by bit while it computes this one: spread over
        // the panels, so that memory is never idle.
        const std::int64_t later = static_cast<std::int64_t>(item) + threads;
        const char* next = later < items ? static_cast<const char*>(g.packed.data) + later % blocks * size
                                         : static_cast<const char*>(g.then) + (later - items) * g.then_block;
        const bool early = later < items || g.then != nullptr;
        const int lines = early ? static_cast<int>(ceil_div(size / steps, end - begin)) : 0;
        Ahead ahead{next, lines};
        const Product<W> product(left, g.packed, block, blocks * kBlock, steps);
        for (std::int64_t p = begin; p < end; p += kTogether, ahead = ahead.after(steps)) {
            const std::int64_t last = std::min(end, p + kTogether);
            product.run(panels, p, last, sums, ahead);
            for (std::int64_t i = p; i < last; ++i)
                finish<T>(g, sums + (i - p) * kRows * kBlock, panels.first(i), panels.rows(i), block);
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
        case Format::int6: return gemm_of<T, Six>(pool, g);
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

// Symmetric, in whole numbers up to `most`: calls put(k, column, number) for every value of a row of the weight, and
// keeps the scales.
template <class T, class Put>
void pack_scaled(const Pack& w, std::int64_t row, float most, const Put& put) {
    const std::int64_t column = column_of(w.first + row, w.half), depth = padded_depth(w.packed, w.k, 1);
    const std::int64_t padded = ceil_div(w.n, w.half > 0 ? kBlock / 2 : kBlock) * kBlock, part = depth / w.packed.segments;
    float greatest[kMostSegments] = {};
    each_value<T>(w, row, [&](std::int64_t k, T value) {
        const float size = __builtin_fabsf(Type<T>::to(value));
        if (!(size <= greatest[k / part])) greatest[k / part] = size;
    });
    for (int segment = 0; segment < w.packed.segments; ++segment)
        w.packed.scales[segment * padded + column] = greatest[segment] / most;
    each_value<T>(w, row, [&](std::int64_t k, T value) {
        const float highest = greatest[k / part];
        put(k, column, highest > 0.0f ? static_cast<int>(__builtin_rintf(Type<T>::to(value) * (most / highest))) : 0);
    });
}

template <class T>
void pack_bytes(const Pack& w, std::int64_t row) {
    const std::int64_t depth = padded_depth(w.packed, w.k, 1), part = depth / w.packed.segments;
    const std::int64_t padded = ceil_div(w.n, w.half > 0 ? kBlock / 2 : kBlock) * kBlock;
    auto* to = static_cast<std::int8_t*>(w.packed.data);
    pack_scaled<T>(w, row, 127.0f, [&](std::int64_t k, std::int64_t column, int number) {
        to[column / kBlock * depth * kBlock + k / 4 * kBlock * 4 + column % kBlock * 4 + k % 4] = static_cast<std::int8_t>(number);
        w.packed.sums[k / part * padded + column] += 128 * number;
    });
}

template <class T>
void pack_sixes(const Pack& w, std::int64_t row) {
    const std::int64_t size = block_bytes(w.packed, w.k, 1);
    auto* to = static_cast<std::uint8_t*>(w.packed.data);
    const auto put = [&](std::int64_t k, std::int64_t column, int number) {
        std::uint8_t* eight = to + column / kBlock * size + k / 8 * kSixes;
        const std::int64_t at = column % kBlock * 4 + k % 4, half = k % 8 / 4;
        const int above = number + kAbove<Six>;
        eight[at] = static_cast<std::uint8_t>(eight[at] | (above & 15) << 4 * half);
        std::uint8_t& bits = eight[kBlock * 4 + half * 64 + at % 64];
        bits = static_cast<std::uint8_t>(bits | above >> 4 << at / 64 * 2);
    };
    pack_scaled<T>(w, row, 31.0f, put);
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
    if (w.rows == 0) return;
    // Columns of one block may share bytes, so that a block is one thread's.
    const std::int64_t width = w.half > 0 ? kBlock / 2 : kBlock, first = w.first / width;
    const std::int64_t blocks = (w.first + w.rows - 1) / width + 1 - first;
    pool.run(static_cast<std::uint32_t>(blocks), [&](std::uint32_t item, int) {
        const std::int64_t begin = (first + item) * width - w.first, end = std::min(w.rows, begin + width);
        for (std::int64_t row = std::max<std::int64_t>(0, begin); row < end; ++row) {
            switch (w.packed.format) {
                case Format::plain: pack_plain<T>(w, row); break;
                case Format::coded: break;  // made of plain ones: coding.hpp
                case Format::int8: pack_bytes<T>(w, row); break;
                case Format::int4: pack_halves<T>(w, row); break;
                case Format::int6: pack_sixes<T>(w, row); break;
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
        case Format::int6: {
            const float scale = w.scales[k / (depth / w.segments) * ceil_div(n, kBlock) * kBlock + column];
            const auto* eight = reinterpret_cast<const std::uint8_t*>(block) + k / 8 * kSixes;
            const std::int64_t at = own * 4 + k % 4, half = k % 8 / 4;
            const int above = (eight[at] >> 4 * half & 15) | (eight[kBlock * 4 + half * 64 + at % 64] >> at / 64 * 2 & 3) << 4;
            return Type<T>::from(static_cast<float>(above - kAbove<Six>) * scale);
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
                if (const std::int64_t k = patch->step * 2 + patch->at % 2; patch->at / 2 == g.ids[i] % kBlock && k < g.k)
                    to[k] = static_cast<T>(patch->word);
        }
    });
}

}  // namespace ORCA_ISA
}  // namespace orca
