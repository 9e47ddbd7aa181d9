// Products with weights of one byte and their scales, and experts' MLPs: each weight is read from
// memory once, in order, by one thread; sums are float32.
//
// A matrix [n, k] is [n / 16][k][16] bytes, n padded to a multiple of 16 with zeros, and a scale
// for every output and group of inputs, [n / 16][groups][16]. The first group may have begun
// `first` inputs earlier, where a matrix is cut along its inputs.

#include <vector>

#include "narrow_tiles.h"

namespace {

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
void product(const Taken<X>* x, int64_t stride, int64_t m, const NarrowMatrix& w, int64_t pair,
             int64_t n, int64_t k, Groups groups, const float* bias, X* out, const int64_t* to_row) {
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
                 const NarrowMatrix* gate, const NarrowMatrix& up, int64_t block, int64_t k,
                 Groups groups, int64_t out_stride, X* out) {
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
void linear(const X* x, int64_t stride, int64_t m, const NarrowMatrix& w, int64_t n, int64_t k,
            Groups groups, const float* bias, X* out) {
    const TakenRows<X> rows(x, stride, nullptr, m, k);
    const int64_t pairs = (n + 2 * kBlock - 1) / (2 * kBlock);
#pragma omp parallel for schedule(static) if (m * n * k > 65536)
    for (int64_t pair = 0; pair < pairs; ++pair) {
        product<W>(rows.begin, rows.stride, m, w, pair, n, k, groups, bias, out, nullptr);
    }
}

struct NarrowExperts {
    const int64_t *from_row, *to_row, *ends;
    int64_t count;
    const NarrowMatrix *gate, *up, *down;
    int64_t hidden, inner;
    Groups of_hidden, of_inner;
};

template <class W, class X>
void experts(const X* x, int64_t stride, const NarrowExperts& of, X* out) {
    std::vector<int64_t> used, numbers;
    for (int64_t e = 0; e < of.count; ++e) {
        if (of.ends[e] > (e ? of.ends[e - 1] : 0)) used.push_back(e);
    }
    const int64_t num_pairs = of.count ? of.ends[of.count - 1] : 0;
    const int64_t blocks = (of.inner + kBlock - 1) / kBlock, width = blocks * kBlock;
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
    const NarrowExperts of{from_row, to_row, ends, num_experts, (const NarrowMatrix*)gate,
                           (const NarrowMatrix*)up, (const NarrowMatrix*)down, hidden, inner,
                           {hidden_group, 0}, {inner_group, inner_first}};
    with_types(is_float8, is_bf16, [&](auto w, auto row) {
        using X = decltype(row);
        experts<decltype(w), X>((const X*)x, stride, of, (X*)out);
    });
}
}
