// The Python face of the kernels: raw addresses in, nothing kept. Whoever calls answers for shapes and lifetimes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels.hpp"

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

// Packed weights of [n, k]; of two such matrices, if gated.
class Matrix {
public:
    Matrix(Dtype dtype, Format format, std::int64_t n, std::int64_t k, bool gated, int segments)
        : dtype(dtype), n(n), k(k), gated(gated), format_(format), segments_(segments),
          padded_(ceil_div(n, gated ? kBlock / 2 : kBlock) * kBlock), data_(padded_ / kBlock * block_bytes()),
          scales_(format == Format::plain ? 0 : segments * padded_ * sizeof(float)),
          sums_(format == Format::plain ? 0 : segments * padded_ * sizeof(std::int32_t)) {
        if (segments < 1 || segments > 64 || (segments & (segments - 1)) != 0 || k % (segments * pair()) != 0) {
            if (segments != 1) throw std::invalid_argument("K cannot be cut into so many segments");
        }
    }

    std::int64_t pair() const { return format_ == Format::int8 ? 4 : dtype == Dtype::bf16 ? 2 : 1; }
    std::int64_t block_bytes() const { return kBlock * ceil_div(k, pair()) * 4; }
    std::size_t bytes() const { return data_.bytes() + scales_.bytes() + sums_.bytes(); }
    Packed packed() const {
        return {data_.data(), static_cast<float*>(scales_.data()), static_cast<std::int32_t*>(sums_.data()), format_,
                segments_};
    }

    const Dtype dtype;
    const std::int64_t n, k;
    const bool gated;

private:
    const Format format_;
    const int segments_;
    const std::int64_t padded_;
    const Buffer data_, scales_, sums_;
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

    void gemm(const Matrix& matrix, Address a, std::int64_t m, Address bias, Address residual, Address out,
              int activation, bool wide) {
        // Layers follow each other in the same order every time: whose weights came after these last time come again.
        const Weights weights{matrix.packed().data, matrix.block_bytes()};
        after_[last_] = weights;
        last_ = weights.data;
        const auto found = after_.find(last_);
        const Weights then = found == after_.end() ? Weights{} : found->second;
        kernels_->gemm(pool_, matrix.dtype,
                       {read<void>(a), m, matrix.k, matrix.packed(), matrix.n, read<float>(bias),
                        read<void>(residual), write<void>(out),
                        static_cast<Activation>(activation), matrix.gated, wide,
                        then.data, then.block_bytes});
    }

    void gather(const Matrix& matrix, Address ids, std::int64_t m, Address out) {
        kernels_->gather(pool_, matrix.dtype,
                         {read<std::int64_t>(ids), m, matrix.k, matrix.n, matrix.packed(), write<void>(out)});
    }

    void norm(Dtype dtype, Address x, std::int64_t m, std::int64_t h, Address weight, Address bias, float eps,
              bool centred, Address out) {
        kernels_->norm(pool_, dtype, {read<void>(x), m, h, read<float>(weight), read<float>(bias), eps, centred,
                                      write<void>(out)});
    }

    void heads(Dtype dtype, Address qkv, std::int64_t m, int heads, int kv_heads, int d, Address q_norm, Address k_norm,
               float eps, Address angles, int rotary, bool interleaved, Address positions, Address slots, Address q,
               Address k_cache, Address v_cache) {
        kernels_->heads(pool_, dtype,
                        {read<void>(qkv), m, heads, kv_heads, d, read<float>(q_norm), read<float>(k_norm), eps,
                         read<float>(angles), rotary, interleaved, read<std::int64_t>(positions),
                         read<std::int64_t>(slots), write<void>(q), write<void>(k_cache), write<void>(v_cache)});
    }

    void attention(Dtype dtype, Address q, Address k_cache, Address v_cache, Address tiles, std::int64_t num_tiles,
                   Address tables, int block_size, int heads, int kv_heads, int d, float scale, int window,
                   float softcap, Address out) {
        kernels_->attention(pool_, dtype,
                            {read<void>(q), read<void>(k_cache), read<void>(v_cache), read<Tile>(tiles), num_tiles,
                             read<std::int32_t>(tables), block_size, heads, kv_heads, d, scale, window, softcap,
                             write<void>(out)});
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
    const Kernels* kernels_ = nullptr;
    Pool pool_;
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
    nb::enum_<Format>(m, "Format").value("plain", Format::plain).value("int8", Format::int8);
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : kAll)
            if (kernels->supported()) names.emplace_back(kernels->name);
        return names;
    }, "Names of the instruction sets that this machine runs, best first.");
    nb::class_<Buffer>(m, "Buffer")
        .def(nb::init<std::size_t>())
        .def_prop_ro("address", [](const Buffer& b) { return reinterpret_cast<Address>(b.data()); })
        .def_prop_ro("nbytes", &Buffer::bytes);
    nb::class_<Matrix>(m, "Matrix")
        .def(nb::init<Dtype, Format, std::int64_t, std::int64_t, bool, int>(), "dtype"_a, "format"_a, "n"_a, "k"_a,
             "gated"_a, "segments"_a)
        .def_ro("n", &Matrix::n)
        .def_ro("k", &Matrix::k)
        .def_prop_ro("nbytes", &Matrix::bytes);
    nb::class_<Engine>(m, "Engine")
        .def(nb::init<const std::string&, int>(), "isa"_a, "threads"_a)
        .def_prop_ro("isa", &Engine::isa)
        .def_prop_ro("threads", &Engine::threads)
        .def("pack", &Engine::pack, free)
        .def("gemm", &Engine::gemm, free)
        .def("gather", &Engine::gather, free)
        .def("norm", &Engine::norm, free)
        .def("heads", &Engine::heads, free)
        .def("attention", &Engine::attention, free)
        .def("peaks", &Engine::peaks, free)
        .def("draw", &Engine::draw, free)
        .def("logprobs", &Engine::logprobs, free);
}
