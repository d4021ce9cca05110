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

gpu_planner::widths gpu_planner::widths_of(const actqkv_cuda & cuda, const hparams & hp, const actqkv_params & params,
                                           int32_t n_most) {
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
    w.key_bytes = (int64_t) bytes[FILE_KEYS];
    w.scored_bytes = (int64_t) bytes[FILE_SUMMARIES];
    if (searches(params.method)) {
        w.scored_bytes = stretches::chunk_bytes(layout);
        w.rest_bytes = stretches::rest_bytes(layout);
        w.n_picked = most.n_picked;
        const std::vector<actqkv_stretch> most_stretches = stretches::most_of(layout, w.n_chunks);
        w.n_cells = stretches::n_cells_most(most_stretches);
        actqkv_search_args args = search_args(w, most_stretches);
        args.n_cells = w.n_cells;
        args.n_chunks = w.n_chunks;
        args.n_picked = w.n_picked;
        w.search_bytes = cuda.search_scratch(&args);
    }
    return w;
}

actqkv_search_args gpu_planner::search_args(const widths & w, const std::vector<actqkv_stretch> & index) {
    actqkv_search_args args = {};
    args.n_head = w.n_head;
    args.n_head_kv = w.n_head_kv;
    args.d_head = w.d_head;
    args.stretches = index.data();
    args.n_stretches = (int32_t) index.size();
    return args;
}

uint64_t gpu_planner::lay_out(const widths & w, uint8_t * memory, arrays & to) {
    arena a = {memory};
    for (int32_t il = 0; il < w.n_layer; il++) {
        layer l = {};
        l.scored = a.take<uint8_t>(w.n_chunks * w.scored_bytes);
        l.rest = a.take<uint8_t>(w.rest_bytes);
        l.slot_of = a.take<int32_t>(w.n_chunks);
        to.layers.push_back(l);
    }
    to.folded = a.take<float>(actqkv_spread_query_size(w.n_head_kv, w.d_head));
    to.scores = a.take<float>(w.n_chunks);
    to.at = a.take<int32_t>(w.n_refined);
    to.head_scores = a.take<float>((uint64_t) w.n_head * w.n_refined);
    to.votes = a.take<float>(w.n_refined);
    to.refined_keys = a.take<uint8_t>(w.n_refined * w.key_bytes);
    to.chosen_keys = a.take<uint8_t>(w.n_most * w.key_bytes);
    to.chosen_values = a.take<uint8_t>(w.n_most * w.key_bytes);
    to.cell_scores = a.take<float>(w.n_picked > 0 ? w.n_head * w.n_cells : 0);
    to.picked = a.take<int32_t>((uint64_t) w.n_head * w.n_picked);
    to.search_scratch = a.take<uint8_t>(w.search_bytes);
    to.report = a.take<int32_t>(1 + (uint64_t) w.n_most + w.n_refined);
    return a.used;
}

uint64_t gpu_planner::bytes(const actqkv_cuda & cuda, const hparams & hp, const actqkv_params & params,
                            int32_t n_most) {
    const actqkv_method & m = params.method;
    const bool by_spreads = m.summary == ACTQKV_SUMMARY_SPREAD && m.decode == ACTQKV_RETRIEVE_TOP;
    arrays none = {};
    return (searches(m) || by_spreads) && n_most > 0 ? lay_out(widths_of(cuda, hp, params, n_most), nullptr, none) : 0;
}

gpu_planner::gpu_planner(const actqkv_cuda & cuda, actqkv_cuda_stream * compute, const kv_store & store,
                         const hparams & hp, const actqkv_params & params, int32_t n_most, uint8_t * memory)
    : cuda(cuda), compute(compute), store(store), scale(hp.attn_scale), width(widths_of(cuda, hp, params, n_most)),
      on_gpu{} {
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
    const bool same_scores = (c.n_picked > 0) == (width.n_picked > 0) && c.n_picked <= width.n_picked;
    return same_scores && c.k <= width.n_most && c.n_refined <= width.n_refined && c.n_chunks <= width.n_chunks;
}

// ---- what the plan is made of

uint64_t gpu_planner::bring(int il) {
    if (on_gpu.layers[il].n_there == store.n_closed()) {
        return 0;
    }
    return width.n_picked > 0 ? bring_index(il) : bring_spreads(il);
}

uint64_t gpu_planner::bring_spreads(int il) {
    layer & l = on_gpu.layers[il];
    const int64_t from = l.n_there, to = store.n_closed(), bytes = width.scored_bytes;
    check(cuda.copy(compute, l.scored + from * bytes, store.spreads(il) + from * bytes, (to - from) * bytes));
    l.n_there = to;
    return (to - from) * bytes;
}

