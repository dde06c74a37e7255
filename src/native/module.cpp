// The Python face of the kernels: raw addresses in, nothing kept. Whoever calls answers for shapes and lifetimes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "coding.hpp"
#include "exchange.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace orca {

// isas.inc, which the build writes, names the instruction sets that were compiled: ISA(name), best first.
#define ISA(name)                 \
    namespace name {              \
    extern const Kernels kernels; \
    }
#include "isas.inc"
#undef ISA

namespace {

const Kernels* const kAll[] = {
#define ISA(name) &name::kernels,
#include "isas.inc"
#undef ISA
};

using Address = std::uintptr_t;

template <class T>
const T* read(Address address) { return reinterpret_cast<const T*>(address); }
template <class T>
T* write(Address address) { return reinterpret_cast<T*>(address); }

constexpr std::int64_t value_bytes(Dtype dtype) { return dtype == Dtype::bf16 ? 2 : 4; }

// Packed weights of [n, k]; of two such matrices, if gated.
class Matrix {
public:
    // group: of 4-bit weights; of others it means nothing.
    Matrix(Dtype dtype, Format format, std::int64_t n, std::int64_t k, bool gated, int group, int segments)
        : dtype(dtype), n(n), k(k), gated(gated), shape_(checked(dtype, format, k, group, segments)),
          padded_(ceil_div(n, gated ? kBlock / 2 : kBlock) * kBlock),
          data_(std::make_unique<Buffer>(padded_ / kBlock * block_bytes())),
          scales_(format == Format::int8 || format == Format::int6 ? segments * padded_ * sizeof(float) : 0),
          sums_(format == Format::int8 ? segments * padded_ * sizeof(std::int32_t) : 0) {}

    std::int64_t value_bytes() const { return orca::value_bytes(dtype); }
    std::int64_t block_bytes() const { return orca::block_bytes(shape_, k, pair(dtype)); }
    std::size_t bytes() const {
        return data_->bytes() + (patches_ == nullptr ? 0 : patches_->bytes()) + scales_.bytes() + sums_.bytes();
    }
    Packed packed() const {
        Packed out = shape_;
        out.data = data_->data();
        out.patches = patches_ == nullptr ? nullptr : static_cast<const Patch*>(patches_->data());
        out.scales = static_cast<float*>(scales_.data());
        out.sums = static_cast<std::int32_t*>(sums_.data());
        return out;
    }

    // Codes what has been packed, if it is bfloat16 and there is something to gain; its values remain.
    void compress(Pool& pool) {
        if (dtype != Dtype::bf16 || shape_.format != Format::plain) return;
        const std::int64_t steps = padded_depth(shape_, k, 2) / 2;
        Coded coded = code(pool, static_cast<const std::uint16_t*>(data_->data()), padded_ / kBlock, steps);
        if (coded.blocks == nullptr) return;
        data_ = std::move(coded.blocks);
        patches_ = std::move(coded.patches);
        shape_.format = Format::coded;
    }

    const Dtype dtype;
    const std::int64_t n, k;
    const bool gated;

private:
    static std::int64_t pair(Dtype dtype) { return dtype == Dtype::bf16 ? 2 : 1; }

    // What describes the packing, still without memory.
    static Packed checked(Dtype dtype, Format format, std::int64_t k, int group, int segments) {
        if (format == Format::int4 && (group < 8 || group > 32 || group % 8 != 0))
            throw std::invalid_argument("a group has a multiple of 8 values, 32 at most");
        if (format == Format::coded) throw std::invalid_argument("coded weights are made of plain ones");
        const Packed shape{nullptr, nullptr, nullptr, nullptr, format, group, segments};
        const bool fits = segments >= 1 && segments <= 64 && (segments & (segments - 1)) == 0 &&
                          k == padded_depth(shape, k, pair(dtype)) && k % segments == 0 &&
                          k / segments == padded_depth(shape, k / segments, pair(dtype));
        if (segments != 1 && !fits) throw std::invalid_argument("K cannot be cut into so many segments");
        return shape;
    }

