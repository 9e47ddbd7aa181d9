// Our kernels against loops in float64, without torch: for emulators and sanitizers. Every buffer
// ends where a page that may not be touched begins, so that a read past its end ends the program.
// Prints what it checked; gives 1 where a result is off.

#include "kernel_checks.h"

extern "C" {
void linear(const bf16*, int64_t, int64_t, const bf16*, int64_t, int64_t, const float*, bf16*);
void experts(const bf16*, int64_t, const int64_t*, const int64_t*, const int64_t*, int64_t,
             const bf16* const*, const bf16* const*, const bf16* const*, int64_t, int64_t, bf16*,
             bf16*);
void few_rows_linear(const float*, int64_t, int64_t, const float*, int64_t, int64_t, const float*,
                     float*);
void few_rows_experts(const float*, int64_t, const int64_t*, const int64_t*, const int64_t*,
                      int64_t, const float* const*, const float* const*, const float* const*,
                      int64_t, int64_t, float*, float*);
void rms_norm(const bf16*, int64_t, int64_t, int64_t, int64_t, const float*, float, bf16*, int64_t);
void rms_norm_float(const float*, int64_t, int64_t, int64_t, int64_t, const float*, float, float*,
                    int64_t);
void sum_parts(int32_t, const char* const*, int64_t, int64_t, void*);
}

namespace {

// As products.cpp wants it: [n / 16][k / 2][16][2].
Guarded<bf16> packed(const bf16* w, int64_t n, int64_t k) {
    const int64_t blocks = (n + 15) / 16;
    Guarded<bf16> to(blocks * k * 16);
    for (int64_t o = 0; o < blocks * 16; ++o) {
        for (int64_t i = 0; i < k; ++i) {
            to.data[((o / 16 * (k / 2) + i / 2) * 16 + o % 16) * 2 + i % 2] =
                o < n ? w[o * k + i] : 0;
        }
    }
    return to;
}
Guarded<float> packed(const float* w, int64_t n, int64_t k) {
    Guarded<float> to(n * k);
    std::copy_n(w, n * k, to.data);
    return to;
}

void product(const bf16* x, int64_t stride, int64_t m, const bf16* w, int64_t n, int64_t k,
             const float* bias, bf16* out) {
    linear(x, stride, m, w, n, k, bias, out);
}
void product(const float* x, int64_t stride, int64_t m, const float* w, int64_t n, int64_t k,
             const float* bias, float* out) {
    few_rows_linear(x, stride, m, w, n, k, bias, out);
}

template <class T>
void check_linear(const char* what, int64_t m, int64_t n, int64_t k, bool has_bias) {
    const int64_t stride = k + 3;  // rows are not aligned
    Guarded<T> x(std::max<int64_t>(0, (m - 1) * stride + k)), w(n * k), out(m * n);
    Guarded<float> bias(n);
    const auto weights = packed(w.data, n, k);
    product(x.data, stride, m, weights.data, n, k, has_bias ? bias.data : nullptr, out.data);
    for (int64_t r = 0; r < m; ++r) {
        for (int64_t o = 0; o < n; ++o) {
            const double expected =
                dot(x.data + r * stride, w.data + o * k, k) + (has_bias ? bias.data[o] : 0);
            check(what, to_float(out.data[r * n + o]), expected, 3 * std::sqrt((double)k) + 1,
                  kTolerance<T>);
        }
    }
}

template <class T, class Function>
void check_experts(const char* what, Function function, std::vector<int64_t> counts, int64_t hidden,
                   int64_t inner, bool is_gated) {
    int64_t pairs = 0, num = (int64_t)counts.size();
    Guarded<int64_t> ends(num);
    for (int64_t e = 0; e < num; ++e) ends.data[e] = pairs += counts[e];
    Guarded<int64_t> from(pairs), to(pairs);
    const int64_t rows = 3;
    for (int64_t p = 0; p < pairs; ++p) from.data[p] = p % rows, to.data[p] = pairs - 1 - p;
    Guarded<T> x(rows * hidden), scratch(pairs * inner), out(pairs * hidden);
    std::vector<Guarded<T>> plain, kept;
    std::vector<const T*> at[3];
    for (int64_t e = 0; e < num; ++e) {
        for (int part = 0; part < 3; ++part) {
            const int64_t n = part == 2 ? hidden : inner, k = part == 2 ? inner : hidden;
            plain.emplace_back(n * k);
            for (int64_t i = 0; i < n * k; ++i) {
                plain.back().set(i, to_float(plain.back().data[i]) / std::sqrt((float)k));
            }
            kept.push_back(packed(plain.back().data, n, k));
            at[part].push_back(kept.back().data);
        }
    }
    function(x.data, hidden, from.data, to.data, ends.data, num,
             is_gated ? at[0].data() : nullptr, at[1].data(), at[2].data(), hidden, inner,
             scratch.data, out.data);
    for (int64_t e = 0, p = 0; e < num; ++e) {
        for (; p < ends.data[e]; ++p) {
            std::vector<double> middle(inner);
            for (int64_t i = 0; i < inner; ++i) {
                const T* row = x.data + from.data[p] * hidden;
                const double gate = dot(row, plain[3 * e].data + i * hidden, hidden);
                const double up = dot(row, plain[3 * e + 1].data + i * hidden, hidden);
                middle[i] = is_gated ? gate / (1 + std::exp(-gate)) * up
                                     : 0.5 * up * (1 + std::erf(up * std::sqrt(0.5)));
            }
            for (int64_t o = 0; o < hidden; ++o) {
                double expected = 0;
                for (int64_t i = 0; i < inner; ++i) {
                    expected += middle[i] * to_float(plain[3 * e + 2].data[o * inner + i]);
                }
                check(what, to_float(out.data[to.data[p] * hidden + o]), expected, 3,
                      kTolerance<T>);
            }
        }
    }
}

template <class T, class Function>
void check_norm(const char* what, Function function, int64_t rows, int64_t size) {
    Guarded<T> x(rows * size), out(rows * size);
    Guarded<float> weight(size);
    function(x.data, size, rows, 1, size, weight.data, 1e-5f, out.data, size);
    for (int64_t r = 0; r < rows; ++r) {
        const double squares = dot(x.data + r * size, x.data + r * size, size);
        for (int64_t i = 0; i < size; ++i) {
            const double expected = to_float(x.data[r * size + i]) * weight.data[i] /
                                    std::sqrt(squares / (double)size + 1e-5);
            check(what, to_float(out.data[r * size + i]), expected, 9, kTolerance<T>);
        }
    }
}

template <class T>
void check_sums(int64_t count) {
    std::vector<Guarded<T>> parts;
    std::vector<const char*> at;
    for (int p = 0; p < 3; ++p) parts.emplace_back(count), at.push_back((char*)parts[p].data);
    Guarded<T> out(count);
    sum_parts(sizeof(T) == 2, at.data(), 3, count, out.data);
    for (int64_t i = 0; i < count; ++i) {
        double expected = 0;
        for (const auto& part : parts) expected += to_float(part.data[i]);
        check("sum_parts", to_float(out.data[i]), expected, 9, kTolerance<T>);
    }
}

void check_functions() {
    float x[kLanes], e[kLanes], s[kLanes], g[kLanes];
    for (float from = -100; from < 88; from += 0.37f) {
        for (int i = 0; i < kLanes; ++i) x[i] = from + 0.02f * (float)i;
        store(e, exp(load(x))), store(s, silu(load(x))), store(g, gelu(load(x)));
        for (int i = 0; i < kLanes; ++i) {
            const double at = x[i], power = std::exp(at);
            if (at < -87.3) check("small exp", e[i], 0, 1.3e-38, 1);
            else check("exp", e[i], power, power, 4e-7);
            check("silu", s[i], at / (1 + std::exp(-at)), std::abs(at) + 1, 3e-7);
            check("gelu", g[i], 0.5 * at * (1 + std::erf(at * std::sqrt(0.5))), std::abs(at) + 1,
                  3e-7);
        }
    }
}

}  // namespace

