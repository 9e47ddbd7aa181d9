// Messages among the ranks of a node, through memory that all of them map.
//
// A channel has one sender and some consumers. A message lies in its sender's heap: it is made there
// or put there. The sender describes it in the channel's ring and raises a counter; consumers copy
// their parts out of that heap, or read them there, and raise theirs. So each word has one writer,
// except the word that a rank sleeps on, which others clear to wake it. Messages too large for the
// heap go in pieces, two at a time. The protocol and its invariants: docs/performance.md.

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "exchanges.h"

namespace {

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
    if (exchange.block >= 0) {  // it was made in the heap
        std::copy(exchange.parts.begin(), exchange.parts.end(), description.parts);
        exchange.num_pieces = 1;
        description.piece_bytes = most;
        description.blocks[0] = exchange.block;
        return true;
    }
    const int64_t num_parts = exchange.same_for_all ? 1 : size - 1;
    const int64_t room = endpoint.region.half() / 4;
    const bool in_pieces = total > room;
    const int64_t piece_bytes = in_pieces ? room / num_parts / kLine * kLine : most;
    const int64_t block_bytes = in_pieces ? num_parts * piece_bytes : total;
    // Both blocks or none: messages that each hold one and wait for another would wait for ever.
    const int64_t block =
        endpoint.take(endpoint.copied, in_pieces ? 2 * block_bytes : block_bytes);
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
    const bool reads_own = exchange.in_place && endpoint.made.has(exchange.block);
    const Exchange* reader = reads_own ? &exchange : nullptr;
    endpoint.lent.push_back({&group, group.num_pieces_sent, exchange.block, reader});
    return true;
}

