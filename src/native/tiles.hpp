// Tiles of AMX: registers of up to sixteen rows of 64 bytes, and products of them. There are two kinds: the instructions,
// and, for tests on machines without them, what Intel's manual says that they do (ORCA_EMULATED_TILES).
//
// A product [rows][steps][4 bytes] x [steps][64][4 bytes] has its sums in tiles 0 to 3. Sixteen steps of the left side lie
// in tile 4 and of 16 columns of the right side in tile 5; the steps that are left at the end in tiles 6 and 7, which are
// as much smaller, so that nothing beyond them is read.
#pragma once

#include "vec.hpp"

#if defined(ORCA_EMULATED_TILES)
#include <cstdlib>
#elif defined(__AMX_TILE__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace orca {
namespace ORCA_ISA {

constexpr int kTileRows = 16, kTileSteps = 16;

// Gives the calling thread's tiles their shapes: of so many rows, and of so many steps at the end (0: none are left).
inline void shape_tiles(int rows, int tail);
// Gives them back: until then the system has 8 KiB more of each thread to keep.
inline void release_tiles();

#if !defined(__AMX_TILE__)
constexpr bool kTiles = false;
#else
constexpr bool kTiles = true;

struct alignas(64) Shapes {
    std::uint8_t palette, start, reserved[14];
    std::uint16_t bytes[16];  // of a row
    std::uint8_t rows[16];
};
static_assert(sizeof(Shapes) == 64);

inline Shapes shapes_of(int rows, int tail) {
    Shapes shapes{};
    shapes.palette = 1;
    const auto set = [&](int tile, int rows, int bytes) {
        shapes.rows[tile] = static_cast<std::uint8_t>(rows);
        shapes.bytes[tile] = static_cast<std::uint16_t>(bytes);
    };
    for (int tile = 0; tile < 5; ++tile) set(tile, rows, 64);
    set(5, kTileSteps, 64);
    if (tail > 0) {
        set(6, rows, tail * 4);
        set(7, tail, 64);
    }
    return shapes;
}

#if defined(ORCA_EMULATED_TILES)

inline bool have_tiles() { return true; }

struct Emulated {
    Shapes shapes;
    alignas(64) unsigned char tiles[8][kTileRows][64];
};
inline thread_local Emulated emulated;

// The processor would raise an exception.
inline void demand(bool allowed) {
    if (!allowed) std::abort();
}
inline int rows_of_tile(int tile) {
    demand(emulated.shapes.palette == 1 && emulated.shapes.rows[tile] > 0);
    return emulated.shapes.rows[tile];
}
inline int bytes_of_tile(int tile) { return rows_of_tile(tile) > 0 ? emulated.shapes.bytes[tile] : 0; }

inline void shape_tiles(int rows, int tail) {
    emulated = {};
    emulated.shapes = shapes_of(rows, tail);
}
inline void release_tiles() { emulated = {}; }
template <int T>
void zero_tile() {
    rows_of_tile(T);
    std::memset(emulated.tiles[T], 0, sizeof(emulated.tiles[T]));
}
template <int T>
void load_tile(const void* p, std::int64_t stride) {
    zero_tile<T>();
    for (int r = 0; r < rows_of_tile(T); ++r)
        std::memcpy(emulated.tiles[T][r], static_cast<const char*>(p) + r * stride, bytes_of_tile(T));
}
template <int T>
void store_tile(void* p, std::int64_t stride) {
    for (int r = 0; r < rows_of_tile(T); ++r)
        std::memcpy(static_cast<char*>(p) + r * stride, emulated.tiles[T][r], bytes_of_tile(T));
}
inline void demand_shapes(int c, int a, int b) {
    demand(rows_of_tile(a) == rows_of_tile(c) && bytes_of_tile(a) == rows_of_tile(b) * 4);
    demand(bytes_of_tile(b) == 64 && bytes_of_tile(c) == 64);
}
// One row of the left side. Even and odd values are summed apart, then together, then with what was there.
ORCA_APART inline void multiply_row(float* c, const bf16* a, const bf16 (*b)[32], int steps) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < steps; ++k)
        for (int n = 0; n < 16; ++n) {
            even[n] = __builtin_fmaf(widen(a[2 * k]), widen(b[k][2 * n]), even[n]);
            odd[n] = __builtin_fmaf(widen(a[2 * k + 1]), widen(b[k][2 * n + 1]), odd[n]);
        }
    for (int n = 0; n < 16; ++n) c[n] += even[n] + odd[n];
}
template <int C, int A, int B>
void multiply_tiles(bf16) {
    demand_shapes(C, A, B);
    const unsigned own = _mm_getcsr();
    _mm_setcsr(0x9fc0);  // round to even, denormal values are zero, nothing is raised
    for (int r = 0; r < rows_of_tile(C); ++r)
        multiply_row(reinterpret_cast<float*>(emulated.tiles[C][r]), reinterpret_cast<const bf16*>(emulated.tiles[A][r]),
                     reinterpret_cast<const bf16(*)[32]>(emulated.tiles[B]), rows_of_tile(B));
    _mm_setcsr(own);
}
template <int C, int A, int B>
void multiply_tiles(std::uint8_t) {
    demand_shapes(C, A, B);
    for (int r = 0; r < rows_of_tile(C); ++r) {
        auto* sums = reinterpret_cast<std::int32_t*>(emulated.tiles[C][r]);
        for (int k = 0; k < rows_of_tile(B); ++k)
            for (int n = 0; n < 16; ++n)
                for (int i = 0; i < 4; ++i)
                    sums[n] += emulated.tiles[A][r][4 * k + i] * static_cast<std::int8_t>(emulated.tiles[B][k][4 * n + i]);
    }
}

#else

// Whether the processor has tiles and the system lets this process have them, for which Linux wants to be asked.
inline bool have_tiles() {
#if defined(__linux__)
    static const bool have = [] {
        constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
        constexpr unsigned kSaved = 3u << 17;                         // what the system keeps of a thread: shapes and tiles
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
        if (!__get_cpuid(1, &a, &b, &c, &d) || (c & 1u << 27) == 0) return false;  // no xgetbv
        asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
        constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return (a & kSaved) == kSaved && ::syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
    }();
    return have;
#else
    return false;
#endif
}

// As instructions: the compiler's own ones do not say what memory they read, and take no numbers from templates.
inline void shape_tiles(int rows, int tail) {
    const Shapes shapes = shapes_of(rows, tail);
    asm volatile("ldtilecfg %0" : : "m"(shapes));
}
inline void release_tiles() { asm volatile("tilerelease"); }
template <int T>
void zero_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T>
void load_tile(const void* p, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
void store_tile(void* p, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
void multiply_tiles(bf16) { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }
template <int C, int A, int B>
void multiply_tiles(std::uint8_t) { asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }

#endif
#endif

}  // namespace ORCA_ISA
}  // namespace orca
