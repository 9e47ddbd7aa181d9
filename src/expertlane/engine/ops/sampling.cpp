// Tokens drawn from scores, a row in one pass: softmax, top-k, top-p, min-p and the draw, as
// engine/model/draw.py has them for all rows together.

#include <memory>
#include <vector>

#include "lanes.h"

namespace {

constexpr int kDigitBits = 10;  // of a probability's bits, the highest two of which are 0
constexpr int kDigits = 1 << kDigitBits;
constexpr int kShift = 20;
constexpr int64_t kSummedTokens = 128;  // whose probabilities are summed together when drawing

uint32_t digit_of(float p) {
    uint32_t bits;
    std::memcpy(&bits, &p, sizeof(bits));
    return bits >> kShift;
}

// Output `index` of SplitMix64 from `seed` (Steele, Lea and Flood 2014), from 0 to 1.
double uniform_number(uint64_t seed, uint64_t index) {
    uint64_t bits = seed + (index + 1) * 0x9E3779B97F4A7C15u;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    bits ^= bits >> 31;
    return (double)(bits >> 16) * 0x1p-48;
}

// The last probability taken when the greatest are taken until they hold `goal`; of each, one is
// held, or its own share.
template <bool of_shares>
float threshold(const float* p, int64_t count, double goal, std::vector<float>& some) {
    double held[kDigits] = {};
    for (int64_t i = 0; i < count; ++i) {
        if (of_shares) held[digit_of(p[i])] += p[i];
        else held[digit_of(p[i])] += 1.0;
    }
    int digit = kDigits - 1;
    for (; digit > 0 && held[digit] < goal; --digit) goal -= held[digit];
    if (!digit) return 0.0f;  // what is left is too unlikely to be drawn
    some.clear();
    for (int64_t i = 0; i < count; ++i) {
        if ((int)digit_of(p[i]) == digit) some.push_back(p[i]);
    }
    std::sort(some.begin(), some.end(), [](float a, float b) { return a > b; });
    for (float each : some) {
        goal -= of_shares ? each : 1.0;
        if (goal <= 0) return each;
    }
    return some.back();  // by rounding
}

void keep(float* p, int64_t count, float least) {
    for (int64_t i = 0; i < count; ++i) p[i] = p[i] >= least ? p[i] : 0.0f;
}

double total(const float* p, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += p[i];
    return sum;
}

// p = softmax of scores / temperature, the greatest of which is finite.
void probabilities(const float* scores, int64_t count, float greatest, float temperature,
                   float* p) {
    Lanes sums{};
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t left = count - i;
        Lanes score = left >= kLanes ? load(scores + i) : load_part(scores + i, left);
        const Lanes value = exp((score - greatest) / temperature);
        store_part(p + i, value, left);
        sums = sums + (left >= kLanes ? value : load_part(p + i, left));
    }
    const float sum = ::sum(sums);
    for (int64_t i = 0; i < count; ++i) p[i] /= sum;
}

// The token at which the probabilities, summed in their order, pass uniform times their sum.
int64_t draw(const float* p, int64_t count, double uniform, std::vector<double>& sums) {
    sums.clear();
    double all_sum = 0.0;
    for (int64_t i = 0; i < count; i += kSummedTokens) {
        sums.push_back(total(p + i, std::min(kSummedTokens, count - i)));
        all_sum += sums.back();
    }
    double goal = uniform * all_sum;
    int64_t block = 0, likely = 0;
    while (block + 1 < (int64_t)sums.size() && goal >= sums[block]) goal -= sums[block++];
    while (block && !sums[block]) --block;  // by rounding
    for (int64_t i = block * kSummedTokens; i < std::min(count, (block + 1) * kSummedTokens); ++i) {
        if (!p[i]) continue;
        likely = i;
        if (goal < p[i]) return i;
        goal -= p[i];
    }
    return likely;  // the last that can be
}

}  // namespace

extern "C" {

// ids [rows]: a token of each row of scores [rows, vocab], -1 where the greatest is not finite.
// Each row has a temperature, a seed and the number of tokens drawn from it so far, which rises by
// one; top_k, top_p and min_p may be null, and infinity in the first two is none.
void draw_tokens(const float* scores, int64_t rows, int64_t vocab, const float* temperature,
                 const double* top_k, const double* top_p, const float* min_p,
                 const uint64_t* seeds, int64_t* num_drawn, int64_t* ids) {
#pragma omp parallel if (rows > 1 && rows * vocab > 16384)
    {
        const std::unique_ptr<float[]> p(new float[vocab]);
        std::vector<float> some;
        std::vector<double> sums;
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < rows; ++r) {
            const float* row = scores + r * vocab;
            const double uniform = uniform_number(seeds[r], num_drawn[r]++);
            float greatest = row[0];
            bool is_number = true;
            for (int64_t i = 0; i < vocab; ++i) {
                greatest = std::max(greatest, row[i]);
                is_number &= row[i] == row[i];
            }
            ids[r] = -1;
            if (!is_number || !std::isfinite(greatest)) continue;
            probabilities(row, vocab, greatest, temperature[r], p.get());
            if (top_k && !std::isinf(top_k[r])) {
                keep(p.get(), vocab, threshold<false>(p.get(), vocab, top_k[r] - 0.5, some));
            }
            if (top_p && !std::isinf(top_p[r])) {
                const double goal = top_p[r] * total(p.get(), vocab);
                keep(p.get(), vocab, threshold<true>(p.get(), vocab, goal, some));
            }
            if (min_p) {
                keep(p.get(), vocab, min_p[r] * *std::max_element(p.get(), p.get() + vocab));
            }
            ids[r] = draw(p.get(), vocab, uniform, sums);
        }
    }
}
}
