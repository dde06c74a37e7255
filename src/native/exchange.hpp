// Memory that the ranks of one host share, and what they tell each other through it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace orca {

// One rank's view of the memory. Every rank makes the same calls in the same order, one at a time.
//
// What is passed goes in turns of `capacity` bytes at most. In a turn each rank writes its part, counts its turn up, and
// reads the others' parts once they have counted up, too. There is room for the parts of two turns: who writes in turn
// t + 2 has seen everybody in turn t + 1, and whoever is there has read all of turn t.
class Exchange {
public:
    // file: of no bytes, or made for this by another rank; it may be closed afterwards.
    Exchange(int file, int rank, int size, std::size_t capacity);
    ~Exchange();
    Exchange(const Exchange&) = delete;
    Exchange& operator=(const Exchange&) = delete;

    // out: [size, bytes], the ranks' in their order; null: this rank needs none of it, but waits for the others' turns.
    void gather(const void* mine, std::size_t bytes, void* out);

private:
    // Of one rank. Whether somebody sleeps until `turn` changes is in a word of its own, which is hardly ever written.
    struct Counter {
        alignas(64) std::atomic<std::uint32_t> turn;
        alignas(64) std::atomic<std::uint32_t> sleeping;
    };

    std::byte* part(std::uint32_t turn, int rank) const;
    void count_up(std::uint32_t turn);
    static void wait(Counter& counter, std::uint32_t turn);

    const int rank_, size_;
    const std::size_t capacity_;
    std::size_t bytes_;
    Counter* counters_;  // size_ of them, and the parts of two turns
    std::uint32_t turn_ = 0;
};

}  // namespace orca
