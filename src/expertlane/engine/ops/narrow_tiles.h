// Tiles of a product with weights of one byte: rows times two blocks of 16 outputs, each group of
// inputs summed in float32, then scaled.

#pragma once

#include <memory>
#include <utility>

#include "narrow_weights.h"

namespace {

struct NarrowMatrix {
    const uint8_t* values;
    const float* scales;
};

struct Groups {
    int64_t size, first;
    int64_t count(int64_t k) const { return (first + k + size - 1) / size; }
};

constexpr int kBlocks = kLanes == kBlock ? 2 : 1;  // that a tile computes
constexpr int kRowSums = kBlocks * kVectors;       // vectors of sums of a row

// Values from a block to what a thread should prefetch meanwhile: the block that is `step` blocks
// on, which it reads next, where the second-level cache has room for it.
inline int64_t ahead_of_bytes(int64_t step, int64_t k) {
    const int64_t next = step * k * kBlock;
    return next <= 65536 ? next : 4096;
}

// sums[r][v] += rows x times the weights of the inputs from i to end, unscaled.
template <int R, class W>
inline void add_group(const float* const* x, const W* const* w, int64_t i, int64_t end,
                      int64_t ahead, Lanes sums[R][kRowSums]) {
    constexpr int kChains = R == 1 ? 4 : R <= 2 ? 2 : 1;  // sums that do not wait for each other
    Lanes more[kChains][R][kRowSums] = {};
    for (; i + kChains <= end; i += kChains) {
        for (int c = 0; c < kChains; ++c) {
            for (int v = 0; v < kRowSums; ++v) {
                const W* from = w[v * kLanes / kBlock] + place(i + c, v);
                prefetch(from + ahead);
                const Lanes weights = load(from);
                for (int r = 0; r < R; ++r) {
                    more[c][r][v] = fma(weights, all(x[r][i + c]), more[c][r][v]);
                }
            }
        }
    }
    for (; i < end; ++i) {
        for (int v = 0; v < kRowSums; ++v) {
            const Lanes weights = load(w[v * kLanes / kBlock] + place(i, v));
            for (int r = 0; r < R; ++r) more[0][r][v] = fma(weights, all(x[r][i]), more[0][r][v]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < kRowSums; ++v) {
            sums[r][v] = more[0][r][v];
            for (int c = 1; c < kChains; ++c) sums[r][v] = sums[r][v] + more[c][r][v];
        }
    }
}

template <int R, class W>
inline void add_group(const bf16* const* x, const W* const* w, int64_t i, int64_t end,
                      int64_t ahead, Lanes sums[R][kRowSums]) {
    for (int r = 0; r < R; ++r) for (int v = 0; v < kRowSums; ++v) sums[r][v] = Lanes{};
#if defined(__AVX512VBMI__)
    const Widener<W, BlockOrder> widen;
    constexpr int kChains = R <= 4 ? 2 : 1;  // sums that do not wait for each other
    Lanes more[kChains][R][kRowSums] = {};
    for (; i + 4 <= end; i += 4) {
        for (int v = 0; v < kRowSums; ++v) {
            const W* from = w[v] + i * kBlock;
            prefetch(from + ahead);
            Bits pairs[2];
            widen(from, pairs);
            for (int r = 0; r < R; ++r) {
                for (int p = 0; p < 2; ++p) {
                    Lanes& sum = more[p % kChains][r][v];
                    sum = add_products(sum, pairs[p], x[r] + i + 2 * p);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < kRowSums; ++v) {
            sums[r][v] = kChains > 1 ? more[0][r][v] + more[kChains - 1][r][v] : more[0][r][v];
        }
    }
#endif
    for (; i + 2 <= end; i += 2) {
        for (int v = 0; v < kRowSums; ++v) {
            const W* from = w[v * kLanes / kBlock];
            prefetch(from + place(i, v) + ahead);
            const Bits pairs = load_narrow_pairs(from, i, v);
            for (int r = 0; r < R; ++r) sums[r][v] = add_products(sums[r][v], pairs, x[r] + i);
        }
    }
    for (; i < end; ++i) {
        for (int v = 0; v < kRowSums; ++v) {
            const Lanes weights = load(w[v * kLanes / kBlock] + place(i, v));
            for (int r = 0; r < R; ++r) {
                sums[r][v] = fma(weights, all(to_float(x[r][i])), sums[r][v]);
            }
        }
    }
}

template <int R, class W>
inline void add_group(const bf16* const* x, const Pair<W>* const* w, int64_t i, int64_t end,
                      int64_t, Lanes sums[R][kRowSums]) {
    for (int r = 0; r < R; ++r) for (int v = 0; v < kRowSums; ++v) sums[r][v] = Lanes{};
    for (; i < end; i += 2) {
        for (int v = 0; v < kRowSums; ++v) {
            const Pair<W>* from = w[v * kLanes / kBlock] + place(i / 2, v);
            const Bits pairs = load_pairs(from->both);
            for (int r = 0; r < R; ++r) sums[r][v] = add_products(sums[r][v], pairs, x[r] + i);
        }
    }
}

// out[r] = row x[r] times kBlocks blocks of 16 outputs.
template <int R, class W, class X>
void tile(const X* const* x, const W* const* w, const float* const* scales, int64_t k,
          Groups groups, int64_t ahead, float* out) {
    Lanes total[R][kRowSums] = {};
    for (int64_t i = 0, end = groups.size - groups.first, g = 0; i < k;
         i = end, end += groups.size, ++g) {
        Lanes sums[R][kRowSums];
        add_group<R>(x, w, i, std::min(end, k), ahead, sums);
        for (int v = 0; v < kRowSums; ++v) {
            const Lanes scale = load(scales[v * kLanes / kBlock] + place(g, v)) * kUnit<W>;
            for (int r = 0; r < R; ++r) total[r][v] = fma(sums[r][v], scale, total[r][v]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < kRowSums; ++v) store(out + r * 2 * kBlock + v * kLanes, total[r][v]);
    }
}

template <class W, class X>
using Tile = void (*)(const X* const*, const W* const*, const float* const*, int64_t, Groups,
                      int64_t, float*);

template <class W, class X, int... R>
Tile<W, X> tile_of(int rows, std::integer_sequence<int, R...>) {
    static constexpr Tile<W, X> tiles[] = {tile<R + 1, W, X>...};
    return tiles[rows - 1];
}

// A block of a matrix.
template <class W>
struct Block {
    const W* values;
    const float* scales;
};

template <class W>
Block<W> block_of(const NarrowMatrix& matrix, int64_t number, int64_t k, Groups groups) {
    return {(const W*)matrix.values + number * k * kBlock,
            matrix.scales + number * groups.count(k) * kBlock};
}

// With more rows, two blocks are widened once for all of them.
constexpr int64_t kMostWithoutPanel = 2 * kRows;

// Two blocks, widened into a cache as rows of type X take them.
template <class W, class X>
struct Panel {
    using Cell = std::conditional_t<std::is_same_v<X, float>, Wide<W>, Pair<W>>;
    static constexpr int64_t kInputs = std::is_same_v<X, float> ? 1 : 2;  // of a cell

    std::unique_ptr<Cell[]> cells;
    Block<Cell> first, second;

    Panel(const Block<W>& one, const Block<W>& two, int64_t k)
        : cells(new Cell[(size_t)(2 * k / kInputs * kBlock)]),
          first{cells.get(), one.scales}, second{cells.get() + k / kInputs * kBlock, two.scales} {
        widen(one.values, k, cells.get());
        widen(two.values, k, cells.get() + k / kInputs * kBlock);
    }

    static bool suits(int64_t m, int64_t k, Groups groups) {
        const int64_t ends = k | groups.first | (groups.size < k ? groups.size : 0);
        return m > kMostWithoutPanel && ends % kInputs == 0;
    }

    static void widen(const W* from, int64_t k, Wide<W>* to) {
        for (int64_t i = 0; i < k * kBlock; i += kLanes) store(&to[i].value, load(from + i));
    }

    static void widen(const W* from, int64_t k, Pair<W>* to) {
        int64_t i = 0;
#if defined(__AVX512VBMI__)
        const Widener<W, BlockOrder> widen_four;
        for (; i + 4 <= k; i += 4) {
            Bits both[2];
            widen_four(from + i * kBlock, both);
            std::memcpy((void*)(to + i / 2 * kBlock), both, sizeof(both));
        }
#endif
        for (; i < k; i += 2) {
            for (int v = 0; v < kBlock / kLanes; ++v) {
                const Bits both = load_narrow_pairs(from, i, v);
                std::memcpy((void*)(to + place(i / 2, v)), &both, sizeof(both));
            }
        }
    }
};

// out[r] = rows of x times two blocks.
template <class W, class X>
void two_blocks(int rows, const X* const* x, const Block<W>& first, const Block<W>& second,
                int64_t k, Groups groups, int64_t ahead, float (*out)[2 * kBlock]) {
    const auto tile = tile_of<W, X>(rows, std::make_integer_sequence<int, kRows>());
    const W* w[] = {first.values, second.values};
    const float* scales[] = {first.scales, second.scales};
    for (int b = 0; b < 2; b += kBlocks) {
        if (b && second.values == first.values) break;
        tile(x, w + b, scales + b, k, groups, ahead, out[0] + b * kBlock);
    }
}

}  // namespace
