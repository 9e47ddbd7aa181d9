// What a rank keeps of its groups, and of the exchanges that it has begun (shared_memory.cpp).

#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "shared_memory.h"

namespace {

// A rank's view of a group; a group of two is used for messages from one to the other too.
struct Group {
    struct Endpoint* endpoint;
    uint32_t id;
    int64_t size, place;
    std::vector<int64_t> ranks;
    char* base;
    uint32_t num_sent = 0;               // messages that are out whole
    uint32_t num_pieces_sent = 0;        // of described messages
    uint32_t end_pieces[kRing] = {};     // of the messages in the ring
    std::vector<uint32_t> num_expected;  // by place: messages that exchanges wait for, or did
    std::vector<uint32_t> num_taken;     // by place: messages that are copied out

    char* channel(int64_t sender) const { return base + sender * channel_bytes(size); }
    Counters& counters(int64_t sender) const { return *(Counters*)channel(sender); }
    Description& description(int64_t sender, uint32_t message) const {
        return *(Description*)(channel(sender) + kLine +
                               message % kRing * description_bytes(size));
    }
    // Pieces of a sender that a consumer needs no more.
    Word& consumed(int64_t consumer, int64_t sender) const {
        return ((Word*)(channel(size) + consumer * lines(4 * size)))[sender];
    }
    bool all_consumed(uint32_t end_piece) const {
        for (int64_t other = 0; other < size; ++other) {
            if (other != place && !reached(consumed(other, place).load(kSeen), end_piece)) {
                return false;
            }
        }
        return true;
    }
};

struct Incoming {
    int64_t sender;
    uint32_t message;
    char* to;  // null: read where it is
    int64_t bytes;
    uint32_t num_pieces = 0;  // taken
    bool is_done = false;
    const char* at = nullptr;  // where it is, in the sender's heap, which keeps it meanwhile
};

struct Exchange {
    Group* group;
    bool sends = false, same_for_all = false, in_place = false, is_done = false;
    bool past_cache = false;  // what all ranks exchange does not fit into it
    const char* from = nullptr;
    std::vector<Part> parts;  // of `from`
    int64_t block = -1;       // of the heap; at first, the one that the message was made in
    uint32_t message = 0, num_pieces = 0, num_published = 0;
    std::vector<Incoming> incoming;
    std::vector<const char*> at;   // by place, of an exchange that is read in place
    std::unique_ptr<char[]> copy;  // of what could not stay where it was
    int64_t differing = -1;  // a place whose message has another size than was expected
};

struct Lent {  // a block of the heap, until all consumers have read it, and the sender its own part
    Group* group;
    uint32_t end_piece;
    int64_t block;
    const Exchange* reader;
};

struct Endpoint {
    Region region;
    int64_t rank, num_spins;
    Heap copied, made;  // two halves of the heap: what waits for room is only in the first
    std::vector<std::unique_ptr<Group>> groups;
    std::deque<std::unique_ptr<Exchange>> exchanges;
    std::vector<Lent> lent;

    // What is read already is used again first: pages that nobody has touched yet cost more.
    int64_t take(Heap& half, int64_t bytes) {
        auto is_back = [this](const Lent& each) {
            if (each.reader || !each.group->all_consumed(each.end_piece)) return false;
            (made.has(each.block) ? made : copied).give_back(each.block);
            return true;
        };
        lent.erase(std::remove_if(lent.begin(), lent.end(), is_back), lent.end());
        return half.take(bytes);
    }
    bool progress(const Exchange& waited_for);
};

}  // namespace
