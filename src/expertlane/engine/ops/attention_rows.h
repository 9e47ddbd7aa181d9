// What both ways of attention share: a thread's part of the work, and rows of results.
//
// Logits are kept times log2(e), so that weights are powers of two. A *row* is a query: of a new
// token and one of the query heads of a kv head; row r is head r % group of token r / group. A
// row's *state* is [sums of values times weights, largest logit, sum of weights]: those of two
// stretches of positions can be merged.

#pragma once

#include <type_traits>
#include <vector>

#include "e4m3.h"

constexpr float kLog2E = 1.44269504f;
constexpr float kMasked = -1e30f;  // a logit of what is not seen; also the largest of nothing
constexpr int kKeys = 96;          // positions a block: of keys, values and weights in the cache

// Whether keys and values are multiplied as pairs, and what queries, weights and copies of keys
// and values are.
template <class T>
constexpr bool kInPairs = kMultipliesPairs && sizeof(T) == sizeof(bf16);
template <class T>
using Operand = typename FactorOf<kInPairs<T>>::Type;

// Sums of values are in panels of 2 kLanes; of pairs, the values of even places come first.
constexpr int64_t kPanel = 2 * kLanes;

inline int64_t round_up(int64_t size, int64_t multiple) {
    return (size + multiple - 1) / multiple * multiple;
}

// 2^x for x <= 0 to 3 units in the last place; 0 below -126. Coefficients are those of a minimax
// polynomial on [-1/2, 1/2].
inline Lanes power_of_2(Lanes x) {
    const Lanes shifted = x + 12582912.0f;  // rounds to an integer
    const Lanes r = x - (shifted - 12582912.0f);
    Lanes p = all(1.535336188319500e-4f);
    for (float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                    2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f}) {
        p = fma(p, r, all(c));
    }
    const Lanes scaled = lanes_of(bits_of(p) + (bits_of(shifted) << 23));
    return lanes_of(x < -126.0f ? Bits{} : bits_of(scaled));
}

inline float power_of_2(float x) { return power_of_2(all(x))[0]; }

// Rounded to bfloat16, in the lower half of each place.
inline Bits bf16_bits(Lanes x) {
#if defined(__AVX512BF16__)
    return (Bits)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
#else
    alignas(64) bf16 rounded[kLanes];
    store(rounded, x);
    return bits_of(load(rounded)) >> 16;
#endif
}

inline Bits pairs_of(Lanes first, Lanes second) {
    return bf16_bits(first) | bf16_bits(second) << 16;
}

// Of two rows of values, pairs of values of the same place: even places, then odd ones.
inline Bits even_pairs(Bits a, Bits b) { return (a & 0xffff) | b << 16; }
inline Bits odd_pairs(Bits a, Bits b) { return a >> 16 | (b & 0xffff0000); }

// The first `count` of 2 kLanes values, zeros after them; nothing beyond is read.
inline Bits load_pairs_part(const bf16* p, int64_t count) {
    Bits x = {};
    std::memcpy(&x, p, (size_t)std::min<int64_t>(count, kPanel) * sizeof(bf16));
    return x;
}

// A row of `size` values as an operand, with zeros up to `padded`, a multiple of kLanes.
template <class T, class X>
inline void copy_row(const T* from, int64_t size, int64_t padded, X* to) {
    if constexpr (std::is_same_v<T, X>) {
        std::memcpy(to, from, (size_t)size * sizeof(T));
        std::memset(to + size, 0, (size_t)(padded - size) * sizeof(T));
    } else {
        int64_t d = 0;
        for (; d + kLanes <= size; d += kLanes) store(to + d, load(from + d));
        for (; d < padded; d += kLanes) {
            store(to + d, d < size ? load_part(from + d, size - d) : Lanes{});
        }
    }
}

// What is attended to, and how.
template <class T>
struct Call {
    const T* q;
    int64_t q_stride;
    const T *keys, *values;
    const int64_t* tables;
    int64_t width;
    const int64_t *first_token, *scheduled, *lengths;
    int64_t heads, group, kv_heads, key_dim, value_dim, block_size;
    int64_t value_stride;  // from position to position
    float scale;           // times log2(e)
    int64_t window;        // 0 for all
    const float* sinks;
    T* out;
    bool has_values;  // else they are a part of the keys
    const uint8_t *key_scales, *value_scales;  // of each row, then they are float8; else null

