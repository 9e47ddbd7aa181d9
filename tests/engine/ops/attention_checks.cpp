// Attention over pages against loops in float64.

#include "kernel_checks.h"

extern "C" {
void attention(const bf16*, int64_t, const bf16*, int64_t, const bf16*, int64_t, const int64_t*,
               int64_t, void*, void*, uint8_t*, uint8_t*, const int64_t*, int64_t, const int64_t*,
               const int64_t*, const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
               float, int64_t, const float*, bf16*);
void attention_float(const float*, int64_t, const float*, int64_t, const float*, int64_t,
                     const int64_t*, int64_t, void*, void*, uint8_t*, uint8_t*, const int64_t*,
                     int64_t, const int64_t*, const int64_t*, const int64_t*, int64_t, int64_t,
                     int64_t, int64_t, int64_t, int64_t, float, int64_t, const float*, float*);
}

namespace {

struct Heads {
    int64_t num, kv, key_dim, value_dim;
    bool is_latent;  // values are a part of the keys
};

// Sequences are (positions computed before, new tokens), their blocks in the reverse order.
template <class T, class Function>
void check_heads(const char* what, Function function,
                 std::vector<std::pair<int64_t, int64_t>> sequences, Heads heads,
                 int64_t block_size, int64_t window, bool has_sinks) {
    const auto [num, kv, key_dim, value_dim, is_latent] = heads;
    const int64_t seqs = (int64_t)sequences.size();
    int64_t tokens = 0, width = 1;
    for (auto [computed, added] : sequences) {
        tokens += added, width = std::max(width, (computed + added + block_size - 1) / block_size);
    }
    Guarded<int64_t> tables(seqs * width), first(seqs), added(seqs), lengths(seqs), slots(tokens);
    for (int64_t i = 0; i < seqs * width; ++i) tables.data[i] = seqs * width - 1 - i;
    for (int64_t s = 0, token = 0; s < seqs; ++s) {
        first.data[s] = token, added.data[s] = sequences[s].second;
        lengths.data[s] = sequences[s].first + sequences[s].second;
        for (int64_t p = sequences[s].first; p < lengths.data[s]; ++p) {
            slots.data[token++] =
                tables.data[s * width + p / block_size] * block_size + p % block_size;
        }
    }
    const int64_t stored = is_latent ? 0 : value_dim, rows = seqs * width * kv * block_size;
    const int64_t strides[] = {num * key_dim + 3, kv * key_dim + 1, kv * stored + 1};
    Guarded<T> q(tokens * strides[0] - 3), new_keys(tokens * strides[1] - 1);
    Guarded<T> new_values(tokens * strides[2] - 1), out(tokens * num * value_dim);
    Guarded<T> keys(rows * key_dim), values(rows * stored);
    Guarded<float> sinks(num);
    const float scale = 1 / std::sqrt((float)key_dim);
    function(q.data, strides[0], new_keys.data, strides[1], new_values.data, strides[2], slots.data,
             tokens, keys.data, is_latent ? nullptr : values.data, nullptr, nullptr, tables.data,
             width, first.data, added.data, lengths.data, seqs, num, kv, key_dim, value_dim, block_size, scale, window,
             has_sinks ? sinks.data : nullptr, out.data);
    const auto row_of = [&](int64_t slot, int64_t head) {
        return (slot / block_size * kv + head) * block_size + slot % block_size;
    };
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < kv * key_dim; ++i) {
            const T* key = keys.data + row_of(slots.data[t], i / key_dim) * key_dim;
            check("stored key", to_float(key[i % key_dim]),
                  to_float(new_keys.data[t * strides[1] + i]), 0, 0);
        }
        for (int64_t i = 0; i < kv * stored; ++i) {
            const T* value = values.data + row_of(slots.data[t], i / stored) * stored;
            check("stored value", to_float(value[i % stored]),
                  to_float(new_values.data[t * strides[2] + i]), 0, 0);
        }
    }
    for (int64_t s = 0; s < seqs; ++s) {
        for (int64_t i = 0; i < added.data[s] * num; ++i) {
            const int64_t token = first.data[s] + i / num, head = i % num;
            const int64_t own = sequences[s].first + i / num, of_kv = head / (num / kv);
            double total = has_sinks ? std::exp((double)sinks.data[head]) : 0;
            std::vector<double> sums(value_dim);
            for (int64_t p = window ? std::max<int64_t>(0, own + 1 - window) : 0; p <= own; ++p) {
                const int64_t slot = tables.data[s * width + p / block_size] * block_size +
                                     p % block_size;
                const T* key = keys.data + row_of(slot, of_kv) * key_dim;
                const T* value = is_latent ? key : values.data + row_of(slot, of_kv) * stored;
                const T* query = q.data + token * strides[0] + head * key_dim;
                const double weight = std::exp(dot(query, key, key_dim) * scale);
                total += weight;
                for (int64_t d = 0; d < value_dim; ++d) sums[d] += weight * to_float(value[d]);
            }
            for (int64_t d = 0; d < value_dim; ++d) {
                check(what, to_float(out.data[(token * num + head) * value_dim + d]),
                      sums[d] / total, 3, kTolerance<T>);
            }
        }
    }
}

}  // namespace

void check_attention() {
    for (auto heads : {Heads{4, 2, 32, 32, false}, {6, 1, 64, 48, false}, {9, 3, 5, 7, false},
                       {40, 1, 80, 64, true}, {2, 2, 96, 96, false}}) {
        for (auto sequences : {std::vector<std::pair<int64_t, int64_t>>{{0, 1}, {31, 1}, {600, 1}},
                               {{0, 40}, {95, 1}, {257, 4}}, {{0, 0}, {70, 37}}}) {
            for (int64_t window : {0, 7, 300}) {
                const int64_t block_size = window == 7 ? 3 : 16;
                check_heads<bf16>("attention", attention, sequences, heads, block_size, window,
                                  window > 0);
                check_heads<float>("attention_float", attention_float, sequences, heads,
                                   block_size, window, window > 0);
            }
        }
    }
}
