#include "gpu_plan.h"

#include "../error.h"

#include <algorithm>
#include <cstring>

namespace actqkv {
namespace {

// Hands out arrays of one piece of memory; with base NULL it only counts.
struct arena {
    uint8_t * base;
    uint64_t used = 0;

    template <typename T> T * take(uint64_t n) {
        T * array = base == nullptr ? nullptr : (T *) (base + used);
        used += padded(n * sizeof(T));
        return array;
    }
};

} // namespace

gpu_planner::widths gpu_planner::widths_of(const hparams & hp, const actqkv_params & params, int32_t n_most) {
    const kv_layout layout = kv_store::layout_for(hp, params);
    const auto bytes = kv_store::chunk_bytes(hp, params);
    widths w = {};
    w.n_layer = hp.n_layer;
    w.n_head = hp.n_head;
    w.n_head_kv = hp.n_head_kv;
    w.d_head = hp.d_head;
    w.n_chunk_tokens = layout.n_chunk_tokens;
    w.kv_type = layout.kv_type;
    w.n_most = n_most;
    w.n_chunks = layout.n_chunks_max(params.n_ctx);
    const choice most = choice_of(params.method, n_most, w.n_chunks);
    w.n_refined = (int32_t) most.n_refined;
    w.n_sketched = (int32_t) std::max(most.n_refined, most.n_sketched);
    w.spread_bytes = (int64_t) bytes[FILE_SUMMARIES];
    w.sketch_bytes = (int64_t) bytes[FILE_SKETCHES];
    w.key_bytes = (int64_t) bytes[FILE_KEYS];
    return w;
}

uint64_t gpu_planner::lay_out(const widths & w, uint8_t * memory, arrays & to) {
    arena a = {memory};
    for (int32_t il = 0; il < w.n_layer; il++) {
        layer l = {};
        l.spreads = a.take<uint8_t>(w.n_chunks * w.spread_bytes);
        l.sketches = a.take<uint8_t>(w.n_chunks * w.sketch_bytes);
        l.slot_of = a.take<int32_t>(w.n_chunks);
        to.layers.push_back(l);
    }
    to.folded = a.take<float>(actqkv_spread_query_size(w.n_head_kv, w.d_head));
    to.scores = a.take<float>(w.n_chunks);
    to.candidates = a.take<int32_t>(w.n_sketched);
    to.at = a.take<int32_t>(w.n_sketched);
    to.head_scores = a.take<float>((uint64_t) w.n_head * w.n_sketched);
    to.votes = a.take<float>(w.n_sketched);
    to.refined_keys = a.take<uint8_t>(w.n_refined * w.key_bytes);
    to.chosen_keys = a.take<uint8_t>(w.n_most * w.key_bytes);
    to.chosen_values = a.take<uint8_t>(w.n_most * w.key_bytes);
    to.report = a.take<int32_t>(1 + (uint64_t) w.n_most + w.n_refined);
    return a.used;
}

uint64_t gpu_planner::bytes(const hparams & hp, const actqkv_params & params, int32_t n_most) {
    const actqkv_method & m = params.method;
    const bool by_spreads = m.summary == ACTQKV_SUMMARY_SPREAD && m.decode == ACTQKV_RETRIEVE_TOP;
    arrays none = {};
    return by_spreads && n_most > 0 ? lay_out(widths_of(hp, params, n_most), nullptr, none) : 0;
}

gpu_planner::gpu_planner(const actqkv_cuda & cuda, actqkv_cuda_stream * compute, const kv_store & store,
                         const hparams & hp, const actqkv_params & params, int32_t n_most, uint8_t * memory)
    : cuda(cuda), compute(compute), store(store), scale(hp.attn_scale), width(widths_of(hp, params, n_most)), on_gpu{} {
    lay_out(width, memory, on_gpu);
    for (const layer & l : on_gpu.layers) {
        check(cuda.fill(compute, l.slot_of, 0xff, width.n_chunks * sizeof(int32_t))); // -1
    }
}

void gpu_planner::check(int32_t status) const {
    if (status != 0) {
        throw error(ACTQKV_ERR_COMPUTE, format("GPU: %s, where plans are made", cuda.error_text(status)));
    }
}

bool gpu_planner::has_room(const choice & c) const {
    const bool sketched = c.n_sketched == c.n_refined || width.sketch_bytes > 0;
    return sketched && c.k <= width.n_most && c.n_refined <= width.n_refined && c.n_sketched <= width.n_sketched &&
           c.n_chunks <= width.n_chunks;
}

// ---- what the plan is made of

uint64_t gpu_planner::bring(int il) {
    layer & l = on_gpu.layers[il];
    const int64_t from = l.n_there, to = store.n_closed();
    if (to <= from) {
        return 0;
    }
    const int64_t sb = width.spread_bytes, kb = width.sketch_bytes;
    check(cuda.copy(compute, l.spreads + from * sb, store.spreads(il) + from * sb, (to - from) * sb));
    if (kb > 0) {
        check(cuda.copy(compute, l.sketches + from * kb, store.sketches(il) + from * kb, (to - from) * kb));
    }
    l.n_there = to;
    return (to - from) * (sb + kb);
}

void gpu_planner::forget_from(int64_t n_closed) {
    for (layer & l : on_gpu.layers) {
        l.n_there = std::min(l.n_there, n_closed);
    }
}

void gpu_planner::set_slots(int il, const std::vector<int32_t> & slot_of) {
    check(cuda.copy(compute, on_gpu.layers[il].slot_of, slot_of.data(), slot_of.size() * sizeof(int32_t)));
}

// ---- a plan

void gpu_planner::make_scores(const layer & l, const choice & c, const float * query) {
    const int32_t G = width.n_head_kv, d = width.d_head;
    check(cuda.spread_query(compute, query, width.n_head, G, d, on_gpu.folded));
    check(cuda.spread_scores(compute, on_gpu.folded, l.spreads, c.n_chunks, G, d, on_gpu.scores));
}

// Of n candidates, the k to whose best keys all query heads together pay the most attention, by head_scores; where among
// the candidates they are is left in `at`.
void gpu_planner::keep(const int32_t * candidates, int64_t n, int64_t k, int32_t * kept) {
    check(cuda.elect(compute, on_gpu.head_scores, (int32_t) n, width.n_head, (int32_t) k, candidates, on_gpu.votes,
                     on_gpu.at, kept));
}

void gpu_planner::make(int il, const choice & c, float temperature, const gpu_queries & q, const uint8_t * slots) {
    const layer & l = on_gpu.layers[il];
    const int32_t H = width.n_head, G = width.n_head_kv, d = width.d_head, tokens = width.n_chunk_tokens;
    const int64_t bytes = width.key_bytes, n_refined = c.n_refined;
    make_scores(l, c, q.q_summaries);
    if (temperature > 0) {
        check(cuda.entropy(compute, on_gpu.scores, c.n_chunks, temperature, (float *) on_gpu.report));
    }
    // Every stage leaves its chunks where the next one looks, the last one in chosen().
    const bool sketched = c.n_sketched > n_refined, by_keys = n_refined > c.k;
    int32_t *last = by_keys ? refined() : chosen(), *first = sketched ? on_gpu.candidates : last;
    check(cuda.top_k(compute, on_gpu.scores, c.n_chunks, (int32_t) c.n_sketched, first));
    if (sketched) {
        check(cuda.sketch_scores(compute, q.q_keys, l.sketches, first, (int32_t) c.n_sketched, H, G, d, tokens, scale,
                                 on_gpu.head_scores));
        keep(first, c.n_sketched, n_refined, last);
    }
    const auto gather = [&](const uint8_t * there, const uint8_t * rest, const int32_t * chunks, int64_t n,
                            uint8_t * to) {
        check(cuda.gather(compute, there, 2 * bytes, l.slot_of, rest, chunks, (int32_t) n, bytes, to));
    };
    const auto host = store.chunk_arrays(il);
    if (by_keys) {
        gather(slots, host[FILE_KEYS].data, last, n_refined, on_gpu.refined_keys);
        check(cuda.refine(compute, q.q_chunks, width.kv_type, on_gpu.refined_keys, nullptr, (int32_t) n_refined, H, G,
                          d, tokens, scale, on_gpu.head_scores));
        keep(last, n_refined, c.k, chosen());
        check(cuda.gather(compute, on_gpu.refined_keys, bytes, nullptr, nullptr, on_gpu.at, (int32_t) c.k, bytes,
                          on_gpu.chosen_keys));
    } else {
        gather(slots, host[FILE_KEYS].data, chosen(), c.k, on_gpu.chosen_keys);
    }
    gather(slots + bytes, host[FILE_VALUES].data, chosen(), c.k, on_gpu.chosen_values);
}

gpu_planner::result gpu_planner::read_report(const choice & c, const void * copy) const {
    result r = {};
    const int32_t *chunks = (const int32_t *) copy + 1, *candidates = chunks + width.n_most;
    memcpy(&r.entropy, copy, sizeof(float));
    r.chunks.assign(chunks, chunks + c.k);
    if (c.n_refined > c.k) {
        r.refined.assign(candidates, candidates + c.n_refined);
    }
    return r;
}

} // namespace actqkv