    Packed shape_;
    const std::int64_t padded_;
    std::unique_ptr<Buffer> data_, patches_;
    const Buffer scales_, sums_;
};

// The parts of a model, as they are bound once. Addresses stay the caller's.
struct Linear {
    const Matrix& matrix;
    const float* bias;  // in the order of packed columns, or null
    Activation activation;
    bool wide;
};

struct NormPart {
    Dtype dtype;
    std::int64_t h;
    const float* weight;
    const float* bias;
    float eps;
    bool centred;
};

struct HeadsPart {
    int heads, kv_heads, d;
    const float* q_norm;
    const float* k_norm;
    float eps;
    int rotary;
    bool interleaved;
};

// What attention sees of the cache, and how.
struct View {
    float scale;
    int window;
    float softcap;
    const float* slopes;
};

// residual + out_norm(out(attention(heads(qkv(norm(x)))))), the norms where there are any
struct AttentionHalf {
    const NormPart* norm;
    const Linear* qkv;
    const HeadsPart* heads;
    View view;
    const Linear* out;
    const NormPart* out_norm;
};

// residual + out_norm(down(inner(norm(x))))
struct MLPHalf {
    const NormPart* norm;
    const Linear* inner;
    const Linear* down;
    const NormPart* out_norm;
};

// One layer's keys and values, of 8 bits or in the dtype of the activations.
struct Cache {
    Cache(Dtype dtype, bool bytes, std::int64_t slots, int kv_heads, int d)
        : dtype(dtype), bytes(bytes),
          k(slots / kGroup * kv_heads * key_bytes(d, dtype == Dtype::bf16 ? 2 : 1, value_bytes(dtype), bytes)),
          v(slots / kGroup * kv_heads * group_value_bytes(d, value_bytes(dtype), bytes)) {}
    const Dtype dtype;
    const bool bytes;
    const Buffer k, v;
};

// Where the rows of one iteration stand.
struct Rows {
    std::int64_t m;
    const std::int64_t* positions;
    const std::int64_t* slots;
    const Tile* tiles;
    std::int64_t num_tiles;
    const std::int32_t* tables;
    std::int32_t block_size;
};

// The kernels of one instruction set on a pool of threads. Calls come from one thread at a time; others wait.
class Engine {
public:
    Engine(const std::string& isa, int threads) : pool_(threads) {
        if (threads < 1) throw std::invalid_argument("an engine needs a thread at least");
        for (const Kernels* kernels : kAll)
            if (isa == kernels->name && kernels->supported()) kernels_ = kernels;
        if (kernels_ == nullptr) throw std::invalid_argument("this machine does not run " + isa);
    }

    std::string isa() const { return kernels_->name; }
    int threads() const { return pool_.threads(); }

    void pack(const Matrix& m, Address weight, std::int64_t rows, std::int64_t row_stride, std::int64_t column_stride,
              std::int64_t first, int half) {
        if (first < 0 || rows < 0 || first + rows > m.n || half < 0 || half > 2 || (half > 0) != m.gated)
            throw std::invalid_argument("these rows do not fit the matrix");
        kernels_->pack(pool_, m.dtype, {read<void>(weight), rows, m.k, row_stride, column_stride, m.packed(), m.n,
                                        first, half});
    }

    // Does nothing where it would not help.
    void compress(Matrix& m) {
        if (!kernels_->codes) return;
        const std::lock_guard<std::mutex> lock(pool_.mutex());
        m.compress(pool_);
    }

    void linear(const Linear& part, Address x, std::int64_t m, Address residual, Address out) {
        product(part, read<void>(x), m, read<void>(residual), write<void>(out));
    }

    void gather(const Matrix& matrix, Address ids, std::int64_t m, Address out) {
        kernels_->gather(pool_, matrix.dtype,
                         {read<std::int64_t>(ids), m, matrix.k, matrix.n, matrix.packed(), write<void>(out)});
    }

    void norm(const NormPart& part, Address x, std::int64_t m, Address residual, Address out) {
        level(part, read<void>(x), m, read<void>(residual), write<void>(out));
    }

