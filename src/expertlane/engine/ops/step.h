// What parts of a layer are made of: the kernels of this library, by the type of their values, and
// the structures of `step.py`.

#pragma once

#include <memory>

#include "lanes.h"

extern "C" {
// products.cpp and few_rows.cpp
void linear(const bf16*, int64_t, int64_t, const bf16*, int64_t, int64_t, const float*, bf16*);
void few_rows_linear(const float*, int64_t, int64_t, const float*, int64_t, int64_t, const float*,
                     float*);
void experts(const bf16*, int64_t, const int64_t*, const int64_t*, const int64_t*, int64_t,
             const bf16* const*, const bf16* const*, const bf16* const*, int64_t, int64_t, bf16*,
             bf16*);
void few_rows_experts(const float*, int64_t, const int64_t*, const int64_t*, const int64_t*,
                      int64_t, const float* const*, const float* const*, const float* const*,
                      int64_t, int64_t, float*, float*);
// narrow.cpp
void narrow_linear(int32_t, int32_t, const void*, int64_t, int64_t, const uint8_t*, const float*,
                   int64_t, int64_t, int64_t, int64_t, const float*, void*);
void narrow_experts(int32_t, int32_t, const void*, int64_t, const int64_t*, const int64_t*,
                    const int64_t*, int64_t, const void*, const void*, const void*, int64_t,
                    int64_t, int64_t, int64_t, int64_t, void*);
// rows.cpp
void rms_norm(const bf16*, int64_t, int64_t, int64_t, int64_t, const float*, float, bf16*, int64_t);
void rms_norm_float(const float*, int64_t, int64_t, int64_t, int64_t, const float*, float, float*,
                    int64_t);
void rotate(bf16*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, const float*,
            int64_t);
void rotate_float(float*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, const float*,
                  int64_t);
// attention.cpp
void attention(const bf16*, int64_t, const bf16*, int64_t, const bf16*, int64_t, const int64_t*,
               int64_t, void*, void*, uint8_t*, uint8_t*, const int64_t*, int64_t, const int64_t*,
               const int64_t*, const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
               float, int64_t, const float*, bf16*);
void attention_float(const float*, int64_t, const float*, int64_t, const float*, int64_t,
                     const int64_t*, int64_t, void*, void*, uint8_t*, uint8_t*, const int64_t*,
                     int64_t, const int64_t*, const int64_t*, const int64_t*, int64_t, int64_t,
                     int64_t, int64_t, int64_t, int64_t, float, int64_t, const float*, float*);

// The structures are those of `step.py`; a pointer may be null where a model has no such thing.

struct Matrix {
    const void* weight;
    const float *bias, *scales;  // scales null: the weight has the type of rows
    int64_t outputs, inputs, group, first, is_float8;
};

struct AttentionLayer {
    Matrix query_key_value, output;
    const float *norm, *head_norms, *sinks;  // norm null: rows come normed
    int64_t heads, kv_heads, head_dim, rotary_dim, interleave, window;
    float eps, scale;
};

struct Tokens {  // of a batch; the same in all layers
    const float *cos, *sin;
    const int64_t *slots, *tables, *first_token, *scheduled, *lengths;
    int64_t width, seqs;
};

struct Pages {  // scales null: of the type of rows
    void *keys, *values;
    uint8_t *key_scales, *value_scales;
    int64_t block_size;
};

struct Router {
    const float *norm, *weight, *bias, *correction;
    int64_t hidden, experts, top_k, is_softmax, renormalise, groups, top_groups, adds_two;
    float eps, scale;
};

struct Head {
    Matrix matrix;
    const float* norm;  // null: rows come normed
    float eps;
};

struct Experts {  // gate null: no gates
    const void *const *gate, *const *up, *const *down;
    int64_t count, inner, is_narrow, is_float8, hidden_group, inner_group, inner_first;
};

struct Mlp {  // norm null: rows come normed; scale null: the output is not multiplied
    const Experts* experts;  // one
    const float* norm;
    const void* scale;
    int64_t hidden;
    float eps;
};
}

