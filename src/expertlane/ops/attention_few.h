// Attention of few rows a kv head: keys and values are multiplied where they lie, so that memory
// is read once, in order, and nothing else is written.

#pragma once

#include "attention_rows.h"

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kSums = 16;  // accumulators that registers have room for
#else
constexpr int kSums = 8;
#endif

// The sum of each of kLanes vectors.
inline Lanes sums_of(const Lanes* x) {
#if defined(__AVX512F__)
    Lanes y[8], z[4];
    for (int i = 0; i < 8; ++i) {
        y[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) +
               _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d a = (__m512d)y[2 * i], b = (__m512d)y[2 * i + 1];
        z[i] = (Lanes)_mm512_unpacklo_pd(a, b) + (Lanes)_mm512_unpackhi_pd(a, b);
    }
    for (int i = 0; i < 2; ++i) {
        y[i] = _mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0x88) +
               _mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0xdd);
    }
    return _mm512_shuffle_f32x4(y[0], y[1], 0x88) + _mm512_shuffle_f32x4(y[0], y[1], 0xdd);
#elif defined(__AVX2__)
    Lanes y[2];
    for (int i = 0; i < 2; ++i) {
        y[i] = _mm256_hadd_ps(_mm256_hadd_ps(x[4 * i], x[4 * i + 1]),
                              _mm256_hadd_ps(x[4 * i + 2], x[4 * i + 3]));
    }
    return _mm256_permute2f128_ps(y[0], y[1], 0x20) + _mm256_permute2f128_ps(y[0], y[1], 0x31);
#elif defined(__aarch64__)
    return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
#else
    Lanes sums;
    for (int i = 0; i < kLanes; ++i) sums[i] = sum(x[i]);
    return sums;
#endif
}

template <class X>
inline bool starts_line(int64_t place) { return place * sizeof(X) % 64 == 0; }

// A vector of factors: pairs where both are multiplied so.
template <bool in_pairs, class X>
inline auto factors(const X* p) {
    if constexpr (in_pairs) {
        return load_pairs(p);
    } else {
        return load(p);
    }
}
inline Lanes add_product(Lanes acc, Bits a, Bits b) { return dot_pairs(acc, a, b); }
inline Lanes add_product(Lanes acc, Lanes a, Lanes b) { return fma(a, b, acc); }

// logits[r][t] of R queries and n keys, n a multiple of kSums. Meanwhile the keys `ahead` are
// fetched, if there are any.
template <int R, class Key, class Query>
inline void few_logits(const Key* const* keys, const Key* const* ahead, const Query* queries,
                       int64_t dim, int64_t n, float scale, float* logits) {
    constexpr bool in_pairs = kMultipliesPairs && sizeof(Key) == 2 && sizeof(Query) == 2;
    constexpr int step = in_pairs ? 2 * kLanes : kLanes;
    constexpr int K = kSums / (R == 3 ? 4 : R);
    for (int64_t t = 0; t < n; t += K) {
        Lanes acc[kSums] = {};
        for (int64_t d = 0; d < dim; d += step) {
            for (int k = 0; k < K; ++k) {
                const auto key = factors<in_pairs>(keys[t + k] + d);
                if (ahead && starts_line<Key>(d)) __builtin_prefetch(ahead[t + k] + d);
                for (int r = 0; r < R; ++r) {
                    const auto query = factors<in_pairs>(queries + r * dim + d);
                    acc[r * K + k] = add_product(acc[r * K + k], key, query);
                }
            }
        }
        alignas(64) float sums[kSums];
        for (int i = 0; i < kSums; i += kLanes) store(sums + i, sums_of(acc + i) * scale);
        for (int r = 0; r < R; ++r) {
            std::memcpy(logits + r * kKeys + t, sums + r * K, K * sizeof(float));
        }
    }
}

