// Attention of many rows a kv head: tiles of a matrix product, over blocks of keys with an online
// softmax (Dao et al. 2022), so that room does not grow with the context. Logits are computed as
// keys times queries: keys need no packing, and the softmax works along vectors of queries.

#pragma once

#include "attention_rows.h"

#if defined(__AVX512F__)
constexpr int kKeyTile = 12, kQueryTile = 8;  // rows a tile of logits, and of sums
#elif defined(__AVX2__)
constexpr int kKeyTile = 6, kQueryTile = 4;
#else
constexpr int kKeyTile = 8, kQueryTile = 4;
#endif
constexpr int64_t kRoundUp = 16;    // of head sizes
constexpr int64_t kLinePad = 32;    // keeps rows that are powers of two apart in the cache

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Ints all_ints(int64_t x) { return (int32_t)x - Ints{}; }

// acc[r][b] += the sum over steps of x[r] (one value, or two as a pair) times vector b of w.
template <int R, int B, class X>
inline void multiply(const X* const* x, int64_t x_step, const X* w, int64_t w_step, int64_t steps,
                     Lanes (&acc)[R][B]) {
    const X* at[R];
    for (int r = 0; r < R; ++r) at[r] = x[r];
    for (int64_t i = 0; i < steps; ++i, w += w_step) {
        if constexpr (sizeof(X) == sizeof(bf16)) {
            Bits vectors[B];
            for (int b = 0; b < B; ++b) vectors[b] = load_pairs(w + b * kPanel);
            for (int r = 0; r < R; ++r) {
                for (int b = 0; b < B; ++b) {
                    acc[r][b] = add_products(acc[r][b], vectors[b], at[r] + i * x_step);
                }
            }
        } else {
            Lanes vectors[B];
            for (int b = 0; b < B; ++b) vectors[b] = load(w + b * kLanes);
            for (int r = 0; r < R; ++r) {
                const Lanes value = all(at[r][i * x_step]);
                for (int b = 0; b < B; ++b) acc[r][b] = fma(vectors[b], value, acc[r][b]);
            }
        }
    }
}

// What a thread needs for a block of rows of one kv head; sizes in values.
template <class T>
struct TileRoom {
    using X = Operand<T>;
    static constexpr int64_t kStep = kInPairs<T> ? 2 : 1;  // values of a product's step

    int64_t key_dim, key_stride, value_dim, state_size, most_rows;
    std::vector<X> keys, values, wide_values, queries, weights;
    std::vector<float> logits;
    std::vector<float> most, sum;
    std::vector<int32_t> own;  // the rows' positions, from the block's first on

    TileRoom(const Call<T>& call, int64_t rows)
        : key_dim(round_up(call.key_dim, kRoundUp)), key_stride(key_dim + kLinePad),
          value_dim(round_up(call.value_dim, kPanel)), state_size(call.state_size()),
          most_rows(round_up(rows, kPanel)), keys(kKeys * key_stride),
          values(kKeys * value_dim), wide_values(call.value_scales ? kStep * value_dim : 0),
          queries(most_rows * key_dim), weights(kKeys * kPanel), logits(kKeys * kPanel),
          most(most_rows), sum(most_rows), own(most_rows) {}

    // Rows as panels [key_dim / kStep][kPanel][kStep].
    void take_queries(const Call<T>& call, const Task& task, int64_t head) {
        std::vector<X> row(key_dim);
        for (int64_t r = 0; r < round_up(task.rows, kPanel); ++r) {
            const bool is_row = r < task.rows;
            if (is_row) copy_row(query_of(call, task, head, r), call.key_dim, key_dim, row.data());
            else std::fill(row.begin(), row.end(), X{});
            X* to = queries.data() + r / kPanel * kPanel * key_dim + r % kPanel * kStep;
            for (int64_t d = 0; d < key_dim; d += kStep) {
                std::memcpy(to + d * kPanel, row.data() + d, kStep * sizeof(X));
            }
            own[r] = (int32_t)own_position(call, task, std::min(r, task.rows - 1));
        }
        std::fill(most.begin(), most.end(), kMasked);
        std::fill(sum.begin(), sum.end(), 0.0f);
    }

