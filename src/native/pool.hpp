// A pool of compute threads that share work in small pieces, and the scratch memory of each.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace orca {

// Memory that only grows, aligned to a cache line; its bytes are whatever was left there.
class Scratch {
public:
    ~Scratch();
    void* get(std::size_t bytes);

private:
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
};

// Owner of its threads. One job runs at a time; whoever calls `run` works too.
class Pool {
public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Calls work(item, thread) for every item in [0, items), handed out one by one in ascending order to whichever
    // thread is free, so that a thread that loses its core for a moment holds up one item only.
    template <class Work>
    void run(std::uint32_t items, const Work& work) {
        call(items, [](const void* context, std::uint32_t item, int thread) {
            (*static_cast<const Work*>(context))(item, thread);
        }, &work);
    }

    // Scratch of one thread (valid inside its work), and scratch that one call shares (valid until the next call).
    void* scratch(int thread, std::size_t bytes) { return scratch_[thread]->get(bytes); }
    void* shared(std::size_t bytes) { return shared_.get(bytes); }

    // Held by a kernel while it uses the pool.
    std::mutex& mutex() { return mutex_; }

private:
    using Call = void (*)(const void*, std::uint32_t, int);

    void call(std::uint32_t items, Call function, const void* context);
    bool take(int thread);
    void serve(int thread);

    // Upper half: number of the job; lower half: items not handed out yet. One word, so that a thread that comes late
    // can never take an item of one job and run the function of another.
    alignas(64) std::atomic<std::uint64_t> ticket_{0};
    alignas(64) std::atomic<std::uint32_t> done_{0};
    alignas(64) std::atomic<std::uint32_t> signal_{0};
    std::atomic<std::uint32_t> sleeping_{0};
    std::atomic<bool> stopping_{false};
    std::uint32_t items_ = 0;
    Call function_ = nullptr;
    const void* context_ = nullptr;
    std::mutex mutex_;
    Scratch shared_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
    std::vector<std::thread> workers_;
};

// Anonymous memory for weights and caches: zero until written, and in huge pages where the kernel gives them.
class Buffer {
public:
    explicit Buffer(std::size_t bytes);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    void* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }

private:
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace orca
