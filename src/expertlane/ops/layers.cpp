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
void local_experts(const Router*, const Experts*, int64_t, void*);
void local_experts_float(const Router*, const Experts*, int64_t, void*);
void local_combine(const Router*, const Experts*, const bf16*, int64_t, void*, bf16*);
void local_combine_float(const Router*, const Experts*, const float*, int64_t, void*, float*);

struct Layer {
    const AttentionLayer* attention;
    const Router* router;
    const Experts* experts;
    Pages pages;
    int64_t index;
};

// A rank's line of the progress board; the stages' numbers in the order of their calls.
struct Progress {
    int64_t *layer, *stage, *counter, *time_ns;
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
};
template <>
struct Kernels<float> {
    decltype(&attention_part_float) attend = attention_part_float;
    decltype(&local_bytes_float) bytes = local_bytes_float;
    decltype(&local_route_float) route = local_route_float;
    decltype(&local_experts_float) compute = local_experts_float;
    decltype(&local_combine_float) combine = local_combine_float;
};

void enter(const Progress& p, int64_t stage, int64_t layer) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *p.stage = p.stages[stage];
    *p.layer = layer;
    ++*p.counter;
    *p.time_ns = now.tv_sec * 1000000000LL + now.tv_nsec;
}

template <class T>
void run(const Layer* layers, int64_t count, const Tokens* batch, const Progress& progress,
         const T* x, int64_t tokens, T* out) {
    const Kernels<T> kernels;
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; ++i) {
        bytes = std::max(bytes, kernels.bytes(layers[i].router, layers[i].experts, tokens));
    }
    const auto memory = room<int64_t>((bytes + 7) / 8);
    const auto attended = room<T>(tokens * layers[0].router->hidden);
    void* work = memory.get();
    for (int64_t i = 0; i < count; ++i) {
        const Layer& l = layers[i];
        enter(progress, 0, l.index);
        kernels.attend(l.attention, batch, &l.pages, i ? out : x, tokens, 1, attended.get());
        enter(progress, 1, l.index);
        kernels.route(l.router, l.experts, attended.get(), tokens, work);
        enter(progress, 2, l.index);
        local_group(l.router, l.experts, tokens, work);
        enter(progress, 3, l.index);
        kernels.compute(l.router, l.experts, tokens, work);
        enter(progress, 4, l.index);
        kernels.combine(l.router, l.experts, attended.get(), tokens, work, out);
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
