// Parts of a step, each in one call: a layer's attention, and the output head.

#include <utility>

#include "step.h"

namespace {

template <class T>
void attend_layer(const AttentionLayer& l, const Tokens& t, const Pages& pages, const T* x,
                  int64_t tokens, int64_t adds_input, T* out) {
    const int64_t hidden = l.query_key_value.inputs, width = l.query_key_value.outputs;
    const int64_t dim = l.head_dim, own = l.heads * dim;
    const auto normed = room<T>(l.norm ? tokens * hidden : 0);
    const auto heads = room<T>(tokens * width), attended = room<T>(tokens * own);
    if (l.norm) norm(x, hidden, tokens, 1, hidden, l.norm, l.eps, normed.get(), hidden);
    multiply(l.query_key_value, l.norm ? normed.get() : x, tokens, heads.get());
    const int64_t turned = l.heads + l.kv_heads;
    if (l.head_norms) {
        norm(heads.get(), width, tokens, turned, dim, l.head_norms, l.eps, heads.get(), width);
    }
    turn(heads.get(), width, tokens, turned, l, t);
    attend(heads.get(), width, tokens, l, t, pages, attended.get());
    multiply(l.output, attended.get(), tokens, out);
    if (adds_input) add_to(out, x, tokens * hidden);
}

// Where the greatest of x [count] stands, the first of equals; and itself, NaN if one of x is.
std::pair<int64_t, float> greatest(const float* x, int64_t count) {
    Lanes most = all(-INFINITY);
    Bits is_nan{};
    for (int64_t i = 0; i + kLanes <= count; i += kLanes) {
        const Lanes values = load(x + i);
        most = larger(most, values);
        is_nan |= (Bits)(values != values);
    }
    float value = largest(most);
    bool has_nan = false;
    for (int i = 0; i < kLanes; ++i) has_nan |= is_nan[i] != 0;
    for (int64_t i = count / kLanes * kLanes; i < count; ++i) {
        value = std::max(value, x[i]);
        has_nan |= std::isnan(x[i]);
    }
    if (has_nan) return {0, NAN};
    return {std::find(x, x + count, value) - x, value};
}

inline float* logits_of(const Matrix& m, const float* x, int64_t rows, float* logits) {
    multiply(m, x, rows, logits);
    return logits;
}
inline float* logits_of(const Matrix& m, const bf16* x, int64_t rows, float* logits) {
    const auto narrow = room<bf16>(rows * m.outputs);
    multiply(m, x, rows, narrow.get());
    widen(narrow.get(), rows * m.outputs, logits);
    return logits;
}

template <class T>
void head_rows(const Head& h, const T* x, const int64_t* rows, int64_t num,
               float* logits, int64_t* ids, double* best) {
    const int64_t hidden = h.matrix.inputs, vocab = h.matrix.outputs;
    if (!num) return;
    const auto normed = room<T>(h.norm ? num * hidden : 0);
    for (int64_t i = 0; h.norm && i < num; ++i) {
        norm(x + (rows ? rows[i] : i) * hidden, hidden, 1, 1, hidden, h.norm, h.eps,
             normed.get() + i * hidden, hidden);
    }
    logits_of(h.matrix, h.norm ? normed.get() : x, num, logits);
#pragma omp parallel for schedule(static) if (num * vocab > 65536)
    for (int64_t i = 0; i < (ids || best ? num : 0); ++i) {
        const auto [place, value] = greatest(logits + i * vocab, vocab);
        if (ids) ids[i] = std::isfinite(value) ? place : -1;
        if (best) best[2 * i] = value, best[2 * i + 1] = (double)place;
    }
}

}  // namespace

extern "C" {

// Where the tokens of a batch stand, with what its sequences have: positions computed before, new
// tokens, blocks of `size` positions [seqs, width]. To be filled: wide tables [seqs, width]; first
// (new token) and lengths [seqs]; slots [tokens]; and of each token's position the row of cosines and
// sines [.., dim], side by side [2, tokens, dim].
void place_tokens(const int64_t* computed, const int64_t* scheduled, const int32_t* tables,
                  int64_t width, int64_t seqs, int64_t tokens, int64_t size, const float* cos,
                  const float* sin, int64_t dim, int64_t* wide, int64_t* first, int64_t* lengths,
                  int64_t* slots, float* turns) {
    for (int64_t i = 0; i < seqs * width; ++i) wide[i] = tables[i];
    int64_t token = 0;
    for (int64_t s = 0; s < seqs; ++s) {
        first[s] = token;
        lengths[s] = computed[s] + scheduled[s];
        for (int64_t p = computed[s]; p < lengths[s]; ++p, ++token) {
            slots[token] = wide[s * width + p / size] * size + p % size;
            std::memcpy(turns + token * dim, cos + p * dim, dim * sizeof(float));
            std::memcpy(turns + (tokens + token) * dim, sin + p * dim, dim * sizeof(float));
        }
    }
}

// out [tokens, hidden] = attention of normed x [tokens, hidden], with x itself added or not; the
// tokens' keys and values are stored.
void attention_part(const AttentionLayer* layer, const Tokens* batch, const Pages* pages,
                    const bf16* x, int64_t tokens, int64_t adds_input, bf16* out) {
    attend_layer(*layer, *batch, *pages, x, tokens, adds_input, out);
}
void attention_part_float(const AttentionLayer* layer, const Tokens* batch, const Pages* pages,
                          const float* x, int64_t tokens, int64_t adds_input, float* out) {
    attend_layer(*layer, *batch, *pages, x, tokens, adds_input, out);
}

// logits [num, vocab] of rows [num] of x [.., hidden], which are null if there is no norm. If not
// null, ids [num]: where the greatest of each stands, -1 where that is not finite; and best
// [num, 2]: the greatest, NaN if one is, and its place.
void head_part(const Head* head, const bf16* x, const int64_t* rows, int64_t num,
               float* logits, int64_t* ids, double* best) {
    head_rows(*head, x, rows, num, logits, ids, best);
}
void head_part_float(const Head* head, const float* x, const int64_t* rows, int64_t num,
                     float* logits, int64_t* ids, double* best) {
    head_rows(*head, x, rows, num, logits, ids, best);
}
}