    void join(Dtype dtype, Address parts, std::int64_t count, std::int64_t m, std::int64_t n, Address bias,
              Address residual, Address out) {
        if (count < 1 || count > kMostParts || (count & (count - 1)) != 0)
            throw std::invalid_argument("so many parts cannot be summed as a balanced tree");
        kernels_->join(pool_, dtype, {read<float>(parts), count, m, n, read<float>(bias), read<void>(residual),
                                      write<void>(out)});
    }

    void heads(const HeadsPart& part, const Rows& rows, Cache& cache, Address qkv, Address angles, Address q) {
        place(part, rows, cache, read<void>(qkv), read<float>(angles), write<void>(q));
    }

    void attention(const HeadsPart& part, const View& view, const Rows& rows, Cache& cache, Address q, Address out) {
        attend(part, view, rows, cache, read<void>(q), write<void>(out));
    }

    void attention_half(const AttentionHalf& half, const Rows& rows, Cache& cache, Address x, Address residual,
                        Address angles, Address out) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const HeadsPart& heads = *half.heads;
        const std::size_t size = half.qkv->matrix.value_bytes();
        const std::size_t in = rounded(rows.m * half.qkv->matrix.k * size), wide = rounded(rows.m * half.qkv->matrix.n * size);
        const std::size_t queries = rounded(rows.m * heads.heads * heads.d * size);
        char* room = static_cast<char*>(room_.get(std::max(in, queries) + wide + queries));
        char* const qkv = room + std::max(in, queries);
        char* const q = qkv + wide;
        product(*half.qkv, normed(half.norm, read<void>(x), rows.m, room), rows.m, nullptr, qkv);
        place(heads, rows, cache, qkv, read<float>(angles), q);
        attend(heads, half.view, rows, cache, q, room);
        finish(*half.out, half.out_norm, room, rows.m, read<void>(residual), write<void>(out));
    }

    void mlp_half(const MLPHalf& half, Address x, std::int64_t m, Address residual, Address out) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const std::size_t size = half.inner->matrix.value_bytes();
        const std::size_t in = rounded(m * half.inner->matrix.k * size), inner = rounded(m * half.inner->matrix.n * size);
        char* room = static_cast<char*>(room_.get(in + inner));
        product(*half.inner, normed(half.norm, read<void>(x), m, room), m, nullptr, room + in);
        finish(*half.down, half.out_norm, room + in, m, read<void>(residual), write<void>(out));
    }

    void peaks(Address logits, std::int64_t rows, std::int64_t vocab, Address peaks, Address ids) {
        kernels_->peaks(pool_, {read<float>(logits), rows, vocab, write<float>(peaks), write<std::int64_t>(ids)});
    }

    void draw(Address logits, std::int64_t vocab, Address draws, std::int64_t count, Address ids, Address scores,
              Address tokens) {
        kernels_->draw(pool_, {write<float>(logits), vocab, read<Draw>(draws), count, read<std::int64_t>(ids),
                               read<float>(scores), write<std::int64_t>(tokens)});
    }

    void logprobs(Address logits, std::int64_t vocab, Address rows, Address peaks, Address tokens, std::int64_t count,
                  std::int64_t top, Address own, Address ranks, Address ids, Address logprobs) {
        kernels_->logprobs(pool_, {read<float>(logits), vocab, read<std::int64_t>(rows), read<float>(peaks),
                                   read<std::int64_t>(tokens), count, top, write<float>(own),
                                   write<std::int64_t>(ranks), write<std::int64_t>(ids), write<float>(logprobs)});
    }

