// Sums of rows, in float32 and in a fixed order. The rows lie in parts, such as what other ranks
// wrote: part p begins at parts[p]. Compiled for any CPU, and again for the best instructions.

#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t kHeldValues = 64;  // values whose sums stay in registers

// to [count] = the sum over rows of (weights or 1) * row [count].
template <class T>
void add_rows(const T* const* rows, const float* weights, int64_t num, int64_t count, T* to) {
    for (int64_t begin = 0; begin < count; begin += kHeldValues) {
        float sum[kHeldValues] = {};
        if (count - begin >= kHeldValues) {
            for (int64_t r = 0; r < num; ++r) {
                const T* row = rows[r] + begin;
                const float weight = weights[r];
                for (int64_t i = 0; i < kHeldValues; ++i) sum[i] += weight * to_float(row[i]);
            }
            for (int64_t i = 0; i < kHeldValues; ++i) put(sum[i], to + begin + i);
        } else {
            for (int64_t r = 0; r < num; ++r) {
                for (int64_t i = begin; i < count; ++i) {
                    sum[i - begin] += weights[r] * to_float(rows[r][i]);
                }
            }
            for (int64_t i = begin; i < count; ++i) put(sum[i - begin], to + i);
        }
    }
}

template <class T>
void gather(const char* const* parts, const int64_t* num_rows, int64_t num_parts,
            const int64_t* place, const float* weights, int64_t tokens, int64_t most, int64_t size,
            T* out) {
    std::vector<const T*> at;  // of each row
    for (int64_t p = 0; p < num_parts; ++p) {
        for (int64_t r = 0; r < num_rows[p]; ++r) at.push_back((const T*)parts[p] + r * size);
    }
#pragma omp parallel if (tokens * size > 32768)
    {
        std::vector<const T*> rows(most);
        std::vector<float> factors(most, 1.0f);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) {
            int64_t num = 0;
            for (int64_t k = t * most; k < (t + 1) * most; ++k) {
                if (place[k] < 0) continue;
                if (weights) factors[num] = weights[k];
                rows[num++] = at[place[k]];
            }
            add_rows(rows.data(), factors.data(), num, size, out + t * size);
        }
    }
}

template <class T>
void add_parts(const char* const* parts, int64_t num_parts, int64_t count, T* out) {
    const int64_t chunk = 64 * kHeldValues, chunks = (count + chunk - 1) / chunk;
#pragma omp parallel if (num_parts * count > 65536)
    {
        std::vector<const T*> rows(num_parts);
        const std::vector<float> ones(num_parts, 1.0f);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t begin = c * chunk, num = std::min(chunk, count - begin);
            for (int64_t p = 0; p < num_parts; ++p) rows[p] = (const T*)parts[p] + begin;
            add_rows(rows.data(), ones.data(), num_parts, num, out + begin);
        }
    }
}

}  // namespace

extern "C" {

// out [tokens, size] = the sum of each token's rows, up to `most`, weighted (or not, where weights
// are null): the rows place [tokens, most] of all parts' together, or none below 0.
void gather_sum(int32_t is_bf16, const char* const* parts, const int64_t* num_rows,
                int64_t num_parts, const int64_t* place, const float* weights, int64_t tokens,
                int64_t most, int64_t size, void* out) {
    if (is_bf16) {
        gather(parts, num_rows, num_parts, place, weights, tokens, most, size, (bf16*)out);
    } else {
        gather(parts, num_rows, num_parts, place, weights, tokens, most, size, (float*)out);
    }
}

// out [count] = the sum of all parts, each [count], in their order.
void sum_parts(int32_t is_bf16, const char* const* parts, int64_t num_parts, int64_t count,
               void* out) {
    if (is_bf16) add_parts(parts, num_parts, count, (bf16*)out);
    else add_parts(parts, num_parts, count, (float*)out);
}
}
