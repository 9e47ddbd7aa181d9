// What checks of kernels share: buffers that end where a page that may not be touched begins, so that
// a read past the end ends the program, and the count of what is off.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <random>
#include <vector>

#include "lanes.h"

inline std::mt19937 generator(1);
inline int num_checks = 0, num_wrong = 0;

// `count` values, the last one before a page without access.
template <class T>
struct Guarded {
    T* data;
    explicit Guarded(int64_t count) {
        const int64_t page = sysconf(_SC_PAGESIZE), bytes = count * (int64_t)sizeof(T);
        const int64_t room = (bytes + page - 1) / page * page;
        char* at = (char*)mmap(nullptr, room + page, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED || mprotect(at + room, page, PROT_NONE)) std::abort();
        data = (T*)(at + room - bytes);
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < count; ++i) set(i, normal(generator));
    }
    void set(int64_t i, float value) {
        if constexpr (std::is_integral_v<T> && sizeof(T) != sizeof(bf16)) data[i] = 0;
        else put(value, data + i);
    }
};

inline void check(const char* what, double found, double expected, double size, double tolerance) {
    ++num_checks;
    if (std::abs(found - expected) <= tolerance * size) return;
    if (++num_wrong <= 10) std::printf("%s: %.9g instead of %.9g\n", what, found, expected);
}

inline double dot(const auto* x, const auto* w, int64_t k) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += (double)to_float(x[i]) * to_float(w[i]);
    return sum;
}

// Of results: bfloat16 rounds them, float32 only sums.
template <class T>
constexpr double kTolerance = sizeof(T) == 2 ? 1.0 / 128 : 1e-5;

void check_attention();
void check_narrow();