private:
    static std::size_t rounded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

    void product(const Linear& part, const void* x, std::int64_t m, const void* residual, void* out) {
        const Matrix& matrix = part.matrix;
        // Layers follow each other in the same order every time: whose weights came after these last time come again.
        const Weights weights{matrix.packed().data, matrix.block_bytes()};
        after_[last_] = weights;
        last_ = weights.data;
        const auto found = after_.find(last_);
        const Weights then = found == after_.end() ? Weights{} : found->second;
        kernels_->gemm(pool_, matrix.dtype,
                       {x, m, matrix.k, matrix.packed(), matrix.n, part.bias, residual, out, part.activation,
                        matrix.gated, part.wide, then.data, then.block_bytes});
    }

    void level(const NormPart& part, const void* x, std::int64_t m, const void* residual, void* out) {
        kernels_->norm(pool_, part.dtype, {x, m, part.h, part.weight, part.bias, part.eps, part.centred, residual, out});
    }

    const void* normed(const NormPart* part, const void* x, std::int64_t m, void* room) {
        if (part == nullptr) return x;
        level(*part, x, m, nullptr, room);
        return room;
    }

    void place(const HeadsPart& part, const Rows& rows, Cache& cache, const void* qkv, const float* angles, void* q) {
        kernels_->heads(pool_, cache.dtype,
                        {qkv, rows.m, part.heads, part.kv_heads, part.d, part.q_norm, part.k_norm, part.eps, angles,
                         part.rotary, part.interleaved, rows.positions, rows.slots, q, cache.k.data(), cache.v.data(),
                         cache.bytes});
    }

    void attend(const HeadsPart& part, const View& view, const Rows& rows, Cache& cache, const void* q, void* out) {
        kernels_->attention(pool_, cache.dtype,
                            {q, cache.k.data(), cache.v.data(), rows.tiles, rows.num_tiles, rows.tables,
                             rows.block_size, part.heads, part.kv_heads, part.d, view.scale, view.window, view.softcap, out,
                             cache.bytes, view.slopes});
    }

    // The second product of a half, its norm if it has one, and the sum with the residual.
    void finish(const Linear& part, const NormPart* norm, const void* x, std::int64_t m, const void* residual, void* out) {
        if (norm == nullptr) return product(part, x, m, residual, out);
        void* room = normed_.get(m * part.matrix.n * part.matrix.value_bytes());
        product(part, x, m, nullptr, room);
        level(*norm, room, m, residual, out);
    }

    const Kernels* kernels_ = nullptr;
    Pool pool_;
    std::mutex mutex_;  // of the room between the parts of a half
    Scratch room_, normed_;
    struct Weights {
        const void* data = nullptr;
        std::int64_t block_bytes = 0;
    };
    // Only fetched from, never read: weights that are gone cost a useless hint.
    std::unordered_map<const void*, Weights> after_;
    const void* last_ = nullptr;
};

}  // namespace
}  // namespace orca

