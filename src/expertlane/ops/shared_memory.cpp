// Messages among the ranks of a node, through memory that all of them map.
//
// A channel has one sender and some consumers. The sender puts a message into its own heap,
// describes it in the channel's ring and raises a counter; consumers copy their parts out of that
// heap and raise theirs. So each word has one writer, except the word that a rank sleeps on, which
// others clear to wake it. Messages too large for the heap go in pieces, two at a time. The protocol
// and its invariants: docs/shared_memory.md.

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstring>
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
    char* to;
    int64_t bytes;
    uint32_t num_pieces = 0;  // taken
    bool is_done = false;
};

struct Exchange {
    Group* group;
    bool sends = false, same_for_all = false, is_done = false;
    const char* from = nullptr;
    std::vector<Part> parts;  // of `from`
    int64_t block = -1;       // of the heap
    uint32_t message = 0, num_pieces = 0, num_published = 0;
    std::vector<Incoming> incoming;
    int64_t differing = -1;  // a place whose message has another size than was expected
};

struct Lent {  // a block of the heap, until all consumers have read it
    Group* group;
    uint32_t end_piece;
    int64_t block;
};

struct Endpoint {
    Region region;
    int64_t rank, num_spins;
    Heap heap;
    std::vector<std::unique_ptr<Group>> groups;
    std::deque<std::unique_ptr<Exchange>> exchanges;
    std::vector<Lent> lent;

    // What is read already is used again first: pages that nobody has touched yet cost more.
    int64_t take(int64_t bytes) {
        auto is_back = [this](const Lent& each) {
            if (!each.group->all_consumed(each.end_piece)) return false;
            heap.give_back(each.block);
            return true;
        };
        lent.erase(std::remove_if(lent.begin(), lent.end(), is_back), lent.end());
        return heap.take(bytes);
    }
    bool progress();
};

long futex(Word& word, int operation, uint32_t value, const timespec* timeout) {
    return syscall(SYS_futex, &word, operation, value, timeout, nullptr, 0);
}

void wake(RankLine& line) {
    if (line.sleeping.load(kOrdered) && line.sleeping.exchange(0, kOrdered)) {
        futex(line.sleeping, FUTEX_WAKE, 1, nullptr);
    }
}

// Whether all messages that a sleeper waits for have begun, as far as this group is concerned.
bool is_served(const Group& group, int64_t sleeper, uint64_t want) {
    if ((uint32_t)(want >> 32) != group.id) return false;
    for (int64_t sender = 0; sender < group.size; ++sender) {
        if (sender == sleeper) continue;
        if (!reached(group.counters(sender).num_begun.load(kOrdered), (uint32_t)want)) return false;
    }
    return true;
}

// The last to begin wakes those who wait for all: one wake a rank, not one a message.
void wake_consumers(const Group& group, bool in_pieces) {
    for (int64_t other = 0; other < group.size; ++other) {
        if (other == group.place) continue;
        RankLine& line = group.endpoint->region.line(group.ranks[other]);
        if (!line.sleeping.load(kOrdered)) continue;
        if (in_pieces || is_served(group, other, line.want.load(kOrdered))) wake(line);
    }
}

// Find room for a message and say where it will lie; false where there is none yet.
bool find_room(Endpoint& endpoint, Exchange& exchange, Description& description) {
    const int64_t size = exchange.group->size, place = exchange.group->place;
    int64_t most = 0, total = 0;
    for (const Part& part : exchange.parts) {
        most = std::max(most, part.bytes);
        total += lines(part.bytes);
    }
    if (exchange.same_for_all) total = lines(most);
    const int64_t num_parts = exchange.same_for_all ? 1 : size - 1;
    const int64_t room = endpoint.region.heap_bytes / 4;
    const bool in_pieces = total > room;
    const int64_t piece_bytes = in_pieces ? room / num_parts / kLine * kLine : most;
    const int64_t block_bytes = in_pieces ? num_parts * piece_bytes : total;
    // Both blocks or none: messages that each hold one and wait for another would wait for ever.
    const int64_t block = endpoint.take(in_pieces ? 2 * block_bytes : block_bytes);
    if (block < 0) return false;
    int64_t offset = 0;
    for (int64_t other = 0; other < size; ++other) {
        description.parts[other] = {offset, exchange.parts[other].bytes};
        if (other == place || exchange.same_for_all) continue;
        offset += in_pieces ? piece_bytes : lines(exchange.parts[other].bytes);
    }
    exchange.block = block;
    exchange.num_pieces = in_pieces ? (uint32_t)((most + piece_bytes - 1) / piece_bytes) : 1;
    description.piece_bytes = piece_bytes;
    description.blocks[0] = block;
    description.blocks[1] = block + block_bytes;
    return true;
}

