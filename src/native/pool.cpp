#include "pool.hpp"

#include <cstdlib>
#include <new>

#include "spin.hpp"

#if defined(__linux__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace orca {

namespace {

inline std::uint32_t left_of(std::uint64_t ticket) { return static_cast<std::uint32_t>(ticket); }

}  // namespace

Scratch::~Scratch() { std::free(data_); }

void* Scratch::get(std::size_t bytes) {
    if (bytes > bytes_) {
        std::free(data_);
        bytes_ = (bytes + 4095) / 4096 * 4096;
        data_ = std::aligned_alloc(64, bytes_);
        if (data_ == nullptr) {
            bytes_ = 0;
            throw std::bad_alloc();
        }
    }
    return data_;
}

Pool::Pool(int threads) {
    for (int i = 0; i < threads; ++i) scratch_.push_back(std::make_unique<Scratch>());
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
}

Pool::~Pool() {
    stopping_.store(true);
    signal_.fetch_add(1);
    signal_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::call(std::uint32_t items, Call function, const void* context) {
    if (items == 0) return;
    if (items == 1 || workers_.empty()) {
        for (std::uint32_t i = 0; i < items; ++i) function(context, i, 0);
        return;
    }
    items_ = items;
    function_ = function;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    const std::uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(number << 32 | items);
    signal_.fetch_add(1);
    if (sleeping_.load() != 0) signal_.notify_all();
    while (take(0)) {}
    for (int spins = 0; done_.load(std::memory_order_acquire) != items; ++spins) {
        relax();
        // The last item's thread may have lost its core to somebody who waits for ours.
        if (spins > kSpins) std::this_thread::yield();
    }
}

bool Pool::take(int thread) {
    std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
        if (left_of(ticket) == 0) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel));
    // The job cannot end before this item is done, so what describes it stands still.
    function_(context_, items_ - left_of(ticket), thread);
    done_.fetch_add(1, std::memory_order_release);
    return true;
}

void Pool::serve(int thread) {
    int spins = 0;
    while (!stopping_.load(std::memory_order_relaxed)) {
        const std::uint32_t seen = signal_.load();
        if (take(thread)) {
            spins = 0;
            continue;
        }
        if (++spins < kSpins) {
            relax();
            continue;
        }
        sleeping_.fetch_add(1);
        if (left_of(ticket_.load()) == 0 && !stopping_.load()) signal_.wait(seen);
        sleeping_.fetch_sub(1);
        spins = 0;
    }
}

Buffer::Buffer(std::size_t bytes) {
    constexpr std::size_t kHuge = std::size_t{2} << 20;
    bytes_ = bytes;
    if (bytes == 0) return;
#if defined(__linux__) || defined(__APPLE__)
    bytes_ = (bytes + 4095) / 4096 * 4096;
    void* data = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    data_ = data;
#if defined(MADV_HUGEPAGE)
    if (bytes_ >= kHuge) ::madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
#else
    data_ = std::calloc(1, bytes_);
    if (data_ == nullptr) throw std::bad_alloc();
#endif
}

Buffer::~Buffer() {
    if (data_ == nullptr) return;
#if defined(__linux__) || defined(__APPLE__)
    ::munmap(data_, bytes_);
#else
    std::free(data_);
#endif
}

}  // namespace orca
