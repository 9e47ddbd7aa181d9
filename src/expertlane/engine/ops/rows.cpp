// What lies between products: rotary positions and norms.

#include <vector>

#include "lanes.h"

namespace {

// Turns the first num_heads heads of each row of x [tokens, stride] in place, by cos and sin
// [tokens, dim]: pairs (i, i + dim / 2) of the last dim of a head's values, or (2i, 2i + 1), which
// are left as the former.
template <class T>
void rotate_rows(T* x, int64_t stride, int64_t tokens, int64_t num_heads, int64_t head_dim,
            int64_t dim, const float* cos, const float* sin, int64_t interleave) {
    const int64_t half = dim / 2;
#pragma omp parallel if (tokens * num_heads * dim > 65536)
    {
        std::vector<float> first(half), second(half);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) {
            const float *c = cos + t * dim, *n = sin + t * dim;
            for (int64_t h = 0; h < num_heads; ++h) {
                T* head = x + t * stride + (h + 1) * head_dim - dim;
                for (int64_t i = 0; i < half; ++i) {
                    first[i] = to_float(head[interleave ? 2 * i : i]);
                    second[i] = to_float(head[interleave ? 2 * i + 1 : i + half]);
                }
                for (int64_t i = 0; i < half; ++i) {
                    put(first[i] * c[i] + second[i] * n[i], head + i);
                }
                for (int64_t i = half; i < dim; ++i) {
                    put(second[i - half] * c[i] + first[i - half] * n[i], head + i);
                }
            }
        }
    }
}

// out = x / sqrt(mean(x^2) + eps) * weight, the mean over each of the first `groups` groups of
// `size` values of each row; x and out may be the same, weight [groups, size].
template <class T>
void norm_rows(const T* x, int64_t stride, int64_t rows, int64_t groups, int64_t size,
               const float* weight, float eps, T* out, int64_t out_stride) {
#pragma omp parallel for schedule(static) if (rows * groups * size > 32768)
    for (int64_t task = 0; task < rows * groups; ++task) {
        const int64_t row = task / groups, group = task % groups;
        const T* from = x + row * stride + group * size;
        T* to = out + row * out_stride + group * size;
        Lanes squares = {};
        for (int64_t i = 0; i < size; i += kLanes) {
            const Lanes value = load(from + i);
            squares = fma(value, value, squares);
        }
        const float factor = 1.0f / std::sqrt(sum(squares) / (float)size + eps);
        for (int64_t i = 0; i < size; i += kLanes) {
            store(to + i, load(from + i) * factor * load(weight + group * size + i));
        }
    }
}

}  // namespace

extern "C" {

void rotate(bf16* x, int64_t stride, int64_t tokens, int64_t num_heads, int64_t head_dim,
            int64_t dim, const float* cos, const float* sin, int64_t interleave) {
    rotate_rows(x, stride, tokens, num_heads, head_dim, dim, cos, sin, interleave);
}

void rotate_float(float* x, int64_t stride, int64_t tokens, int64_t num_heads, int64_t head_dim,
                  int64_t dim, const float* cos, const float* sin, int64_t interleave) {
    rotate_rows(x, stride, tokens, num_heads, head_dim, dim, cos, sin, interleave);
}

void rms_norm(const bf16* x, int64_t stride, int64_t rows, int64_t groups, int64_t size,
              const float* weight, float eps, bf16* out, int64_t out_stride) {
    norm_rows(x, stride, rows, groups, size, weight, eps, out, out_stride);
}

void rms_norm_float(const float* x, int64_t stride, int64_t rows, int64_t groups, int64_t size,
                    const float* weight, float eps, float* out, int64_t out_stride) {
    norm_rows(x, stride, rows, groups, size, weight, eps, out, out_stride);
}
}