    // Keys side by side; values as panels [n / kStep][kPanel][kStep], even places first.
    void take_block(const Call<T>& call, const int64_t* rows, int64_t n, int64_t head) {
        const int64_t first = head * call.block_size;
        for (int64_t t = 0; t < round_up(n, kKeyTile); ++t) {
            call.take_key(first + rows[t], key_dim, keys.data() + t * key_stride);
        }
        const T* of_values = call.values + first * call.value_stride;
        for (int64_t t = 0; t < n; t += kStep) {
            X* to = values.data() + t * kPanel;
            if (call.value_scales) {
                for (int i = 0; i < kStep; ++i) {
                    X* wide = wide_values.data() + i * value_dim;
                    call.take_value(first + rows[t + i], value_dim, wide);
                }
                const X* wide = wide_values.data();
                put_values(wide, wide + (kStep - 1) * value_dim, value_dim, to);
            } else {
                put_values(of_values + rows[t] * call.value_stride,
                           of_values + rows[t + kStep - 1] * call.value_stride, call.value_dim, to);
            }
        }
    }

    // A row of `size` values to panels, or two.
    template <class Row>
    void put_values(const Row* a, const Row* b, int64_t size, X* to) const {
        for (int64_t d = 0; d < value_dim; d += kPanel, to += kKeys * kPanel) {
            const int64_t left = size - d;
            if constexpr (kInPairs<T>) {
                const Bits x = left < kPanel ? load_pairs_part(a + d, left) : load_pairs(a + d);
                const Bits y = left < kPanel ? load_pairs_part(b + d, left) : load_pairs(b + d);
                const Bits even = even_pairs(x, y), odd = odd_pairs(x, y);
                std::memcpy(to, &even, sizeof(even));
                std::memcpy(to + kPanel, &odd, sizeof(odd));
            } else {
                copy_row<Row>(a + d, std::min(left, kPanel), kPanel, to);
            }
        }
    }

    // Logits [n, B vectors] of a panel of queries; gives the largest of each query. Position p of
    // the block is seen by row r if it is at most own[r], and more than own[r] - window.
    template <int B>
    void panel_logits(const Call<T>& call, int64_t panel, int64_t first, int64_t n, bool masks,
                      Lanes (&largest)[B]) {
        const X* q = queries.data() + panel * kPanel * key_dim;
        Ints own_of[B];
        std::memcpy(own_of, own.data() + panel * kPanel, sizeof(own_of));
        const Ints window = all_ints(call.window > 0 ? call.window : INT32_MAX);
        for (int b = 0; b < B; ++b) largest[b] = load(most.data() + panel * kPanel + b * kLanes);
        for (int64_t t = 0; t < n; t += kKeyTile) {
            const X* rows[kKeyTile];
            for (int k = 0; k < kKeyTile; ++k) rows[k] = keys.data() + (t + k) * key_stride;
            Lanes acc[kKeyTile][B] = {};
            multiply(rows, kStep, q, kPanel * kStep, key_dim / kStep, acc);
            for (int k = 0; k < kKeyTile; ++k) {
                for (int b = 0; b < B; ++b) {
                    Lanes logit = acc[k][b] * call.scale;
                    if (masks || t + k >= n) {
                        const Ints before = own_of[b] - all_ints(first + t + k);
                        const Ints sees = t + k < n ? (before >= 0) & (before < window) : Ints{};
                        logit = lanes_of((Bits)sees ? bits_of(logit) : bits_of(all(kMasked)));
                    }
                    largest[b] = larger(largest[b], logit);
                    store(logits.data() + (t + k) * kPanel + b * kLanes, logit);
                }
            }
        }
    }

