// Products with bfloat16 weights, experts, attention over a paged cache, and what lies between,
// for CPUs with AVX512_BF16. What they have in common: each weight, key and value is read
// from memory once, in order, by one thread; sums are float32.
//
// A packed matrix [n, k] is [n / 16][k / 2][16][2]: 64 bytes hold two neighbouring inputs of 16
// outputs, as vdpbf16ps takes them. k is even; n is padded to a multiple of 16 with zeros.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using bf16 = uint16_t;

namespace {

constexpr int kLanes = 16;
constexpr int kRows = 12;       // rows a tile: 2 x 12 accumulators leave registers for operands
constexpr int64_t kAhead = 16;  // lines to prefetch; blocks follow one another in memory

inline __m512bh load_pairs(const bf16* p) {
    __m512i raw = _mm512_loadu_si512(p);
    return (__m512bh)raw;
}

inline __m512bh broadcast_pair(const bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
}

inline void store(bf16* out, __m512 values, int64_t count) {
    __mmask16 mask = count >= kLanes ? 0xffff : (__mmask16)((1u << count) - 1);
    _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

inline __m512 widen(const bf16* p) {
    __m256i raw = _mm256_loadu_si256((const __m256i*)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline bf16 to_bf16(float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }
inline float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); }

// acc[r][b] = rows r of x times block b of the weights.
template <int R>
inline void tile(const bf16* x, int64_t stride, const bf16* w0, const bf16* w1, int64_t k,
                 __m512 acc[kRows][2]) {
    __m512 a[R][2];
    for (int r = 0; r < R; ++r) a[r][0] = a[r][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 2) {
        const int64_t at = i * kLanes;
        _mm_prefetch((const char*)(w0 + at + kAhead * 32), _MM_HINT_T0);
        _mm_prefetch((const char*)(w1 + at + kAhead * 32), _MM_HINT_T0);
        const __m512bh first = load_pairs(w0 + at), second = load_pairs(w1 + at);
        for (int r = 0; r < R; ++r) {
            const __m512bh pair = broadcast_pair(x + r * stride + i);
            a[r][0] = _mm512_dpbf16_ps(a[r][0], first, pair);
            a[r][1] = _mm512_dpbf16_ps(a[r][1], second, pair);
        }
    }
    for (int r = 0; r < R; ++r) acc[r][0] = a[r][0], acc[r][1] = a[r][1];
}

inline void tiles(int rows, const bf16* x, int64_t stride, const bf16* w0, const bf16* w1,
                  int64_t k, __m512 acc[kRows][2]) {
    switch (rows) {
        case 1: return tile<1>(x, stride, w0, w1, k, acc);
        case 2: return tile<2>(x, stride, w0, w1, k, acc);
        case 3: return tile<3>(x, stride, w0, w1, k, acc);
        case 4: return tile<4>(x, stride, w0, w1, k, acc);
        case 5: return tile<5>(x, stride, w0, w1, k, acc);
        case 6: return tile<6>(x, stride, w0, w1, k, acc);
        case 7: return tile<7>(x, stride, w0, w1, k, acc);
        case 8: return tile<8>(x, stride, w0, w1, k, acc);
        case 9: return tile<9>(x, stride, w0, w1, k, acc);
        case 10: return tile<10>(x, stride, w0, w1, k, acc);
        case 11: return tile<11>(x, stride, w0, w1, k, acc);
        default: return tile<12>(x, stride, w0, w1, k, acc);
    }
}

// Rows a tile so that all tiles of m rows are about equally high.
inline int64_t tile_height(int64_t m) {
    const int64_t count = (m + kRows - 1) / kRows;
    return count ? (m + count - 1) / count : kRows;
}

// Two neighbouring blocks of a product; the second may lie beyond the last one.
void two_blocks(const bf16* x, int64_t stride, int64_t m, const bf16* w, int64_t block, int64_t n,
                int64_t k, const float* bias, bf16* out, int64_t out_stride) {
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
            bf16* to = out + (row + r) * out_stride + block * kLanes;
            store(to, _mm512_add_ps(acc[r][0], add[0]), left);
            if (left > kLanes) {
                store(to + kLanes, _mm512_add_ps(acc[r][1], add[1]), left - kLanes);
            }
        }
    }
}

