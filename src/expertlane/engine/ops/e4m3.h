// e4m3: sign, 4 bits of exponent, 3 of mantissa; no infinity, 448 at most.

#pragma once

#include <cmath>

#include "lanes.h"

struct E4m3 { uint8_t bits; };

// Values times 1/256. Half precision has e4m3's mantissa with 7 zeros after it, and an exponent that
// is 8 more.
inline Lanes load(const E4m3* p) {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    const __m256i magnitude = _mm256_slli_epi16(bits, 7);
    return _mm512_cvtph_ps(_mm256_and_si256(magnitude, _mm256_set1_epi16((short)0xbf80)));
#elif defined(__AVX2__)
    const __m128i bits = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
    const __m128i magnitude = _mm_slli_epi16(bits, 7);
    return _mm256_cvtph_ps(_mm_and_si128(magnitude, _mm_set1_epi16((short)0xbf80)));
#else
    // As a float32 with too small an exponent, maybe none: multiplying sets both right.
    Bits bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = p[i].bits;
    const Lanes value = lanes_of((bits & 0x7f) << 20) * 0x1p112f;
    return lanes_of(bits_of(value) | (bits & 0x80) << 24);
#endif
}

// A row of the cache as `float8.py` rounds and widens it: its scale is 2^(byte - 127), infinite
// where a value is no number.

inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

inline float power_of_scale(uint32_t byte) {
    const uint32_t bits = byte << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return power;
}

// What a loaded value of a row is to be multiplied by: no number where the row has none.
inline float factor_of(uint8_t scale) { return scale == 255 ? NAN : power_of_scale(scale) * 256.0f; }

// To the nearest, ties to even, of |x| <= 448; anything else that is no number stays so.
inline E4m3 to_e4m3(float x) {
    const uint32_t bits = float_bits(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x7f800000) return {(uint8_t)(sign | 0x7f)};
    if (magnitude < 121u << 23) {  // below 2^-6: multiples of 2^-9
        return {(uint8_t)(sign | (float_bits(std::fabs(x) + 16384.0f) - float_bits(16384.0f)))};
    }
    const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
    return {(uint8_t)(sign | ((rounded >> 20) - (120u << 3)))};
}

template <class T>
inline void round_row(const T* from, int64_t size, E4m3* to, uint8_t* scale) {
    uint32_t most = 0;
    for (int64_t i = 0; i < size; ++i) {
        most = std::max(most, float_bits(to_float(from[i])) & 0x7fffffff);
    }
    const int32_t exponent = (int32_t)((most + 0x1fffff) >> 23) - 8;  // 1.75 * 2^8 is 448
    *scale = (uint8_t)(most < 0x7f800000 ? std::max(exponent, 1) : 255);
    const float inverse = power_of_scale(254u - *scale);
    for (int64_t i = 0; i < size; ++i) to[i] = to_e4m3(to_float(from[i]) * inverse);
}

// With zeros up to `padded`, a multiple of kLanes.
template <class X>
inline void widen_row(const E4m3* from, uint8_t scale, int64_t size, int64_t padded, X* to) {
    const Lanes factor = all(factor_of(scale));
    int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) store(to + d, load(from + d) * factor);
    for (; d < padded; d += kLanes) {
        E4m3 last[kLanes] = {};
        std::memcpy(last, from + d, (size_t)std::max<int64_t>(0, size - d));
        store(to + d, load(last) * factor);
    }
}
