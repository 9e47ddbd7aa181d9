// Products with weights of one byte and their scales, and experts' MLPs: each weight is read from
// memory once, in order, by one thread; sums are float32.
//
// A matrix [n, k] is [n / 16][k][16] bytes, n padded to a multiple of 16 with zeros, and a scale
// for every output and group of inputs, [n / 16][groups][16]. The first group may have begun
// `first` inputs earlier, where a matrix is cut along its inputs.

#include <memory>
#include <utility>
#include <vector>

#include "narrow_weights.h"

namespace {

struct Matrix {
    const uint8_t* values;
    const float* scales;
};

struct Groups {
    int64_t size, first;
    int64_t count(int64_t k) const { return (first + k + size - 1) / size; }
};

constexpr int kBlocks = kLanes == kBlock ? 2 : 1;  // that a tile computes
constexpr int kSums = kBlocks * kVectors;        // vectors of sums of a row

// Values from a block to what a thread should prefetch meanwhile: the block that is `step` blocks
// on, which it reads next, where the second-level cache has room for it.
inline int64_t ahead_of_bytes(int64_t step, int64_t k) {
    const int64_t next = step * k * kBlock;
    return next <= 65536 ? next : 4096;
}

// sums[r][v] += rows x times the weights of the inputs from i to end, unscaled.
template <int R, class W>
inline void add_group(const float* const* x, const W* const* w, int64_t i, int64_t end,
                      int64_t ahead, Lanes sums[R][kSums]) {
    constexpr int kChains = R == 1 ? 4 : R <= 2 ? 2 : 1;  // sums that do not wait for each other
    Lanes more[kChains][R][kSums] = {};
    for (; i + kChains <= end; i += kChains) {
        for (int c = 0; c < kChains; ++c) {
            for (int v = 0; v < kSums; ++v) {
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
        for (int v = 0; v < kSums; ++v) {
            const Lanes weights = load(w[v * kLanes / kBlock] + place(i, v));
            for (int r = 0; r < R; ++r) more[0][r][v] = fma(weights, all(x[r][i]), more[0][r][v]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < kSums; ++v) {
            sums[r][v] = more[0][r][v];
            for (int c = 1; c < kChains; ++c) sums[r][v] = sums[r][v] + more[c][r][v];
        }
    }
}

template <int R, class W>
inline void add_group(const bf16* const* x, const W* const* w, int64_t i, int64_t end,
                      int64_t ahead, Lanes sums[R][kSums]) {
    for (int r = 0; r < R; ++r) for (int v = 0; v < kSums; ++v) sums[r][v] = Lanes{};
#if defined(__AVX512VBMI__)
    const Widener<W> widen;
    constexpr int kChains = R <= 4 ? 2 : 1;  // sums that do not wait for each other
    Lanes more[kChains][R][kSums] = {};
    for (; i + 4 <= end; i += 4) {
        for (int v = 0; v < kSums; ++v) {
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
        for (int v = 0; v < kSums; ++v) {
            sums[r][v] = kChains > 1 ? more[0][r][v] + more[kChains - 1][r][v] : more[0][r][v];
        }
    }
#endif
    for (; i + 2 <= end; i += 2) {
        for (int v = 0; v < kSums; ++v) {
            const W* from = w[v * kLanes / kBlock];
            prefetch(from + place(i, v) + ahead);
            const Bits pairs = load_narrow_pairs(from, i, v);
            for (int r = 0; r < R; ++r) sums[r][v] = add_products(sums[r][v], pairs, x[r] + i);
        }
    }
    for (; i < end; ++i) {
        for (int v = 0; v < kSums; ++v) {
            const Lanes weights = load(w[v * kLanes / kBlock] + place(i, v));
            for (int r = 0; r < R; ++r) {
                sums[r][v] = fma(weights, all(to_float(x[r][i])), sums[r][v]);
            }
        }
    }
}

template <int R, class W>
inline void add_group(const bf16* const* x, const Pair<W>* const* w, int64_t i, int64_t end,
                      int64_t, Lanes sums[R][kSums]) {
    for (int r = 0; r < R; ++r) for (int v = 0; v < kSums; ++v) sums[r][v] = Lanes{};
    for (; i < end; i += 2) {
        for (int v = 0; v < kSums; ++v) {
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
    Lanes total[R][kSums] = {};
    for (int64_t i = 0, end = groups.size - groups.first, g = 0; i < k;
         i = end, end += groups.size, ++g) {
        Lanes sums[R][kSums];
        add_group<R>(x, w, i, std::min(end, k), ahead, sums);
        for (int v = 0; v < kSums; ++v) {
            const Lanes scale = load(scales[v * kLanes / kBlock] + place(g, v)) * kUnit<W>;
            for (int r = 0; r < R; ++r) total[r][v] = fma(sums[r][v], scale, total[r][v]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < kSums; ++v) store(out + r * 2 * kBlock + v * kLanes, total[r][v]);
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
Block<W> block_of(const Matrix& matrix, int64_t number, int64_t k, Groups groups) {
    return {(const W*)matrix.values + number * k * kBlock,
            matrix.scales + number * groups.count(k) * kBlock};
}

constexpr int64_t kFewRows = 2 * kRows;  // with more, two blocks are widened once for all of them

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
        return m > kFewRows && ends % kInputs == 0;
    }

    static void widen(const W* from, int64_t k, Wide<W>* to) {
        for (int64_t i = 0; i < k * kBlock; i += kLanes) store(&to[i].value, load(from + i));
    }

    static void widen(const W* from, int64_t k, Pair<W>* to) {
        int64_t i = 0;
#if defined(__AVX512VBMI__)
        const Widener<W> widen_four;
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

template <class O>
inline void write(const float* sums, const float* bias, int64_t count, O* to) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const Lanes values = load(sums + i);
        store_part(to + i, bias ? values + load_part(bias + i, count - i) : values, count - i);
    }
}

// Rows that a product takes, as it takes them: float32, or bfloat16 where the CPU multiplies it.
template <class X>
using Taken = std::conditional_t<kMultipliesPairs, X, float>;

template <class X>
struct TakenRows {
    std::unique_ptr<float[]> widened;
    const Taken<X>* begin;
    int64_t stride;

    // Rows from_row[i] of x, or i where that is null.
    TakenRows(const X* x, int64_t stride, const int64_t* from_row, int64_t m, int64_t k)
        : stride(stride) {
        if constexpr (std::is_same_v<Taken<X>, X>) {
            begin = x;
        } else {
            widened.reset(new float[(size_t)(m * k)]);
            begin = widened.get(), this->stride = k;
#pragma omp parallel for schedule(static) if (m * k > 65536)
            for (int64_t i = 0; i < m; ++i) {
                const X* row = x + (from_row ? from_row[i] : i) * stride;
                for (int64_t j = 0; j < k; j += kLanes) {
                    const Lanes values = k - j < kLanes ? load_part(row + j, k - j) : load(row + j);
                    store_part(widened.get() + i * k + j, values, k - j);
                }
            }
        }
    }
};

// use(row, sums) for the sums of each of m rows with two blocks; row i is from_row[i] of x, or i.
// The blocks `step` blocks on in each matrix are those that follow.
template <class W, class X, class Use>
void each_row(const X* x, int64_t stride, const int64_t* from_row, int64_t m, const Block<W>& first,
              const Block<W>& second, int64_t k, Groups groups, int64_t step, Use use) {
    if constexpr (sizeof(W) == 1) {
        if (Panel<W, X>::suits(m, k, groups)) {
            const Panel<W, X> panel(first, second, k);
            return each_row(x, stride, from_row, m, panel.first, panel.second, k, groups, 0, use);
        }
    }
    float sums[kRows][2 * kBlock];
    const int64_t height = tile_height(m);
    for (int64_t row = 0; row < m; row += height) {
        const int rows = (int)std::min<int64_t>(height, m - row);
        const X* from[kRows];
        for (int r = 0; r < rows; ++r) {
            from[r] = x + (from_row ? from_row[row + r] : row + r) * stride;
        }
        two_blocks(rows, from, first, second, k, groups, ahead_of_bytes(step, k), sums);
        for (int r = 0; r < rows; ++r) use(row + r, sums[r]);
    }
}

template <class W, class X>
void product(const Taken<X>* x, int64_t stride, int64_t m, const Matrix& w, int64_t pair, int64_t n,
             int64_t k, Groups groups, const float* bias, X* out, const int64_t* to_row) {
    const int64_t at = 2 * pair * kBlock, left = n - at;
    const auto first = block_of<W>(w, 2 * pair, k, groups);
    const auto second = block_of<W>(w, left > kBlock ? 2 * pair + 1 : 2 * pair, k, groups);
    each_row(x, stride, nullptr, m, first, second, k, groups, 2, [&](int64_t row, float* sums) {
        X* to = out + (to_row ? to_row[row] : row) * n + at;
        write(sums, bias ? bias + at : nullptr, std::min<int64_t>(left, 2 * kBlock), to);
    });
}

// A block of act(gate) · up, or of act(up) where there is no gate, for rows of x.
template <class W, class X>
void inner_block(const X* x, int64_t stride, const int64_t* from_row, int64_t m,
                 const Matrix* gate, const Matrix& up, int64_t block, int64_t k, Groups groups,
                 int64_t out_stride, X* out) {
    const auto second = block_of<W>(up, block, k, groups);
    const auto first = gate ? block_of<W>(*gate, block, k, groups) : second;
    each_row(x, stride, from_row, m, first, second, k, groups, 1, [&](int64_t row, float* sums) {
        for (int i = 0; i < kBlock; i += kLanes) {
            const Lanes x = load(sums + i);
            store(sums + i, gate ? silu(x) * load(sums + kBlock + i) : gelu(x));
        }
        write(sums, nullptr, kBlock, out + row * out_stride + block * kBlock);
    });
}

template <class W, class X>
void linear(const X* x, int64_t stride, int64_t m, const Matrix& w, int64_t n, int64_t k,
            Groups groups, const float* bias, X* out) {
    const TakenRows<X> rows(x, stride, nullptr, m, k);
    const int64_t pairs = (n + 2 * kBlock - 1) / (2 * kBlock);
#pragma omp parallel for schedule(static) if (m * n * k > 65536)
    for (int64_t pair = 0; pair < pairs; ++pair) {
        product<W>(rows.begin, rows.stride, m, w, pair, n, k, groups, bias, out, nullptr);
    }
}

struct Experts {
    const int64_t *from_row, *to_row, *ends;
    int64_t count;
    const Matrix *gate, *up, *down;
    int64_t hidden, inner;
    Groups of_hidden, of_inner;
};

template <class W, class X>
void experts(const X* x, int64_t stride, const Experts& of, X* out) {
    std::vector<int64_t> used, numbers;
    for (int64_t e = 0; e < of.count; ++e) {
        if (of.ends[e] > (e ? of.ends[e - 1] : 0)) used.push_back(e);
    }
    const int64_t num_pairs = of.count ? of.ends[of.count - 1] : 0, blocks = (of.inner + kBlock - 1) / kBlock;
    const int64_t width = blocks * kBlock;
    const int64_t outs = (of.hidden + 2 * kBlock - 1) / (2 * kBlock);
    const TakenRows<X> rows(x, stride, of.from_row, num_pairs, of.hidden);
    const int64_t* from_row = of.from_row;
    if (rows.widened) {  // in the order of pairs
        for (int64_t i = 0; i < num_pairs; ++i) numbers.push_back(i);
        from_row = numbers.data();
    }
    const std::unique_ptr<Taken<X>[]> scratch(new Taken<X>[(size_t)(num_pairs * width)]);
    const int64_t num_used = (int64_t)used.size();
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 8)
        for (int64_t task = 0; task < num_used * blocks; ++task) {
            const int64_t e = used[task / blocks], begin = e ? of.ends[e - 1] : 0;
            inner_block<W>(rows.begin, rows.stride, from_row + begin, of.ends[e] - begin,
                           of.gate ? of.gate + e : nullptr, of.up[e], task % blocks,
                           of.hidden, of.of_hidden, width, scratch.get() + begin * width);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < num_used * outs; ++task) {
            const int64_t e = used[task / outs], begin = e ? of.ends[e - 1] : 0;
            product<W>(scratch.get() + begin * width, width, of.ends[e] - begin, of.down[e],
                       task % outs, of.hidden, of.inner, of.of_inner, nullptr, out,
                       of.to_row + begin);
        }
    }
}

// Calls f with the types of weights and of rows.
template <class F>
void with_types(bool is_float8, bool is_bf16, F f) {
    if (is_float8 && is_bf16) return f(E4m3(), bf16());
    if (is_float8) return f(E4m3(), float());
    if (is_bf16) return f(int8_t(), bf16());
    f(int8_t(), float());
}

}  // namespace

extern "C" {

// out [m, n] = x [m, k] times w [n, k], plus bias [n] or null. x and out are float32 or bfloat16;
// weights are int8 or e4m3, `group` inputs with a scale.
void narrow_linear(int32_t is_float8, int32_t is_bf16, const void* x, int64_t stride, int64_t m,
                   const uint8_t* values, const float* scales, int64_t n, int64_t k,
                   int64_t group, int64_t first, const float* bias, void* out) {
    with_types(is_float8, is_bf16, [&](auto w, auto row) {
        using X = decltype(row);
        linear<decltype(w), X>((const X*)x, stride, m, {values, scales}, n, k, {group, first},
                               bias, (X*)out);
    });
}

// Experts' MLPs, as `experts` of products.cpp; of each matrix there are values and scales.
// gate (or null), up: [experts] of [inner, hidden]; down: of [hidden, inner].
void narrow_experts(int32_t is_float8, int32_t is_bf16, const void* x, int64_t stride,
                    const int64_t* from_row, const int64_t* to_row, const int64_t* ends,
                    int64_t num_experts, const void* gate, const void* up, const void* down,
                    int64_t hidden, int64_t inner, int64_t hidden_group, int64_t inner_group,
                    int64_t inner_first, void* out) {
    const Experts of{from_row, to_row, ends, num_experts, (const Matrix*)gate, (const Matrix*)up,
                      (const Matrix*)down, hidden, inner, {hidden_group, 0},
                      {inner_group, inner_first}};
    with_types(is_float8, is_bf16, [&](auto w, auto row) {
        using X = decltype(row);
        experts<decltype(w), X>((const X*)x, stride, of, (X*)out);
    });
}
}
