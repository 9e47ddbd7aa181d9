// Products with packed weights, and experts' MLPs.

#include <vector>

#include "tiles.h"

namespace {

// Two neighbouring blocks of a product; the second may lie beyond the last one. Row r goes to the
// row to_row[r] of out, or to row r where that is null.
void two_blocks(const bf16* x, int64_t stride, int64_t m, const bf16* w, int64_t block, int64_t n,
                int64_t k, const float* bias, bf16* out, int64_t out_stride,
                const int64_t* to_row) {
    const int64_t size = k * kLanes, left = n - block * kLanes;
    const bf16* w0 = w + block * size;
    const bf16* w1 = left > kLanes ? w0 + size : w0;
    __m512 acc[kRows][2];
    __m512 add[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int b = 0; bias && b < 2 && left > b * kLanes; ++b) {
        const int64_t count = std::min<int64_t>(left - b * kLanes, kLanes);
        add[b] = _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1),
                                       bias + (block + b) * kLanes);
    }
    const int64_t height = tile_height(m);
    for (int64_t row = 0; row < m; row += height) {
        const int rows = (int)std::min<int64_t>(height, m - row);
        tiles(rows, x + row * stride, stride, w0, w1, k, acc);
        for (int r = 0; r < rows; ++r) {
            const int64_t at = to_row ? to_row[row + r] : row + r;
            bf16* to = out + at * out_stride + block * kLanes;
            store(to, _mm512_add_ps(acc[r][0], add[0]), left);
            if (left > kLanes) {
                store(to + kLanes, _mm512_add_ps(acc[r][1], add[1]), left - kLanes);
            }
        }
    }
}

// A block of act(gate) * up, or of act(up) where there is no gate (then two blocks of it), of the
// rows from_row of x.
void inner_block(const bf16* x, int64_t stride, const int64_t* from_row, int64_t m,
                 const bf16* gate, const bf16* up, int64_t block, int64_t inner, int64_t k,
                 bf16* out) {
    const int64_t size = k * kLanes;
    __m512 acc[kRows][2];
    alignas(64) float g[kLanes], u[kLanes];
    const bf16* w0 = gate ? gate + block * size : up + block * size;
    const bf16* w1 = gate ? up + block * size : w0 + size;
    const int64_t height = tile_height(m);
    for (int64_t row = 0; row < m; row += height) {
        const int rows = (int)std::min<int64_t>(height, m - row);
        const bf16* from[kRows];
        for (int r = 0; r < rows; ++r) from[r] = x + from_row[row + r] * stride;
        tiles(rows, from, w0, w1, k, acc);
        for (int r = 0; r < rows; ++r) {
            bf16* to = out + (row + r) * inner + block * kLanes;
            _mm512_store_ps(g, acc[r][0]);
            _mm512_store_ps(u, acc[r][1]);
            if (gate) {
                for (int i = 0; i < kLanes; ++i) g[i] = silu(g[i]) * u[i];
            } else {
                for (int i = 0; i < kLanes; ++i) g[i] = gelu(g[i]), u[i] = gelu(u[i]);
                store(to + kLanes, _mm512_load_ps(u), kLanes);
            }
            store(to, _mm512_load_ps(g), kLanes);
        }
    }
}

}  // namespace

extern "C" {

// out [m, n] = x [m, k] times the packed [n, k], plus bias [n] or null.
void linear(const bf16* x, int64_t stride, int64_t m, const bf16* w, int64_t n, int64_t k,
            const float* bias, bf16* out) {
    const int64_t blocks = (n + kLanes - 1) / kLanes;
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < (blocks + 1) / 2; ++pair) {
        two_blocks(x, stride, m, w, 2 * pair, n, k, bias, out, n, nullptr);
    }
}

// Experts' MLPs: expert e has the pairs ends[e-1] to ends[e]; pair p takes the row from_row[p] of x
// and gives the row to_row[p] of out [pairs, hidden]. gate (or null), up: [experts] pointers to
// packed [inner, hidden]; down: to packed [hidden, inner]. scratch: [pairs, inner]. inner is a
// multiple of 32.
void experts(const bf16* x, int64_t stride, const int64_t* from_row, const int64_t* to_row,
             const int64_t* ends, int64_t num_experts, const bf16* const* gate,
             const bf16* const* up, const bf16* const* down, int64_t hidden, int64_t inner,
             bf16* scratch, bf16* out) {
    std::vector<int64_t> used;
    for (int64_t e = 0; e < num_experts; ++e) {
        if (ends[e] > (e ? ends[e - 1] : 0)) used.push_back(e);
    }
    const int64_t step = gate ? 1 : 2, first_blocks = inner / kLanes / step;
    const int64_t second_blocks = (hidden + 2 * kLanes - 1) / (2 * kLanes);
    const int64_t count = (int64_t)used.size();
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 8)
        for (int64_t task = 0; task < count * first_blocks; ++task) {
            const int64_t e = used[task / first_blocks], block = task % first_blocks * step;
            const int64_t begin = e ? ends[e - 1] : 0;
            inner_block(x, stride, from_row + begin, ends[e] - begin, gate ? gate[e] : nullptr,
                        up[e], block, inner, hidden, scratch + begin * inner);
        }
#pragma omp for schedule(dynamic, 8)
        for (int64_t task = 0; task < count * second_blocks; ++task) {
            const int64_t e = used[task / second_blocks], pair = task % second_blocks;
            const int64_t begin = e ? ends[e - 1] : 0;
            two_blocks(scratch + begin * inner, inner, ends[e] - begin, down[e], 2 * pair, hidden,
                       inner, nullptr, out, hidden, to_row + begin);
        }
    }
}
}
