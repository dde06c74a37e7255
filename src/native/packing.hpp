// Weights as they are packed once, in every format, and the rows of a tied embedding gathered from them.
#pragma once

#include "gemm.hpp"

namespace orca {
namespace ORCA_ISA {

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