// Adds weights times values to the sums of R rows, `vectors` from place d on.
template <int R, int V, class Value, class Weight>
inline void few_sums(const Value* const* values, const Value* const* ahead, const Weight* weights,
                     int64_t n, int64_t d, float* sums, int64_t stride) {
    Lanes acc[R][V];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) acc[r][v] = load(sums + r * stride + d + v * kLanes);
    }
    if constexpr (kMultipliesPairs && sizeof(Value) == 2) {
        for (int64_t t = 0; t < n; t += 2) {
            for (int v = 0; v < V; v += 2) {
                const Bits a = load_pairs(values[t] + d + v * kLanes);
                const Bits b = load_pairs(values[t + 1] + d + v * kLanes);
                if (ahead) {
                    __builtin_prefetch(ahead[t] + d + v * kLanes);
                    __builtin_prefetch(ahead[t + 1] + d + v * kLanes);
                }
                const Bits even = even_pairs(a, b), odd = odd_pairs(a, b);
                for (int r = 0; r < R; ++r) {
                    const Weight* two = weights + r * kKeys + t;
                    acc[r][v] = add_products(acc[r][v], even, two);
                    acc[r][v + 1] = add_products(acc[r][v + 1], odd, two);
                }
            }
        }
    } else {
        for (int64_t t = 0; t < n; ++t) {
            for (int v = 0; v < V; ++v) {
                const Lanes value = load(values[t] + d + v * kLanes);
                if (ahead && starts_line<Value>(d + v * kLanes)) {
                    __builtin_prefetch(ahead[t] + d + v * kLanes);
                }
                for (int r = 0; r < R; ++r) {
                    acc[r][v] = fma(value, all(weights[r * kKeys + t]), acc[r][v]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) store(sums + r * stride + d + v * kLanes, acc[r][v]);
    }
}

// Logits of a row to weights; its state with those of the positions before.
template <class Weight>
inline void weigh(float* logits, int64_t n, float* sums, int64_t dim, float* most_and_sum,
                  Weight* weights) {
    Lanes most = load(logits);
    for (int64_t t = kLanes; t < n; t += kLanes) most = larger(most, load(logits + t));
    const float before = most_and_sum[0], now = std::max(before, largest(most));
    if (now != before) {
        const float factor = power_of_2(before - now);
        for (int64_t d = 0; d < dim; d += kLanes) store(sums + d, load(sums + d) * factor);
        most_and_sum[0] = now, most_and_sum[1] *= factor;
    }
    Lanes total = {};
    for (int64_t t = 0; t < n; t += kLanes) {
        const Lanes weight = power_of_2(load(logits + t) - now);
        total += weight;
        store(weights + t, weight);
    }
    most_and_sum[1] += sum(total);
}

// What a thread needs for few rows of some kv heads; sizes in values.
template <class T>
struct FewRoom {
    using X = Operand<T>;

    int64_t key_dim, value_dim, state_size;
    bool is_whole;  // vectors fit heads: keys and values need no copies with zeros after them
    std::vector<X> queries, keys, values;
    std::vector<float> logits;
    std::vector<X> weights;

    FewRoom(const Call<T>& call, int64_t most_rows)
        : key_dim(round_up(call.key_dim, kPanel)), value_dim(round_up(call.value_dim, kPanel)),
          state_size(call.state_size()),
          is_whole(key_dim == call.key_dim && value_dim == call.value_dim),
          queries(call.kv_heads * most_rows * key_dim), keys(is_whole ? 0 : kKeys * key_dim),
          values(is_whole ? 0 : kKeys * value_dim), logits(4 * kKeys), weights(4 * kKeys) {}

    // Rows of keys and values of a block, and of the next.
    template <class Row>
    struct Rows {
        const Row *keys[kKeys], *values[kKeys], *next_keys[kKeys], *next_values[kKeys];
    };

    // R rows from `row` on, over the n positions from `first` on.
    template <int R, class Row>
    void attend_rows(const Call<T>& call, const Task& task, const Rows<Row>& rows, int64_t first,
                     int64_t n, int64_t row, const X* query, float* states, bool fetches) {
        const int64_t padded = round_up(n, kSums);
        few_logits<R>(rows.keys, fetches ? rows.next_keys : nullptr, query, key_dim, padded,
                      call.scale, logits.data());
        for (int r = 0; r < R; ++r) {
            float *logit = logits.data() + r * kKeys, *state = states + r * state_size;
            const int64_t to = own_position(call, task, row + r) + 1 - first;
            const int64_t from = call.window > 0 ? to - call.window : 0;
            std::fill(logit, logit + std::clamp<int64_t>(from, 0, padded), kMasked);
            std::fill(logit + std::clamp<int64_t>(to, 0, n), logit + padded, kMasked);
            weigh(logit, padded, state, value_dim, state + state_size - kLanes,
                  weights.data() + r * kKeys);
        }
        constexpr int V = std::max(2, kSums / (R == 3 ? 4 : R));
        const Row* const* ahead = fetches ? rows.next_values : nullptr;
        int64_t d = 0;
        for (; d + V * kLanes <= value_dim; d += V * kLanes) {
            few_sums<R, V>(rows.values, ahead, weights.data(), n, d, states, state_size);
        }
        for (; d < value_dim; d += kPanel) {
            few_sums<R, 2>(rows.values, ahead, weights.data(), n, d, states, state_size);
        }
    }

    template <class Row>
    void attend_block(const Call<T>& call, const Task& task, const Rows<Row>& rows, int64_t first,
                      int64_t n, const X* query, float* states, bool has_next) {
        for (int64_t row = 0; row < task.rows; row += 4) {
            const bool fetches = has_next && row == 0;
            const X* of_row = query + row * key_dim;
            float* state = states + row * state_size;
            switch (std::min<int64_t>(4, task.rows - row)) {
                case 1: attend_rows<1>(call, task, rows, first, n, row, of_row, state, fetches);
                    break;
                case 2: attend_rows<2>(call, task, rows, first, n, row, of_row, state, fetches);
                    break;
                case 3: attend_rows<3>(call, task, rows, first, n, row, of_row, state, fetches);
                    break;
                default: attend_rows<4>(call, task, rows, first, n, row, of_row, state, fetches);
            }
        }
    }

    // States [heads of the task, rows, state_size].
    void attend(const Call<T>& call, const Task& task, float* states) {
        const int64_t heads = task.end_head - task.head;
        for (int64_t i = 0; i < heads * task.rows; ++i) {
            const T* query = query_of(call, task, task.head + i / task.rows, i % task.rows);
            copy_row(query, call.key_dim, key_dim, queries.data() + i * key_dim);
            float* state = states + i * state_size;
            std::fill(state, state + state_size, 0.0f);
            state[state_size - kLanes] = kMasked;
        }
        int64_t slots[2][kKeys];
        int64_t n = std::min<int64_t>(kKeys, task.end - task.first), side = 0;
        find_slots(call, task, task.first, n, slots[0]);
        for (int64_t first = task.first; first < task.end; first += kKeys, side ^= 1) {
            const int64_t left = task.end - first - n;
            const int64_t next = std::min<int64_t>(kKeys, left);
            if (left > 0) find_slots(call, task, first + n, next, slots[side ^ 1]);
            for (int64_t h = 0; h < heads; ++h) {
                const X* query = queries.data() + h * task.rows * key_dim;
                float* state = states + h * task.rows * state_size;
                if (is_whole) {
                    Rows<T> rows;
                    find_rows(call, slots[side], task.head + h, rows.keys, rows.values);
                    if (left > 0) {
                        find_rows(call, slots[side ^ 1], task.head + h, rows.next_keys,
                                  rows.next_values);
                    }
                    attend_block(call, task, rows, first, n, query, state, left > 0);
                } else {
                    Rows<X> rows;
                    copy_rows(call, slots[side], task.head + h, rows);
                    attend_block(call, task, rows, first, n, query, state, false);
                }
            }
            n = next;
        }
    }

    void find_rows(const Call<T>& call, const int64_t* slots, int64_t head, const T** of_keys,
                   const T** of_values) const {
        const T* key = call.keys + head * call.key_dim;
        const T* value = call.values + head * call.value_stride;
        for (int t = 0; t < kKeys; ++t) {
            of_keys[t] = key + slots[t] * call.key_row;
            of_values[t] = value + slots[t] * call.value_row;
        }
    }

    void copy_rows(const Call<T>& call, const int64_t* slots, int64_t head, Rows<X>& rows) {
        Rows<T> from;
        find_rows(call, slots, head, from.keys, from.values);
        for (int t = 0; t < kKeys; ++t) {
            X* key = keys.data() + t * key_dim;
            X* value = values.data() + t * value_dim;
            copy_row(from.keys[t], call.key_dim, key_dim, key);
            copy_row(from.values[t], call.value_dim, value_dim, value);
            rows.keys[t] = key, rows.values[t] = value;
        }
    }
};