    int64_t state_size() const { return round_up(value_dim, kPanel) + kLanes; }
    int64_t position_bytes() const {
        return kv_heads * (key_dim + (has_values ? value_stride : 0)) * (int64_t)sizeof(T);
    }
    // Of a row of the cache, as an operand with zeros up to `padded`.
    void take_key(int64_t row, int64_t padded, Operand<T>* to) const {
        take(keys, key_scales, row, key_dim, key_dim, padded, to);
    }
    void take_value(int64_t row, int64_t padded, Operand<T>* to) const {
        take(values, value_scales, row, value_stride, value_dim, padded, to);
    }

  private:
    static void take(const T* pages, const uint8_t* scales, int64_t row, int64_t stride,
                     int64_t size, int64_t padded, Operand<T>* to) {
        if (!scales) return copy_row(pages + row * stride, size, padded, to);
        widen_row((const E4m3*)pages + row * stride, scales[row], size, padded, to);
    }
};

// Rows of a sequence for some kv heads, over a stretch of positions.
struct Task {
    int64_t seq, row, rows, first, end, head, end_head;
};

template <class T>
inline int64_t own_position(const Call<T>& call, const Task& task, int64_t row) {
    const int64_t start = call.lengths[task.seq] - call.scheduled[task.seq];
    return start + (task.row + row) / call.group;
}

template <class T>
inline const T* query_of(const Call<T>& call, const Task& task, int64_t head, int64_t row) {
    const int64_t token = call.first_token[task.seq] + (task.row + row) / call.group;
    return call.q + token * call.q_stride +
           (head * call.group + (task.row + row) % call.group) * call.key_dim;
}

// Rows of the cache [blocks, kv_heads, block_size] that have the first kv head's keys and values of
// `count` positions from `first` on, the last again up to kKeys; those of the next kv head stand
// block_size rows further.
template <class T>
inline void find_rows(const Call<T>& call, const Task& task, int64_t first, int64_t count,
                      int64_t* rows) {
    const int64_t* table = call.tables + task.seq * call.width;
    const int64_t block_rows = call.kv_heads * call.block_size;
    int64_t block = first / call.block_size, offset = first % call.block_size;
    for (int64_t i = 0; i < count; ++i, ++offset) {
        if (offset == call.block_size) ++block, offset = 0;
        rows[i] = table[block] * block_rows + offset;
    }
    std::fill(rows + count, rows + kKeys, rows[count - 1]);
}

// Merges the state of further positions into one.
inline void merge(float* state, const float* other, int64_t size) {
    const int64_t sums = size - kLanes;
    const float most = std::max(state[sums], other[sums]);
    const float mine = power_of_2(state[sums] - most), its = power_of_2(other[sums] - most);
    for (int64_t d = 0; d < sums; d += kLanes) {
        store(state + d, fma(load(other + d), all(its), load(state + d) * mine));
    }
    state[sums] = most;
    state[sums + 1] = state[sums + 1] * mine + other[sums + 1] * its;
}

template <class T>
inline void finish(const Call<T>& call, const Task& task, int64_t head, int64_t row,
                   const float* state) {
    const int64_t sums = call.state_size() - kLanes, dim = call.value_dim;
    const int64_t query_head = head * call.group + (task.row + row) % call.group;
    const int64_t token = call.first_token[task.seq] + (task.row + row) / call.group;
    float weight = 1.0f, sum = state[sums + 1];
    if (call.sinks) {
        const float sink = call.sinks[query_head] * kLog2E, most = std::max(state[sums], sink);
        weight = power_of_2(state[sums] - most);
        sum = sum * weight + power_of_2(sink - most);
    }
    const float factor = weight / sum;
    T* out = call.out + (token * call.heads + query_head) * dim;
    for (int64_t d = 0; d < dim; d += kPanel) {
        const Lanes a = load(state + d) * factor, b = load(state + d + kLanes) * factor;
        if constexpr (kInPairs<T>) {
            const Bits pairs = pairs_of(a, b);
            std::memcpy(out + d, &pairs, (size_t)std::min(dim - d, kPanel) * sizeof(T));
        } else {
            store_part(out + d, a, dim - d);
            if (dim - d > kLanes) store_part(out + d + kLanes, b, dim - d - kLanes);
        }
    }
}
