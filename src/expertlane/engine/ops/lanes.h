// Vectors of float32 lanes: the one place where instruction sets differ. A kernel written with
// these compiles for AVX2 with FMA, AVX-512 with or without its bfloat16, NEON with or without its
// bfloat16, and, slowly, for anything else.
//
// *Pairs* are a vector of 32-bit places with two neighbouring bfloat16 values each: as packed
// weights, keys and values have them. Sums are float32.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

using bf16 = uint16_t;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
using Lanes = __m512;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
using Lanes = __m256;
#else
constexpr int kLanes = 4;
#if defined(__ARM_NEON)
using Lanes = float32x4_t;
#else
typedef float Lanes __attribute__((vector_size(16)));
#endif
#endif
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));  // of each lane; also pairs

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kMultipliesPairs = true;  // the CPU has products of pairs
#else
constexpr bool kMultipliesPairs = false;
#endif

// How a kernel wants the rows that it multiplies with pairs.
template <bool>
struct FactorOf { using Type = float; };
template <>
struct FactorOf<true> { using Type = bf16; };
using Factor = FactorOf<kMultipliesPairs>::Type;

// Into the second-level cache: where memory is the bound, the first level's few outstanding lines
// are better left to loads.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline void put(float x, float* to) { *to = x; }
inline void put(float x, bf16* to) {  // to the nearest, ties to even; not a number stays so
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *to = (bf16)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : rounded);
}

inline Bits bits_of(Lanes x) { return (Bits)x; }
inline Lanes lanes_of(Bits x) { return (Lanes)x; }
inline Lanes all(float x) { return x - Lanes{}; }
inline Bits all_bits(uint32_t x) { return x - Bits{}; }

inline Lanes fma(Lanes a, Lanes b, Lanes c) {  // a * b + c
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// acc + a * b in the register of acc, as sums of a tile need it: GCC, left to itself with 16
// registers, moves them to the stack and back.
inline Lanes accumulate(Lanes acc, Lanes a, Lanes b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
    return acc;
#else
    return fma(a, b, acc);
#endif
}

inline Lanes larger(Lanes a, Lanes b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline float sum(Lanes x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#elif defined(__AVX2__)
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#elif defined(__aarch64__)
    return vaddvq_f32(x);
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// The sums of four vectors.
inline void four_sums(const Lanes x[4], float to[4]) {
#if defined(__AVX2__)
    __m256 v[4];
    for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
        v[i] = _mm512_castps512_ps256(x[i]) + _mm512_extractf32x8_ps(x[i], 1);
#else
        v[i] = x[i];
#endif
    }
    const __m256 of = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(to, _mm256_castps256_ps128(of) + _mm256_extractf128_ps(of, 1));
#else
    for (int i = 0; i < 4; ++i) to[i] = sum(x[i]);
#endif
}

inline float largest(Lanes x) {
    float most = x[0];
    for (int i = 1; i < kLanes; ++i) most = std::max(most, x[i]);
    return most;
}

inline Lanes load(const float* p) {
    Lanes x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

// The first `count` values, zeros after them; nothing beyond is read.
template <class T>
inline Lanes load_part(const T* p, int64_t count) {
    alignas(64) float values[kLanes] = {};
    for (int64_t i = 0; i < std::min<int64_t>(count, kLanes); ++i) values[i] = to_float(p[i]);
    return load(values);
}

inline Lanes load(const bf16* p) {
#if defined(__AVX512F__)
    const __m256i raw = _mm256_loadu_si256((const __m256i*)p);
    return lanes_of((Bits)_mm512_cvtepu16_epi32(raw) << 16);
#elif defined(__AVX2__)
    const __m128i raw = _mm_loadu_si128((const __m128i*)p);
    return lanes_of((Bits)_mm256_cvtepu16_epi32(raw) << 16);
#elif defined(__ARM_NEON)
    return lanes_of((Bits)vshll_n_u16(vld1_u16(p), 16));
#else
    return load_part(p, kLanes);
#endif
}

inline Lanes load(const int8_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    Lanes x;
    for (int i = 0; i < kLanes; ++i) x[i] = (float)p[i];
    return x;
#endif
}

inline void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof(x)); }

inline void store(bf16* to, Lanes x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x));
#else
    // To the nearest, ties to even; not a number stays so.
    const Bits bits = bits_of(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
    const Bits kept = (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded;
    const Bits high = kept >> 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)high));