namespace {

template <class T>
bool multiply_narrow(const Matrix& m, const T* x, int64_t rows, T* out) {
    if (!m.scales) return false;
    narrow_linear((int32_t)m.is_float8, sizeof(T) == 2, x, m.inputs, rows,
                  (const uint8_t*)m.weight, m.scales, m.outputs, m.inputs, m.group, m.first, m.bias,
                  out);
    return true;
}

inline void multiply(const Matrix& m, const bf16* x, int64_t rows, bf16* out) {
    if (multiply_narrow(m, x, rows, out)) return;
    linear(x, m.inputs, rows, (const bf16*)m.weight, m.outputs, m.inputs, m.bias, out);
}
inline void multiply(const Matrix& m, const float* x, int64_t rows, float* out) {
    if (multiply_narrow(m, x, rows, out)) return;
    few_rows_linear(x, m.inputs, rows, (const float*)m.weight, m.outputs, m.inputs, m.bias, out);
}

template <class T>
bool apply_narrow(const Experts& e, const T* x, const int64_t* from, const int64_t* to,
                  const int64_t* ends, int64_t hidden, T* out) {
    if (!e.is_narrow) return false;
    narrow_experts((int32_t)e.is_float8, sizeof(T) == 2, x, hidden, from, to, ends, e.count,
                   e.gate, e.up, e.down, hidden, e.inner, e.hidden_group, e.inner_group,
                   e.inner_first, out);
    return true;
}

inline void apply(const Experts& e, const bf16* x, const int64_t* from, const int64_t* to,
                  const int64_t* ends, int64_t hidden, bf16* scratch, bf16* out) {
    if (apply_narrow(e, x, from, to, ends, hidden, out)) return;
    experts(x, hidden, from, to, ends, e.count, (const bf16* const*)e.gate,
            (const bf16* const*)e.up, (const bf16* const*)e.down, hidden, e.inner, scratch, out);
}
inline void apply(const Experts& e, const float* x, const int64_t* from, const int64_t* to,
                  const int64_t* ends, int64_t hidden, float* scratch, float* out) {
    if (apply_narrow(e, x, from, to, ends, hidden, out)) return;
    few_rows_experts(x, hidden, from, to, ends, e.count, (const float* const*)e.gate,
                     (const float* const*)e.up, (const float* const*)e.down, hidden, e.inner,
                     scratch, out);
}

inline void norm(const bf16* x, int64_t stride, int64_t rows, int64_t groups, int64_t size,
                 const float* weight, float eps, bf16* out, int64_t out_stride) {
    rms_norm(x, stride, rows, groups, size, weight, eps, out, out_stride);
}
inline void norm(const float* x, int64_t stride, int64_t rows, int64_t groups, int64_t size,
                 const float* weight, float eps, float* out, int64_t out_stride) {
    rms_norm_float(x, stride, rows, groups, size, weight, eps, out, out_stride);
}

inline void turn(bf16* x, int64_t stride, int64_t tokens, int64_t heads, const AttentionLayer& l,
                 const Tokens& t) {
    rotate(x, stride, tokens, heads, l.head_dim, l.rotary_dim, t.cos, t.sin, l.interleave);
}
inline void turn(float* x, int64_t stride, int64_t tokens, int64_t heads, const AttentionLayer& l,
                 const Tokens& t) {
    rotate_float(x, stride, tokens, heads, l.head_dim, l.rotary_dim, t.cos, t.sin, l.interleave);
}

// Of heads [tokens, width]: queries, then new keys, then new values, which are stored.
template <class T, class Kernel>
void attend_with(Kernel kernel, const T* heads, int64_t width, int64_t tokens,
                 const AttentionLayer& l, const Tokens& t, const Pages& p, T* out) {
    const T *key = heads + l.heads * l.head_dim, *value = key + l.kv_heads * l.head_dim;
    kernel(heads, width, key, width, value, width, t.slots, tokens, p.keys, p.values,
           p.key_scales, p.value_scales, t.tables, t.width, t.first_token, t.scheduled,
           t.lengths, t.seqs, l.heads, l.kv_heads, l.head_dim, l.head_dim, p.block_size,
           l.scale, l.window, l.sinks, out);
}
inline void attend(const bf16* heads, int64_t width, int64_t tokens, const AttentionLayer& l,
                   const Tokens& t, const Pages& p, bf16* out) {
    attend_with(attention, heads, width, tokens, l, t, p, out);
}
inline void attend(const float* heads, int64_t width, int64_t tokens, const AttentionLayer& l,
                   const Tokens& t, const Pages& p, float* out) {
    attend_with(attention_float, heads, width, tokens, l, t, p, out);
}

template <class T>
std::unique_ptr<T[]> room(int64_t count) {  // not set to anything
    return std::unique_ptr<T[]>(new T[count]);
}

// As a value of type T has it.
inline Lanes rounded(Lanes x, const float*) { return x; }
inline Lanes rounded(Lanes x, const bf16*) {
    bf16 values[kLanes];
    store(values, x);
    return load(values);
}

template <class T>
Lanes load_some(const T* p, int64_t count) {
    return count >= kLanes ? load(p) : load_part(p, count);
}

// x += y.
template <class T>
void add_to(T* x, const T* y, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
        store_part(x + i, load_some(x + i, count - i) + load_some(y + i, count - i), count - i);
    }
}

inline const float* widen(const float* x, int64_t, float*) { return x; }
inline const float* widen(const bf16* x, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += kLanes) {
        store_part(to + i, load_some(x + i, count - i), count - i);
    }
    return to;
}

}  // namespace