// A block of act(gate) * up, or of act(up) where there is no gate (then two blocks of it).
void inner_block(const bf16* x, int64_t m, const bf16* gate, const bf16* up, int64_t block,
                 int64_t inner, int64_t k, bf16* out) {
    const int64_t size = k * kLanes;
    __m512 acc[kRows][2];
    alignas(64) float g[kLanes], u[kLanes];
    const bf16* w0 = gate ? gate + block * size : up + block * size;
    const bf16* w1 = gate ? up + block * size : w0 + size;
    const int64_t height = tile_height(m);
    for (int64_t row = 0; row < m; row += height) {
        const int rows = (int)std::min<int64_t>(height, m - row);
        tiles(rows, x + row * k, k, w0, w1, k, acc);
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

struct Cache {
    const bf16 *keys, *values;
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
    for (int64_t t = 0; t < count; ++t) row[t] = std::exp(row[t] - most);
    for (int64_t t = 0; t < count; ++t) sum += row[t];
    return sum;
}

// A sequence's only new token, for some kv heads and the query heads of each.
void attend_one(const Cache& cache, const Shape& shape, const int64_t* table, int64_t end,
                const bf16* q, int64_t begin_head, int64_t end_head, std::vector<float>& room,
                bf16* out) {
    const int64_t group = shape.group, value_dim = shape.value_dim;
    const int64_t first = shape.window > 0 ? std::max<int64_t>(0, end - shape.window) : 0;
    const int64_t count = end - first, begin = begin_head * group, num = end_head * group - begin;
    room.assign(num * (count + value_dim), 0.0f);
    float* scores = room.data();
    float* sums = scores + num * count;
    visit(table, first, end, cache.block_size, [&](int64_t p, int64_t slot) {
        for (int64_t h = begin; h < begin + num; ++h) {
            const bf16* key = cache.keys + slot * cache.key_row + h / group * cache.key_dim;
            const bf16* query = q + h * cache.key_dim;
            __m512 acc = _mm512_setzero_ps();
            for (int64_t d = 0; d < cache.key_dim; d += 32) {
                acc = _mm512_dpbf16_ps(acc, load_pairs(query + d), load_pairs(key + d));
            }
            scores[(h - begin) * count + p - first] = shape.scale * _mm512_reduce_add_ps(acc);
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
            const bf16* value = cache.values + slot * cache.value_row +
                                (begin + h) / group * cache.value_stride;
            const __m512 weight = _mm512_set1_ps(scores[h * count + p - first]);
            float* sum = sums + h * value_dim;
            for (int64_t d = 0; d < value_dim; d += kLanes) {
                const __m512 now = _mm512_loadu_ps(sum + d);
                _mm512_storeu_ps(sum + d, _mm512_fmadd_ps(weight, widen(value + d), now));
            }
        }
    });
    for (int64_t i = 0; i < num * value_dim; i += kLanes) {
        store(out + begin * value_dim + i, _mm512_loadu_ps(sums + i), kLanes);
    }
}

// Several new tokens of a sequence, for one kv head and its query heads. Keys and values are
// packed like weights, so that logits and sums are products of tiles; weights round to bfloat16.
void attend_many(const Cache& cache, const Shape& shape, const int64_t* table, int64_t end,
                 int64_t num, const bf16* q, int64_t kv_head, std::vector<float>& room, bf16* out) {
    const int64_t key_dim = cache.key_dim, value_dim = shape.value_dim;
    const int64_t start = end - num;  // positions computed before
    const int64_t first =
        shape.window > 0 ? std::max<int64_t>(0, start + 1 - shape.window) / 32 * 32 : 0;
    const int64_t padded = (end - first + 31) / 32 * 32;
    const int64_t value_blocks = (value_dim + 31) / 32 * 2;
    room.assign((padded * (key_dim + value_blocks * kLanes) + kRows * padded) / 2 +
                    kRows * padded, 0.0f);
    float* scores = room.data();
    bf16* weights = (bf16*)(scores + kRows * padded);
    bf16* packed_keys = weights + kRows * padded;
    bf16* packed_values = packed_keys + padded * key_dim;
    visit(table, first, end, cache.block_size, [&](int64_t p, int64_t slot) {
        const int64_t t = p - first;
        const bf16* key = cache.keys + slot * cache.key_row + kv_head * key_dim;
        bf16* to = packed_keys + t / kLanes * key_dim * kLanes + t % kLanes * 2;
        for (int64_t d = 0; d < key_dim; d += 2) std::memcpy(to + d * kLanes, key + d, 4);
        const bf16* value =
            cache.values + slot * cache.value_row + kv_head * cache.value_stride;
        bf16* pair = packed_values + t / 2 * 2 * kLanes + t % 2;
        for (int64_t d = 0; d < value_dim; ++d) {
            pair[d / kLanes * padded * kLanes + d % kLanes * 2] = value[d];
        }
    });
    __m512 acc[kRows][2];
    for (int64_t h = kv_head * shape.group; h < (kv_head + 1) * shape.group; ++h) {
        for (int64_t row = 0; row < num; row += kRows) {
            const int rows = (int)std::min<int64_t>(kRows, num - row);
            const int64_t seen = (start + row + rows - first + 31) / 32 * 32;
            const bf16* query = q + row * shape.q_stride + h * key_dim;
            for (int64_t t = 0; t < seen; t += 32) {
                const bf16* block = packed_keys + t * key_dim;
                tiles(rows, query, shape.q_stride, block, block + key_dim * kLanes, key_dim, acc);
                for (int r = 0; r < rows; ++r) {
                    float* to = scores + r * padded + t;
                    const __m512 scale = _mm512_set1_ps(shape.scale);
                    _mm512_storeu_ps(to, _mm512_mul_ps(acc[r][0], scale));
                    _mm512_storeu_ps(to + kLanes, _mm512_mul_ps(acc[r][1], scale));
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
                    store(weights + r * padded + t, _mm512_loadu_ps(line + t), kLanes);
                }
            }
            for (int64_t block = 0; block < value_blocks; block += 2) {
                const bf16* w = packed_values + block * padded * kLanes;
                tiles(rows, weights, padded, w, w + padded * kLanes, seen, acc);
                for (int r = 0; r < rows; ++r) {
                    bf16* to = out + ((row + r) * shape.heads + h) * value_dim + block * kLanes;
                    const __m512 norm = _mm512_set1_ps(1.0f / sums[r]);
                    store(to, _mm512_mul_ps(acc[r][0], norm), kLanes);
                    if (value_dim > (block + 1) * kLanes) {
                        store(to + kLanes, _mm512_mul_ps(acc[r][1], norm), kLanes);
                    }
                }
            }
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
        two_blocks(x, stride, m, w, 2 * pair, n, k, bias, out, n);
    }
}

// Experts' MLPs: out [rows, hidden] of x [rows, hidden]; expert e has the rows ends[e-1] to
// ends[e]. gate (or null), up: [experts] pointers to packed [inner, hidden]; down: to packed
// [hidden, inner]. scratch: [rows, inner]. inner is a multiple of 32.
void experts(const bf16* x, const int64_t* ends, int64_t num_experts, const bf16* const* gate,
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
            inner_block(x + begin * hidden, ends[e] - begin, gate ? gate[e] : nullptr, up[e],
                        block, inner, hidden, scratch + begin * inner);
        }
#pragma omp for schedule(dynamic, 8)
        for (int64_t task = 0; task < count * second_blocks; ++task) {
            const int64_t e = used[task / second_blocks], pair = task % second_blocks;
            const int64_t begin = e ? ends[e - 1] : 0;
            two_blocks(scratch + begin * inner, inner, ends[e] - begin, down[e], 2 * pair, hidden,
                       inner, nullptr, out + begin * hidden, hidden);
        }
    }
}

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
    const Cache cache{keys, values ? values : keys, kv_heads * key_dim,
                      kv_heads * (values ? value_dim : key_dim), key_dim,
                      values ? value_dim : key_dim, block_size};
    const Shape shape{heads, heads / kv_heads, value_dim, q_stride, scale, window, sinks};
    // All heads of a position lie side by side: a decode takes as many as leave work for others.
    const int64_t threads = omp_get_max_threads();
    const int64_t parts = std::min<int64_t>(kv_heads, seqs >= 4 * threads ? 1 : 2 * threads);
    std::vector<std::array<int64_t, 3>> tasks;  // a sequence, and some of its kv heads
    for (int64_t s = 0; s < seqs; ++s) {
        const int64_t num = scheduled[s] > 1 ? kv_heads : parts;
        for (int64_t i = 0; i < num; ++i) {
            tasks.push_back({s, kv_heads * i / num, kv_heads * (i + 1) / num});
        }
    }
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

// Turns the first num_heads heads of each row of x [tokens, stride] in place, by cos and sin
// [tokens, dim]: pairs (i, i + dim / 2) of the last dim of a head's values, or (2i, 2i + 1), which
// are left as the former.
void rotate(bf16* x, int64_t stride, int64_t tokens, int64_t num_heads, int64_t head_dim,
            int64_t dim, const float* cos, const float* sin, int64_t interleave) {
    const int64_t half = dim / 2;
#pragma omp parallel if (tokens * num_heads * dim > 65536)
    {
        std::vector<float> first(half), second(half);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) {
            const float *c = cos + t * dim, *n = sin + t * dim;
            for (int64_t h = 0; h < num_heads; ++h) {
                bf16* head = x + t * stride + (h + 1) * head_dim - dim;
                for (int64_t i = 0; i < half; ++i) {
                    first[i] = to_float(head[interleave ? 2 * i : i]);
                    second[i] = to_float(head[interleave ? 2 * i + 1 : i + half]);
                }
                for (int64_t i = 0; i < half; ++i) {
                    head[i] = to_bf16(first[i] * c[i] + second[i] * n[i]);
                }
                for (int64_t i = half; i < dim; ++i) {
                    head[i] = to_bf16(second[i - half] * c[i] + first[i - half] * n[i]);
                }
            }
        }
    }
}

