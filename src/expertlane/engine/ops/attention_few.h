// Attention of few rows a kv head: keys and values are multiplied where they lie, so that memory
// is read once, in order, and nothing else is written.

#pragma once

#include "attention_rows.h"
#include "lookup.h"

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kSums = 16;  // accumulators that registers have room for
#else
constexpr int kSums = 8;
#endif

constexpr int64_t kBlockBytes = 128 << 10;  // of a block: with the next, less than a core's cache

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

// Rows of a kv head that a thread reads next, to be fetched into the cache meanwhile, in the order in
// which they lie in memory; a few lines at a time, which memory answers faster than single ones.
template <class Row>
struct Ahead {
    const Row* const* rows;
    int64_t offset, count, size;  // rows[i] + offset is the head's
    int64_t row = 0, at = 0;

    void fetch(int64_t values) {
        for (int64_t i = 0; i < values && row < count; i += kLineValues) {
            prefetch(rows[row] + offset + at);
            at += kLineValues;
            if (at >= size) at = 0, ++row;
        }
    }
    static constexpr int64_t kLineValues = 64 / sizeof(Row);
};
constexpr int64_t kFetchedValues = 128;  // at a time, of each of some keys
constexpr int64_t kFetchedRows = 16;     // at a time, of values

// A vector of factors: pairs where both are multiplied so.
template <bool in_pairs, class X>
inline auto factors(const X* p) {
    if constexpr (in_pairs) {
        return load_pairs(p);
    } else {
        return load(p);
    }
}

// How rows of the cache become factors, a few vectors at a time.
template <class Row, class Other>
struct Reader {
    static constexpr bool in_pairs = kMultipliesPairs && sizeof(Row) == 2 && sizeof(Other) == 2;
    static constexpr int kVectors = 1;

    template <int N, class Vector>
    void read(const Row* p, Vector* to) const { *to = factors<in_pairs>(p); }
};
#if defined(__AVX512VBMI__)
template <>
struct Reader<E4m3, bf16> {
    static constexpr bool in_pairs = true;
    static constexpr int kVectors = 2;
    Widener<E4m3, RowOrder> widen;

    template <int N>
    void read(const E4m3* p, Bits* to) const {
        if constexpr (N == 2) {
            widen(p, to);
        } else {
            *to = widen.half(p);
        }
    }
};
#endif
inline Lanes add_product(Lanes acc, Bits a, Bits b) { return dot_pairs(acc, a, b); }
inline Lanes add_product(Lanes acc, Lanes a, Lanes b) { return fma(a, b, acc); }

