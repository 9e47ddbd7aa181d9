// Ranks as threads of one process, for a race detector: random exchanges, every byte checked.
#include "../../../src/expertlane/engine/ops/shared_memory.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

namespace {

constexpr int64_t kRanks = 3, kControl = 1 << 20, kHeap = 8192;

uint8_t value(int64_t from, int64_t to, int64_t round, int64_t i) {
    return (uint8_t)(from * 31 + to * 7 + round * 3 + i);
}

void run(char* base, int64_t rank, int64_t rounds) {
    void* endpoint = shared_open(base, kRanks, kControl, kHeap, rank, 0);
    const int64_t ranks[kRanks] = {0, 1, 2};
    void* groups[2];
    for (int64_t id = 0; id < 2; ++id) {
        groups[id] = shared_group(endpoint, id + 1, id * shared_group_bytes(kRanks), kRanks, rank, ranks);
    }
    std::mt19937 random(7);  // the same in every rank: all know all sizes
    struct Flight {
        void* exchange;
        std::vector<uint8_t> from, to;
        int64_t round;
        std::vector<int64_t> receive;
        bool in_place;
    };
    std::deque<Flight> flights;
    auto finish = [&] {
        Flight& flight = flights.front();
        int64_t place = 0;
        const char* parts[kRanks];
        if (shared_wait(flight.exchange, 60000000000LL, &place, parts)) std::abort();
        const uint8_t* at = flight.to.data();
        for (int64_t from = 0; from < kRanks; ++from) {
            if (flight.in_place) at = (const uint8_t*)parts[from];
            for (int64_t i = 0; i < flight.receive[from]; ++i) {
                if (*at++ != value(from, rank, flight.round, i)) std::abort();
            }
        }
        if (flight.in_place) shared_end(flight.exchange);
        flights.pop_front();
    };
    for (int64_t round = 0; round < rounds; ++round) {
        int64_t bytes[kRanks][kRanks];
        for (auto& row : bytes) for (auto& each : row) each = random() % (random() % 4 ? 100 : 5000);
        flights.emplace_back();
        Flight& flight = flights.back();
        flight.round = round;
        flight.in_place = random() % 2;
        const bool in_heap = random() % 2;
        for (int64_t to = 0; to < kRanks; ++to) {
            for (int64_t i = 0; i < bytes[rank][to]; ++i) flight.from.push_back(value(rank, to, round, i));
            flight.receive.push_back(bytes[to][rank]);
        }
        int64_t total = 1;
        for (int64_t each : flight.receive) total += each;
        flight.to.resize(total);
        flight.from.push_back(0);
        char* from = (char*)flight.from.data();
        const int64_t room = in_heap ? shared_room(endpoint, (int64_t)flight.from.size()) : -1;
        if (room >= 0) {
            from = (char*)std::memcpy(((Endpoint*)endpoint)->region.heap(rank) + room, from, flight.from.size());
        }
        char* to = flight.in_place ? nullptr : (char*)flight.to.data();
        flight.exchange = shared_begin(groups[round % 2], 1, from, bytes[rank], 0, to, flight.receive.data());
        if (flights.size() == 1 + round / 8 % 3) finish();
    }
    while (!flights.empty()) finish();
    shared_close(endpoint);
}

}  // namespace

int main(int, char** arguments) {
    char* base = (char*)std::aligned_alloc(64, kRanks * (kLine + kHeap) + kControl);
    std::memset(base, 0, kRanks * kLine + kControl);
    std::vector<std::thread> threads;
    for (int64_t rank = 0; rank < kRanks; ++rank) {
        threads.emplace_back(run, base, rank, std::atoll(arguments[1]));
    }
    for (auto& thread : threads) thread.join();
    std::free(base);
    std::puts("done");
}
