// What the kernels are asked for, and the table of them that every instruction set fills in.
//
// All matrices are row-major; T is bfloat16 or float32, one for a whole model. Weights and caches are laid out as
// described here, the same in every instruction set, so that packing is done once and read by all.
//
// Packed weights [N, K]: blocks of 64 columns, each [K / PAIR][64][PAIR], with PAIR = 2 for bfloat16 and 1 for float32;
// columns and values past the end are zero. A gated pair has 32 columns of the gate and 32 of the other in each block.
// Weights of 8 bits have PAIR = 4; every column has a scale for each segment of K, and is symmetric about zero.
// Coded weights are bfloat16 without loss in 12 bits: a block begins with its `Code`; the 128 words of every step are 128
// lower bytes, then 64 bytes of two halves, each of which stands for an upper byte: its sign, and one of eight of
// the block's exponents by twos. Words with other exponents, about one in ten thousand, are patched. The words of
// 16 columns and 2 values are lanes of 8; two such vectors' lower bytes alternate by lanes (`place_of_word`).
// Weights of 4 bits: every group of values along K is [group / 8][64][4] bytes, the lower half of a byte a value of the
// first four, the upper half its like of the next four, each 8 above what it means; then bfloat16 scales [64].
// Weights of 6 bits: eight values along K are [64][4] bytes of their lower four bits, in halves as with 4 bits, each value 32
// above what it means; then twice 64 bytes of upper two bits, of the first and of the next four: bits 2 j and 2 j + 1 of byte
// i belong to byte 64 j + i of those before. Scales are as with 8 bits.
//
// KV caches: groups of 16 slots (slot = block * block_size + offset, block_size a multiple of 16), for every group and
// head: keys as [d / PAIR][16][PAIR], values as [16 / PAIR][D][PAIR], where D is d rounded up to 16. Caches of 8 bits have
// PAIR = 2 whatever T is, d rounded up to it, and behind both keys and values of a group and head float32 scales [16], one
// for every slot; values are symmetric about zero.
#pragma once

#include <cstdint>

#include "pool.hpp"

