// Parts of an MoE block, each in one call: the router, and all of a block whose experts are here.

#include <utility>
#include <vector>

#include "step.h"

namespace {

using Choice = std::pair<float, int64_t>;

// The k largest at the front, largest first. Equal ones come as torch.topk has them on a CPU: by
// the same algorithms of the standard library.
void choose(std::vector<Choice>& from, int64_t k) {
    const auto before = [](const Choice& a, const Choice& b) {
        return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
    };
    if (k * 64 <= (int64_t)from.size()) {
        std::partial_sort(from.begin(), from.begin() + k, from.end(), before);
    } else {
        std::nth_element(from.begin(), from.begin() + k - 1, from.end(), before);
        std::sort(from.begin(), from.begin() + k - 1, before);
    }
}

void softmax(float* x, int64_t count) {
    float most = x[0], sum = 0.0f;
    for (int64_t i = 1; i < count; ++i) most = std::max(most, x[i]);
    for (int64_t i = 0; i < count; ++i) sum += x[i] = std::exp(x[i] - most);
    for (int64_t i = 0; i < count; ++i) x[i] /= sum;
}

// -inf in place of the choices outside the best groups.
void mask_groups(const Router& r, std::vector<Choice>& choices, std::vector<Choice>& groups) {
    const int64_t size = r.experts / r.groups;
    groups.resize(r.groups);
    for (int64_t g = 0; g < r.groups; ++g) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t e = g * size; e < (g + 1) * size; ++e) {
            const float score = choices[e].first;
            if (score > first) second = first, first = score;
            else second = std::max(second, score);
        }
        groups[g] = {r.adds_two ? first + second : first, g};
    }
    choose(groups, r.top_groups);
    for (int64_t i = r.top_groups; i < r.groups; ++i) {
        const int64_t g = groups[i].second;
        for (int64_t e = g * size; e < (g + 1) * size; ++e) choices[e].first = -INFINITY;
    }
}

// As `expertlane.engine.ops.router.route`: scores [experts] hold logits, and are used up.
void route_token(const Router& r, float* scores, std::vector<Choice>& choices,
                 std::vector<Choice>& groups, int64_t* ids, float* weights) {
    const bool of_chosen = r.is_softmax && r.renormalise && r.groups == 1 && !r.correction;
    if (!of_chosen && r.is_softmax) softmax(scores, r.experts);
    if (!of_chosen && !r.is_softmax) {
        for (int64_t e = 0; e < r.experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
    }
    for (int64_t e = 0; e < r.experts; ++e) {
        choices[e] = {r.correction ? scores[e] + r.correction[e] : scores[e], e};
    }
    if (r.groups > 1) mask_groups(r, choices, groups);
    choose(choices, r.top_k);
    float sum = 0.0f;
    for (int64_t k = 0; k < r.top_k; ++k) {
        ids[k] = choices[k].second;
        sum += weights[k] = scores[ids[k]];
    }
    if (of_chosen) softmax(weights, r.top_k);
    for (int64_t k = 0; k < r.top_k; ++k) {
        if (!of_chosen && r.renormalise) weights[k] /= sum + 1e-20f;  // it may have vanished
        weights[k] *= r.scale;
    }
}

template <class T>
void route_rows(const Router& r, const T* x, int64_t tokens, T* normed, int64_t* ids,
                float* weights) {
    norm(x, r.hidden, tokens, 1, r.hidden, r.norm, r.eps, normed, r.hidden);
    const auto wide = room<float>(sizeof(T) == 4 ? 0 : tokens * r.hidden);
    const auto logits = room<float>(tokens * r.experts);
    few_rows_linear(widen(normed, tokens * r.hidden, wide.get()), r.hidden, tokens, r.weight,
                    r.experts, r.hidden, r.bias, logits.get());
    std::vector<Choice> choices(r.experts), groups;
    for (int64_t t = 0; t < tokens; ++t) {
        choices.resize(r.experts);
        route_token(r, logits.get() + t * r.experts, choices, groups, ids + t * r.top_k,
                    weights + t * r.top_k);
    }
}

// What the calls for a layer whose experts are all here leave to one another.
template <class T>
struct Work {
    int64_t *ids, *row, *number, *ends;  // [tokens, top_k]; by expert the pairs' rows and numbers
    T *normed, *results;                 // [tokens, hidden], [pairs, hidden]
    float* weights;                      // [tokens, top_k]
    int64_t bytes;

    Work(const Router& r, const Experts& e, int64_t tokens, void* memory) {
        const int64_t pairs = tokens * r.top_k;
        ids = (int64_t*)memory;
        ends = ids + pairs;
        row = ends + e.count;
        number = row + pairs;
        normed = (T*)(number + pairs);
        results = normed + tokens * r.hidden;
        weights = (float*)(results + pairs * r.hidden);
        bytes = (char*)(weights + pairs) - (char*)memory;
    }
};

// Pairs by expert, stable; ends[e] is where those of expert e end.
void group(const int64_t* ids, int64_t tokens, int64_t top_k, int64_t experts, int64_t* ends,
           int64_t* row, int64_t* number) {
    const int64_t pairs = tokens * top_k;
    std::fill(ends, ends + experts, 0);
    for (int64_t p = 0; p < pairs; ++p) ++ends[ids[p]];
    int64_t begin = 0;
    for (int64_t e = 0; e < experts; ++e) begin += std::exchange(ends[e], begin);
    for (int64_t p = 0; p < pairs; ++p) {
        const int64_t at = ends[ids[p]]++;
        row[at] = p / top_k;
        number[at] = p;
    }
}

template <class T>
void combine_rows(const Router& r, const Work<T>& w, const T* x, int64_t tokens, T* out) {
#pragma omp parallel for schedule(static) if (tokens * r.top_k * r.hidden > 65536)
    for (int64_t t = 0; t < tokens; ++t) {
        const T* results = w.results + t * r.top_k * r.hidden;
        for (int64_t i = 0; i < r.hidden; i += kLanes) {
            const int64_t left = r.hidden - i, at = t * r.hidden + i;
            Lanes sum{};
            for (int64_t k = 0; k < r.top_k; ++k) {
                const Lanes row = load_some(results + k * r.hidden + i, left);
                sum = fma(all(w.weights[t * r.top_k + k]), row, sum);
            }
            if (x) sum = rounded(sum, x) + load_some(x + at, left);
            store_part(out + at, sum, left);
        }
    }
}

template <class T>
void route_here(const Router& r, const Experts& e, const T* x, int64_t tokens, void* work) {
    const Work<T> w(r, e, tokens, work);
    route_rows(r, x, tokens, w.normed, w.ids, w.weights);
}

template <class T>
void compute_here(const Router& r, const Experts& e, int64_t tokens, void* work) {
    const Work<T> w(r, e, tokens, work);
    const auto scratch = room<T>(tokens * r.top_k * e.inner);
    apply(e, w.normed, w.row, w.number, w.ends, r.hidden, scratch.get(), w.results);
}

}  // namespace