uint64_t gpu_planner::copy_stretch(layer & l, const actqkv_stretch & from, uint8_t * to) {
    const uint64_t bytes = width.n_head_kv * from.head_stride;
    check(cuda.copy(compute, to, from.data, bytes));
    l.index.push_back(from);
    l.index.back().data = to;
    return bytes;
}

// Those that are no longer there have made room for longer ones.
uint64_t gpu_planner::bring_stretches(int il) {
    if (width.n_picked == 0) {
        return 0;
    }
    layer & l = on_gpu.layers[il];
    const std::vector<actqkv_stretch> & made = store.index(il);
    const auto is_same = [](const actqkv_stretch & a, const actqkv_stretch & b) {
        return a.first_chunk == b.first_chunk && a.n_keys == b.n_keys && a.in_order == 0 && b.in_order == 0;
    };
    const auto differ = std::mismatch(made.begin(), made.end(), l.index.begin(), l.index.end(), is_same);
    l.index.erase(differ.second, l.index.end());
    l.n_there = -1; // some of it, until a step brings keys in order too
    uint64_t n_copied = 0;
    for (auto from = differ.first; from != made.end() && from->in_order == 0; from++) {
        n_copied += copy_stretch(l, *from, l.scored + from->first_chunk * width.scored_bytes);
    }
    return n_copied;
}

// Keys in order are copied whenever there are more.
uint64_t gpu_planner::bring_index(int il) {
    layer & l = on_gpu.layers[il];
    const std::vector<actqkv_stretch> & wanted = store.index(il);
    uint64_t n_copied = bring_stretches(il);
    if (!wanted.empty() && wanted.back().in_order != 0) {
        n_copied += copy_stretch(l, wanted.back(), l.rest);
    }
    l.n_cells = 0;
    for (int32_t g = 0; g < width.n_head_kv; g++) {
        int64_t n_divided;
        const int64_t n = actqkv_search_cells(wanted.data(), (int32_t) wanted.size(), g, width.d_head, &n_divided);
        l.n_cells = std::max(l.n_cells, n);
    }
    l.n_there = store.n_closed();
    return n_copied;
}

void gpu_planner::forget_from(int64_t n_closed) {
    const auto is_kept = [&](const actqkv_stretch & s) {
        return s.in_order == 0 && s.first_chunk + s.n_keys / width.n_chunk_tokens <= n_closed;
    };
    for (layer & l : on_gpu.layers) {
        l.n_there = width.n_picked > 0 ? -1 : std::min(l.n_there, n_closed); // keys in order are gone
        l.index.erase(std::find_if_not(l.index.begin(), l.index.end(), is_kept), l.index.end());
    }
}

void gpu_planner::set_slots(int il, const std::vector<int32_t> & slot_of) {
    check(cuda.copy(compute, on_gpu.layers[il].slot_of, slot_of.data(), slot_of.size() * sizeof(int32_t)));
}

// ---- a plan

void gpu_planner::make_scores(const layer & l, const choice & c, const float * query) {
    const int32_t G = width.n_head_kv, d = width.d_head;
    check(cuda.spread_query(compute, query, width.n_head, G, d, on_gpu.folded));
    check(cuda.spread_scores(compute, on_gpu.folded, l.scored, c.n_chunks, G, d, on_gpu.scores));
}

// Votes of all chunks, by the index.
void gpu_planner::search(const layer & l, const choice & c, const float * query) {
    actqkv_search_args args = search_args(width, l.index);
    args.scale = scale;
    args.query = query;
    args.n_chunks = c.n_chunks;
    args.n_cells = l.n_cells;
    args.scores = on_gpu.cell_scores;
    args.n_picked = c.n_picked;
    args.picked = on_gpu.picked;
    args.votes = on_gpu.scores;
    args.scratch = on_gpu.search_scratch;
    check(cuda.search_score(compute, &args));
    check(cuda.search_vote(compute, &args));
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
    if (c.n_picked == 0) {
        make_scores(l, c, q.q_scored);
    } else if (c.k < c.n_chunks) {
        search(l, c, q.q_scored);
    }
    if (temperature > 0) {
        check(cuda.entropy(compute, on_gpu.scores, c.n_chunks, temperature, (float *) on_gpu.report));
    }
    // Every stage leaves its chunks where the next one looks, the last one in chosen().
    const bool by_keys = n_refined > c.k;
    int32_t * last = by_keys ? refined() : chosen();
    check(cuda.top_k(compute, on_gpu.scores, c.n_chunks, (int32_t) n_refined, last));
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
