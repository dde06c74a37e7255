#include "coding.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <numeric>
#include <vector>

namespace orca {
namespace {

constexpr std::int64_t kWords = kBlock * 2;       // of a step
constexpr std::int64_t kWordsPerPatch = 512;      // with more patches than that, plain weights are faster
constexpr std::uint8_t kNone = 255;

int exponents(std::uint16_t word) { return word >> 8 & 127; }

// The code of each pair of exponents, kNone without one, and what each of 16 codes stands for.
struct Codes {
    std::array<std::uint8_t, 128> of;
    std::array<std::uint8_t, 16> upper;
};

Codes codes_of(const std::array<std::int64_t, 128>& counts) {
    std::array<int, 128> order;
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + 8, order.end(),
                      [&](int a, int b) { return counts[a] != counts[b] ? counts[a] > counts[b] : a < b; });
    Codes codes;
    codes.of.fill(kNone);
    for (int i = 0; i < 8; ++i) {
        codes.of[order[i]] = static_cast<std::uint8_t>(i);
        codes.upper[i] = static_cast<std::uint8_t>(order[i]);
        codes.upper[8 + i] = static_cast<std::uint8_t>(order[i] | 128);
    }
    return codes;
}

std::array<std::int64_t, 128> count_exponents(const std::uint16_t* words, std::int64_t n) {
    // Several of each, so that equal neighbours do not wait for each other.
    std::array<std::array<std::int32_t, 128>, 4> some{};
    for (std::int64_t i = 0; i < n; i += 4)
        for (int j = 0; j < 4; ++j) ++some[j][exponents(words[i + j])];
    std::array<std::int64_t, 128> counts;
    for (int e = 0; e < 128; ++e) counts[e] = std::int64_t{some[0][e]} + some[1][e] + some[2][e] + some[3][e];
    return counts;
}

void code_step(const std::uint16_t* words, const Codes& codes, std::int32_t step, std::uint8_t* to, Patch*& patch) {
    std::uint8_t halves[kWords];
    for (int at = 0; at < kWords; ++at) {
        const int place = place_of_word(at);
        to[place] = static_cast<std::uint8_t>(words[at]);
        std::uint8_t half = codes.of[exponents(words[at])];
        if (half == kNone) {
            half = 0;
            *patch++ = {step, static_cast<std::uint16_t>(at), words[at]};
        }
        halves[place] = static_cast<std::uint8_t>(half | words[at] >> 15 << 3);
    }
    for (int i = 0; i < 64; ++i) to[kWords + i] = static_cast<std::uint8_t>(halves[i] | halves[64 + i] << 4);
}

}  // namespace

Coded code(Pool& pool, const std::uint16_t* plain, std::int64_t blocks, std::int64_t steps) {
    const std::int64_t words = steps * kWords;
    std::vector<Codes> codes(blocks);
    std::vector<std::int64_t> first(blocks + 1);
    pool.run(static_cast<std::uint32_t>(blocks), [&](std::uint32_t block, int) {
        const auto counts = count_exponents(plain + block * words, words);
        codes[block] = codes_of(counts);
        first[block + 1] = 1;  // the one that ends them
        for (int e = 0; e < 128; ++e)
            if (codes[block].of[e] == kNone) first[block + 1] += counts[e];
    });
    std::partial_sum(first.begin(), first.end(), first.begin());
    if ((first[blocks] - blocks) * kWordsPerPatch > blocks * words) return {};
    const std::int64_t block_bytes = static_cast<std::int64_t>(sizeof(Code)) + steps * kCodedStep;
    Coded out{std::make_unique<Buffer>(blocks * block_bytes), std::make_unique<Buffer>(first[blocks] * sizeof(Patch))};
    pool.run(static_cast<std::uint32_t>(blocks), [&](std::uint32_t block, int) {
        char* to = static_cast<char*>(out.blocks->data()) + block * block_bytes;
        Code* head = reinterpret_cast<Code*>(to);
        std::copy(codes[block].upper.begin(), codes[block].upper.end(), head->upper);
        head->first = first[block];
        Patch* patch = static_cast<Patch*>(out.patches->data()) + first[block];
        for (std::int64_t s = 0; s < steps; ++s)
            code_step(plain + block * words + s * kWords, codes[block], static_cast<std::int32_t>(s),
                      reinterpret_cast<std::uint8_t*>(to + sizeof(Code) + s * kCodedStep), patch);
        *patch = {INT_MAX, 0, 0};
    });
    return out;
}

}  // namespace orca
