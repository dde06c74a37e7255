// What is done to a row alone: norms, activations, and the way from a QKV product to heads and caches.
#pragma once

#include "gemm.hpp"

namespace orca {
namespace ORCA_ISA {

// Rows that one piece of work takes, so that it is worth handing out.
inline std::int64_t rows_at_once(std::int64_t values) { return std::max<std::int64_t>(1, 16384 / std::max<std::int64_t>(1, values)); }

// Calls work(first, end) for pieces of [0, m).
template <class Work>
void by_rows(Pool& pool, std::int64_t m, std::int64_t values, const Work& work) {
    const std::int64_t at_once = rows_at_once(values);
    pool.run(static_cast<std::uint32_t>(ceil_div(m, at_once)), [&](std::uint32_t item, int) {
        work(item * at_once, std::min<std::int64_t>(m, (item + 1) * at_once));
    });
}

template <class T>
float sum_of_squares(const T* x, std::int64_t n, float mean) {
    Vec squares = zero();
    const Vec centre = set1(mean);
    for (std::int64_t i = 0; i < n; i += 16) {
        const Vec off = first(static_cast<int>(std::min<std::int64_t>(16, n - i)), load_some(x + i, n - i) - centre, zero());
        squares = fma(off, off, squares);
    }
    return sum(squares);
}

template <class T>
float total(const T* x, std::int64_t n) {
    Vec out = zero();
    for (std::int64_t i = 0; i < n; i += 16) out = out + load_some(x + i, n - i);
    return sum(out);
}

constexpr int kLargestHead = 1024;  // dimensions

inline float inverse_root(float x) { return 1.0f / __builtin_sqrtf(x); }

template <class T>
void norm(Pool& pool, const Norm& g) {
    by_rows(pool, g.m, g.h, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            const T* x = static_cast<const T*>(g.x) + row * g.h;
            const T* residual = g.residual == nullptr ? nullptr : static_cast<const T*>(g.residual) + row * g.h;
            T* out = static_cast<T*>(g.out) + row * g.h;
            const float mean = g.centred ? total(x, g.h) / static_cast<float>(g.h) : 0.0f;
            const Vec centre = set1(mean);
            const Vec factor = set1(inverse_root(sum_of_squares(x, g.h, mean) / static_cast<float>(g.h) + g.eps));
            for (std::int64_t i = 0; i < g.h; i += 16) {
                const std::int64_t left = g.h - i;
                Vec y = (load_some(x + i, left) - centre) * factor;
                if (g.weight != nullptr) y = y * load_some(g.weight + i, left);
                if (g.bias != nullptr) y = y + load_some(g.bias + i, left);
                if (residual != nullptr) y = y + load_some(residual + i, left);
                store_some(out + i, y, left);
            }
        }
    });
}

template <class T>
void join(Pool& pool, const Join& g) {
    by_rows(pool, g.m, g.n * g.count, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            const T* residual = g.residual == nullptr ? nullptr : static_cast<const T*>(g.residual) + row * g.n;
            for (std::int64_t i = 0; i < g.n; i += 16) {
                const std::int64_t left = g.n - i;
                Vec sums[kMostParts];
                for (std::int64_t p = 0; p < g.count; ++p) sums[p] = load_some(g.parts + (p * g.m + row) * g.n + i, left);
                for (std::int64_t step = 1; step < g.count; step *= 2)
                    for (std::int64_t p = 0; p < g.count; p += 2 * step) sums[p] = sums[p] + sums[p + step];
                Vec y = sums[0];
                if (g.bias != nullptr) y = y + load_some(g.bias + i, left);
                if (residual != nullptr) y = y + load_some(residual + i, left);
                store_some(static_cast<T*>(g.out) + row * g.n + i, y, left);
            }
        }
    });
}