void copy_piece(const Endpoint& endpoint, const Exchange& exchange, const Description& description,
                uint32_t piece) {
    char* block = endpoint.region.heap(endpoint.rank) + description.blocks[piece % 2];
    if (endpoint.made.has(exchange.block)) return;
    const int64_t begin = piece * description.piece_bytes;
    for (int64_t other = 0; other < exchange.group->size; ++other) {
        const Part& part = exchange.parts[other];
        const int64_t bytes = std::min(part.bytes - begin, description.piece_bytes);
        if (bytes <= 0) continue;
        copy_bytes(block + description.parts[other].offset, exchange.from + part.offset + begin,
                   bytes, exchange.past_cache);
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

// Where a message of one piece is, if it is there and its turn has come; else, or if another size
// was expected, null.
const Description* arrived(Exchange& exchange, const Incoming& incoming) {
    const Group& group = *exchange.group;
    if (group.num_taken[incoming.sender] != incoming.message ||
        !reached(group.counters(incoming.sender).num_begun.load(kSeen), incoming.message + 1)) {
        return nullptr;
    }
    const Description& description = group.description(incoming.sender, incoming.message);
    if (description.parts[group.place].bytes == incoming.bytes) return &description;
    exchange.differing = incoming.sender;
    return nullptr;
}

// Copy out what is there of a message; messages of a sender are taken in order.
void copy_out(Exchange& exchange, Incoming& incoming) {
    const Description* description = arrived(exchange, incoming);
    if (!description) return;
    Group& group = *exchange.group;
    const int64_t sender = incoming.sender;
    const Part& part = description->parts[group.place];
    const char* heap = group.endpoint->region.heap(group.ranks[sender]);
    const bool in_pieces = description->num_pieces > 1;
    const uint32_t published = group.counters(sender).num_published.load(kSeen);
    int64_t begin = incoming.num_pieces * description->piece_bytes;
    while (begin < incoming.bytes) {
        const uint32_t end_piece = description->first_piece + incoming.num_pieces + 1;
        if (!reached(published, end_piece)) return;
        const int64_t bytes = std::min(incoming.bytes - begin, description->piece_bytes);
        const char* block = heap + description->blocks[incoming.num_pieces % 2];
        copy_bytes(incoming.to + begin, block + part.offset, bytes, exchange.past_cache);
        begin += bytes;
        ++incoming.num_pieces;
        if (in_pieces && begin < incoming.bytes) consume(group, sender, end_piece, true);
    }
    incoming.is_done = true;
    ++group.num_taken[sender];
    consume(group, sender, description->first_piece + description->num_pieces, in_pieces);
}

// Have what was to be read in place copied out: others wait for its block, or for what follows it.
void copy_after_all(Exchange& exchange, Incoming& incoming) {
    if (!exchange.copy) {
        int64_t total = 0;
        for (const Incoming& each : exchange.incoming) total += each.bytes;
        exchange.copy.reset(new char[total]);
    }
    incoming.to = exchange.copy.get();
    for (const Incoming* each = exchange.incoming.data(); each != &incoming; ++each) {
        incoming.to += each->bytes;
    }
    incoming.at = nullptr;
    incoming.is_done = false;
}

// Find a message that is to be read in place; while its sender has no room left it is copied.
void find(Exchange& exchange, Incoming& incoming) {
    const Group& group = *exchange.group;
    const Description* description = arrived(exchange, incoming);
    if (!description) return;
    const RankLine& line = group.endpoint->region.line(group.ranks[incoming.sender]);
    if (description->num_pieces > 1 || line.starving.load(kOrdered)) {
        copy_after_all(exchange, incoming);
        return copy_out(exchange, incoming);
    }
    incoming.at = group.endpoint->region.heap(group.ranks[incoming.sender]) +
                  description->blocks[0] + description->parts[group.place].offset;
    incoming.is_done = true;
}

// Go on with every exchange; whether something can't go out for want of room. Only what a rank
// waits for stays where it is: messages behind it in the same group can't be taken meanwhile.
bool Endpoint::progress(const Exchange& waited_for) {
    bool is_starving = false;
    for (auto& each : exchanges) {
        Exchange& exchange = *each;
        if (exchange.is_done && (!exchange.in_place || &exchange == &waited_for)) continue;
        const bool is_out = push(*this, exchange);
        is_starving |= !is_out;
        exchange.is_done = is_out;
        for (Incoming& incoming : exchange.incoming) {
            const bool stays = &exchange == &waited_for;
            if (!incoming.to && !stays) copy_after_all(exchange, incoming);
            if (!incoming.to) find(exchange, incoming);
            else if (!incoming.is_done) copy_out(exchange, incoming);
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
    const bool is_starving = endpoint.progress(exchange);  // what came before others saw it asleep
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
    const Region region{base, num_ranks, groups_bytes, heap_bytes};
    const int64_t half = region.half();
    return new Endpoint{region, rank, num_spins, Heap(0, half), Heap(half, half), {}, {}, {}};
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

// Room for a message that is made in the heap, then sent once and left alone: where in the heap.
// -1: there is none, or the message is too large.
int64_t shared_room(void* of, int64_t bytes) {
    Endpoint& endpoint = *(Endpoint*)of;
    if (bytes > endpoint.region.half() / 4) return -1;
    return endpoint.take(endpoint.made, bytes);
}

// Begin an exchange of rows. send [size]: how many to each place, one after another in `from`, or
// the first for all; -1 for no message. receive [size]: how many from each place, one after another
// in `to`, or to be read where they are if that is null; -1 for no message. `from` stays as it is
// until the end.
void* shared_begin(void* of, int64_t row_bytes, const char* from, const int64_t* send,
                   int32_t same_for_all, char* to, const int64_t* receive) {
    auto& group = *(Group*)of;
    Endpoint& endpoint = *group.endpoint;
    endpoint.exchanges.push_back(std::make_unique<Exchange>());
    Exchange& exchange = *endpoint.exchanges.back();
    exchange.group = &group;
    exchange.from = from;
    exchange.same_for_all = same_for_all;
    exchange.in_place = !to;
    int64_t num_rows = 0;
    for (int64_t p = 0; p < group.size; ++p) num_rows += std::max<int64_t>(receive[p], 0);
    exchange.past_cache = num_rows * row_bytes * group.size > kCacheBytes;
    const int64_t in_heap = from - endpoint.region.heap(endpoint.rank);
    if (endpoint.made.is_taken(in_heap)) exchange.block = in_heap;
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
        char* into = to ? to + offset : nullptr;
        if (place != group.place && receive[place] >= 0) {
            exchange.incoming.push_back({place, group.num_expected[place]++, into, bytes});
        } else if (to && place == group.place) {
            copy_bytes(into, own, bytes, exchange.past_cache);
        }
        offset += bytes;
    }
    if (!to) exchange.at.resize(group.size), exchange.at[group.place] = own;
    push(endpoint, exchange);
    return &exchange;
}

// The end of an exchange.
void shared_end(void* of) {
    auto& exchange = *(Exchange*)of;
    Group& group = *exchange.group;
    Endpoint& endpoint = *group.endpoint;
    for (const Incoming& incoming : exchange.incoming) {
        if (!incoming.at) continue;
        const uint32_t message = group.num_taken[incoming.sender]++;
        const Description& description = group.description(incoming.sender, message);
        consume(group, incoming.sender, description.first_piece + 1, false);
    }
    for (Lent& each : endpoint.lent) {
        if (each.reader == &exchange) each.reader = nullptr;
    }
    auto is_this = [&](const auto& each) { return each.get() == &exchange; };
    auto& exchanges = endpoint.exchanges;
    exchanges.erase(std::find_if(exchanges.begin(), exchanges.end(), is_this));
}

// Wait for an exchange, so long at most. 0: done; 1: not yet; 2: a size differs. In `place` then the
// first that is missing or differs; -1: nobody, but there is no room. What is done is gone, unless
// it is read in place: then `at` [size] says where, until shared_end.
int32_t shared_wait(void* of, int64_t timeout_ns, int64_t* place, const char** at) {
    auto& exchange = *(Exchange*)of;
    Endpoint& endpoint = *exchange.group->endpoint;
    const int64_t deadline_ns = now_ns() + timeout_ns;
    int64_t num_spins = endpoint.num_spins;
    do {
        endpoint.progress(exchange);
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
    if (!exchange.in_place) return shared_end(of), 0;
    for (const Incoming& each : exchange.incoming) {
        exchange.at[each.sender] = each.at ? each.at : each.to;
    }
    std::copy(exchange.at.begin(), exchange.at.end(), at);
    return 0;
}

// shared_begin, then shared_wait; `exchange` gets what others are to go on with.
int32_t shared_exchange(void* of, int64_t row_bytes, const char* from, const int64_t* send,
                        int32_t same_for_all, char* to, const int64_t* receive,
                        int64_t timeout_ns, int64_t* place, const char** at, void** exchange) {
    *exchange = shared_begin(of, row_bytes, from, send, same_for_all, to, receive);
    return shared_wait(*exchange, timeout_ns, place, at);
}
}
