// What the kernels share: bfloat16 vectors of AVX512_BF16, and tiles of a matrix product. Each
// weight, key and value is read from memory once, in order, by one thread; sums are float32.
//
// A packed matrix [n, k] is [n / 16][k / 2][16][2]: 64 bytes hold two neighbouring inputs of 16
// outputs, as vdpbf16ps takes them. k is even; n is padded to a multiple of 16 with zeros.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

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

inline void store(float* out, __m512 values, int64_t count) {
    _mm512_mask_storeu_ps(out, count >= kLanes ? 0xffff : (__mmask16)((1u << count) - 1), values);
}

inline __m512 widen(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 widen(const bf16* p) {
    __m256i raw = _mm256_loadu_si256((const __m256i*)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline float to_float(float x) { return x; }
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

inline void put(float x, float* to) { *to = x; }
inline void put(float x, bf16* to) { *to = to_bf16(x); }

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }
inline float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); }

// acc[r][b] = row x[r] times block b of the weights.
template <int R>
inline void tile(const bf16* const x[kRows], const bf16* w0, const bf16* w1, int64_t k,
                 __m512 acc[kRows][2]) {
    __m512 a[R][2];
    const bf16* at_row[R];
    for (int r = 0; r < R; ++r) a[r][0] = a[r][1] = _mm512_setzero_ps(), at_row[r] = x[r];
    for (int64_t i = 0; i < k; i += 2) {
        const int64_t at = i * kLanes;
        _mm_prefetch((const char*)(w0 + at + kAhead * 32), _MM_HINT_T0);
        _mm_prefetch((const char*)(w1 + at + kAhead * 32), _MM_HINT_T0);
        const __m512bh first = load_pairs(w0 + at), second = load_pairs(w1 + at);
        for (int r = 0; r < R; ++r) {
            const __m512bh pair = broadcast_pair(at_row[r] + i);
            a[r][0] = _mm512_dpbf16_ps(a[r][0], first, pair);
            a[r][1] = _mm512_dpbf16_ps(a[r][1], second, pair);
        }
    }
    for (int r = 0; r < R; ++r) acc[r][0] = a[r][0], acc[r][1] = a[r][1];
}

inline void tiles(int rows, const bf16* const x[kRows], const bf16* w0, const bf16* w1, int64_t k,
                  __m512 acc[kRows][2]) {
    switch (rows) {
        case 1: return tile<1>(x, w0, w1, k, acc);
        case 2: return tile<2>(x, w0, w1, k, acc);
        case 3: return tile<3>(x, w0, w1, k, acc);
        case 4: return tile<4>(x, w0, w1, k, acc);
        case 5: return tile<5>(x, w0, w1, k, acc);
        case 6: return tile<6>(x, w0, w1, k, acc);
        case 7: return tile<7>(x, w0, w1, k, acc);
        case 8: return tile<8>(x, w0, w1, k, acc);
        case 9: return tile<9>(x, w0, w1, k, acc);
        case 10: return tile<10>(x, w0, w1, k, acc);
        case 11: return tile<11>(x, w0, w1, k, acc);
        default: return tile<12>(x, w0, w1, k, acc);
    }
}

// Rows a tile so that all tiles of m rows are about equally high.
inline int64_t tile_height(int64_t m) {
    const int64_t count = (m + kRows - 1) / kRows;
    return count ? (m + count - 1) / count : kRows;
}

// The same for rows `stride` apart.
inline void tiles(int rows, const bf16* x, int64_t stride, const bf16* w0, const bf16* w1,
                  int64_t k, __m512 acc[kRows][2]) {
    const bf16* from[kRows];
    for (int r = 0; r < rows; ++r) from[r] = x + r * stride;
    tiles(rows, from, w0, w1, k, acc);
}