NB_MODULE(_native, m) {
    using namespace orca;
    const auto free = nb::call_guard<nb::gil_scoped_release>();
    nb::enum_<Dtype>(m, "Dtype").value("f32", Dtype::f32).value("bf16", Dtype::bf16);
    nb::enum_<Format>(m, "Format").value("plain", Format::plain).value("coded", Format::coded).value("int8", Format::int8).value("int4", Format::int4).value("int6", Format::int6);
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : kAll)
            if (kernels->supported()) names.emplace_back(kernels->name);
        return names;
    }, "Names of the instruction sets that this machine runs, best first.");
    nb::class_<Matrix>(m, "Matrix")
        .def(nb::init<Dtype, Format, std::int64_t, std::int64_t, bool, int, int>(), "dtype"_a, "format"_a, "n"_a, "k"_a,
             "gated"_a, "group"_a, "segments"_a)
        .def_ro("n", &Matrix::n)
        .def_ro("k", &Matrix::k)
        .def_prop_ro("nbytes", &Matrix::bytes);
    nb::class_<Linear>(m, "Linear")
        .def("__init__", [](Linear* self, const Matrix& matrix, Address bias, int activation, bool wide) {
            new (self) Linear{matrix, read<float>(bias), static_cast<Activation>(activation), wide};
        }, nb::keep_alive<1, 2>(), "matrix"_a, "bias"_a, "activation"_a, "wide"_a);
    nb::class_<NormPart>(m, "Norm")
        .def("__init__", [](NormPart* self, Dtype dtype, std::int64_t h, Address weight, Address bias, float eps,
                            bool centred) {
            new (self) NormPart{dtype, h, read<float>(weight), read<float>(bias), eps, centred};
        }, "dtype"_a, "h"_a, "weight"_a, "bias"_a, "eps"_a, "centred"_a);
    nb::class_<HeadsPart>(m, "Heads")
        .def("__init__", [](HeadsPart* self, int heads, int kv_heads, int d, Address q_norm, Address k_norm, float eps,
                            int rotary, bool interleaved) {
            new (self) HeadsPart{heads, kv_heads, d, read<float>(q_norm), read<float>(k_norm), eps, rotary, interleaved};
        }, "heads"_a, "kv_heads"_a, "d"_a, "q_norm"_a, "k_norm"_a, "eps"_a, "rotary"_a, "interleaved"_a);
    nb::class_<View>(m, "View")
        .def("__init__", [](View* self, float scale, int window, float softcap, Address slopes) {
            new (self) View{scale, window, softcap, read<float>(slopes)};
        }, "scale"_a, "window"_a, "softcap"_a, "slopes"_a);
    nb::class_<AttentionHalf>(m, "AttentionHalf")
        .def("__init__", [](AttentionHalf* self, const NormPart* norm, const Linear& qkv, const HeadsPart& heads,
                            const View& view, const Linear& out, const NormPart* out_norm) {
            new (self) AttentionHalf{norm, &qkv, &heads, view, &out, out_norm};
        }, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 6>(),
           nb::keep_alive<1, 7>(), "norm"_a.none(), "qkv"_a, "heads"_a, "view"_a, "out"_a, "out_norm"_a.none());
    nb::class_<MLPHalf>(m, "MLPHalf")
        .def("__init__", [](MLPHalf* self, const NormPart* norm, const Linear& inner, const Linear& down,
                            const NormPart* out_norm) { new (self) MLPHalf{norm, &inner, &down, out_norm}; },
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
             "norm"_a.none(), "inner"_a, "down"_a, "out_norm"_a.none());
    nb::class_<Cache>(m, "Cache")
        .def(nb::init<Dtype, bool, std::int64_t, int, int>(), "dtype"_a, "bytes"_a, "slots"_a, "kv_heads"_a, "d"_a)
        .def_prop_ro("buffers", [](const Cache& c) {
            return std::vector<std::pair<Address, std::size_t>>{{reinterpret_cast<Address>(c.k.data()), c.k.bytes()},
                                                                {reinterpret_cast<Address>(c.v.data()), c.v.bytes()}};
        }, "(address, bytes) of the keys and of the values.");
    nb::class_<Rows>(m, "Rows")
        .def("__init__", [](Rows* self, std::int64_t m, Address positions, Address slots, Address tiles,
                            std::int64_t num_tiles, Address tables, int block_size) {
            new (self) Rows{m, read<std::int64_t>(positions), read<std::int64_t>(slots), read<Tile>(tiles), num_tiles,
                            read<std::int32_t>(tables), block_size};
        }, "m"_a, "positions"_a, "slots"_a, "tiles"_a, "num_tiles"_a, "tables"_a, "block_size"_a);
    nb::class_<Exchange>(m, "Exchange")
        .def(nb::init<int, int, int, std::size_t>(), "file"_a, "rank"_a, "size"_a, "capacity"_a)
        .def("gather", [](Exchange& self, Address mine, std::size_t bytes, Address out) {
            self.gather(read<std::byte>(mine), bytes, write<std::byte>(out));
        }, free, "mine"_a, "bytes"_a, "out"_a, "All ranks' bytes to `out`, in their order; to nowhere, if it is 0.");
    nb::class_<Engine>(m, "Engine")
        .def(nb::init<const std::string&, int>(), "isa"_a, "threads"_a)
        .def_prop_ro("isa", &Engine::isa)
        .def_prop_ro("threads", &Engine::threads)
        .def("pack", &Engine::pack, free)
        .def("compress", &Engine::compress, free)
        .def("linear", &Engine::linear, free)
        .def("gather", &Engine::gather, free)
        .def("norm", &Engine::norm, free)
        .def("join", &Engine::join, free)
        .def("heads", &Engine::heads, free)
        .def("attention", &Engine::attention, free)
        .def("attention_half", &Engine::attention_half, free)
        .def("mlp_half", &Engine::mlp_half, free)
        .def("peaks", &Engine::peaks, free)
        .def("draw", &Engine::draw, free)
        .def("logprobs", &Engine::logprobs, free);
}
