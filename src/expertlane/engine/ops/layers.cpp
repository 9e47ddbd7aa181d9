// Layers one after the other in one call, where nothing travels between them.

#include <ctime>
#include <utility>

#include "step.h"

extern "C" {
// step.cpp and moe_step.cpp
void attention_part(const AttentionLayer*, const Tokens*, const Pages*, const bf16*, int64_t,
                    int64_t, bf16*);
void attention_part_float(const AttentionLayer*, const Tokens*, const Pages*, const float*, int64_t,
                          int64_t, float*);
int64_t local_bytes(const Router*, const Experts*, int64_t);
int64_t local_bytes_float(const Router*, const Experts*, int64_t);
void local_route(const Router*, const Experts*, const bf16*, int64_t, void*);
void local_route_float(const Router*, const Experts*, const float*, int64_t, void*);
void local_group(const Router*, const Experts*, int64_t, void*);
void local_count(const Router*, const Experts*, int64_t, const void*, int64_t*);
void local_experts(const Router*, const Experts*, int64_t, void*);
void local_experts_float(const Router*, const Experts*, int64_t, void*);
void local_combine(const Router*, const Experts*, const bf16*, int64_t, void*, bf16*);
void local_combine_float(const Router*, const Experts*, const float*, int64_t, void*, float*);
const void* local_normed(const Router*, const Experts*, int64_t, void*);
// mlp.cpp
void mlp_part(const Mlp*, const bf16*, int64_t, bf16*);
void mlp_part_float(const Mlp*, const float*, int64_t, float*);

struct Layer {
    const AttentionLayer* attention;
    const Router* router;  // null: a dense layer
    const Experts* experts;
    const Mlp* mlp;  // a dense layer's, with its norm, or the shared expert; null: there is none
    Pages pages;
    int64_t index;
    int64_t* counts;  // [experts]; pairs so far; null: nobody asks
};

// A rank's line of the progress board; the stages' numbers in the order of their calls. The meter,
// if not null: when the present stage began, which it is, and nanoseconds by stage.
struct Progress {
    int64_t *layer, *stage, *counter, *time_ns, *meter;
    int64_t stages[5];
};
}

namespace {

template <class T>
struct Kernels {
    decltype(&attention_part) attend = attention_part;
    decltype(&local_bytes) bytes = local_bytes;
    decltype(&local_route) route = local_route;
    decltype(&local_experts) compute = local_experts;
    decltype(&local_combine) combine = local_combine;
    decltype(&mlp_part) mlp = mlp_part;
};
template <>
struct Kernels<float> {
    decltype(&attention_part_float) attend = attention_part_float;
    decltype(&local_bytes_float) bytes = local_bytes_float;
    decltype(&local_route_float) route = local_route_float;
    decltype(&local_experts_float) compute = local_experts_float;
    decltype(&local_combine_float) combine = local_combine_float;
    decltype(&mlp_part_float) mlp = mlp_part_float;
};

void enter(const Progress& p, int64_t stage, int64_t layer) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *p.stage = p.stages[stage];
    *p.layer = layer;
    ++*p.counter;
    *p.time_ns = now.tv_sec * 1000000000LL + now.tv_nsec;
    if (!p.meter) return;
    p.meter[2 + p.meter[1]] += *p.time_ns - p.meter[0];
    p.meter[0] = *p.time_ns;
    p.meter[1] = p.stages[stage];
}

template <class T>
void run(const Layer* layers, int64_t count, const Tokens* batch, const Progress& progress,
         const T* x, int64_t tokens, T* out) {
    const Kernels<T> kernels;
    int64_t bytes = 0;
    bool has_shared = false;
    for (int64_t i = 0; i < count; ++i) {
        if (!layers[i].router) continue;
        bytes = std::max(bytes, kernels.bytes(layers[i].router, layers[i].experts, tokens));
        has_shared |= layers[i].mlp != nullptr;
    }
    const int64_t size = tokens * layers[0].attention->query_key_value.inputs;
    const auto memory = room<int64_t>((bytes + 7) / 8);
    const auto attended = room<T>(size), shared = room<T>(has_shared ? size : 0);
    void* work = memory.get();
    for (int64_t i = 0; i < count; ++i) {
        const Layer& l = layers[i];
        enter(progress, 0, l.index);
        kernels.attend(l.attention, batch, &l.pages, i ? out : x, tokens, 1, attended.get());
        enter(progress, 1, l.index);
        if (!l.router) {
            enter(progress, 3, l.index);
            kernels.mlp(l.mlp, attended.get(), tokens, out);
            add_to(out, attended.get(), size);
            continue;
        }
        kernels.route(l.router, l.experts, attended.get(), tokens, work);
        enter(progress, 2, l.index);
        local_group(l.router, l.experts, tokens, work);
        if (l.counts) local_count(l.router, l.experts, tokens, work, l.counts);
        enter(progress, 3, l.index);
        kernels.compute(l.router, l.experts, tokens, work);
        enter(progress, 4, l.index);
        const T* added = l.mlp ? nullptr : attended.get();
        kernels.combine(l.router, l.experts, added, tokens, work, out);
        if (!l.mlp) continue;
        enter(progress, 3, l.index);
        const auto* normed = (const T*)local_normed(l.router, l.experts, tokens, work);
        kernels.mlp(l.mlp, normed, tokens, shared.get());
        add_to(out, shared.get(), size);
        add_to(out, attended.get(), size);
    }
}

}  // namespace

extern "C" {

// out [tokens, hidden] = what the layers make of x [tokens, hidden].
void layers_part(const Layer* layers, int64_t count, const Tokens* batch, const Progress* progress,
                 const bf16* x, int64_t tokens, bf16* out) {
    run(layers, count, batch, *progress, x, tokens, out);
}
void layers_part_float(const Layer* layers, int64_t count, const Tokens* batch,
                       const Progress* progress, const float* x, int64_t tokens, float* out) {
    run(layers, count, batch, *progress, x, tokens, out);
}
}
