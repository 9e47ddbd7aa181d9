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

// Rows a tile of one block, and of two blocks side by side: their sums, with two vectors of weights,
// fit into the registers. More rows than 8 are no faster.
#if defined(__AVX512F__)
constexpr int kRowsOfOneBlock = 8, kRowsOfTwoBlocks = 8;
#else
constexpr int kRowsOfOneBlock = 5, kRowsOfTwoBlocks = 2;
#endif
#if defined(__AMX_BF16__)
constexpr bool kHasTiles = true;
constexpr int kRows = 32;  // of a call: as AMX takes them
#else
constexpr bool kHasTiles = false;
constexpr int kRows = kRowsOfOneBlock;
#endif

// a[r][v] += the pairs from `w` on, those of each of B blocks `apart` values from one another, times
// two neighbouring values of each row.
template <int R, int B>
inline void add_pairs(const bf16* const* at_row, const bf16* w, int64_t apart, int64_t i,
                      Lanes a[R][B * kVectors]) {
    Bits pairs[B * kVectors];
    for (int v = 0; v < B * kVectors; ++v) {
        pairs[v] = load_pairs(w + v / kVectors * apart + v % kVectors * 2 * kLanes);
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < B * kVectors; ++v) a[r][v] = add_products(a[r][v], pairs[v], at_row[r] + i);
    }
}

// The same, all rows by the first values and then by the second ones: so few registers hold
// weights.
template <int R, int B>
inline void add_pairs(const float* const* at_row, const bf16* w, int64_t apart, int64_t i,
                      Lanes a[R][B * kVectors]) {
    for (int which = 0; which < 2; ++which) {
        Lanes weights[B * kVectors];
        for (int v = 0; v < B * kVectors; ++v) {
            const Bits pairs = load_pairs(w + v / kVectors * apart + v % kVectors * 2 * kLanes);
            weights[v] = which ? second_of(pairs) : first_of(pairs);
        }
        for (int r = 0; r < R; ++r) {
            const Lanes x = all(at_row[r][i + which]);
            for (int v = 0; v < B * kVectors; ++v) a[r][v] = accumulate(a[r][v], weights[v], x);
        }
        asm("" : "+r"(w));  // load them again: they would be kept in registers that sums need
    }
}

// acc[r][v] = row x[r] times the vectors of B blocks from w on, `apart` values from one another;
// acc[r] has a place for those of two blocks. `ahead` values on lies what is prefetched.
template <int R, int B>
inline void tile(const Factor* const* x, const bf16* w, int64_t apart, int64_t k, int64_t ahead,
                 Lanes acc[][2 * kVectors]) {
    constexpr int V = B * kVectors;
    Lanes a[R][V];
    const Factor* at_row[R];
    for (int r = 0; r < R; ++r) {
        at_row[r] = x[r];
        for (int v = 0; v < V; ++v) a[r][v] = Lanes{};
    }
    for (int64_t i = 0; i < k; i += 2) {
        const bf16* at = w + i * kBlock;
        for (int b = 0; b < B; ++b) prefetch(at + b * apart + ahead);
        add_pairs<R, B>(at_row, at, apart, i, a);
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) acc[r][v] = a[r][v];
    }
}

// Values from a block of a matrix to what a thread should prefetch meanwhile: the block that is
// `step` blocks on, which it reads next, where the second-level cache has room for it.
inline int64_t ahead_of(int64_t step, int64_t k) {
    const int64_t next = step * k * kBlock;
    return next <= 32768 ? next : 2048;
}

template <int R = kRowsOfOneBlock>
inline void register_tiles(int rows, const Factor* const* x, const bf16* w0, const bf16* w1,
                           int64_t k, int64_t step, Lanes acc[][2 * kVectors]) {
    if constexpr (R > 1) {
        if (rows < R) return register_tiles<R - 1>(rows, x, w0, w1, k, step, acc);
    }
    const int64_t ahead = ahead_of(step, k);
    if constexpr (R <= kRowsOfTwoBlocks) {
        tile<R, 2>(x, w0, w1 - w0, k, ahead, acc);
    } else {
        tile<R, 1>(x, w0, 0, k, ahead, acc);
        Lanes second[R][2 * kVectors];
        tile<R, 1>(x, w1, 0, k, ahead, second);
        for (int r = 0; r < R; ++r) std::copy_n(second[r], kVectors, acc[r] + kVectors);
    }
}

#if defined(__AMX_BF16__)
// As _tile_loadconfig takes it.
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The same for 1 to 32 rows `stride` apart, k a multiple of 32: sums in the tiles 0 to 3, rows in 4
// and 5, blocks in 6 and 7; 32 inputs of a packed block are a tile as it is.
inline void amx_tiles(int rows, const bf16* x, int64_t stride, const bf16* w0, const bf16* w1,
                      int64_t k, Lanes acc[][2 * kVectors]) {
    const int first = std::min(rows, 16), second = rows - first;
    TileConfig config;
    const int rows_of[] = {first, first, second, second, first, second, 16, 16};
    for (int t = 0; t < 8; ++t) {
        if (rows_of[t]) config.rows[t] = (uint8_t)rows_of[t], config.row_bytes[t] = 64;
    }
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    if (second) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < k; i += 32) {
        _tile_loadd(6, w0 + i * kBlock, 64);
        _tile_loadd(7, w1 + i * kBlock, 64);
        _tile_loadd(4, x + i, stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (second) {
            _tile_loadd(5, x + 16 * stride + i, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, acc[0], sizeof(acc[0]));
    _tile_stored(1, acc[0] + 1, sizeof(acc[0]));
    if (second) {
        _tile_stored(2, acc[16], sizeof(acc[0]));
        _tile_stored(3, acc[16] + 1, sizeof(acc[0]));
    }
    _tile_release();
}
#endif

// Up to kRows rows times a block from w0 on, and one from w1 on; in each matrix, `step` blocks on
// lie those that this thread reads next.
inline void tiles(int rows, const Factor* const* x, const bf16* w0, const bf16* w1, int64_t k,
                  int64_t step, Lanes acc[kRows][2 * kVectors]) {
#if defined(__AMX_BF16__)
    const int64_t stride = rows > 1 ? x[1] - x[0] : 0;
    bool suits = rows > kRowsOfOneBlock && k % 32 == 0;
    for (int r = 2; suits && r < rows; ++r) suits = x[r] - x[r - 1] == stride;
    if (suits) return amx_tiles(rows, x[0], stride, w0, w1, k, acc);
#endif
    for (int r = 0; r < rows; r += kRowsOfOneBlock) {
        register_tiles(std::min(rows - r, kRowsOfOneBlock), x + r, w0, w1, k, step, acc + r);
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
    tiles(rows, from, w0, w1, k, 2, acc);
}