int main() {
    check_functions();
    for (int64_t m : {0, 1, 2, 3, 5, 6, 8, 9, 17}) {
        for (auto [n, k] : {std::pair<int64_t, int64_t>{1, 2}, {16, 8}, {31, 6}, {33, 64},
                            {65, 130}, {7, 34}}) {
            check_linear<bf16>("linear", m, n, k, m % 2);
            check_linear<float>("few_rows_linear", m, n, k - (m > 4), m % 2);
        }
    }
    for (bool is_gated : {true, false}) {
        for (auto counts : {std::vector<int64_t>{0, 0}, {1, 0, 4}, {9, 2, 13}}) {
            for (int64_t hidden : {2, 48, 50}) {
                check_experts<bf16>("experts", experts, counts, hidden, 32, is_gated);
                check_experts<float>("few_rows_experts", few_rows_experts, counts, hidden, 11,
                                     is_gated);
            }
        }
    }
    check_attention();
    check_narrow();
    for (int64_t rows : {0, 1, 3}) {
        check_norm<bf16>("rms_norm", rms_norm, rows, 48);
        check_norm<float>("rms_norm_float", rms_norm_float, rows, 48);
    }
    for (int64_t count : {0, 1, 63, 64, 200}) check_sums<bf16>(count), check_sums<float>(count);
    std::printf("%d values checked, %d wrong\n", num_checks, num_wrong);
    return num_wrong > 0;
}
