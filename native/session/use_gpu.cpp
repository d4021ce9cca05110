// Sessions that attend on a GPU (gpu.h): what they take there, when they go there and when they leave.
#include "session.h"

#include "../error.h"

#include <algorithm>
#include <numeric>

namespace actqkv {

namespace {

// Chunks of the widest plan: a layer's share ends at twice the mean.
int32_t most_chunks_of(const actqkv_params & p) { return 2 * n_retrieved(p); }

// Of a device's memory, for the graphs of layers there.
uint64_t graph_bytes(const hparams & hp, const weights & w, const actqkv_params & p) {
    return w.on_device() ? runner::memory_plan(hp, w.layers[0].up->ne[1], p.n_window) : 0;
}

} // namespace

int32_t session::most_chunks() const { return std::max(most_chunks_of(params), most_chunks_of(answering)); }

actqkv_gpu_memory session::gpu_plan(const llama_model * model, const actqkv_params & wanted, const actqkv_cuda & cuda) {
    const hparams hp = read_hparams(model);
    const actqkv_params params = resolve_params(wanted, hp);
    actqkv_gpu_memory plan = gpu_attention::memory_plan(cuda, hp, params, most_chunks_of(params));
    const uint64_t graphs = graph_bytes(hp, read_weights(model, hp), params);
    for (uint64_t * bytes : {&plan.window_bytes, &plan.least_bytes, &plan.useful_bytes, &plan.planning_bytes}) {
        *bytes += *bytes > 0 ? graphs : 0;
    }
    return plan;
}

void session::use_gpu(const actqkv_cuda & cuda, int32_t device, uint64_t limit_bytes) {
    const uint64_t graphs = std::min(limit_bytes, graph_bytes(hp, tensors, params));
    make_gpu = [this, &cuda, device, rest = limit_bytes - graphs] {
        gpu.reset();
        gpu = std::make_unique<gpu_attention>(cuda, device, rest, hp, params, store, most_chunks());
        close_on_gpu();
    };
    left_gpu.clear();
    make_gpu();
}

void session::leave_gpu(const char * why) {
    left_gpu = why;
    gpu.reset();
}

// Chunks that have closed go there as well.
void session::close_on_gpu() {
    try {
        if (gpu != nullptr) {
            gpu->closed(store.n_closed());
        }
    } catch (const error & e) {
        if (e.status != ACTQKV_ERR_COMPUTE) { // not the GPU's
            throw;
        }
        leave_gpu(e.what());
    }
}

// Whether it did. All that it reads is on the CPU too, so that attention goes on there when the GPU fails.
bool session::attend_on_gpu(const window & w, int il, const actqkv_attend_args & args, const chunk_plan & plan) {
    if (gpu == nullptr || !gpu->fits(args, plan.n)) {
        return false;
    }
    try {
        gpu->attend(il, args, plan.chunks.data(), plan.n, first_chunk_span(w));
        return true;
    } catch (const error & e) {
        if (e.status != ACTQKV_ERR_COMPUTE) { // not the GPU's
            throw;
        }
        leave_gpu(e.what());
        return false;
    }
}

// Where the spans of planned chunks begin: behind the sinks'.
int32_t session::first_chunk_span(const window & w) const { return std::min<int64_t>(w.first, params.n_sink) > 0; }

// An answering step's plan and attention in one go, with one wait. Whether it was done: else nothing has changed.
bool session::answer_on_gpu(const window & w, int il, const float * q_stored) {
    const bool watched = watcher != nullptr || recorder != nullptr || il == audit_layer;
    if (gpu == nullptr || watched || !plans.is_open(il, store)) {
        return false;
    }
    const choice c = plans.choice_of(il);
    all_chunks.n = (int32_t) c.k; // whichever: planned chunks are alike in all but their place
    all_chunks.n_lists = 1;
    all_chunks.chunks.resize(c.k);
    std::iota(all_chunks.chunks.begin(), all_chunks.chunks.end(), 0);
    make_spans(w, il, all_chunks);
    actqkv_attend_args args = summing_args(w);
    if (!gpu->plans_too(c) || !gpu->fits(args, (int32_t) c.k)) {
        return false;
    }
    const float *q_far = graph.io().q_far, *q_near = graph.io().q_near;
    const gpu_queries q = {plans.scored_by(q_far, q_near), q_stored};
    try {
        gpu_planner::result found = gpu->answer(il, args, first_chunk_span(w), c, plans.entropy_temperature(), q);
        make_spans(w, il, plans.take(il, memory[il], std::move(found.chunks), found.entropy));
    } catch (const error & e) {
        if (e.status != ACTQKV_ERR_COMPUTE) { // not the GPU's
            throw;
        }
        leave_gpu(e.what());
        return false;
    }
    args.spans = spans.data();
    finish_attention(w, il, args);
    return true;
}

} // namespace actqkv