// out = x / sqrt(mean(x^2) + eps) * weight, the mean over each of the first `groups` groups of
// `size` values of each row; x and out are bfloat16 and may be the same, weight [groups, size].
void rms_norm(const bf16* x, int64_t stride, int64_t rows, int64_t groups, int64_t size,
              const float* weight, float eps, bf16* out, int64_t out_stride) {
#pragma omp parallel for schedule(static) if (rows * groups * size > 32768)
    for (int64_t task = 0; task < rows * groups; ++task) {
        const int64_t row = task / groups, group = task % groups;
        const bf16* from = x + row * stride + group * size;
        bf16* to = out + row * out_stride + group * size;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < size; i += kLanes) {
            const __m512 value = widen(from + i);
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / (float)size;
        const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
        for (int64_t i = 0; i < size; i += kLanes) {
            const __m512 scaled = _mm512_mul_ps(widen(from + i), factor);
            const __m512 gain = _mm512_loadu_ps(weight + group * size + i);
            store(to + i, _mm512_mul_ps(scaled, gain), kLanes);
        }
    }
}

// out [tokens, size] = the sum of each token's top_k rows, weighted; pair token * top_k + choice
// has the row place[pair] of x.
void weighted_sum(const bf16* x, const int64_t* place, const float* weights, int64_t tokens,
                  int64_t top_k, int64_t size, bf16* out) {
#pragma omp parallel for schedule(static) if (tokens * size > 32768)
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < size; i += kLanes) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t k = t * top_k; k < (t + 1) * top_k; ++k) {
                if (place[k] < 0) continue;
                const __m512 value = widen(x + place[k] * size + i);
                sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[k]), value, sum);
            }
            store(out + t * size + i, sum, kLanes);
        }
    }
}
}
