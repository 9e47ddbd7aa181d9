// Causal attention over a paged cache.

#include <omp.h>

#include <array>
#include <vector>

#include "tiles.h"

namespace {

template <class T>
struct Cache {
    const T *keys, *values;
    int64_t key_row, value_row, key_dim, value_stride, block_size;
};

// Calls with (position, place in the cache) for each position from first to end.
template <class Visit>
inline void visit(const int64_t* table, int64_t first, int64_t end, int64_t size, Visit visit) {
    for (int64_t p = first; p < end;) {
        const int64_t block = p / size, stop = std::min(end, (block + 1) * size);
        for (int64_t slot = table[block] * size + p - block * size; p < stop;) visit(p++, slot++);
    }
}

struct Shape {
    int64_t heads, group, value_dim, q_stride;
    float scale;
    int64_t window;
    const float* sinks;
};

// Logits to weights, in place, with room for a sink's share; gives what is to be divided by.
float exponentials(float* row, int64_t count, const float* sink) {
    float most = sink ? *sink : row[0];
    for (int64_t t = 0; t < count; ++t) most = std::max(most, row[t]);
    float sum = sink ? std::exp(*sink - most) : 0.0f;
    Lanes sums = {};
    for (int64_t t = 0; t < count; t += kLanes) {
        const int64_t left = count - t;
        const Lanes value = exp(load_part(row + t, left) - most);
        store_part(row + t, value, left);
        sums += load_part(row + t, left);
    }
    return sum + ::sum(sums);
}

float dot(const float* a, const float* b, int64_t size) {
    Lanes acc = {};
    for (int64_t d = 0; d < size; d += kLanes) acc = fma(load(a + d), load(b + d), acc);
    return sum(acc);
}

float dot(const bf16* a, const bf16* b, int64_t size) {
    Lanes acc = {};
    for (int64_t d = 0; d < size; d += 2 * kLanes) {
        acc = dot_pairs(acc, load_pairs(a + d), load_pairs(b + d));
    }
    return sum(acc);
}

// A sequence's only new token, for some kv heads and the query heads of each.
template <class T>
void attend_one(const Cache<T>& cache, const Shape& shape, const int64_t* table, int64_t end,
                const T* q, int64_t begin_head, int64_t end_head, std::vector<float>& room,
                T* out) {
    const int64_t group = shape.group, value_dim = shape.value_dim;
    const int64_t first = shape.window > 0 ? std::max<int64_t>(0, end - shape.window) : 0;
    const int64_t count = end - first, begin = begin_head * group, num = end_head * group - begin;
    room.assign(num * (count + value_dim), 0.0f);
    float* scores = room.data();
    float* sums = scores + num * count;
    visit(table, first, end, cache.block_size, [&](int64_t p, int64_t slot) {
        for (int64_t h = begin; h < begin + num; ++h) {
            const T* key = cache.keys + slot * cache.key_row + h / group * cache.key_dim;
            scores[(h - begin) * count + p - first] =
                shape.scale * dot(q + h * cache.key_dim, key, cache.key_dim);
        }
    });
    for (int64_t h = 0; h < num; ++h) {
        float* row = scores + h * count;
        const float sum =
            exponentials(row, count, shape.sinks ? shape.sinks + begin + h : nullptr);
        for (int64_t t = 0; t < count; ++t) row[t] /= sum;
    }
    visit(table, first, end, cache.block_size, [&](int64_t p, int64_t slot) {
        for (int64_t h = 0; h < num; ++h) {
            const T* value = cache.values + slot * cache.value_row +
                             (begin + h) / group * cache.value_stride;
            const Lanes weight = all(scores[h * count + p - first]);
            float* sum = sums + h * value_dim;
            for (int64_t d = 0; d < value_dim; d += kLanes) {
                store(sum + d, fma(weight, load(value + d), load(sum + d)));
            }
        }
    });
    for (int64_t i = 0; i < num * value_dim; i += kLanes) {
        store(out + begin * value_dim + i, load(sums + i));
    }
}

// Several new tokens of a sequence, for one kv head and its query heads. Keys and values are
// packed like weights, so that logits and sums are products of tiles; weights round to bfloat16.
void attend_many(const Cache<bf16>& cache, const Shape& shape, const int64_t* table, int64_t end,
                 int64_t num, const bf16* q, int64_t kv_head, std::vector<float>& room, bf16* out) {
    const int64_t key_dim = cache.key_dim, value_dim = shape.value_dim;
    const int64_t start = end - num;  // positions computed before
    const int64_t first =
        shape.window > 0 ? std::max<int64_t>(0, start + 1 - shape.window) / 32 * 32 : 0;
    const int64_t padded = (end - first + 31) / 32 * 32;
    const int64_t value_blocks = (value_dim + 31) / 32 * 2;
    room.assign(padded * (key_dim + value_blocks * kBlock) / 2 + 2 * kRows * padded +
                    kRows * key_dim, 0.0f);
    float* scores = room.data();
    Factor* weights = (Factor*)(scores + kRows * padded);
    Factor* widened = (Factor*)(scores + 2 * kRows * padded);
    bf16* packed_keys = (bf16*)(scores + 2 * kRows * padded + kRows * key_dim);
    bf16* packed_values = packed_keys + padded * key_dim;
    visit(table, first, end, cache.block_size, [&](int64_t p, int64_t slot) {
        const int64_t t = p - first;
        const bf16* key = cache.keys + slot * cache.key_row + kv_head * key_dim;
        bf16* to = packed_keys + t / kBlock * key_dim * kBlock + t % kBlock * 2;
        for (int64_t d = 0; d < key_dim; d += 2) std::memcpy(to + d * kBlock, key + d, 4);
        const bf16* value =
            cache.values + slot * cache.value_row + kv_head * cache.value_stride;
        bf16* pair = packed_values + t / 2 * 2 * kBlock + t % 2;
        for (int64_t d = 0; d < value_dim; ++d) {
            pair[d / kBlock * padded * kBlock + d % kBlock * 2] = value[d];
        }
    });
    Lanes acc[kRows][2 * kVectors];
    for (int64_t h = kv_head * shape.group; h < (kv_head + 1) * shape.group; ++h) {
        for (int64_t row = 0; row < num; row += kRows) {
            const int rows = (int)std::min<int64_t>(kRows, num - row);
            const int64_t seen = (start + row + rows - first + 31) / 32 * 32;
            for (int r = 0; r < rows; ++r) {
                const bf16* query = q + (row + r) * shape.q_stride + h * key_dim;
                for (int64_t d = 0; d < key_dim; d += kLanes) {
                    store(widened + r * key_dim + d, load(query + d));
                }
            }
            for (int64_t t = 0; t < seen; t += 32) {
                const bf16* block = packed_keys + t * key_dim;
                tiles(rows, widened, key_dim, block, block + key_dim * kBlock, key_dim, acc);
                for (int r = 0; r < rows; ++r) {
                    float* to = scores + r * padded + t;
                    for (int v = 0; v < 2 * kVectors; ++v) {
                        store(to + v * kLanes, acc[r][v] * shape.scale);
                    }
                }
            }
            float sums[kRows];
            for (int r = 0; r < rows; ++r) {
                const int64_t own = start + row + r - first;  // its own place among the keys
                const int64_t from =
                    shape.window > 0 ? std::max<int64_t>(0, own + 1 - shape.window) : 0;
                float* line = scores + r * padded;
                sums[r] = exponentials(line + from, own + 1 - from,
                                       shape.sinks ? shape.sinks + h : nullptr);
                std::fill(line, line + from, 0.0f);
                std::fill(line + own + 1, line + seen, 0.0f);
                for (int64_t t = 0; t < seen; t += kLanes) {
                    store(weights + r * padded + t, load(line + t));
                }
            }
            for (int64_t block = 0; block < value_blocks; block += 2) {
                const bf16* w = packed_values + block * padded * kBlock;
                tiles(rows, weights, padded, w, w + padded * kBlock, seen, acc);
                for (int r = 0; r < rows; ++r) {
                    bf16* to = out + ((row + r) * shape.heads + h) * value_dim + block * kBlock;
                    const int v_end = value_dim > (block + 1) * kBlock ? 2 * kVectors : kVectors;
                    for (int v = 0; v < v_end; ++v) {
                        store(to + v * kLanes, acc[r][v] * (1.0f / sums[r]));
                    }
                }
            }
        }
    }
}

// A sequence, and some of its kv heads.
using Task = std::array<int64_t, 3>;

// All heads of a position lie side by side: a decode takes as many as leave work for others.
std::vector<Task> share_out(const int64_t* scheduled, int64_t seqs, int64_t kv_heads) {
    const int64_t threads = omp_get_max_threads();
    const int64_t parts = std::min<int64_t>(kv_heads, seqs >= 4 * threads ? 1 : 2 * threads);
    std::vector<Task> tasks;
    for (int64_t s = 0; s < seqs; ++s) {
        const int64_t num = scheduled[s] > 1 ? kv_heads : parts;
        for (int64_t i = 0; i < num; ++i) {
            tasks.push_back({s, kv_heads * i / num, kv_heads * (i + 1) / num});
        }
    }
    return tasks;
}

template <class T>
Cache<T> cache_of(const T* keys, const T* values, int64_t kv_heads, int64_t key_dim,
                  int64_t value_dim, int64_t block_size) {
    const int64_t stride = values ? value_dim : key_dim;
    return {keys, values ? values : keys, kv_heads * key_dim, kv_heads * stride, key_dim, stride,
            block_size};
}

}  // namespace