// Norms and rotates one head; x: float32 [d], in place, with room for 16 values more.
inline void turn(const Heads& g, float* x, const float* norm, const float* angles) {
    if (norm != nullptr) {
        const Vec factor = set1(inverse_root(sum_of_squares(x, g.d, 0.0f) / static_cast<float>(g.d) + g.eps));
        for (int i = 0; i < g.d; i += 16) store_some(x + i, load_some(x + i, g.d - i) * factor * load_some(norm + i, g.d - i), g.d - i);
    }
    if (angles == nullptr) return;
    const int half = g.rotary / 2;
    const float* cosines = angles;
    const float* sines = angles + half;
    if (g.interleaved) {
        for (int i = 0; i < half; ++i) {
            const float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cosines[i] - b * sines[i];
            x[2 * i + 1] = b * cosines[i] + a * sines[i];
        }
        return;
    }
    for (int i = 0; i < half; i += 16) {
        const int left = half - i;
        const Vec a = load_some(x + i, left), b = load_some(x + half + i, left);
        const Vec c = load_some(cosines + i, left), s = load_some(sines + i, left);
        store_some(x + i, a * c - b * s, left);
        store_some(x + half + i, b * c + a * s, left);
    }
}

template <class T>
void store_key(const Heads& g, const T* x, std::int64_t slot, int head) {
    constexpr int P = Type<T>::PAIR;
    const std::int64_t padded = ceil_div(g.d, P);
    T* to = static_cast<T*>(g.k_cache) + (slot / kGroup * g.kv_heads + head) * padded * kGroup * P + slot % kGroup * P;
    for (int i = 0; i < g.d; i += P) std::memcpy(to + i * kGroup, x + i, P * sizeof(T));
}

// Writes a value, and what belongs beside it: a pair is always written by one row, the first of it in the iteration.
// The second of a pair is zero as long as it has no value of its own: what lies there may be a stranger's NaN.
template <class T>
void store_value(const Heads& g, const T* x, std::int64_t row, std::int64_t stride, int head) {
    constexpr int P = Type<T>::PAIR;
    const std::int64_t slot = g.slots[row], offset = slot % kGroup, padded = ceil_div(g.d, 16) * 16;
    T* to = static_cast<T*>(g.v_cache) + ((slot / kGroup * g.kv_heads + head) * kGroup + offset / P * P) * padded;
    if constexpr (P == 1) {
        std::copy(x, x + g.d, to);
    } else if (offset % 2 == 0) {
        const bool followed = row + 1 < g.m && g.slots[row + 1] == slot + 1;
        const T* second = followed ? x + stride : x;
        const std::uint32_t keep = followed ? 0xffff0000u : 0;
        for (int i = 0; i < g.d; ++i) {
            const std::uint32_t both = x[i] | (static_cast<std::uint32_t>(second[i]) << 16 & keep);
            std::memcpy(to + 2 * i, &both, 4);
        }
    } else if (row == 0 || g.slots[row - 1] != slot - 1) {
        for (int i = 0; i < g.d; ++i) {
            std::uint32_t both;
            std::memcpy(&both, to + 2 * i, 4);
            both = (both & 0xffffu) | static_cast<std::uint32_t>(x[i]) << 16;
            std::memcpy(to + 2 * i, &both, 4);
        }
    }
}

// The greatest size of n values; NaN if one of them is not finite.
template <class T>
float largest_size(const T* x, std::int64_t n) {
    Vec greatest = zero(), strange = zero();
    for (std::int64_t i = 0; i < n; i += 16) {
        const Vec a = load_some(x + i, n - i);
        greatest = max(greatest, max(a, zero() - a));
        strange = fma(a, zero(), strange);  // a comparison may lose a NaN, a product does not
    }
    return largest(greatest) + sum(strange);
}

constexpr float kNothing = 1e-30f;  // values that are no larger are brought to zero: their inverse might be infinite

// Brings n values to whole numbers from -127 to 127, with room for 16 more; returns what one of them means.
inline float to_bytes(const float* x, std::int64_t n, std::int8_t* out) {
    const float most = largest_size(x, n);
    const Vec factor = set1(most > kNothing ? 127.0f / most : 0.0f);
    for (std::int64_t i = 0; i < n; i += 16) {
        std::uint8_t above[16];
        store_bytes(above, load_some(x + i, n - i) * factor);
        for (int j = 0; j < 16; ++j) out[i + j] = static_cast<std::int8_t>(above[j] ^ 0x80);
    }
    return most / 127.0f;
}

