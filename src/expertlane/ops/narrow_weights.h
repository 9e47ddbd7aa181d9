// Weights of one byte, int8 or e4m3, widened in registers: to float32, or to pairs of bfloat16, which
// has as many digits. Blocks are [k][16]: 16 outputs of an input lie together.

#pragma once

#include <type_traits>

#include "e4m3.h"
#include "tiles.h"

// What a loaded weight is to be multiplied by, beside its scale.
template <class W>
constexpr float kUnit = 1.0f;
template <>
constexpr float kUnit<E4m3> = 256.0f;

// A widened weight; the same unit.
template <class W>
struct Wide { float value; };
template <class W>
constexpr float kUnit<Wide<W>> = kUnit<W>;
template <class W>
inline Lanes load(const Wide<W>* p) { return load(&p->value); }

// Two inputs of an output, as a panel of widened weights has them: [k / 2][16].
template <class W>
struct Pair { bf16 both[2]; };
template <class W>
constexpr float kUnit<Pair<W>> = kUnit<W>;

inline int64_t place(int64_t i, int v) { return i * kBlock + v * kLanes % kBlock; }

// Pairs of the inputs i and i + 1: one byte has no more digits than bfloat16.
template <class W>
inline Bits load_narrow_pairs(const W* p, int64_t i, int v) {
    const Bits low = bits_of(load(p + place(i, v))) >> 16;
    return low | (bits_of(load(p + place(i + 1, v))) & 0xffff0000);
}

#if defined(__AVX512VBMI__)
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

// The bytes of the bfloat16 of every magnitude; and which byte of 4 inputs of 16 outputs goes where
// so that interleaving low and high bytes makes pairs of them, in order.
template <class W>
struct Lookup {
    alignas(64) uint8_t low[128] = {}, high[128] = {}, order[64] = {};
    constexpr Lookup() {
        for (int code = 0; code < 128; ++code) {
            const bf16 value = magnitude(W(), code);
            low[code] = (uint8_t)value, high[code] = (uint8_t)(value >> 8);
        }
        for (int i = 0; i < 64; ++i) {
            const int lane = i / 16, word = i % 8, input = i % 16 / 8 * 2 + word % 2;
            order[i] = (uint8_t)(input * kBlock + lane * 4 + word / 2);
        }
    }
};

// Looks up values of int8 and e4m3 as sign and magnitude.
template <class W>
struct Widener {
    static constexpr Lookup<W> table{};
    __m512i low[2], high[2], order;
    Widener() {
        for (int i = 0; i < 2; ++i) {
            low[i] = _mm512_load_si512(table.low + 64 * i);
            high[i] = _mm512_load_si512(table.high + 64 * i);
        }
        order = _mm512_load_si512(table.order);
    }

    // Pairs of the first two, and of the next two, of 4 inputs of a block.
    void operator()(const W* p, Bits pairs[2]) const {
        const __m512i w = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(p));
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
#endif
