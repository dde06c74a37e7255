#include "exchange.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "spin.hpp"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace orca {

#if defined(__linux__)

namespace {

static_assert(std::atomic<std::uint32_t>::is_always_lock_free, "several processes share the counters");

bool has_come(std::uint32_t now, std::uint32_t turn) { return static_cast<std::int32_t>(now - turn) >= 0; }

// Of several processes: what the standard library has for waiting works within one.
void futex(std::atomic<std::uint32_t>& word, int what, std::uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), what, value, nullptr, nullptr, 0);
}

}  // namespace

Exchange::Exchange(int file, int rank, int size, std::size_t capacity)
    : rank_(rank), size_(size), capacity_((capacity + 63) / 64 * 64),
      bytes_(size * (sizeof(Counter) + 2 * capacity_)) {
    if (size < 1 || rank < 0 || rank >= size || capacity == 0) throw std::invalid_argument("there is no such rank");
    if (ftruncate(file, static_cast<off_t>(bytes_)) != 0)
        throw std::system_error(errno, std::generic_category(), "memory for ranks to share");
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "memory for ranks to share");
    counters_ = static_cast<Counter*>(memory);  // zero, as new files are
}

Exchange::~Exchange() { munmap(counters_, bytes_); }

void Exchange::gather(const void* mine, std::size_t bytes, void* out) {
    const auto* from = static_cast<const std::byte*>(mine);
    auto* to = static_cast<std::byte*>(out);
    for (std::size_t begin = 0; begin < bytes; begin += capacity_) {
        const std::size_t count = std::min(capacity_, bytes - begin);
        const std::uint32_t turn = ++turn_;
        std::memcpy(part(turn, rank_), from + begin, count);
        count_up(turn);
        if (to != nullptr) std::memcpy(to + rank_ * bytes + begin, from + begin, count);
        // Whoever comes after this rank first: otherwise all of them would read the same part at a time.
        for (int i = 1; i < size_; ++i) {
            const int other = (rank_ + i) % size_;
            wait(counters_[other], turn);
            if (to != nullptr) std::memcpy(to + other * bytes + begin, part(turn, other), count);
        }
    }
}

std::byte* Exchange::part(std::uint32_t turn, int rank) const {
    return reinterpret_cast<std::byte*>(counters_ + size_) + ((turn & 1) * size_ + rank) * capacity_;
}

// The order of these two, and of the two in `wait`, is the same for everybody (seq_cst): either the one who goes to
// sleep sees the turn, or this one sees that he sleeps.
void Exchange::count_up(std::uint32_t turn) {
    Counter& mine = counters_[rank_];
    mine.turn.store(turn);
    if (mine.sleeping.load() != 0) futex(mine.turn, FUTEX_WAKE, INT32_MAX);
}

void Exchange::wait(Counter& counter, std::uint32_t turn) {
    for (int i = 0; i < kSpins; ++i) {
        if (has_come(counter.turn.load(std::memory_order_acquire), turn)) return;
        relax();
    }
    counter.sleeping.fetch_add(1);
    for (std::uint32_t seen; !has_come(seen = counter.turn.load(), turn);) futex(counter.turn, FUTEX_WAIT, seen);
    counter.sleeping.fetch_sub(1);
}

#else

Exchange::Exchange(int, int rank, int size, std::size_t capacity)
    : rank_(rank), size_(size), capacity_(capacity), bytes_(0), counters_(nullptr) {
    throw std::runtime_error("ranks share memory on Linux only");
}
Exchange::~Exchange() = default;
void Exchange::gather(const void*, std::size_t, void*) {}

#endif

}  // namespace orca
