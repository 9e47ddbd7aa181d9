// An MLP that all tokens take, in one call: the experts' kernels with one expert.

#include <numeric>
#include <vector>

#include "step.h"

namespace {

// The sigmoid of a row times the scale's, rounded after each step as values of type T are.
template <class T>
float factor_of(const T* row, const T* scale, int64_t hidden) {
    Lanes sums{};
    for (int64_t i = 0; i < hidden; i += kLanes) {
        sums = fma(load_some(row + i, hidden - i), load_some(scale + i, hidden - i), sums);
    }
    T value;
    put(sum(sums), &value);
    put(1.0f / (1.0f + std::exp(-to_float(value))), &value);
    return to_float(value);
}

template <class T>
void mlp_rows(const Mlp& m, const T* x, int64_t tokens, T* out) {
    const int64_t hidden = m.hidden;
    const auto normed = room<T>(m.norm ? tokens * hidden : 0);
    if (m.norm) norm(x, hidden, tokens, 1, hidden, m.norm, m.eps, normed.get(), hidden);
    const T* rows = m.norm ? normed.get() : x;
    std::vector<int64_t> numbers(tokens);
    std::iota(numbers.begin(), numbers.end(), 0);
    const auto scratch = room<T>(tokens * m.experts->inner);
    apply(*m.experts, rows, numbers.data(), numbers.data(), &tokens, hidden, scratch.get(), out);
    for (int64_t t = 0; m.scale && t < tokens; ++t) {
        const Lanes factor = all(factor_of(rows + t * hidden, (const T*)m.scale, hidden));
        for (int64_t i = t * hidden, left = hidden; left > 0; i += kLanes, left -= kLanes) {
            store_part(out + i, load_some(out + i, left) * factor, left);
        }
    }
}

}  // namespace

extern "C" {

// out [tokens, hidden] of x [tokens, hidden].
void mlp_part(const Mlp* mlp, const bf16* x, int64_t tokens, bf16* out) {
    mlp_rows(*mlp, x, tokens, out);
}
void mlp_part_float(const Mlp* mlp, const float* x, int64_t tokens, float* out) {
    mlp_rows(*mlp, x, tokens, out);
}
}