    // Logits to weights; gives by what the sums so far are to be multiplied.
    template <int B>
    void panel_weights(int64_t panel, int64_t n, const Lanes (&largest)[B], float* factors) {
        for (int b = 0; b < B; ++b) {
            float* mosts = most.data() + panel * kPanel + b * kLanes;
            float* total = sum.data() + panel * kPanel + b * kLanes;
            const Lanes factor = power_of_2(load(mosts) - largest[b]);
            Lanes all_weights = load(total) * factor;
            const float* from = logits.data() + b * kLanes;
            X* to = weights.data() + b * kLanes * kStep;
            for (int64_t t = 0; t < n; t += kStep) {
                const Lanes weight = power_of_2(load(from + t * kPanel) - largest[b]);
                all_weights += weight;
                if constexpr (kInPairs<T>) {
                    const Lanes next = power_of_2(load(from + (t + 1) * kPanel) - largest[b]);
                    all_weights += next;
                    const Bits pairs = pairs_of(weight, next);
                    std::memcpy(to + t * kPanel, &pairs, sizeof(pairs));
                } else {
                    store(to + t * kPanel, weight);
                }
            }
            store(total, all_weights);
            store(mosts, largest[b]);
            store(factors + b * kLanes, factor);
        }
    }

    // Adds weights times values to the sums of a panel's first `rows` rows.
    void panel_sums(int64_t rows, int64_t n, const float* factors, float* states) {
        for (int64_t d = 0; d < value_dim; d += kPanel) {
            const X* of_values = values.data() + d * kKeys;
            for (int64_t row = 0; row < rows; row += kQueryTile) {
                const X* of_weights[kQueryTile];
                Lanes acc[kQueryTile][2];
                float* sums = states + row * state_size + d;
                for (int r = 0; r < kQueryTile; ++r) {
                    of_weights[r] = weights.data() + (row + r) * kStep;
                    const Lanes factor = all(factors[row + r]);
                    for (int b = 0; b < 2; ++b) {
                        acc[r][b] = load(sums + r * state_size + b * kLanes) * factor;
                    }
                }
                multiply(of_weights, kPanel * kStep, of_values, kPanel * kStep,
                         (n + kStep - 1) / kStep, acc);
                for (int r = 0; r < kQueryTile; ++r) {
                    for (int b = 0; b < 2; ++b) {
                        store(sums + r * state_size + b * kLanes, acc[r][b]);
                    }
                }
            }
        }
    }

    template <int B>
    void attend_panel(const Call<T>& call, int64_t panel, int64_t rows, int64_t first, int64_t n,
                      float* states) {
        const int64_t lowest = own[panel * kPanel], highest = own[panel * kPanel + rows - 1];
        n = std::min(n, highest + 1 - first);
        if (n <= 0 || (call.window > 0 && first + n <= lowest + 1 - call.window)) return;
        const bool masks = first + n - 1 > lowest ||
                           (call.window > 0 && first < highest + 1 - call.window);
        alignas(64) float factors[kPanel];
        Lanes largest[B];
        panel_logits(call, panel, first, n, masks, largest);
        panel_weights(panel, n, largest, factors);
        panel_sums(rows, n, factors, states);
    }

    // All rows of a task for one kv head; states [rows up to a whole panel, state_size].
    void attend(const Call<T>& call, const Task& task, int64_t head, float* states) {
        int64_t rows_of_block[kKeys];
        take_queries(call, task, head);
        std::fill(states, states + round_up(task.rows, kPanel) * state_size, 0.0f);
        for (int64_t first = task.first; first < task.end; first += kKeys) {
            const int64_t n = std::min<int64_t>(kKeys, task.end - first);
            find_rows(call, task, first, n, rows_of_block);
            take_block(call, rows_of_block, n, head);
            for (int64_t panel = 0; panel * kPanel < task.rows; ++panel) {
                const int64_t rows = std::min(kPanel, task.rows - panel * kPanel);
                float* of_panel = states + panel * kPanel * state_size;
                if (rows > kLanes) attend_panel<2>(call, panel, rows, first, n, of_panel);
                else attend_panel<1>(call, panel, rows, first, n, of_panel);
            }
        }
        for (int64_t r = 0; r < task.rows; ++r) {
            float* at = states + (r + 1) * state_size - kLanes;
            at[0] = most[r], at[1] = sum[r];
        }
    }
};
