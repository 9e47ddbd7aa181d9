// Where things are in the memory that the ranks of a node share (shared_memory.cpp).

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace {

using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free, "shared between processes");

// Sequentially consistent, not only released: what a rank publishes must be seen before it looks
// for who sleeps, and a sleeper says so before it looks again for what is published.
constexpr auto kOrdered = std::memory_order_seq_cst;
#ifdef PLANTED_RELAXED  // a test's: the race detector must notice
constexpr auto kPublished = std::memory_order_relaxed;
#else
constexpr auto kPublished = kOrdered;
#endif
constexpr auto kSeen = std::memory_order_acquire;

constexpr int64_t kLine = 64;
constexpr int64_t kCacheBytes = 24 << 20;  // about what a socket's cores share
constexpr uint32_t kRing = 8;  // messages of a channel that are described at a time

int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// Past the cache goes what would push itself out of it: then nothing need be read to be written.
void copy_bytes(char* to, const char* from, int64_t bytes, bool past_cache) {
#ifdef __SSE2__
    if (past_cache && bytes >= 4096) {
        const int64_t first = -(intptr_t)to & 15, last = (bytes - first) / 64 * 64 + first;
        std::memcpy(to, from, first);
        for (int64_t at = first; at < last; at += 64) {
            for (int64_t i = at; i < at + 64; i += 16) {
                const __m128i value = _mm_loadu_si128((const __m128i*)(from + i));
                _mm_stream_si128((__m128i*)(to + i), value);
            }
        }
        std::memcpy(to + last, from + last, bytes - last);
        return _mm_sfence();  // before a counter says that it is there
    }
#endif
    std::memcpy(to, from, bytes);
}

// Counters wrap around.
bool reached(uint32_t counter, uint32_t value) { return (int32_t)(counter - value) >= 0; }

struct RankLine {
    Word sleeping;               // 1: in a futex on this word, or about to be
    Word starving;               // 1: waits for consumers to free its heap
    std::atomic<uint64_t> want;  // group and message that it waits for
};

struct Counters {
    Word num_begun;      // messages whose first piece is there
    Word num_published;  // pieces of all messages
};

struct Part {
    int64_t offset, bytes;  // where in a block; how many in all pieces
};

struct Description {
    uint32_t first_piece, num_pieces;
    int64_t piece_bytes;  // of a part in each piece but its last
    int64_t blocks[2];    // in the sender's heap, of even and odd pieces
    Part parts[1];        // one for each place of the group
};

int64_t description_bytes(int64_t size) {
    return lines(sizeof(Description) + (size - 1) * sizeof(Part));
}
int64_t channel_bytes(int64_t size) { return kLine + kRing * description_bytes(size); }

// Which part of the shared memory is what: a line a rank, all groups, a heap a rank.
struct Region {
    char* base;
    int64_t num_ranks, groups_bytes, heap_bytes;

    RankLine& line(int64_t rank) const { return *(RankLine*)(base + rank * kLine); }
    char* groups() const { return base + num_ranks * kLine; }
    char* heap(int64_t rank) const { return groups() + groups_bytes + rank * heap_bytes; }
    int64_t half() const { return heap_bytes / 2 / kLine * kLine; }
};

// Which bytes of a part of its heap a rank uses. First fit, from the low end: what was touched
// before is used again.
class Heap {
  public:
    Heap(int64_t begin, int64_t bytes) : free_{{begin, bytes}}, begin_(begin), bytes_(bytes) {}

    bool has(int64_t offset) const { return offset >= begin_ && offset < begin_ + bytes_; }
    bool is_taken(int64_t offset) const { return taken_.count(offset); }

    int64_t take(int64_t bytes) {  // -1: there is no room
        bytes = lines(std::max<int64_t>(bytes, 1));
        for (auto [offset, size] : free_) {
            if (size < bytes) continue;
            free_.erase(offset);
            if (size > bytes) free_[offset + bytes] = size - bytes;
            taken_[offset] = bytes;
            return offset;
        }
        return -1;
    }

    void give_back(int64_t offset) {
        auto taken = taken_.find(offset);
        auto place = free_.emplace(offset, taken->second).first;
        taken_.erase(taken);
        if (auto next = std::next(place); next != free_.end()) join(place, next);
        if (place != free_.begin()) join(std::prev(place), place);
    }

  private:
    using Blocks = std::map<int64_t, int64_t>;  // offset: bytes

    void join(Blocks::iterator place, Blocks::iterator next) {
        if (place->first + place->second != next->first) return;
        place->second += next->second;
        free_.erase(next);
    }

    Blocks free_, taken_;
    int64_t begin_, bytes_;
};

}  // namespace
