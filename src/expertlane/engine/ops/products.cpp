// Products with packed weights, and experts' MLPs.

#include <memory>
#include <vector>

#include "tiles.h"

namespace {

using Sums = Lanes[kRows][2 * kVectors];

// Room that is not zeroed.
std::unique_ptr<Factor[]> room(int64_t count) {
    return std::unique_ptr<Factor[]>(new Factor[(size_t)count]);
}

// m rows of k values as the products take them; row(r) is where each lies.
class FactorRows {
  public:
    template <class Row>
    FactorRows(int64_t m, int64_t k, Row row) : at_(m) {
        if constexpr (kMultipliesPairs && !kHasTiles) {
            for (int64_t r = 0; r < m; ++r) at_[r] = (const Factor*)row(r);
        } else {
            copy_ = room(m * k);
#pragma omp parallel for schedule(static) if (m * k > 65536)
            for (int64_t r = 0; r < m; ++r) at_[r] = copy_row(row(r), k, copy_.get() + r * k);
        }
    }

    const Factor* const* at(int64_t row) const { return at_.data() + row; }

  private:
    static const Factor* copy_row(const bf16* x, int64_t k, Factor* to) {
        int64_t i = 0;
        for (; i + kLanes <= k; i += kLanes) store(to + i, load(x + i));
        for (; i < k; ++i) put(to_float(x[i]), to + i);
        return to;
    }

    std::vector<const Factor*> at_;
    std::unique_ptr<Factor[]> copy_;
};

// Two neighbouring blocks of a product; the second may lie beyond the last one. Row r goes to the
// row to_row[r] of out, or to row r where that is null.
void two_blocks(const Factor* const* x, int64_t m, const bf16* w, int64_t block, int64_t n,
                int64_t k, const float* bias, bf16* out, int64_t out_stride,
                const int64_t* to_row) {
    const int64_t size = k * kBlock, left = n - block * kBlock;
    const bf16* w0 = w + block * size;
    const bf16* w1 = left > kBlock ? w0 + size : w0;
    Sums acc;
    Lanes add[2 * kVectors] = {};
    for (int v = 0; bias && v < 2 * kVectors; ++v) {
        add[v] = load_part(bias + block * kBlock + v * kLanes, left - v * kLanes);
    }
    const int64_t height = tile_height(m);
    for (int64_t row = 0; row < m; row += height) {
        const int rows = (int)std::min<int64_t>(height, m - row);
        tiles(rows, x + row, w0, w1, k, 2, acc);
        for (int r = 0; r < rows; ++r) {
            const int64_t at = to_row ? to_row[row + r] : row + r;
            bf16* to = out + at * out_stride + block * kBlock;
            for (int v = 0; v < 2 * kVectors && left > v * kLanes; ++v) {
                store_part(to + v * kLanes, acc[r][v] + add[v], left - v * kLanes);
            }
        }
    }
}

// A block of act(gate) * up, or of act(up) where there is no gate (then two blocks of it), of m
// rows of x.
void inner_block(const Factor* const* x, int64_t m, const bf16* gate, const bf16* up,
                 int64_t block, int64_t inner, int64_t k, Factor* out) {
    const int64_t size = k * kBlock;
    Sums acc;
    const bf16* w0 = gate ? gate + block * size : up + block * size;
    const bf16* w1 = gate ? up + block * size : w0 + size;
    const int64_t height = tile_height(m);
    for (int64_t row = 0; row < m; row += height) {
        const int rows = (int)std::min<int64_t>(height, m - row);
        tiles(rows, x + row, w0, w1, k, gate ? 1 : 2, acc);
        for (int r = 0; r < rows; ++r) {
            Factor* to = out + (row + r) * inner + block * kBlock;
            if (gate) {
                for (int v = 0; v < kVectors; ++v) {
                    store(to + v * kLanes, silu(acc[r][v]) * acc[r][kVectors + v]);
                }
            } else {
                for (int v = 0; v < 2 * kVectors; ++v) store(to + v * kLanes, gelu(acc[r][v]));
            }
        }
    }
}

}  // namespace

extern "C" {

// out [m, n] = x [m, k] times the packed [n, k], plus bias [n] or null.
void linear(const bf16* x, int64_t stride, int64_t m, const bf16* w, int64_t n, int64_t k,
            const float* bias, bf16* out) {
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    const FactorRows rows(m, k, [=](int64_t r) { return x + r * stride; });
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < (blocks + 1) / 2; ++pair) {
        two_blocks(rows.at(0), m, w, 2 * pair, n, k, bias, out, n, nullptr);
    }
}

// A product for each head: out [m, heads, n] = x [m, heads, k] times the packed [heads, n, k]. Tokens
// and heads of x and out lie as their strides say; a head stride of 0: all heads take the same x.
void heads_linear(const bf16* x, int64_t stride, int64_t head_stride, int64_t m, const bf16* w,
                  int64_t heads, int64_t n, int64_t k, bf16* out, int64_t out_stride,
                  int64_t out_head_stride) {
    const int64_t blocks = (n + kBlock - 1) / kBlock, pairs = (blocks + 1) / 2;
    const int64_t taken = head_stride ? heads : 1;
    const FactorRows rows(taken * m, k, [=](int64_t i) {
        return x + i % m * stride + i / m * head_stride;
    });
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < heads * pairs; ++task) {
        const int64_t head = task / pairs;
        two_blocks(rows.at(head % taken * m), m, w + head * blocks * kBlock * k, 2 * (task % pairs), n,
                   k, nullptr, out + head * out_head_stride, out_stride, nullptr);
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
    const int64_t step = gate ? 1 : 2, first_blocks = inner / kBlock / step;
    const int64_t second_blocks = (hidden + 2 * kBlock - 1) / (2 * kBlock);
    const int64_t count = (int64_t)used.size(), pairs = num_experts ? ends[num_experts - 1] : 0;
    const FactorRows rows(pairs, hidden, [=](int64_t p) { return x + from_row[p] * stride; });
    std::unique_ptr<Factor[]> wider;
    Factor* middle = (Factor*)scratch;
    if constexpr (!kMultipliesPairs) {
        wider = room(pairs * inner);
        middle = wider.get();
    }
    std::vector<const Factor*> middle_at(pairs);
    for (int64_t p = 0; p < pairs; ++p) middle_at[p] = middle + p * inner;
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 8)
        for (int64_t task = 0; task < count * first_blocks; ++task) {
            const int64_t e = used[task / first_blocks], block = task % first_blocks * step;
            const int64_t begin = e ? ends[e - 1] : 0;
            inner_block(rows.at(begin), ends[e] - begin, gate ? gate[e] : nullptr, up[e], block,
                        inner, hidden, middle + begin * inner);
        }
#pragma omp for schedule(dynamic, 8)
        for (int64_t task = 0; task < count * second_blocks; ++task) {
            const int64_t e = used[task / second_blocks], pair = task % second_blocks;
            const int64_t begin = e ? ends[e - 1] : 0;
            two_blocks(middle_at.data() + begin, ends[e] - begin, down[e], 2 * pair, hidden, inner,
                       nullptr, out, hidden, to_row + begin);
        }
    }
}
}
