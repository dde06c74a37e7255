// What a thread does that looks at a word of memory again and again.
#pragma once

namespace orca {

// About fifty microseconds of looking before a thread sleeps: longer than the pause between two kernels of a layer,
// shorter than anybody sharing the core would notice.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace orca
