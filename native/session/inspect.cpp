// What a session tells of itself beside its results: true attention mass, records of windows, audits of the
// retrieval, which tokens an answer attended to, and statistics.
#include "session.h"

#include <chrono>

namespace actqkv {

// Attention over all chunks, by `lists` equal lists: for its weights only. The output that it leaves is overwritten by
// the layer's own.
actqkv_attend_args session::everything(const window & w, int il, int32_t lists) {
    const int64_t N = store.n_closed();
    all_chunks.n = (int32_t) N;
    all_chunks.n_lists = lists;
    all_chunks.chunks.resize(N * lists);
    for (int64_t i = 0; i < N * lists; i++) {
        all_chunks.chunks[i] = (int32_t) (i % N);
    }
    make_spans(w, il, all_chunks);
    span_mass.resize(spans.size());
    actqkv_attend_args args = attend_args(w);
    args.span_mass = span_mass.data();
    return args;
}

const std::vector<double> & session::true_mass(const window & w, int il, bool per_head) {
    const int64_t N = store.n_closed(), before = params.n_sink > 0 ? 1 : 0; // the span of the sinks
    const actqkv_attend_args args = everything(w, il, per_head ? hp.n_head_kv : 1);
    actqkv_attend(actqkv_impl_best(), &args);
    chunk_mass.resize(N * all_chunks.n_lists);
    for (int64_t i = 0; i < all_chunks.n_lists; i++) {
        std::copy_n(span_mass.begin() + i * args.n_spans + before, N, chunk_mass.begin() + i * N);
    }
    return chunk_mass;
}

// ---- records

void session::set_recorder(actqkv_record_fn fn, void * user, int32_t mass) {
    recorder = fn;
    recorder_user = user;
    recorded_mass = fn != nullptr ? mass : ACTQKV_MASS_NONE;
    try {
        reserve_scratch();
    } catch (...) {
        recorder = nullptr;
        recorded_mass = ACTQKV_MASS_NONE;
        throw;
    }
}

void session::record(const window & w, int il, const chunk_plan & plan) {
    const int64_t N = store.n_closed();
    const bool mass = recorded_mass == ACTQKV_MASS_ALL || (recorded_mass == ACTQKV_MASS_ANSWERS && w.decode);
    const planner::trace & trace = plans.last();
    actqkv_record r = {};
    r.n_past = w.first;
    r.n_tokens = w.m;
    r.phase = tokens.phases[w.first];
    r.layer = il;
    r.n_lists = plan.n_lists;
    r.n_chunks = N;
    r.n_chosen = plan.n;
    r.chosen = plan.n < N && plan.n > 0 ? plan.chunks.data() : nullptr;
    r.bias = trace.bias;
    r.weights = trace.weights;
    r.mass = mass && N > 0 ? true_mass(w, il, plan.n_lists > 1).data() : nullptr;
    r.entropy = trace.entropy;
    recorder(recorder_user, &r);
}

// ---- audits

void session::set_audit(int32_t every) {
    audit_every = every;
    n_audit_steps = n_audit_turns = 0;
    try {
        reserve_scratch();
    } catch (...) {
        audit_every = 0;
        throw;
    }
}

// Whose turn it is in this window, if anybody's: one layer after another, then the next KV head of each.
void session::begin_audit(const window & w) {
    audit_layer = -1;
    if (audit_every == 0 || !w.decode || store.n_closed() == 0 || ++n_audit_steps % audit_every != 0) {
        return;
    }
    const int64_t n_dense = answering.method.n_dense_layers, n_layers = hp.n_layer - n_dense;
    if (n_layers > 0) {
        audit_layer = (int) (n_dense + n_audit_turns % n_layers);
        audit_head = (int) (n_audit_turns / n_layers % hp.n_head_kv);
        n_audit_turns++;
    }
}

// Recall of one KV head in a window of one token: as if the model had this head alone.
void session::audit(const window & w, int il, const chunk_plan & plan) {
    const auto start = std::chrono::steady_clock::now();
    const int64_t N = store.n_closed(), before = params.n_sink > 0 ? 1 : 0, g = audit_head;
    const int32_t r = hp.n_head / hp.n_head_kv;
    actqkv_attend_args args = everything(w, il, 1);
    for (actqkv_span & s : spans) {
        s.far = s.far != nullptr ? s.far + g * s.far_stride : nullptr;
        s.near = s.near != nullptr ? s.near + g * s.near_stride : nullptr;
        s.v += g * s.v_stride;
    }
    args.n_head = r;
    args.n_head_kv = 1;
    args.q_near += g * r * hp.d_head;
    args.q_far += g * r * hp.d_head;
    args.q_turned += args.q_turned != nullptr ? g * r * hp.d_head : 0;
    args.k_window += g * args.window_stride;
    args.v_window += g * args.window_stride;
    actqkv_attend(actqkv_impl_best(), &args);
    const double * mass = span_mass.data() + before;
    double all = 0.0, chosen = 0.0;
    for (int64_t b = 0; b < N; b++) {
        all += mass[b];
    }
    const int32_t * list = plan.chunks.data() + (plan.n_lists > 1 ? g * plan.n : 0);
    for (int32_t i = 0; i < plan.n; i++) {
        chosen += mass[list[i]];
    }
    if (all > 0.0) { // else there is nothing to be found
        counts.n_audits++;
        counts.audit_recall += chosen / all;
        counts.audit_recall_last = chosen / all;
        counts.audit_layer = il;
        counts.audit_head = audit_head;
    }
    counts.audit_ms += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

// ---- sources

void session::begin_sources() {
    recording = true;
    sources_from = tokens.size();
    sources.clear();
}

std::vector<double> session::end_sources() {
    recording = false;
    source_weights.clear();
    return std::move(sources);
}

// Has attention leave the weights of all keys, not of the recent ones alone.
void session::keep_weights(actqkv_attend_args & args) {
    int64_t n_keys = 1; // the window's own
    for (int32_t s = 0; s < args.n_spans; s++) {
        n_keys += args.spans[s].n_tok;
    }
    source_weights.resize(hp.n_head * n_keys);
    args.weight_sums = source_weights.data();
    args.sum_stride = n_keys;
    args.first_summed = 0;
}

// Squares: a head that has found something puts most of its weight on few tokens and counts fully, one that spreads it
// over all that is attended counts next to nothing.
void session::add_sources(const window & w, const actqkv_attend_args & args) {
    const int64_t n_keys = args.sum_stride, n_summed = w.first + w.m - summed_from; // of these the store sums weights
    const int64_t stride = params.n_local + params.n_window;
    const int n_sharing = hp.n_head / n_lists; // query heads of one list
    const double share = 1.0 / (hp.n_head * hp.n_layer);
    sources.resize(w.first);
    for (int i = 0; i < n_lists; i++) {
        source_squares.assign(n_keys, 0.0f);
        for (int h = i * n_sharing; h < (i + 1) * n_sharing; h++) {
            const float * weight = args.weight_sums + h * n_keys;
            for (int64_t j = 0; j < n_keys; j++) {
                source_squares[j] += weight[j] * weight[j];
            }
            if (store.sums_attention()) {
                std::copy_n(weight + n_keys - n_summed, n_summed, sums.begin() + h * stride);
            }
        }
        const float * square = source_squares.data();
        for (int32_t s = 0; s < args.n_spans; s++) {
            const actqkv_span & span = args.spans[i * args.span_stride + s];
            for (int32_t t = 0; t < span.n_tok; t++) {
                sources[span.first + t] += *square++ * share;
            }
        }
    }
}

// ---- statistics

actqkv_stats session::stats() const {
    actqkv_stats s = counts;
    s.attended_tokens_mean = attended_n > 0 ? counts.attended_tokens_mean / attended_n : 0.0;
    s.audit_recall = counts.n_audits > 0 ? counts.audit_recall / counts.n_audits : 0.0;
    s.dense_tokens_mean = dense_n > 0 ? counts.dense_tokens_mean / dense_n : 0.0;
    s.probe = {plans.probe_stage.ms, plans.probe_stage.bytes};
    s.score = {plans.score_stage.ms, plans.score_stage.bytes};
    s.refine = {plans.refine_stage.ms, plans.refine_stage.bytes};
    s.gpu = gpu != nullptr ? gpu->stats() : actqkv_gpu_stats{};
    s.gpu.memory_bytes += graph.device_bytes();
    return s;
}

void session::reset_stats() {
    counts = {};
    attended_n = dense_n = 0;
    plans.probe_stage = plans.score_stage = plans.refine_stage = {};
    if (gpu != nullptr) {
        gpu->reset_stats();
    }
}

} // namespace actqkv
