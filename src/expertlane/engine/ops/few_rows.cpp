// Products of few rows with float32 weights [n, k] as torch keeps them. Each weight is read from
// memory once, in order; torch's own product packs them anew at every call.

#include <vector>

#include "lanes.h"

namespace {

constexpr int kColumns = 4;  // outputs that are computed together
// With kColumns, so many sums fit into registers.
constexpr int64_t kMostRows = kLanes == 8 ? 3 : 4;

// sums[r][c] += row r of x times row c of w, as many values of each as `load` takes from i on.
template <int R, class Load>
void add_products(const float* const* x, const float* w, int64_t k, int64_t i, Load load,
                  Lanes sums[R][kColumns]) {
    Lanes rows[R];
    for (int r = 0; r < R; ++r) rows[r] = load(x[r] + i);
    for (int c = 0; c < kColumns; ++c) {
        prefetch(w + (c + kColumns) * k + i);  // of the next tile
        const Lanes weights = load(w + c * k + i);
        for (int r = 0; r < R; ++r) sums[r][c] = fma(rows[r], weights, sums[r][c]);
    }
}

// out[r][c] = row r of x times row c of w, k values each.
template <int R>
void few_rows_tile(const float* const* x, const float* w, int64_t k,
                   float out[kMostRows][kColumns]) {
    Lanes sums[R][kColumns] = {};
    const int64_t whole = k / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        add_products<R>(x, w, k, i, [](const float* p) { return load(p); }, sums);
    }
    if (whole < k) {
        const auto rest = [left = k - whole](const float* p) { return load_part(p, left); };
        add_products<R>(x, w, k, whole, rest, sums);
    }
    for (int r = 0; r < R; ++r) four_sums(sums[r], out[r]);
}

// The same for up to kMostRows rows, and up to kColumns rows of w.
void product(const float* const* x, int64_t rows, const float* w, int64_t columns, int64_t k,
             float out[kMostRows][kColumns]) {
    if (columns == kColumns) {
        switch (rows) {
            case 1: return few_rows_tile<1>(x, w, k, out);
            case 2: return few_rows_tile<2>(x, w, k, out);
            case 3: return few_rows_tile<3>(x, w, k, out);
            default: return few_rows_tile<kMostRows>(x, w, k, out);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
            Lanes each = {};
            for (int64_t i = 0; i < k; i += kLanes) {
                each = fma(load_part(x[r] + i, k - i), load_part(w + c * k + i, k - i), each);
            }
            out[r][c] = sum(each);
        }
    }
}

// up = SiLU(gate) * up, or GELU(up) without a gate, of a tile's sums.
void activate(const float* gate, float* up) {
    for (int64_t i = 0; i < kMostRows * kColumns; i += kLanes) {
        const int64_t left = kMostRows * kColumns - i;
        const Lanes x = load_part(up + i, left);
        store_part(up + i, gate ? silu(load_part(gate + i, left)) * x : gelu(x), left);
    }
}

}  // namespace

extern "C" {

// out [m, n] = x [m, k] times w [n, k], plus bias [n] or null.
void few_rows_linear(const float* x, int64_t stride, int64_t m, const float* w, int64_t n,
                     int64_t k, const float* bias, float* out) {
#pragma omp parallel for schedule(static) if (m * n * k > 65536)
    for (int64_t block = 0; block < (n + kColumns - 1) / kColumns; ++block) {
        const int64_t column = block * kColumns, columns = std::min<int64_t>(kColumns, n - column);
        for (int64_t row = 0; row < m; row += kMostRows) {
            const int64_t rows = std::min(kMostRows, m - row);
            const float* from[kMostRows];
            for (int64_t r = 0; r < rows; ++r) from[r] = x + (row + r) * stride;
            float sums[kMostRows][kColumns];
            product(from, rows, w + column * k, columns, k, sums);
            for (int64_t r = 0; r < rows; ++r) {
                float* to = out + (row + r) * n + column;
                for (int64_t c = 0; c < columns; ++c) {
                    to[c] = sums[r][c] + (bias ? bias[column + c] : 0.0f);
                }
            }
        }
    }
}

// Experts' MLPs, as `experts` of products.cpp, with weights that are not packed.
void few_rows_experts(const float* x, int64_t stride, const int64_t* from_row,
                      const int64_t* to_row, const int64_t* ends, int64_t num_experts,
                      const float* const* gate, const float* const* up, const float* const* down,
                      int64_t hidden, int64_t inner, float* scratch, float* out) {
    const int64_t firsts = (inner + kColumns - 1) / kColumns;
    const int64_t seconds = (hidden + kColumns - 1) / kColumns;
    std::vector<int64_t> used;
    for (int64_t e = 0; e < num_experts; ++e) {
        if (ends[e] > (e ? ends[e - 1] : 0)) used.push_back(e);
    }
    const int64_t count = (int64_t)used.size();
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < count * firsts; ++task) {
            const int64_t e = used[task / firsts], column = task % firsts * kColumns;
            const int64_t columns = std::min<int64_t>(kColumns, inner - column);
            const int64_t begin = e ? ends[e - 1] : 0, end = ends[e];
            for (int64_t pair = begin; pair < end; pair += kMostRows) {
                const int64_t rows = std::min(kMostRows, end - pair);
                const float* from[kMostRows];
                for (int64_t r = 0; r < rows; ++r) from[r] = x + from_row[pair + r] * stride;
                float gates[kMostRows][kColumns] = {}, ups[kMostRows][kColumns] = {};
                product(from, rows, up[e] + column * hidden, columns, hidden, ups);
                if (gate) product(from, rows, gate[e] + column * hidden, columns, hidden, gates);
                activate(gate ? gates[0] : nullptr, ups[0]);
                for (int64_t r = 0; r < rows; ++r) {
                    std::copy_n(ups[r], columns, scratch + (pair + r) * inner + column);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < count * seconds; ++task) {
            const int64_t e = used[task / seconds], column = task % seconds * kColumns;
            const int64_t columns = std::min<int64_t>(kColumns, hidden - column);
            const int64_t begin = e ? ends[e - 1] : 0, end = ends[e];
            for (int64_t pair = begin; pair < end; pair += kMostRows) {
                const int64_t rows = std::min(kMostRows, end - pair);
                const float* from[kMostRows];
                for (int64_t r = 0; r < rows; ++r) from[r] = scratch + (pair + r) * inner;
                float sums[kMostRows][kColumns];
                product(from, rows, down[e] + column * inner, columns, inner, sums);
                for (int64_t r = 0; r < rows; ++r) {
                    float* to = out + to_row[pair + r] * hidden + column;
                    for (int64_t c = 0; c < columns; ++c) to[c] = sums[r][c];
                }
            }
        }
    }
}
}
