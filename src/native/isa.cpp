// All kernels in the instruction set of this translation unit, which is compiled once for each of them.
#include "attention.hpp"
#include "packing.hpp"
#include "sampling.hpp"

#define ORCA_NAME_(x) #x
#define ORCA_NAME(x) ORCA_NAME_(x)

namespace orca {
namespace ORCA_ISA {

static bool supported() {
#if defined(__AMX_TILE__)
    if (!have_tiles()) return false;
#endif
#if defined(__AVX512BF16__)
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return true;
#endif
}


#define ORCA_BOTH(function, Arguments)                              \
    [](Pool& pool, Dtype dtype, const Arguments& arguments) {       \
        const std::lock_guard<std::mutex> lock(pool.mutex());       \
        if (dtype == Dtype::f32) {                                  \
            function<float>(pool, arguments);                       \
        } else {                                                    \
            function<bf16>(pool, arguments);                        \
        }                                                           \
    }

extern const Kernels kernels;
const Kernels kernels = {
    ORCA_NAME(ORCA_ISA),
    supported,
    kCodes,
    ORCA_BOTH(pack, Pack),
    ORCA_BOTH(gemm, Gemm),
    ORCA_BOTH(gather, Gather),
    ORCA_BOTH(norm, Norm),
    ORCA_BOTH(join, Join),
    ORCA_BOTH(heads, Heads),
    ORCA_BOTH(attention, Attention),
    peaks,
    draw,
    logprobs,
};

}  // namespace ORCA_ISA
}  // namespace orca
