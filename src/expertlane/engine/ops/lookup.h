// Values of one byte, int8 or e4m3, looked up as pairs of bfloat16, which has as many digits.

#pragma once

#include <type_traits>

#include "e4m3.h"

#if defined(__AVX512VBMI__)
constexpr bool kLooksUp = true;

// mantissa * 2^exponent as bfloat16, of at most 8 bits.
constexpr bf16 bf16_of(int mantissa, int exponent) {
    if (!mantissa) return 0;
    while (mantissa < 128) mantissa *= 2, --exponent;
    return (bf16)((exponent + 7 + 127) << 7 | (mantissa & 127));
}

constexpr bf16 magnitude(int8_t, int code) { return bf16_of(code, 0); }
constexpr bf16 magnitude(E4m3, int code) {
    const int exponent = code >> 3, mantissa = code & 7;
    if (code == 127) return 0x7fc0;
    return exponent ? bf16_of(8 + mantissa, exponent - 18) : bf16_of(mantissa, -17);
}

// The bytes of the bfloat16 of every magnitude.
template <class W>
struct Lookup {
    alignas(64) uint8_t low[128] = {}, high[128] = {};
    constexpr Lookup() {
        for (int code = 0; code < 128; ++code) {
            const bf16 value = magnitude(W(), code);
            low[code] = (uint8_t)value, high[code] = (uint8_t)(value >> 8);
        }
    }
};

// Which of 64 bytes goes where, so that interleaving low and high bytes of what is looked up makes
// two vectors of pairs: of 64 values in a row, in order.
struct RowOrder {
    alignas(64) uint8_t from[64] = {};
    constexpr RowOrder() {
        for (int i = 0; i < 64; ++i) from[i] = (uint8_t)(i % 16 / 8 * 32 + i / 16 * 8 + i % 8);
    }
};

// Looks up values of int8 and e4m3 as sign and magnitude.
template <class W, class Order>
struct Widener {
    static constexpr Lookup<W> table{};
    static constexpr Order places{};
    __m512i low[2], high[2], order;
    Widener() {
        for (int i = 0; i < 2; ++i) {
            low[i] = _mm512_load_si512(table.low + 64 * i);
            high[i] = _mm512_load_si512(table.high + 64 * i);
        }
        order = _mm512_load_si512(places.from);
    }

    // Of 64 values.
    void operator()(const W* p, Bits pairs[2]) const { widen(_mm512_loadu_si512(p), pairs); }

    // Of 32 values; in the order of a row.
    Bits half(const W* p) const {
        Bits pairs[2];
        widen(_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p)), pairs);
        return pairs[0];
    }

  private:
    void widen(__m512i bytes, Bits pairs[2]) const {
        const __m512i w = _mm512_permutexvar_epi8(order, bytes);
        constexpr bool is_int8 = std::is_same_v<W, int8_t>;
        const __m512i code = is_int8 ? _mm512_abs_epi8(w) : w;  // of which 7 bits are looked at
        const __m512i lows = _mm512_permutex2var_epi8(low[0], code, low[1]);
        __m512i highs = _mm512_permutex2var_epi8(high[0], code, high[1]);
        constexpr int kFirstOrBoth = 0xf8;  // a | (b & c)
        highs = _mm512_ternarylogic_epi32(highs, w, _mm512_set1_epi8((char)0x80), kFirstOrBoth);
        if (is_int8) {  // -128's magnitude has 8 bits
            const __m512i of_least = _mm512_set1_epi8((char)(magnitude(int8_t(), 128) >> 8 | 0x80));
            highs = _mm512_mask_mov_epi8(highs, _mm512_movepi8_mask(code), of_least);
        }
        pairs[0] = (Bits)_mm512_unpacklo_epi8(lows, highs);
        pairs[1] = (Bits)_mm512_unpackhi_epi8(lows, highs);
    }
};
#else
constexpr bool kLooksUp = false;
#endif
