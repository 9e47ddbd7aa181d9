// Products and experts with weights of one byte against loops in float64.

#include "kernel_checks.h"

extern "C" {
void narrow_linear(int32_t, int32_t, const void*, int64_t, int64_t, const uint8_t*, const float*,
                   int64_t, int64_t, int64_t, int64_t, const float*, void*);
void narrow_experts(int32_t, int32_t, const void*, int64_t, const int64_t*, const int64_t*,
                    const int64_t*, int64_t, const void*, const void*, const void*, int64_t,
                    int64_t, int64_t, int64_t, int64_t, void*);
}

namespace {

// A matrix of one-byte values [n, k], as narrow.cpp wants it, and what it stands for.
struct Narrow {
    std::vector<double> wide;
    Guarded<uint8_t> values;
    Guarded<float> scales;

    static double decoded(int code, bool is_float8) {
        if (!is_float8) return (int8_t)code;
        const int exponent = code >> 3 & 15, mantissa = code & 7;
        const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10)
                                     : std::ldexp(mantissa, -9);
        return code & 128 ? -size : size;
    }

    Narrow(bool is_float8, int64_t n, int64_t k, int64_t group, int64_t first, float size)
        : wide(n * k), values((n + 15) / 16 * 16 * k),
          scales((n + 15) / 16 * 16 * ((first + k + group - 1) / group)) {
        const int64_t groups = (first + k + group - 1) / group;
        for (int64_t o = 0; o < (n + 15) / 16 * 16; ++o) {
            for (int64_t g = 0; g < groups; ++g) {
                scales.data[(o / 16 * groups + g) * 16 + o % 16] =
                    o < n ? size / 64 * (0.5f + (float)(generator() % 256) / 256) : 0;
            }
            for (int64_t i = 0; i < k; ++i) {
                int code = o < n ? (int)(generator() % 256) : 0;
                if (is_float8 && (code & 127) == 127) code = 0;  // is no number
                values.data[(o / 16 * k + i) * 16 + o % 16] = (uint8_t)code;
                const int64_t g = (first + i) / group;
                if (o < n) {
                    wide[o * k + i] = decoded(code, is_float8) *
                                      scales.data[(o / 16 * groups + g) * 16 + o % 16];
                }
            }
        }
    }

    template <class T>
    double row_times(const T* x, int64_t o, int64_t k) const {
        double sum = 0;
        for (int64_t i = 0; i < k; ++i) sum += (double)to_float(x[i]) * wide[o * k + i];
        return sum;
    }
};

template <class T>
void check_narrow_linear(bool is_float8, int64_t m, int64_t n, int64_t k, int64_t group,
                         int64_t first, bool has_bias) {
    const int64_t stride = k + 3;
    Guarded<T> x(std::max<int64_t>(0, (m - 1) * stride + k)), out(m * n);
    Guarded<float> bias(n);
    const Narrow w(is_float8, n, k, group, first, 1);
    narrow_linear(is_float8, sizeof(T) == 2, x.data, stride, m, w.values.data, w.scales.data, n, k,
                  group, first, has_bias ? bias.data : nullptr, out.data);
    for (int64_t r = 0; r < m; ++r) {
        for (int64_t o = 0; o < n; ++o) {
            const double expected =
                w.row_times(x.data + r * stride, o, k) + (has_bias ? bias.data[o] : 0);
            check("narrow_linear", to_float(out.data[r * n + o]), expected,
                  6 * std::sqrt((double)k) + 1, kTolerance<T>);
        }
    }
}

template <class T>
void check_narrow_experts(bool is_float8, std::vector<int64_t> counts, int64_t hidden,
                          int64_t inner, bool is_gated) {
    struct Pointers {
        const uint8_t* values;
        const float* scales;
    };
    const int64_t rows = 3, num = (int64_t)counts.size(), group = 16, inner_first = 6;
    int64_t pairs = 0;
    Guarded<int64_t> ends(num);
    for (int64_t e = 0; e < num; ++e) ends.data[e] = pairs += counts[e];
    Guarded<int64_t> from(pairs), to(pairs);
    for (int64_t p = 0; p < pairs; ++p) from.data[p] = p % rows, to.data[p] = pairs - 1 - p;
    Guarded<T> x(rows * hidden), out(pairs * hidden);
    std::vector<Narrow> kept;
    std::vector<Pointers> at[3];
    for (int64_t e = 0; e < num; ++e) {
        for (int part = 0; part < 3; ++part) {
            const int64_t n = part == 2 ? hidden : inner, k = part == 2 ? inner : hidden;
            kept.emplace_back(is_float8, n, k, group, part == 2 ? inner_first : 0,
                              1 / std::sqrt((float)k));
            at[part].push_back({kept.back().values.data, kept.back().scales.data});
        }
    }
    narrow_experts(is_float8, sizeof(T) == 2, x.data, hidden, from.data, to.data, ends.data, num,
                   is_gated ? at[0].data() : nullptr, at[1].data(), at[2].data(), hidden, inner,
                   group, group, inner_first, out.data);
    for (int64_t e = 0, p = 0; e < num; ++e) {
        for (; p < ends.data[e]; ++p) {
            std::vector<float> middle(inner);
            for (int64_t i = 0; i < inner; ++i) {
                const T* row = x.data + from.data[p] * hidden;
                const double gate = kept[3 * e].row_times(row, i, hidden);
                const double up = kept[3 * e + 1].row_times(row, i, hidden);
                middle[i] = (float)(is_gated ? gate / (1 + std::exp(-gate)) * up
                                             : 0.5 * up * (1 + std::erf(up * std::sqrt(0.5))));
            }
            for (int64_t o = 0; o < hidden; ++o) {
                check("narrow_experts", to_float(out.data[to.data[p] * hidden + o]),
                      kept[3 * e + 2].row_times(middle.data(), o, inner), 9, kTolerance<T>);
            }
        }
    }
}

}  // namespace

void check_narrow() {
    for (bool is_float8 : {false, true}) {
        for (int64_t m : {0, 1, 2, 5, 8, 33}) {
            for (auto [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {16, 8}, {31, 7}, {33, 64},
                                {65, 130}}) {
                const int64_t group = m % 2 ? 16 : 128, first = m % 3 ? 0 : 6;
                check_narrow_linear<bf16>(is_float8, m, n, k, group, first, m % 2);
                check_narrow_linear<float>(is_float8, m, n, k, group, first, m % 2);
            }
        }
        for (auto counts : {std::vector<int64_t>{0, 0}, {1, 0, 4}, {9, 2, 33}}) {
            for (int64_t hidden : {2, 48, 51}) {
                check_narrow_experts<bf16>(is_float8, counts, hidden, 32, hidden < 51);
                check_narrow_experts<float>(is_float8, counts, hidden, 27, hidden < 51);
            }
        }
    }
}
