// Weights in bfloat16 without loss in three quarters of the memory.
//
// Of 16 bits of a trained or drawn weight the exponent's carry fewer than three: eight pairs of neighbouring exponents
// hold all but one weight in some ten thousand. A product that waits for memory becomes faster by what is not read.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels.hpp"

namespace orca {

// Coded weights of `blocks` blocks, and what had to be patched.
struct Coded {
    std::unique_ptr<Buffer> blocks, patches;
};

// Plain bfloat16 blocks of so many steps in code; nothing if too many words would need a patch.
Coded code(Pool& pool, const std::uint16_t* plain, std::int64_t blocks, std::int64_t steps);

}  // namespace orca