extern "C" {

// Causal attention of each sequence's new tokens. q [tokens, heads, key_dim], the new tokens of
// sequence s from first_token[s] on, scheduled[s] of them, the last at position lengths[s] - 1;
// keys and values [blocks, block_size, kv_heads, dim], values null where they are the first
// value_dim of the keys; tables [seqs, width]; sinks [heads] or null; out [tokens, heads,
// value_dim]. key_dim is a multiple of 32, value_dim of 16.
void attention(const bf16* q, int64_t q_stride, const bf16* keys, const bf16* values,
               const int64_t* tables, int64_t width, const int64_t* first_token,
               const int64_t* scheduled, const int64_t* lengths, int64_t seqs, int64_t heads,
               int64_t kv_heads, int64_t key_dim, int64_t value_dim, int64_t block_size,
               float scale, int64_t window, const float* sinks, bf16* out) {
    const auto cache = cache_of(keys, values, kv_heads, key_dim, value_dim, block_size);
    const Shape shape{heads, heads / kv_heads, value_dim, q_stride, scale, window, sinks};
    const std::vector<Task> tasks = share_out(scheduled, seqs, kv_heads);
#pragma omp parallel
    {
        std::vector<float> room;
#pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < tasks.size(); ++task) {
            const auto [s, begin, end] = tasks[task];
            const int64_t* table = tables + s * width;
            const bf16* query = q + first_token[s] * q_stride;
            bf16* to = out + first_token[s] * heads * value_dim;
            if (scheduled[s] == 1) {
                attend_one(cache, shape, table, lengths[s], query, begin, end, room, to);
            } else {
                attend_many(cache, shape, table, lengths[s], scheduled[s], query, begin, room, to);
            }
        }
    }
}

// The same in float32 for sequences of one new token each; key_dim is a multiple of 16 too.
void decode_attention_float(const float* q, int64_t q_stride, const float* keys,
                            const float* values, const int64_t* tables, int64_t width,
                            const int64_t* first_token, const int64_t* scheduled,
                            const int64_t* lengths, int64_t seqs, int64_t heads, int64_t kv_heads,
                            int64_t key_dim, int64_t value_dim, int64_t block_size, float scale,
                            int64_t window, const float* sinks, float* out) {
    const auto cache = cache_of(keys, values, kv_heads, key_dim, value_dim, block_size);
    const Shape shape{heads, heads / kv_heads, value_dim, q_stride, scale, window, sinks};
    const std::vector<Task> tasks = share_out(scheduled, seqs, kv_heads);
#pragma omp parallel
    {
        std::vector<float> room;
#pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < tasks.size(); ++task) {
            const auto [s, begin, end] = tasks[task];
            const int64_t token = first_token[s];
            attend_one(cache, shape, tables + s * width, lengths[s], q + token * q_stride, begin,
                       end, room, out + token * heads * value_dim);
        }
    }
}
}