namespace orca {

enum class Dtype : int { f32, bf16 };
enum class Activation : int { none, silu, gelu, gelu_tanh, gelu_quick, relu, relu2, tanh, sigmoid };

constexpr std::int64_t kBlock = 64;   // columns of a block of packed weights
constexpr std::int64_t kGroup = 16;   // slots of a group of the caches
constexpr std::int64_t kSpan = 128;   // positions that attention reduces at once

// Weights in the dtype of the activations, the same without loss in three quarters of the memory, or of 8, 4 or 6 bits,
// whose activations are brought to 8 bits row by row.
enum class Format : int { plain, coded, int8, int4, int6 };

// A word of coded weights that the code cannot say. at: its place among the step's [64][2].
struct Patch {
    std::int32_t step;
    std::uint16_t at, word;
};

// The head of a block of coded weights.
struct alignas(64) Code {
    std::uint8_t upper[16];  // what each half stands for
    std::int64_t first;      // the block's patches, by steps, end with one whose step is never reached
};

// Packed weights as they lie in memory.
struct Packed {
    void* data;
    const Patch* patches;  // of coded weights; else null
    float* scales;       // [segments][columns, padded], of 8 and 6 bits; else null
    std::int32_t* sums;  // [segments][columns, padded]: 128 times the sum of a column, of 8 bits
    Format format;
    int group;     // values along K that share a scale, a multiple of 8, of 4 bits
    int segments;  // K is cut into as many equal parts, whose sums are added as a balanced tree; 1 or a power of two
};

struct Pack {
    const void* weight;  // [rows, k], values one row apart every `row_stride`, one column apart every `column_stride`
    std::int64_t rows, k, row_stride, column_stride;
    Packed packed;
    std::int64_t n;  // columns of the whole; of each of the pair, if gated
    std::int64_t first;  // row r goes to column column_of(first + r)
    int half;            // 0: plain columns; 1, 2: the first or second of a gated pair
};

struct Gemm {
    const void* a;  // [m, k]
    std::int64_t m, k;
    Packed packed;
    std::int64_t n;       // columns of the result; of each of the pair, if gated
    const float* bias;    // in the order of packed columns, or null
    const void* residual;  // [m, n], added last, or null
    void* out;            // [m, n] of T, or of float32 if `wide`
    Activation activation;  // of the result; of the gate, if gated
    bool gated, wide;
    const void* then;  // packed weights that will most likely be read next: a hint, or null
    std::int64_t then_block;  // bytes of one block of them
};

struct Gather {
    const std::int64_t* ids;
    std::int64_t m, k, n;
    Packed packed;
    void* out;  // [m, k]
};

struct Norm {
    const void* x;  // [m, h]
    std::int64_t m, h;
    const float* weight;  // or null
    const float* bias;    // or null
    float eps;
    bool centred;  // layer norm; else rms norm
    const void* residual;  // [m, h], added last, or null
    void* out;             // [m, h]
};

// Sums the parts of a product whose K was cut, as a balanced tree, and finishes it as an uncut one is finished.
struct Join {
    const float* parts;  // [count][m][n]
    std::int64_t count;  // a power of 2
    std::int64_t m, n;
    const float* bias;     // [n] or null
    const void* residual;  // [m, n], added last, or null
    void* out;             // [m, n]
};
constexpr int kMostParts = 8;

// Splits the rows of a QKV product into heads, norms and rotates them, stores keys and values, gives queries.
struct Heads {
    const void* qkv;  // [m, (heads + 2 * kv_heads) * d]
    std::int64_t m;
    int heads, kv_heads, d;
    const float* q_norm;  // [d] or null
    const float* k_norm;
    float eps;
    const float* angles;  // [positions][2][rotary / 2] cosines and sines, or null
    int rotary;           // dimensions that turn
    bool interleaved;
    const std::int64_t* positions;
    const std::int64_t* slots;
    void* q;  // [m, heads * d]
    void* k_cache;
    void* v_cache;
    bool bytes;  // caches of 8 bits
};

// A run of queries of one request: positions [start, start + count), whose first stands at row `first` of the batch.
struct Tile {
    std::int32_t first, count, start, table;  // table: where its block table begins
};

struct Attention {
    const void* q;  // [m, heads * d]
    const void* k_cache;
    const void* v_cache;
    const Tile* tiles;
    std::int64_t num_tiles;
    const std::int32_t* tables;
    std::int32_t block_size;
    int heads, kv_heads, d;
    float scale;
    std::int32_t window;  // a query at p sees positions > p - window; 0: all
    float softcap;        // scores become softcap * tanh(score / softcap); 0: as they are
    void* out;            // [m, heads * d]
    bool bytes;           // caches of 8 bits
    const float* slopes;  // [heads] of ALiBi, or null: slope * (position of the key - of the query) is added to a score
};

// Over each row of logits [rows, vocab].
struct Peaks {
    const float* logits;
    std::int64_t rows, vocab;
    float* peaks;       // the greatest of each row; NaN if the row has one
    std::int64_t* ids;  // the lowest id that has it
};

// How the token of one row is drawn; ops/draw.py says what the words mean, and has this layout as a numpy dtype.
struct Draw {
    std::int64_t row;
    std::int64_t first, count;  // its changes: the first of them, and how many
    std::int64_t top_k;         // 0: no limit
    std::uint64_t key;          // of the noise
    double top_p;
    float temperature;  // 0: the greatest score
    float least;        // log(min_p): scaled scores below it are left out
    const std::uint32_t* allowed;  // a bit for each token; null: all
};

struct Draws {
    float* logits;  // [rows, vocab]; the changed scores stand in it while the call lasts
    std::int64_t vocab;
    const Draw* draws;
    std::int64_t count;
    const std::int64_t* ids;  // of the changed scores; a row has no id twice
    const float* scores;
    std::int64_t* tokens;  // [count]; -1 where the greatest score is not finite
};

// log(softmax) of tokens, their ranks (from 1), and the greatest of their rows, ties to the lower id.
struct Logprobs {
    const float* logits;  // [., vocab]
    std::int64_t vocab;
    const std::int64_t* rows;  // [count]: which of them
    const float* peaks;        // [.]
    const std::int64_t* tokens;
    std::int64_t count, top;
    float* own;            // [count]
    std::int64_t* ranks;   // [count]
    std::int64_t* ids;     // [count, top]
    float* logprobs;       // [count, top]
};

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Bytes of one step of a block of coded weights.
constexpr std::int64_t kCodedStep = kBlock * 3;

// Where the lower byte of word `at` of a step's [64][2] lies; its half lies in byte (place % 64), the upper half of it
// from place 64 on.
constexpr int place_of_word(int at) { return at / 64 * 64 + at % 32 / 8 * 16 + at % 64 / 32 * 8 + at % 8; }

// Bytes of a group of 4-bit weights in a block.
constexpr std::int64_t group_bytes(int group) { return group / 8 * kBlock * 4 + kBlock * 2; }

// Bytes of eight values along K of 6-bit weights in a block.
constexpr std::int64_t kSixes = kBlock * 4 + 2 * 64;

// Values along K that a block has room for, and the bytes of a block. pair: of the dtype, of plain weights.
constexpr std::int64_t padded_depth(const Packed& w, std::int64_t k, std::int64_t pair) {
    const std::int64_t multiple = w.format == Format::int4   ? w.group
                                  : w.format == Format::int6 ? 8
                                  : w.format == Format::int8 ? 4
                                                             : pair;
    return ceil_div(k, multiple) * multiple;
}
constexpr std::int64_t block_bytes(const Packed& w, std::int64_t k, std::int64_t pair) {
    const std::int64_t depth = padded_depth(w, k, pair);
    if (w.format == Format::int4) return depth / w.group * group_bytes(w.group);
    if (w.format == Format::int6) return depth / 8 * kSixes;
    if (w.format == Format::coded) return static_cast<std::int64_t>(sizeof(Code)) + depth / 2 * kCodedStep;
    return depth * kBlock * (w.format == Format::int8 ? 1 : 4 / pair);
}

// Bytes of the keys, or of the values, of a group of slots and one head. pair, size: of the dtype, unless of 8 bits.
constexpr std::int64_t key_bytes(int d, std::int64_t pair, std::int64_t size, bool bytes) {
    if (bytes) return ceil_div(d, 2) * 2 * kGroup + kGroup * 4;
    return ceil_div(d, pair) * pair * kGroup * size;
}
constexpr std::int64_t group_value_bytes(int d, std::int64_t size, bool bytes) {
    const std::int64_t padded = ceil_div(d, 16) * 16;
    return bytes ? padded * kGroup + kGroup * 4 : padded * kGroup * size;
}

struct Kernels {
    const char* name;
    bool (*supported)();
    bool codes;  // whether its products read coded weights
    void (*pack)(Pool&, Dtype, const Pack&);
    void (*gemm)(Pool&, Dtype, const Gemm&);
    void (*gather)(Pool&, Dtype, const Gather&);
    void (*norm)(Pool&, Dtype, const Norm&);
    void (*join)(Pool&, Dtype, const Join&);
    void (*heads)(Pool&, Dtype, const Heads&);
    void (*attention)(Pool&, Dtype, const Attention&);
    void (*peaks)(Pool&, const Peaks&);
    void (*draw)(Pool&, const Draws&);
    void (*logprobs)(Pool&, const Logprobs&);
};

}  // namespace orca
