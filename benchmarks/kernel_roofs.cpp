// What an instruction set can do at most: bench_kernels.py compares the kernels with it.

#include "lanes.h"

namespace {
constexpr int kSums = 12;  // enough for the latency of a multiply-add
}

extern "C" {

// Each thread multiplies and adds `count` times kSums vectors in registers; gives the number of
// float operations of a thread.
double multiply(int64_t count, int64_t pairs, float* to) {
#pragma omp parallel
    {
        Lanes acc[kSums];
        for (int i = 0; i < kSums; ++i) acc[i] = all((float)i);
        Lanes a = all(to[0]), b = all(to[1]);
        Bits c = bits_of(a), d = bits_of(b);
        for (int64_t i = 0; i < count; ++i) {
            if (kMultipliesPairs && pairs) {
                _Pragma("GCC unroll 16") for (auto& each : acc) each = dot_pairs(each, c, d);
            } else {
                _Pragma("GCC unroll 16") for (auto& each : acc) each = fma(a, b, each);
            }
        }
        float total = 0;
        for (auto& each : acc) total += sum(each);
#pragma omp critical
        to[2] += total;
    }
    return 2.0 * (double)count * kSums * kLanes * (kMultipliesPairs && pairs ? 2 : 1);
}

// Reads all of `from`, each thread a stretch of its own.
void read_all(const float* from, int64_t count, float* to) {
    constexpr int64_t kStep = 8 * kLanes;
    float total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t part = 0; part < count / (kStep * 1024); ++part) {
        Lanes acc[8] = {};
        for (int64_t i = 0; i < 1024; ++i) {
            const float* at = from + (part * 1024 + i) * kStep;
            for (int v = 0; v < 8; ++v) {
                __builtin_prefetch(at + v * kLanes + 512);
                acc[v] += load(at + v * kLanes);
            }
        }
        for (auto& each : acc) total += sum(each);
    }
    to[0] = total;
}
}