// Whether the message is described: not before those ahead of it are out whole.
bool describe(Endpoint& endpoint, Exchange& exchange) {
    if (exchange.num_pieces) return true;
    Group& group = *exchange.group;
    const uint32_t slot = exchange.message % kRing;
    if (group.num_sent != exchange.message || !group.all_consumed(group.end_pieces[slot])) {
        return false;
    }
    Description& description = group.description(group.place, exchange.message);
    if (!find_room(endpoint, exchange, description)) return false;
    description.first_piece = group.num_pieces_sent;
    description.num_pieces = exchange.num_pieces;
    group.num_pieces_sent += exchange.num_pieces;
    group.end_pieces[slot] = group.num_pieces_sent;
    endpoint.lent.push_back({&group, group.num_pieces_sent, exchange.block});
    return true;
}

void copy_piece(const Endpoint& endpoint, const Exchange& exchange, const Description& description,
                uint32_t piece) {
    char* block = endpoint.region.heap(endpoint.rank) + description.blocks[piece % 2];
    const int64_t begin = piece * description.piece_bytes;
    for (int64_t other = 0; other < exchange.group->size; ++other) {
        const Part& part = exchange.parts[other];
        const int64_t bytes = std::min(part.bytes - begin, description.piece_bytes);
        if (bytes <= 0) continue;
        std::memcpy(block + description.parts[other].offset, exchange.from + part.offset + begin,
                    bytes);
        if (exchange.same_for_all) break;
    }
}

// Publish the pieces there is room for; whether all are out.
bool push(Endpoint& endpoint, Exchange& exchange) {
    if (!exchange.sends) return true;
    if (!describe(endpoint, exchange)) return false;
    Group& group = *exchange.group;
    const Description& description = group.description(group.place, exchange.message);
    Counters& counters = group.counters(group.place);
    while (exchange.num_published < exchange.num_pieces) {
        const uint32_t piece = exchange.num_published;
        const uint32_t number = description.first_piece + piece;
        if (piece >= 2 && !group.all_consumed(number - 1)) return false;  // the block's last one
        copy_piece(endpoint, exchange, description, piece);
        if (++exchange.num_published == exchange.num_pieces) ++group.num_sent;
        counters.num_published.store(number + 1, kPublished);
        if (piece == 0) counters.num_begun.store(exchange.message + 1, kPublished);
        wake_consumers(group, exchange.num_pieces > 1);
    }
    return true;
}

// Say that pieces of a sender are read up to `end_piece`.
void consume(const Group& group, int64_t sender, uint32_t end_piece, bool in_pieces) {
    group.consumed(group.place, sender).store(end_piece, kOrdered);
    RankLine& line = group.endpoint->region.line(group.ranks[sender]);
    if (in_pieces || line.starving.load(kOrdered)) wake(line);
}

// Copy out what is there of a message; messages of a sender are taken in order.
void copy_out(Exchange& exchange, Incoming& incoming) {
    Group& group = *exchange.group;
    const int64_t sender = incoming.sender;
    const Counters& counters = group.counters(sender);
    if (group.num_taken[sender] != incoming.message ||
        !reached(counters.num_begun.load(kSeen), incoming.message + 1)) {
        return;
    }
    const Description& description = group.description(sender, incoming.message);
    const Part& part = description.parts[group.place];
    if (part.bytes != incoming.bytes) {
        exchange.differing = sender;
        return;
    }
    const char* heap = group.endpoint->region.heap(group.ranks[sender]);
    const bool in_pieces = description.num_pieces > 1;
    const uint32_t published = counters.num_published.load(kSeen);
    int64_t begin = incoming.num_pieces * description.piece_bytes;
    while (begin < incoming.bytes) {
        const uint32_t end_piece = description.first_piece + incoming.num_pieces + 1;
        if (!reached(published, end_piece)) return;
        const int64_t bytes = std::min(incoming.bytes - begin, description.piece_bytes);
        const char* block = heap + description.blocks[incoming.num_pieces % 2];
        std::memcpy(incoming.to + begin, block + part.offset, bytes);
        begin += bytes;
        ++incoming.num_pieces;
        if (in_pieces && begin < incoming.bytes) consume(group, sender, end_piece, true);
    }
    incoming.is_done = true;
    ++group.num_taken[sender];
    consume(group, sender, description.first_piece + description.num_pieces, in_pieces);
}

// Go on with every exchange; whether something can't go out for want of room.
bool Endpoint::progress() {
    bool is_starving = false;
    for (auto& each : exchanges) {
        Exchange& exchange = *each;
        if (exchange.is_done) continue;
        const bool is_out = push(*this, exchange);
        is_starving |= !is_out;
        exchange.is_done = is_out;
        for (Incoming& incoming : exchange.incoming) {
            if (!incoming.is_done) copy_out(exchange, incoming);
            exchange.is_done &= incoming.is_done;
        }
    }
    return is_starving;
}