// Where a group's keys or values of a head begin, in a cache of 8 bits.
inline std::int8_t* bytes_at(const Heads& g, void* cache, std::int64_t slot, int head, std::int64_t size) {
    return static_cast<std::int8_t*>(cache) + (slot / kGroup * g.kv_heads + head) * size;
}

// x: float32 [d] with room for 16 more.
inline void store_key_bytes(const Heads& g, const float* x, std::int64_t slot, int head) {
    std::int8_t bytes[kLargestHead + 16] = {};
    const float scale = to_bytes(x, g.d, bytes);
    const std::int64_t offset = slot % kGroup, padded = ceil_div(g.d, 2) * 2;
    std::int8_t* to = bytes_at(g, g.k_cache, slot, head, key_bytes(g.d, 2, 1, true));
    for (std::int64_t i = 0; i < padded; i += 2) std::memcpy(to + i * kGroup + offset * 2, bytes + i, 2);
    std::memcpy(to + padded * kGroup + offset * 4, &scale, 4);
}

// The other of a pair is left alone: whatever lies there is a finite number until it is written.
inline void store_value_bytes(const Heads& g, const float* x, std::int64_t slot, int head) {
    std::int8_t bytes[kLargestHead + 16];
    const float scale = to_bytes(x, g.d, bytes);
    const std::int64_t offset = slot % kGroup, padded = ceil_div(g.d, 16) * 16;
    std::int8_t* to = bytes_at(g, g.v_cache, slot, head, group_value_bytes(g.d, 1, true));
    std::int8_t* pair = to + offset / 2 * padded * 2 + offset % 2;
    for (int i = 0; i < g.d; ++i) pair[i * 2] = bytes[i];
    std::memcpy(to + padded * kGroup + offset * 4, &scale, 4);
}

template <class T>
void heads(Pool& pool, const Heads& g) {
    const int all = g.heads + 2 * g.kv_heads;
    const std::int64_t stride = static_cast<std::int64_t>(all) * g.d;
    // Up to a whole group of slots, so that the cache lines of a head's keys, which sixteen rows share, are written
    // together; fewer where there is not enough for all threads.
    const std::int64_t at_once = std::clamp<std::int64_t>(g.m / (pool.threads() * 4), 1, kGroup);
    pool.run(static_cast<std::uint32_t>(ceil_div(g.m, at_once)), [&](std::uint32_t item, int) {
        const std::int64_t begin = item * at_once, end = std::min<std::int64_t>(g.m, begin + at_once);
        float wide[kLargestHead + 16];
        T narrow_[kLargestHead + 16];
        for (int head = 0; head < all; ++head) {
            for (std::int64_t row = begin; row < end; ++row) {
                const T* x = static_cast<const T*>(g.qkv) + row * stride + head * g.d;
                const int value = head - g.heads - g.kv_heads;
                if (value >= 0 && !g.bytes) {
                    store_value(g, x, row, stride, value);
                    continue;
                }
                const float* angles = g.angles == nullptr ? nullptr : g.angles + g.positions[row] * g.rotary;
                for (int i = 0; i < g.d; i += 16) store(wide + i, load_some(x + i, g.d - i));
                if (value >= 0) {
                    store_value_bytes(g, wide, g.slots[row], value);
                    continue;
                }
                turn(g, wide, head < g.heads ? g.q_norm : g.k_norm, angles);
                if (head < g.heads) {
                    T* q = static_cast<T*>(g.q) + (row * g.heads + head) * g.d;
                    for (int i = 0; i < g.d; i += 16) store_some(q + i, load(wide + i), g.d - i);
                } else if (g.bytes) {
                    store_key_bytes(g, wide, g.slots[row], head - g.heads);
                } else {
                    for (int i = 0; i < g.d; i += 16) Type<T>::store16(narrow_ + i, load(wide + i));
                    store_key(g, narrow_, g.slots[row], head - g.heads);
                }
            }
        }
    });
}

}  // namespace ORCA_ISA
}  // namespace orca
