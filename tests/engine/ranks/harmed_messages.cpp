// shared_memory.cpp in which a rank can be made to die or to stop at a chosen access to the memory
// that it shares. What it does in between no other rank can see, so these are all moments there are.
#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <thread>
#include <vector>

namespace harm {

enum Kind { kNothing, kLoad, kStore, kExchange, kCopy, kSleep, kWake };  // as in harmed_ranks.py

Kind kind = kNothing;
int64_t num_left, delay_us, *happened_ns;
int number;

bool is_due(Kind now) { return now == kind && num_left-- == 0; }

void happen(pid_t pid) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *happened_ns = now.tv_sec * 1000000000LL + now.tv_nsec;
    if (pid) kill(pid, number);
    else raise(number);  // to this thread: nothing comes after it
}

void at(Kind now) {
    if (is_due(now)) happen(0);
}

long system_call(long call, void* word, int operation, uint32_t value, const void* timeout,
                 void* word2, int value3) {
    if (operation == FUTEX_WAKE) at(kWake);
    if (operation == FUTEX_WAIT && is_due(kSleep)) {
        std::thread([] { usleep(delay_us), happen(getpid()); }).detach();
    }
    return ::syscall(call, word, operation, value, timeout, word2, value3);
}

}  // namespace harm

namespace std {

template <class T>
struct harmed_atomic : atomic<T> {
    T load(memory_order order) const { harm::at(harm::kLoad); return atomic<T>::load(order); }
    void store(T value, memory_order order) { harm::at(harm::kStore); atomic<T>::store(value, order); }
    T exchange(T value, memory_order order) {
        harm::at(harm::kExchange);
        return atomic<T>::exchange(value, order);
    }
};

inline void* harmed_memcpy(void* to, const void* from, size_t bytes) {
    const size_t half = harm::is_due(harm::kCopy) ? bytes / 2 : bytes;
    memcpy(to, from, half);
    if (half < bytes) harm::happen(0);
    return to;
}

}  // namespace std

#define atomic harmed_atomic
#define memcpy harmed_memcpy
#define syscall harm::system_call
#include "../../../src/expertlane/engine/ops/shared_memory.cpp"

// From now on; `delay`: from falling asleep. Before that, the time is put into `happened`.
extern "C" void harm_at(int32_t kind, int64_t num_before, int64_t delay, int32_t number,
                        int64_t* happened) {
    harm::num_left = num_before;
    harm::delay_us = delay;
    harm::number = number;
    harm::happened_ns = happened;
    harm::kind = (harm::Kind)kind;
}