// Those who have begun to take a message may sleep for another one: have them look again.
void wake_borrowers(const Endpoint& endpoint) {
    for (const Lent& each : endpoint.lent) wake_consumers(*each.group, true);
}

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// Sleep until others have what this exchange waits for, unless it is there.
void sleep_until(Endpoint& endpoint, const Exchange& exchange, int64_t deadline_ns) {
    RankLine& line = endpoint.region.line(endpoint.rank);
    const uint32_t message =
        exchange.incoming.empty() ? exchange.message : exchange.incoming.front().message;
    line.want.store((uint64_t)exchange.group->id << 32 | (message + 1), kOrdered);
    line.starving.store(1, kOrdered);
    line.sleeping.store(1, kOrdered);
    const bool is_starving = endpoint.progress();  // what came before others saw it asleep
    line.starving.store(is_starving, kOrdered);
    if (is_starving) wake_borrowers(endpoint);
    const int64_t left_ns = deadline_ns - now_ns();
    if (!exchange.is_done && exchange.differing < 0 && left_ns > 0) {
        const timespec left = {left_ns / 1000000000, left_ns % 1000000000};
        futex(line.sleeping, FUTEX_WAIT, 1, &left);
    }
    line.sleeping.store(0, kOrdered);
}

}  // namespace

extern "C" {

int64_t shared_group_bytes(int64_t size) {
    return size * (channel_bytes(size) + lines(4 * size));
}

// A rank's end of memory that begins as zeros. num_spins: looks before it sleeps.
void* shared_open(char* base, int64_t num_ranks, int64_t groups_bytes, int64_t heap_bytes,
                  int64_t rank, int64_t num_spins) {
    return new Endpoint{{base, num_ranks, groups_bytes, heap_bytes}, rank, num_spins,
                        Heap(heap_bytes), {}, {}, {}};
}

void shared_close(void* endpoint) { delete (Endpoint*)endpoint; }

// The group `id` (of all ranks the same), `offset` bytes into the groups; ranks [size].
void* shared_group(void* of, int64_t id, int64_t offset, int64_t size, int64_t place,
                   const int64_t* ranks) {
    auto& endpoint = *(Endpoint*)of;
    auto group = std::make_unique<Group>();
    group->endpoint = &endpoint;
    group->id = (uint32_t)id;
    group->size = size;
    group->place = place;
    group->ranks.assign(ranks, ranks + size);
    group->base = endpoint.region.groups() + offset;
    group->num_expected.resize(size);
    group->num_taken.resize(size);
    endpoint.groups.push_back(std::move(group));
    return endpoint.groups.back().get();
}

// Begin an exchange of rows. send [size]: how many to each place, one after another in `from`, or
// the first for all; -1 for no message. receive [size]: how many from each place, one after another
// in `to`; -1 for no message. `from` stays as it is until the end.
void* shared_begin(void* of, int64_t row_bytes, const char* from, const int64_t* send,
                   int32_t same_for_all, char* to, const int64_t* receive) {
    auto& group = *(Group*)of;
    Endpoint& endpoint = *group.endpoint;
    endpoint.exchanges.push_back(std::make_unique<Exchange>());
    Exchange& exchange = *endpoint.exchanges.back();
    exchange.group = &group;
    exchange.from = from;
    exchange.same_for_all = same_for_all;
    exchange.parts.resize(group.size);
    const char* own = from;
    int64_t offset = 0;
    for (int64_t place = 0; place < group.size; ++place) {
        const int64_t bytes = row_bytes * std::max<int64_t>(send[place], 0);
        if (place == group.place) own = from + offset;
        else exchange.parts[place] = {offset, bytes}, exchange.sends |= send[place] >= 0;
        if (!same_for_all) offset += bytes;
    }
    exchange.message = group.num_sent;
    for (auto& other : endpoint.exchanges) {
        if (other->group != &group || !other->sends || other.get() == &exchange) continue;
        exchange.message += !other->num_pieces || other->num_published < other->num_pieces;
    }
    offset = 0;
    for (int64_t place = 0; place < group.size; ++place) {
        const int64_t bytes = row_bytes * std::max<int64_t>(receive[place], 0);
        if (place == group.place) std::memcpy(to + offset, own, bytes);
        else if (receive[place] >= 0) {
            exchange.incoming.push_back({place, group.num_expected[place]++, to + offset, bytes});
        }
        offset += bytes;
    }
    push(endpoint, exchange);
    return &exchange;
}

// Wait for an exchange, so long at most. 0: done, and gone; 1: not yet; 2: a size differs. In
// `place` then the first that is missing or differs; -1: nobody, but there is no room.
int32_t shared_wait(void* of, int64_t timeout_ns, int64_t* place) {
    auto& exchange = *(Exchange*)of;
    Endpoint& endpoint = *exchange.group->endpoint;
    const int64_t deadline_ns = now_ns() + timeout_ns;
    int64_t num_spins = endpoint.num_spins;
    do {
        endpoint.progress();
        if (exchange.is_done || exchange.differing >= 0) break;
        if (num_spins-- <= 0) sleep_until(endpoint, exchange, deadline_ns);
    } while (!exchange.is_done && exchange.differing < 0 && now_ns() < deadline_ns);
    *place = exchange.differing;
    if (exchange.differing >= 0) return 2;
    if (!exchange.is_done) {
        for (const Incoming& incoming : exchange.incoming) {
            if (!incoming.is_done && *place < 0) *place = incoming.sender;
        }
        return 1;
    }
    auto is_this = [&](const auto& each) { return each.get() == &exchange; };
    auto& exchanges = endpoint.exchanges;
    exchanges.erase(std::find_if(exchanges.begin(), exchanges.end(), is_this));
    return 0;
}
}
