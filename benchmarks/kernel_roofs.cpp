// What an instruction set can do at most: bench_kernels.py compares the kernels with it.

#include "lanes.h"

namespace {
constexpr int kSums = 12;  // enough for the latency of a multiply-add
}

extern "C" {

// Each thread multiplies and adds kSums vectors in registers `count` times, pairs of bfloat16 where
// asked for and there; gives the number of float operations of a thread.
double multiply(int64_t count, int64_t wants_pairs, float* to) {
    const bool has_pairs = kMultipliesPairs && wants_pairs;
#pragma omp parallel
    {
        Lanes acc[kSums];
        for (int i = 0; i < kSums; ++i) acc[i] = all((float)i);
        const Lanes a = all(to[0]), b = all(to[1]);
        for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 16
            for (auto& each : acc) {
                each = has_pairs ? dot_pairs(each, bits_of(a), bits_of(b)) : fma(a, b, each);
            }
        }
        float total = 0;
        for (const auto& each : acc) total += sum(each);
#pragma omp atomic
        to[2] += total;
    }
    return 2.0 * (double)count * kSums * kLanes * (has_pairs ? 2 : 1);
}

// Reads `count` values, each thread stretches of its own.
void read_all(const float* from, int64_t count, float* to) {
    constexpr int64_t kStep = 8 * kLanes, kStretch = 64 * kStep;
    float total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t begin = 0; begin < count; begin += kStretch) {
        Lanes acc[8] = {};
        for (int64_t i = begin; i + kStep <= std::min(begin + kStretch, count); i += kStep) {
            prefetch(from + i + 1024), prefetch(from + i + 1024 + kStep / 2);
            for (int v = 0; v < 8; ++v) acc[v] += load(from + i + v * kLanes);
        }
        for (const auto& each : acc) total += sum(each);
    }
    to[0] += 0 * total;
}
}
