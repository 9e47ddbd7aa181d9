// Tiles of a product with packed weights: each weight is read from memory once, in order, by one
// thread; sums are float32.
//
// A packed matrix [n, k] is [n / 16][k / 2][16][2]: 64 bytes hold two neighbouring inputs of 16
// outputs, in as many vectors of pairs as the instruction set takes. k is even; n is padded to a
// multiple of 16 with zeros. Rows that are multiplied with it are bfloat16 where the CPU has
// products of pairs, else float32.

#pragma once

#include "lanes.h"

constexpr int kBlock = 16;                 // outputs of a packed block
constexpr int kVectors = kBlock / kLanes;  // vectors of their sums
constexpr int64_t kAhead = 16;             // blocks of 64 bytes to prefetch

// Rows a tile of one block: with two vectors of weights, their sums fit into the registers.
#if defined(__AVX512F__)
constexpr int kRows = 12, kRowsOfTwoBlocks = 12;
#elif defined(__AVX2__)
constexpr int kRows = 6, kRowsOfTwoBlocks = 3;
#else
constexpr int kRows = 6, kRowsOfTwoBlocks = 3;
#endif

// acc[r][v] = row x[r] times the vectors of B blocks from w on, `apart` values from one another;
// acc[r] has a place for those of two blocks.
template <int R, int B>
inline void tile(const Factor* const* x, const bf16* w, int64_t apart, int64_t k,
                 Lanes acc[][2 * kVectors]) {
    constexpr int V = B * kVectors;
    Lanes a[R][V];
    const Factor* at_row[R];
    for (int r = 0; r < R; ++r) {
        at_row[r] = x[r];
        for (int v = 0; v < V; ++v) a[r][v] = Lanes{};
    }
    for (int64_t i = 0; i < k; i += 2) {
        Bits pairs[V];
        for (int b = 0; b < B; ++b) {
            const bf16* from = w + b * apart + i * kBlock;
            __builtin_prefetch(from + kAhead * 2 * kBlock);
            for (int v = 0; v < kVectors; ++v) {
                pairs[b * kVectors + v] = load_pairs(from + v * 2 * kLanes);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) a[r][v] = add_products(a[r][v], pairs[v], at_row[r] + i);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) acc[r][v] = a[r][v];
    }
}

template <int R = kRows>
inline void tiles(int rows, const Factor* const* x, const bf16* w0, const bf16* w1, int64_t k,
                  Lanes acc[kRows][2 * kVectors]) {
    if constexpr (R > 1) {
        if (rows < R) return tiles<R - 1>(rows, x, w0, w1, k, acc);
    }
    if constexpr (R <= kRowsOfTwoBlocks) {
        tile<R, 2>(x, w0, w1 - w0, k, acc);
    } else {
        tile<R, 1>(x, w0, 0, k, acc);
        Lanes second[R][2 * kVectors];
        tile<R, 1>(x, w1, 0, k, second);
        for (int r = 0; r < R; ++r) std::copy_n(second[r], kVectors, acc[r] + kVectors);
    }
}

// Rows a tile so that all tiles of m rows are about equally high.
inline int64_t tile_height(int64_t m) {
    const int64_t count = (m + kRows - 1) / kRows;
    return count ? (m + count - 1) / count : kRows;
}

// The same for rows `stride` apart.
inline void tiles(int rows, const Factor* x, int64_t stride, const bf16* w0, const bf16* w1,
                  int64_t k, Lanes acc[kRows][2 * kVectors]) {
    const Factor* from[kRows] = {};
    for (int r = 0; r < rows; ++r) from[r] = x + r * stride;
    tiles(rows, from, w0, w1, k, acc);
}