extern "C" {

// normed [tokens, hidden] of x [tokens, hidden]; ids and weights [tokens, top_k].
void router_part(const Router* router, const bf16* x, int64_t tokens, bf16* normed, int64_t* ids,
                 float* weights) {
    route_rows(*router, x, tokens, normed, ids, weights);
}
void router_part_float(const Router* router, const float* x, int64_t tokens, float* normed,
                       int64_t* ids, float* weights) {
    route_rows(*router, x, tokens, normed, ids, weights);
}

// A layer whose experts are all here: bytes of `work`, then four calls in this order.
int64_t local_bytes(const Router* r, const Experts* e, int64_t tokens) {
    return Work<bf16>(*r, *e, tokens, nullptr).bytes;
}
int64_t local_bytes_float(const Router* r, const Experts* e, int64_t tokens) {
    return Work<float>(*r, *e, tokens, nullptr).bytes;
}

void local_route(const Router* r, const Experts* e, const bf16* x, int64_t tokens, void* work) {
    route_here(*r, *e, x, tokens, work);
}
void local_route_float(const Router* r, const Experts* e, const float* x, int64_t tokens,
                       void* work) {
    route_here(*r, *e, x, tokens, work);
}

void local_group(const Router* r, const Experts* e, int64_t tokens, void* work) {
    const Work<float> w(*r, *e, tokens, work);  // whole numbers come first, whatever the type
    group(w.ids, tokens, r->top_k, e->count, w.ends, w.row, w.number);
}

// Adds the pairs of each expert to counts [experts], after local_group.
void local_count(const Router* r, const Experts* e, int64_t tokens, const void* work,
                 int64_t* counts) {
    const Work<float> w(*r, *e, tokens, (void*)work);
    for (int64_t i = 0; i < e->count; ++i) counts[i] += w.ends[i] - (i ? w.ends[i - 1] : 0);
}

void local_experts(const Router* r, const Experts* e, int64_t tokens, void* work) {
    compute_here<bf16>(*r, *e, tokens, work);
}
void local_experts_float(const Router* r, const Experts* e, int64_t tokens, void* work) {
    compute_here<float>(*r, *e, tokens, work);
}

// The normed tokens [tokens, hidden], after local_route.
const void* local_normed(const Router* r, const Experts* e, int64_t tokens, void* work) {
    return Work<float>(*r, *e, tokens, work).normed;  // which whole numbers alone come before
}

// out = weighted sums, plus x if not null; [tokens, hidden] each.
void local_combine(const Router* r, const Experts* e, const bf16* x, int64_t tokens, void* work,
                   bf16* out) {
    combine_rows(*r, Work<bf16>(*r, *e, tokens, work), x, tokens, out);
}
void local_combine_float(const Router* r, const Experts* e, const float* x, int64_t tokens,
                         void* work, float* out) {
    combine_rows(*r, Work<float>(*r, *e, tokens, work), x, tokens, out);
}
}
