// Weights of one byte, int8 or e4m3, widened in registers: to float32, or to pairs of bfloat16, which
// has as many digits. Blocks are [k][16]: 16 outputs of an input lie together.

#pragma once

#include <type_traits>

#include "lookup.h"
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
// Pairs of the first two, and of the next two, of 4 inputs of a block's 16 outputs.
struct BlockOrder {
    alignas(64) uint8_t from[64] = {};
    constexpr BlockOrder() {
        for (int i = 0; i < 64; ++i) {
            const int lane = i / 16, word = i % 8, input = i % 16 / 8 * 2 + word % 2;
            from[i] = (uint8_t)(input * kBlock + lane * 4 + word / 2);
        }
    }
};
#endif