#elif defined(__AVX2__)
    const __m256i all = (__m256i)high;
    _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(_mm256_castsi256_si128(all),
                                                    _mm256_extracti128_si256(all, 1)));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = (bf16)high[i];
#endif
#endif
}

// The first `count` lanes; nothing beyond is written.
template <class T>
inline void store_part(T* to, Lanes x, int64_t count) {
    if (count >= kLanes) return store(to, x);
    alignas(64) T values[kLanes];
    store(values, x);
    std::memcpy(to, values, (size_t)count * sizeof(T));
}

// kLanes pairs.
inline Bits load_pairs(const bf16* p) {
    Bits x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

inline Lanes first_of(Bits pairs) { return lanes_of(pairs << 16); }
inline Lanes second_of(Bits pairs) { return lanes_of(pairs & 0xffff0000); }

// acc + first * first + second * second.
inline Lanes dot_pairs(Lanes acc, Bits a, Bits b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return vbfdotq_f32(acc, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
    return fma(second_of(a), second_of(b), fma(first_of(a), first_of(b), acc));
#endif
}

// acc + the pairs times the same two neighbouring values in every lane.
inline Lanes add_products(Lanes acc, Bits pairs, const bf16* two) {
    uint32_t both;
    std::memcpy(&both, two, sizeof(both));
    return dot_pairs(acc, pairs, all_bits(both));
}
inline Lanes add_products(Lanes acc, Bits pairs, const float* two) {
    return fma(second_of(pairs), all(two[1]), fma(first_of(pairs), all(two[0]), acc));
}

// e^x to 2 units in the last place; 0 below -87.3, as large as it gets above 88.3.
// Polynomial of Cephes' expf (Moshier 1989).
inline Lanes exp(Lanes x) {
    x = larger(all(-104.0f), x);
    x = -larger(all(-88.37f), -x);
    const Lanes shifted = fma(x, all(1.44269504f), all(12582912.0f));  // rounds to an integer
    const Lanes n = shifted - 12582912.0f;
    Lanes r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    Lanes p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                    5.0000001201e-1f}) {
        p = fma(p, r, all(c));
    }
    p = fma(p, r * r, r + 1.0f);
    const Lanes scaled = lanes_of(bits_of(p) + (bits_of(shifted) << 23));
    return lanes_of(n < -126.0f ? Bits{} : bits_of(scaled));
}

inline Lanes silu(Lanes x) { return x / (exp(-x) + 1.0f); }

// erf to about one unit in the last place; coefficients of N. Juffa's erff.
inline Lanes erf(Lanes x) {
    const Lanes t = larger(x, -x), s = x * x;
    Lanes far = fma(all(-1.72853470e-5f), t, all(3.83197126e-4f));
    far = fma(far, s, fma(all(-3.88396438e-3f), t, all(2.42546219e-2f)));
    for (float c : {-1.06777877e-1f, -6.34846687e-1f, -1.28717512e-1f}) far = fma(far, t, all(c));
    far = 1.0f - exp(fma(far, t, -t));
    far = lanes_of(bits_of(far) | (bits_of(x) & 0x80000000));
    Lanes near = all(-5.96761703e-4f);
    for (float c : {4.99119423e-3f, -2.67681349e-2f, 1.12819925e-1f, -3.76125336e-1f,
                    1.28379166e-1f}) {
        near = fma(near, s, all(c));
    }
    near = fma(near, x, x);
    return t > 0.927734375f ? far : near;
}

inline Lanes gelu(Lanes x) { return x * 0.5f * (erf(x * 0.70710678118654752f) + 1.0f); }