// logits[r][t] of R queries and n keys, n a multiple of kSums; keys[t] + offset is the head's, of
// whole vectors as they are read.
template <int R, class Key, class Query>
inline void few_logits(const Key* const* keys, int64_t offset, Ahead<Key> ahead,
                       const Query* queries, int64_t dim, int64_t n, float scale, float* logits) {
    using Keys = Reader<Key, Query>;
    using Vector = std::conditional_t<Keys::in_pairs, Bits, Lanes>;
    constexpr int width = Keys::in_pairs ? 2 * kLanes : kLanes, step = Keys::kVectors * width;
    constexpr int K = kSums / (R == 3 ? 4 : R);
    const Keys reader;
    for (int64_t t = 0; t < n; t += K) {
        Lanes acc[kSums] = {};
        for (int64_t d = 0; d < dim; d += step) {
            if (d % kFetchedValues == 0) ahead.fetch(K * kFetchedValues);
            for (int k = 0; k < K; ++k) {
                Vector key[Keys::kVectors];
                reader.template read<Keys::kVectors>(keys[t + k] + offset + d, key);
                for (int r = 0; r < R; ++r) {
                    for (int v = 0; v < Keys::kVectors; ++v) {
                        const Vector query =
                            factors<Keys::in_pairs>(queries + r * dim + d + v * width);
                        acc[r * K + k] = add_product(acc[r * K + k], key[v], query);
                    }
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
inline void few_sums(const Value* const* values, int64_t offset, Ahead<Value>& ahead,
                     const Weight* weights, int64_t n, int64_t d, float* sums, int64_t stride) {
    Lanes acc[R][V];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) acc[r][v] = load(sums + r * stride + d + v * kLanes);
    }
    using Values = Reader<Value, Weight>;
    if constexpr (Values::in_pairs) {
        constexpr int N = std::min(Values::kVectors, V / 2);
        const Values reader;
        for (int64_t t = 0; t < n; t += 2) {
            if (t % kFetchedRows == 0) ahead.fetch(kFetchedRows * V * kLanes);
            for (int v = 0; v < V; v += 2 * N) {
                Bits a[N], b[N];
                reader.template read<N>(values[t] + offset + d + v * kLanes, a);
                reader.template read<N>(values[t + 1] + offset + d + v * kLanes, b);
                for (int i = 0; i < N; ++i) {
                    const Bits even = even_pairs(a[i], b[i]), odd = odd_pairs(a[i], b[i]);
                    const int at = v + 2 * i;
                    for (int r = 0; r < R; ++r) {
                        const Weight* two = weights + r * kKeys + t;
                        acc[r][at] = add_products(acc[r][at], even, two);
                        acc[r][at + 1] = add_products(acc[r][at + 1], odd, two);
                    }
                }
            }
        }
    } else {
        for (int64_t t = 0; t < n; ++t) {
            if (t % kFetchedRows == 0) ahead.fetch(kFetchedRows * V * kLanes);
            for (int v = 0; v < V; ++v) {
                const Lanes value = load(values[t] + offset + d + v * kLanes);
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

// What a thread needs for few rows of some kv heads; sizes in values. Rows of the cache are float8
// or of type T; float8 is widened in registers, once for all queries, to pairs where these can be
// looked up, and its scales go to logits and weights.
template <class T, class Page>
struct FewRoom {
    static constexpr bool kIsFloat8 = std::is_same_v<Page, E4m3>;
    static constexpr bool kIsWide = kIsFloat8 && !(kLooksUp && kInPairs<T>);  // to float32
    using X = std::conditional_t<kIsWide, float, Operand<T>>;
    using Copy = std::conditional_t<kIsFloat8, E4m3, X>;

    int64_t key_dim, value_dim, state_size, block;  // positions of a block
    bool is_whole;  // vectors fit heads: keys and values need no copies with zeros after them
    std::vector<X> queries;
    std::vector<Copy> keys, values;
    std::vector<float> logits;
    std::vector<X> weights;
    float key_factors[kKeys], value_factors[kKeys];  // of a block of a head, of float8
    float* states_of_task = nullptr;

    FewRoom(const Call<T>& call, int64_t most_rows)
        : key_dim(round_up(call.key_dim, kPanel * Reader<Page, X>::kVectors)), value_dim(round_up(call.value_dim, kPanel)),
          state_size(call.state_size()),
          block(std::clamp<int64_t>(kBlockBytes / call.position_bytes() / kSums * kSums, kSums,
                                    kKeys)),
          is_whole(key_dim == call.key_dim && value_dim == call.value_dim),
          queries(call.kv_heads * most_rows * key_dim), keys(is_whole ? 0 : kKeys * key_dim),
          values(is_whole ? 0 : kKeys * value_dim), logits(4 * kKeys), weights(4 * kKeys) {}

    // Of a block's positions: keys and values of the task's first head, and the next block's. Those
    // that are copies are in the cache already.
    template <class Row>
    struct Rows {
        const Row *keys[kKeys], *values[kKeys], *next_keys[kKeys], *next_values[kKeys];
        int64_t key_offset, value_offset;  // from head to head
        int64_t num, num_next;             // positions; 0: there is nothing to fetch
    };

    // R rows from `row` on of a head, over the n positions from `first` on.
    template <int R, class Row>
    void attend_rows(const Call<T>& call, const Task& task, const Rows<Row>& rows, int64_t head,
                     int64_t first, int64_t n, int64_t row) {
        const int64_t padded = round_up(n, kSums), heads = task.end_head - task.head;
        const X* query = queries.data() + (head * task.rows + row) * key_dim;
        float* states = states_of_task + (head * task.rows + row) * state_size;
        // What comes next: the next head of this block, or the first one of the next block.
        const bool is_here = head + 1 < heads;
        const int64_t next = is_here ? head + 1 : 0;
        const int64_t num = row ? 0 : is_here ? rows.num : rows.num_next;
        const Ahead<Row> keys_ahead{is_here ? rows.keys : rows.next_keys, next * rows.key_offset,
                                    num, key_dim};
        few_logits<R>(rows.keys, head * rows.key_offset, keys_ahead, query, key_dim, padded,
                      call.scale, logits.data());
        if constexpr (kIsFloat8) multiply<R>(key_factors, padded, logits.data());
        for (int r = 0; r < R; ++r) {
            float *logit = logits.data() + r * kKeys, *state = states + r * state_size;
            const int64_t to = own_position(call, task, row + r) + 1 - first;
            const int64_t from = call.window > 0 ? to - call.window : 0;
            std::fill(logit, logit + std::clamp<int64_t>(from, 0, padded), kMasked);
            std::fill(logit + std::clamp<int64_t>(to, 0, n), logit + padded, kMasked);
            weigh(logit, padded, state, value_dim, state + state_size - kLanes,
                  weights.data() + r * kKeys);
        }
        if constexpr (kIsFloat8) multiply<R>(value_factors, padded, weights.data());
        constexpr int V = std::min(8, kSums / (R == 3 ? 4 : R));
        Ahead<Row> ahead{is_here ? rows.values : rows.next_values, next * rows.value_offset,
                         call.has_values ? num : 0, value_dim};
        const int64_t offset = head * rows.value_offset;
        int64_t d = 0;
        for (; d + V * kLanes <= value_dim; d += V * kLanes) {
            few_sums<R, V>(rows.values, offset, ahead, weights.data(), n, d, states, state_size);
        }
        for (; d < value_dim; d += kPanel) {
            few_sums<R, 2>(rows.values, offset, ahead, weights.data(), n, d, states, state_size);
        }
    }

    // Each of R rows.
    template <int R, class Row>
    static void multiply(const float* factors, int64_t n, Row* rows) {
        for (int64_t t = 0; t < n; t += kLanes) {
            const Lanes factor = load(factors + t);
            for (int r = 0; r < R; ++r) {
                Row* at = rows + r * kKeys + t;
                store(at, load(at) * factor);
            }
        }
    }

    template <class Row>
    void attend_block(const Call<T>& call, const Task& task, const Rows<Row>& rows, int64_t head,
                      int64_t first, int64_t n) {
        for (int64_t row = 0; row < task.rows; row += 4) {
            switch (std::min<int64_t>(4, task.rows - row)) {
                case 1: attend_rows<1>(call, task, rows, head, first, n, row); break;
                case 2: attend_rows<2>(call, task, rows, head, first, n, row); break;
                case 3: attend_rows<3>(call, task, rows, head, first, n, row); break;
                default: attend_rows<4>(call, task, rows, head, first, n, row);
            }
        }
    }

    // States [heads of the task, rows, state_size].
    void attend(const Call<T>& call, const Task& task, float* states) {
        states_of_task = states;
        const int64_t heads = task.end_head - task.head;
        for (int64_t i = 0; i < heads * task.rows; ++i) {
            const T* query = query_of(call, task, task.head + i / task.rows, i % task.rows);
            copy_row(query, call.key_dim, key_dim, queries.data() + i * key_dim);
            float* state = states + i * state_size;
            std::fill(state, state + state_size, 0.0f);
            state[state_size - kLanes] = kMasked;
        }
        Rows<Page> rows;
        int64_t n = std::min<int64_t>(block, task.end - task.first);
        point_at(call, task, task.first, n, rows.next_keys, rows.next_values);
        rows.key_offset = call.block_size * call.key_dim;
        rows.value_offset = call.block_size * call.value_stride;
        for (int64_t first = task.first; first < task.end; first += block) {
            const int64_t next = std::min<int64_t>(block, task.end - first - n);
            std::memcpy(rows.keys, rows.next_keys, sizeof(rows.keys));
            std::memcpy(rows.values, rows.next_values, sizeof(rows.values));
            rows.num = n, rows.num_next = next;
            if (next) point_at(call, task, first + n, next, rows.next_keys, rows.next_values);
            for (int64_t h = 0; h < heads; ++h) {
                if constexpr (kIsFloat8) take_factors(call, task, first, n, h);
                if (is_whole) {
                    attend_block(call, task, rows, h, first, n);
                } else {
                    attend_block(call, task, copied(call, rows, h), h, first, n);
                }
            }
            n = next;
        }
        if constexpr (kIsWide && kInPairs<T>) {
            for (int64_t i = 0; i < heads * task.rows; ++i) order_as_pairs(states + i * state_size);
        }
    }

    // Sums of values in the order that those of pairs have.
    void order_as_pairs(float* sums) const {
        for (int64_t d = 0; d < value_dim; d += kPanel) {
            float panel[kPanel];
            std::memcpy(panel, sums + d, sizeof(panel));
            for (int64_t i = 0; i < kLanes; ++i) {
                sums[d + i] = panel[2 * i];
                sums[d + kLanes + i] = panel[2 * i + 1];
            }
        }
    }

    void point_at(const Call<T>& call, const Task& task, int64_t first, int64_t n,
                  const Page** of_keys, const Page** of_values) const {
        int64_t rows[kKeys];
        find_rows(call, task, first, n, rows);
        for (int t = 0; t < kKeys; ++t) {
            const int64_t row = rows[t] + task.head * call.block_size;
            of_keys[t] = (const Page*)call.keys + row * call.key_dim;
            of_values[t] = (const Page*)call.values + row * call.value_stride;
        }
    }

    // Copies with zeros up to whole vectors.
    Rows<Copy> copied(const Call<T>& call, const Rows<Page>& from, int64_t head) {
        Rows<Copy> rows{};
        for (int t = 0; t < kKeys; ++t) {
            Copy* key = keys.data() + t * key_dim;
            Copy* value = values.data() + t * value_dim;
            copy_row(from.keys[t] + head * from.key_offset, call.key_dim, key_dim, key);
            copy_row(from.values[t] + head * from.value_offset, call.value_dim, value_dim, value);
            rows.keys[t] = key, rows.values[t] = value;
        }
        return rows;
    }

    void take_factors(const Call<T>& call, const Task& task, int64_t first, int64_t n,
                      int64_t head) {
        int64_t rows[kKeys];
        find_rows(call, task, first, n, rows);
        for (int64_t t = 0; t < round_up(n, kSums); ++t) {
            const int64_t row = rows[t] + (task.head + head) * call.block_size;
            key_factors[t] = factor_of(call.key_scales[row]);
            value_factors[t] = factor_of(call.value_scales[row]);
        }
    }
};
