// Products of few rows with float32 weights [n, k] as torch keeps them. Each weight is read from
// memory once, in order; torch's own product packs them anew at every call.

#include "tiles.h"

namespace {

constexpr int kColumns = 4;       // outputs that are computed together
constexpr int64_t kMostRows = 4;  // with kColumns, so many sums fit into registers

// One vector of the sums of 16 vectors' values.
__m512 sums_of(const __m512 v[16]) {
    __m512 two[8], four[4], eight[2];
    for (int i = 0; i < 8; ++i) {
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 8]), _mm512_unpackhi_ps(v[i], v[i + 8]));
    }
    for (int i = 0; i < 4; ++i) {
        four[i] = _mm512_add_ps(_mm512_unpacklo_ps(two[i], two[i + 4]),
                                _mm512_unpackhi_ps(two[i], two[i + 4]));
    }
    for (int i = 0; i < 2; ++i) {
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[i], four[i + 2], 0x88),
                                 _mm512_shuffle_f32x4(four[i], four[i + 2], 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88),
                         _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}

// Where sums_of puts the sum of each vector: its lanes are in another order than the vectors.
struct Places {
    int of[16];
    Places() {
        for (int i = 0; i < 16; ++i) {
            __m512 v[16];
            for (auto& each : v) each = _mm512_setzero_ps();
            v[i] = _mm512_set1_ps(1.0f);
            float lanes[16];
            _mm512_storeu_ps(lanes, sums_of(v));
            of[i] = (int)(std::max_element(lanes, lanes + 16) - lanes);
        }
    }
};

template <int R, class Load>
void add_products(const float* const* x, const float* w, int64_t k, int64_t i, Load load,
                  __m512 sum[16]) {
    __m512 rows[R];
    for (int r = 0; r < R; ++r) rows[r] = load(x[r] + i);
    for (int c = 0; c < kColumns; ++c) {
        _mm_prefetch((const char*)(w + (c + kColumns) * k + i), _MM_HINT_T0);  // of the next tile
        const __m512 weights = load(w + c * k + i);
        for (int r = 0; r < R; ++r) {
            sum[r * kColumns + c] = _mm512_fmadd_ps(rows[r], weights, sum[r * kColumns + c]);
        }
    }
}

// out[r][c] = row r of x times row c of w, k values each.
template <int R>
void few_rows_tile(const float* const* x, const float* w, int64_t k,
                   float out[kMostRows][kColumns]) {
    static const Places places;
    __m512 sum[16];
    for (auto& each : sum) each = _mm512_setzero_ps();
    const int64_t whole = k / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        add_products<R>(x, w, k, i, [](const float* p) { return _mm512_loadu_ps(p); }, sum);
    }
    if (whole < k) {
        const __mmask16 mask = (__mmask16)((1u << (k - whole)) - 1);
        const auto load = [mask](const float* p) { return _mm512_maskz_loadu_ps(mask, p); };
        add_products<R>(x, w, k, whole, load, sum);
    }
    if (R == 1) {
        for (int c = 0; c < kColumns; ++c) out[0][c] = _mm512_reduce_add_ps(sum[c]);
        return;
    }
    float lanes[16];
    _mm512_storeu_ps(lanes, sums_of(sum));
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < kColumns; ++c) out[r][c] = lanes[places.of[r * kColumns + c]];
    }
}

// The same for up to kMostRows rows, and up to kColumns rows of w.
void product(const float* const* x, int64_t rows, const float* w, int64_t columns, int64_t k,
             float out[kMostRows][kColumns]) {
    if (columns == kColumns) {
        switch (rows) {
            case 1: return few_rows_tile<1>(x, w, k, out);
            case 2: return few_rows_tile<2>(x, w, k, out);
            case 3: return few_rows_tile<3>(x, w, k, out);
            default: return few_rows_tile<4>(x, w, k, out);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < k; i += kLanes) {
                const int64_t left = k - i;
                const __mmask16 mask = left >= kLanes ? 0xffff : (__mmask16)((1u << left) - 1);
                sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x[r] + i),
                                      _mm512_maskz_loadu_ps(mask, w + c * k + i), sum);
            }
            out[r][c] = _mm512_reduce_add_ps(sum);
        }
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
#pragma omp parallel
    for (int64_t e = 0; e < num_experts; ++e) {
        const int64_t begin = e ? ends[e - 1] : 0, end = ends[e];
        if (begin == end) continue;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < firsts; ++block) {
            const int64_t column = block * kColumns;
            const int64_t columns = std::min<int64_t>(kColumns, inner - column);
            for (int64_t pair = begin; pair < end; pair += kMostRows) {
                const int64_t rows = std::min(kMostRows, end - pair);
                const float* from[kMostRows];
                for (int64_t r = 0; r < rows; ++r) from[r] = x + from_row[pair + r] * stride;
                float gates[kMostRows][kColumns], ups[kMostRows][kColumns];
                product(from, rows, up[e] + column * hidden, columns, hidden, ups);
                if (gate) product(from, rows, gate[e] + column * hidden, columns, hidden, gates);
                for (int64_t r = 0; r < rows; ++r) {
                    float* to = scratch + (pair + r) * inner + column;
                    for (int64_t c = 0; c < columns; ++c) {
                        to[c] = gate ? silu(gates[r][c]) * ups[r][c] : gelu(ups[r][c]);
                    }
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < seconds; ++block) {
            const int64_t column = block * kColumns;
            const int64_t columns = std::min<int64_t>(kColumns, hidden - column);
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
