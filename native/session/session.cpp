#include "session.h"

#include "../error.h"
#include "../kernels/parallel.h"

#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>

namespace actqkv {
namespace {

double now_ms() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

// Long readings keep a checkpoint at window boundaries this many tokens apart, before thinning.
constexpr int64_t CHECKPOINT_TOKENS = 4096;

int64_t most_keys(const actqkv_params & p, bool everything) {
    const int64_t some = 2 * (int64_t) p.budget + 2 * p.method.n_chunk_tokens + p.n_window;
    return (everything ? p.n_ctx : std::min<int64_t>(p.n_ctx, some)) + p.n_window;
}

uint64_t scratch_bytes(const hparams & hp, const actqkv_params & p, bool everything) {
    const int64_t keys = most_keys(p, everything);
    return actqkv_attend_scratch(hp.n_head, hp.n_head_kv, hp.d_head, p.n_window, keys, p.n_threads);
}

} // namespace

session::session(const llama_model * model, const actqkv_params & wanted)
    : model(model), hp(read_hparams(model)), params(resolve_params(wanted, hp)), answering(params),
      tensors(read_weights(model, hp)), store(hp, params), plans(hp, params, answering),
      graph(hp, tensors, params.n_window, params.n_local, params.n_threads), memory(hp.n_layer) {
    const size_t kv = (size_t) params.n_window * hp.n_kv_channels();
    for (auto * buffer : {&k_near, &k_far, &v}) {
        buffer->resize(kv);
    }
    q_turned.resize(params.kv_type != ACTQKV_KV_F16 ? params.n_window * hp.n_channels() : 0);
    sums.resize(store.sums_attention() ? (size_t) hp.n_head * (params.n_local + params.n_window) : 0);
    reserve_scratch();
}

// For the widest attention that reading, answering, recording and audits ask for.
void session::reserve_scratch() {
    const bool everything = attends_all(params.method) || attends_all(answering.method) ||
                            recorded_mass != ACTQKV_MASS_NONE || audit_every > 0;
    scratch.resize(std::max(scratch_bytes(hp, params, everything), scratch_bytes(hp, answering, everything)) + 64);
}

actqkv_memory session::memory_plan(const llama_model * model, const actqkv_params & wanted) {
    const hparams hp = read_hparams(model);
    const actqkv_params params = resolve_params(wanted, hp);
    const weights w = read_weights(model, hp);
    actqkv_memory plan = {};
    kv_store::add_memory(hp, params, plan);
    const kv_layout shape = kv_store::layout_for(hp, params);
    // A checkpoint is made when all that has left local is closed, so that less than a chunk lies before it.
    const uint64_t open = (params.n_local / params.method.n_chunk_tokens + 2) * params.method.n_chunk_tokens;
    const uint64_t recent = open * (3 * shape.token_stride() * sizeof(actqkv_f16) + hp.n_head * sizeof(float));
    // mean, variance, the question and its queries; entropies
    const uint64_t learnt = (3 + N_QUESTION_QUERIES) * hp.n_channels() * sizeof(float) + N_ENTROPIES * sizeof(double);
    const uint64_t window = params.n_window * 3 * hp.n_kv_channels() * sizeof(actqkv_f16) +  // k_near, k_far, v
                            params.n_window * hp.n_channels() * sizeof(float) +              // q_turned
                            (params.n_local + params.n_window) * hp.n_head * sizeof(float) + // sums
                            most_keys(params, attends_all(params.method)) * hp.n_head * sizeof(float); // of sources
    const uint64_t per_token = 2 * (sizeof(int32_t) + sizeof(int8_t)) + sizeof(double); // history with room, sources
    uint64_t per_chunk = 6 * sizeof(float);                                             // the planner's lists
    if (params.method.granularity == ACTQKV_GRANULARITY_KV_HEAD) {
        per_chunk += (hp.n_head + hp.n_head_kv) * sizeof(float); // scores and votes
    }
    if (attends_all(params.method)) { // spans, their masses
        per_chunk += hp.n_head_kv * (sizeof(actqkv_span) + 2 * sizeof(double));
    }
    plan.checkpoint_bytes = (N_CHECKPOINTS + 1) * hp.n_layer * (recent + learnt); // one more while it is made
    plan.compute_bytes += scratch_bytes(hp, params, attends_all(params.method)) + window + hp.n_layer * learnt +
                          runner::memory_plan(hp, w.layers[0].up->ne[1], params.n_window) + per_token * params.n_ctx +
                          per_chunk * shape.n_chunks_max(params.n_ctx) +
                          planner::search_bytes(hp, params, shape.n_chunks_max(params.n_ctx));
    return plan;
}

void session::set_answering(const actqkv_method & method, int32_t budget) {
    actqkv_params wanted = params;
    wanted.method = method;
    wanted.budget = budget;
    wanted = resolve_params(wanted, hp);
    check_same_stores(params.method, wanted.method);
    std::swap(answering, wanted);
    try {
        reserve_scratch();
    } catch (...) {
        answering = wanted;
        throw;
    }
    if (gpu != nullptr && most_chunks() > gpu->most_chunks()) {
        try {
            make_gpu();
        } catch (const error & e) {
            leave_gpu(e.what());
        }
    }
}

// ---- decode: from tokens to windows

void session::check_tokens(const int32_t * more, int64_t n) const {
    for (int64_t i = 0; i < n; i++) {
        if (more[i] < 0 || more[i] >= hp.n_vocab) {
            throw error(ACTQKV_ERR_ARGUMENT,
                        format("token %lld is %d, expected 0 to %d", (long long) i, more[i], hp.n_vocab - 1));
        }
    }
    if (tokens.size() + n > params.n_ctx) {
        throw error(ACTQKV_ERR_FULL, format("%lld tokens after %lld do not fit n_ctx %d", (long long) n,
                                            (long long) tokens.size(), params.n_ctx));
    }
}

bool session::decode(const int32_t * more, int64_t n, int32_t phase, float * logits, int64_t n_logits) {
    check_tokens(more, n);
    store.check_file();
    const int64_t before = tokens.size();
    tokens.append(more, n, phase);
    try {
        if (before < tokens.size() && n_done == before && before > 0 &&
            !tokens.starts_window(before, params.n_window)) {
            restore(before - 1); // the unfinished window is read again, together with the new tokens
        }
        if (run_pending(logits, n_logits)) {
            return true;
        }
        rewind(std::max(before, n_done));
        return false;
    } catch (...) { // perhaps midway through a window, whose statistics are then neither of its start nor of its end
        truncate(before);
        restore(std::min(before, n_done));
        throw;
    }
}

bool session::run_pending(float * logits, int64_t n_logits) {
    const int64_t start = n_done, total = tokens.size(), first_out = total - n_logits;
    while (n_done < total) {
        const window w = run_next(first_out);
        if (w.n_out > 0) {
            graph.read_logits(logits + (n_done - w.n_out - first_out) * hp.n_vocab);
        }
        if (progress != nullptr && !progress(progress_user, n_done - start, total - start) && n_done < total) {
            return false;
        }
    }
    return true;
}

// The next pending window; logits are computed of its tokens from first_out on.
session::window session::run_next(int64_t first_out) {
    const int64_t end = tokens.window_end(n_done, params.n_window);
    const int8_t phase = tokens.phases[n_done];
    const window w = {n_done, (int) (end - n_done), phase == ACTQKV_DECODE, phase == ACTQKV_QUESTION,
                      (int) std::max<int64_t>(0, end - std::max(first_out, n_done))};
    const double before = now_ms();
    close_chunks(w.first);
    before_window(w);
    run_window(w);
    store.check_file();
    n_done = end;
    sources_from = std::max(sources_from, end);
    (w.decode ? counts.decode_ms : counts.prefill_ms) += now_ms() - before;
    (w.decode ? counts.n_decode_tokens : counts.n_prefill_tokens) += w.m;
    counts.n_windows++;
    return w;
}

// ---- one window

// Before a window at `first`: what has left local by then.
void session::close_chunks(int64_t first) {
    const double start = now_ms();
    store.close_until(first - params.n_local, params.n_threads);
    counts.summarize.ms += now_ms() - start;
    close_on_gpu();
}

void session::run_window(const window & w) {
    const window_tensors & io = graph.io();
    for (int i = 0; i < w.m; i++) {
        io.token[i] = tokens.tokens[w.first + i];
        io.position[i] = (int32_t) (w.first + i);
    }
    graph.prepare(w.m, w.n_out);
    plans.begin_window(memory, store.n_closed(), w.decode);
    begin_audit(w);
    for (int il = 0; il < hp.n_layer; il++) {
        run_layer(w, il);
    }
    if (w.n_out > 0) {
        const double before = now_ms();
        graph.run(hp.n_layer);
        counts.graph.ms += now_ms() - before;
        counts.graph.bytes += graph.segment_bytes(hp.n_layer);
    }
}

void session::run_layer(const window & w, int il) {
    const window_tensors & io = graph.io();
    double t0 = now_ms();
    graph.run(il);
    counts.graph.ms += now_ms() - t0;
    counts.graph.bytes += graph.segment_bytes(il);

    const observer observe = observer_of(il, w.first);
    if (observe) {
        observe("q", io.q, hp.d_head, hp.n_head, w.m);
        observe("k", io.k, hp.d_head, hp.n_head_kv, w.m);
        observe("v", io.v, hp.d_head, hp.n_head_kv, w.m);
    }
    t0 = now_ms();
    convert_window(w.m);
    const float * q_stored = stored_queries(w.m);
    counts.attend.ms += now_ms() - t0;
    t0 = now_ms();
    if (answer_on_gpu(w, il, q_stored)) {
        counts.attend.ms += now_ms() - t0;
    } else {
        plan_and_attend(w, il, q_stored, observe);
    }
    if (observe) {
        observe("out", io.attn, hp.n_channels(), w.m, 1);
    }

    t0 = now_ms();
    const int64_t stride = (int64_t) w.m * hp.d_head;
    store.append(il, w.first, w.m, k_near.data(), k_far.data(), v.data(), stride);
    if (gpu != nullptr) {
        gpu->changed(il, w.first, w.first + w.m);
    }
    if (store.sums_attention()) {
        store.clear_sums(il, w.first, w.first + w.m);
        const int64_t from = std::max<int64_t>(summed_from, params.n_sink); // a window may begin among the sinks
        const int64_t n = w.first + w.m - from;
        if (n > 0) {
            store.add_sums(il, from, n, sums.data() + (from - summed_from), params.n_local + params.n_window);
        }
        if (w.question && params.method.question_weight > 0.0f) {
            learn_question(w, il);
        }
    }
    counts.append.ms += now_ms() - t0;
    counts.append.bytes += 3 * (uint64_t) w.m * hp.n_kv_channels() * sizeof(actqkv_f16);
}

void session::plan_and_attend(const window & w, int il, const float * q_stored, const observer & observe) {
    const window_tensors & io = graph.io();
    const auto timed = [&](bool per_head) -> const std::vector<double> & {
        const double start = now_ms();
        const std::vector<double> & found = true_mass(w, il, per_head);
        counts.attend.ms += now_ms() - start;
        return found;
    };
    const mass_source mass = std::cref(timed); // owning the captures, it would take heap memory in every layer
    const chunk_plan & plan = plans.plan(il, memory[il], store, io.q_far, io.q_near, q_stored, w.m, mass, observe);

    if (recorder != nullptr) {
        record(w, il, plan);
    }
    if (il == audit_layer) {
        audit(w, il, plan);
    }

    const double start = now_ms();
    make_spans(w, il, plan);
    attend(w, il, plan);
    counts.attend.ms += now_ms() - start;
}

// The window's keys and values as the store holds them: f16, [G][m][d].
void session::convert_window(int m) {
    const window_tensors & io = graph.io();
    const int d = hp.d_head, G = hp.n_head_kv, impl = actqkv_impl_best();
    const auto convert = [&](const float * from, actqkv_f16 * to) {
        for (int g = 0; g < G; g++) {
            for (int i = 0; i < m; i++) {
                actqkv_to_f16(impl, from + ((int64_t) i * G + g) * d, to + ((int64_t) g * m + i) * d, d);
            }
        }
    };
    convert(io.k_near, k_near.data());
    convert(io.k_far, k_far.data());
    convert(io.v, v.data());
}

// The window's queries as the keys of closed chunks meet them.
const float * session::stored_queries(int m) {
    const float * met = params.method.positions == ACTQKV_POSITIONS_EXACT ? graph.io().q_near : graph.io().q_far;
    if (params.kv_type == ACTQKV_KV_F16) {
        return met;
    }
    const int64_t n = (int64_t) m * hp.n_head;
    parallel(m > 1 ? params.n_threads : 1, [&](int ith, int nth) {
        const int64_t from = n * ith / nth * hp.d_head, to = n * (ith + 1) / nth * hp.d_head;
        std::copy_n(met + from, to - from, q_turned.data() + from);
        actqkv_turn(q_turned.data() + from, (to - from) / hp.d_head, hp.d_head);
    });
    return q_turned.data();
}

void session::make_spans(const window & w, int il, const chunk_plan & plan) {
    spans.clear();
    n_lists = plan.n_lists;
    for (int32_t i = 0; i < n_lists; i++) {
        add_list(w, il, plan.chunks.data() + (int64_t) i * plan.n, plan.n);
    }
}

// Sinks, the plan's chunks, then every token that is in no closed chunk: remainder up to local, and local.
void session::add_list(const window & w, int il, const int32_t * chunks, int32_t n_chunks) {
    const kv_layout & shape = store.layout();
    const int64_t local = std::max<int64_t>(0, w.first - params.n_local);
    const int64_t open = shape.block_first(store.n_closed() + 1);
    const size_t begin = spans.size();
    store.fetch_chunks(il, FILE_KEYS, chunks, n_chunks);
    store.fetch_chunks(il, FILE_VALUES, chunks, n_chunks);
    const auto add = [&](int64_t block, int64_t first, int64_t last) {
        if (first < last) {
            spans.push_back(store.span(il, block, first, last, last > local));
        }
    };
    add(0, 0, std::min<int64_t>(w.first, params.n_sink));
    for (int32_t i = 0; i < n_chunks; i++) {
        const int64_t block = chunks[i] + 1;
        add(block, shape.block_first(block), shape.block_first(block + 1));
    }
    summed_from = std::max(open, local);
    first_summed = -1;
    for (int64_t first = open; first < w.first;) {
        const int64_t block = shape.block_of(first);
        int64_t last = std::min(w.first, shape.block_first(block + 1));
        if (first < local && local < last) {
            last = local; // the remainder has left local: its weights are no longer summed
        }
        if (first == summed_from) {
            first_summed = (int) (spans.size() - begin);
        }
        add(block, first, last);
        first = last;
    }
    if (first_summed < 0) { // nothing but the window itself
        first_summed = (int) (spans.size() - begin);
        summed_from = w.first;
    }
}

actqkv_attend_args session::attend_args(const window & w) {
    const window_tensors & io = graph.io();
    actqkv_attend_args args = {};
    args.n_head = hp.n_head;
    args.n_head_kv = hp.n_head_kv;
    args.d_head = hp.d_head;
    args.m = w.m;
    args.n_past = w.first;
    args.n_clamp = params.n_local;
    args.scale = hp.attn_scale;
    args.q_near = io.q_near;
    args.q_far = io.q_far;
    args.q_turned = q_turned.empty() ? nullptr : q_turned.data();
    args.spans = spans.data();
    args.n_spans = (int32_t) spans.size() / n_lists;
    args.span_stride = n_lists > 1 ? args.n_spans : 0;
    args.k_window = k_near.data();
    args.v_window = v.data();
    args.window_stride = (int64_t) w.m * hp.d_head;
    args.out = io.attn;
    args.first_summed = first_summed;
    args.sum_stride = params.n_local + params.n_window;
    args.n_threads = params.n_threads;
    args.scratch = scratch.data() + (64 - (uintptr_t) scratch.data() % 64) % 64;
    return args;
}

// With the sums of weights that summaries and sources need.
actqkv_attend_args session::summing_args(const window & w) {
    actqkv_attend_args args = attend_args(w);
    args.weight_sums = store.sums_attention() ? sums.data() : nullptr;
    if (counts_for_sources(w)) {
        keep_weights(args);
    }
    return args;
}

void session::attend(const window & w, int il, const chunk_plan & plan) {
    const actqkv_attend_args args = summing_args(w);
    if (!attend_on_gpu(w, il, args, plan)) {
        actqkv_attend(actqkv_impl_best(), &args);
    }
    finish_attention(w, il, args);
}

void session::finish_attention(const window & w, int il, const actqkv_attend_args & args) {
    if (counts_for_sources(w)) {
        add_sources(w, args);
    }
    count_attended(w, il);
}

void session::count_attended(const window & w, int il) {
    const int64_t n_of_list = (int64_t) spans.size() / n_lists;
    int64_t n_keys = 0;
    uint64_t n_bytes = 0; // of K, and of V
    for (int64_t s = 0; s < n_of_list; s++) {
        n_keys += spans[s].n_tok;
        n_bytes += (uint64_t) spans[s].n_tok * hp.n_head_kv * actqkv_row_bytes(spans[s].kv_type, hp.d_head);
    }
    const bool dense = il < (w.decode ? answering : params).method.n_dense_layers;
    uint64_t & most = dense ? counts.dense_tokens_max : counts.attended_tokens_max;
    counts.attend.bytes += 2 * (n_bytes + (uint64_t) w.m * hp.n_head_kv * actqkv_row_bytes(ACTQKV_KV_F16, hp.d_head));
    most = std::max<uint64_t>(most, n_keys + w.m);
    (dense ? counts.dense_tokens_mean : counts.attended_tokens_mean) += (n_keys + (w.m + 1) / 2.0) * w.m;
    (dense ? dense_n : attended_n) += w.m;
}

// docs/algorithms.md 3.4: the question is the mean of the most attended of its tokens' far queries.
void session::learn_question(const window & w, int il) {
    const int64_t E = hp.n_channels(), stride = params.n_local + params.n_window;
    layer_memory & a = memory[il];
    if (w.first == 0 || tokens.phases[w.first - 1] != ACTQKV_QUESTION) {
        a.asked_queries.clear();
        a.asked_attention.clear();
    }
    const float * q_far = graph.io().q_far;
    for (int i = 0; i < w.m; i++) {
        float attention = 0.0f;
        for (int h = 0; h < hp.n_head; h++) {
            attention += sums[h * stride + (w.first - summed_from) + i];
        }
        a.asked_attention.push_back(attention);
        a.asked_queries.insert(a.asked_queries.end(), q_far + i * E, q_far + (i + 1) * E);
    }
    std::vector<int32_t> best(a.asked_attention.size());
    std::iota(best.begin(), best.end(), 0);
    std::stable_sort(best.begin(), best.end(),
                     [&](int x, int y) { return a.asked_attention[x] > a.asked_attention[y]; });
    best.resize(std::min<size_t>(best.size(), N_QUESTION_QUERIES));
    std::sort(best.begin(), best.end()); // in their order, so that they can move to the front one by one
    a.question.assign(E, 0.0f);
    for (size_t to = 0; to < best.size(); to++) {
        a.asked_attention[to] = a.asked_attention[best[to]];
        std::copy_n(a.asked_queries.begin() + best[to] * E, E, a.asked_queries.begin() + to * E);
        for (int64_t e = 0; e < E; e++) {
            a.question[e] += a.asked_queries[to * E + e] / best.size();
        }
    }
    a.asked_attention.resize(best.size()); // no other query can be among the best of a longer question
    a.asked_queries.resize(best.size() * E);
}

observer session::observer_of(int il, int64_t n_past) const {
    if (watcher == nullptr) {
        return {};
    }
    return [this, il, n_past](const char * name, const float * data, int64_t ne0, int64_t ne1, int64_t ne2) {
        const int64_t ne[3] = {ne0, ne1, ne2};
        watcher(watcher_user, name, il, n_past, data, ne);
    };
}

// ---- checkpoints and rewind

checkpoint session::make_checkpoint() const {
    return {n_done, store.n_closed(), false, memory, store.save_recent(n_done)};
}

// Before a window that may have to be read again (an unfinished one), and now and then in a long reading.
void session::before_window(const window & w) {
    if (w.decode) {
        return store.index_keys(params.n_threads);
    }
    const int64_t end = w.first + w.m;
    const bool unfinished = end == tokens.size() && end % params.n_window != 0;
    const bool due = w.first / CHECKPOINT_TOKENS != (w.first - params.n_window) / CHECKPOINT_TOKENS;
    if (w.first > 0 && (unfinished || due)) {
        saved.add(make_checkpoint());
    }
    if (file != nullptr) {
        write_what_is_due();
    }
}

void session::keep_checkpoint() {
    close_chunks(n_done);
    checkpoint c = make_checkpoint();
    c.pinned = true;
    saved.add(std::move(c));
}

// Returns to the last usable checkpoint at or before `limit`, or to the empty session. Tokens after it are pending,
// and later checkpoints are void: reading those tokens again overwrites the K and V that they rely on.
void session::restore(int64_t limit) {
    const std::vector<checkpoint> & list = saved.list();
    for (size_t i = list.size(); i-- > 0;) {
        const checkpoint & c = list[i];
        const bool usable = c.n_past == tokens.size() || tokens.starts_window(c.n_past, params.n_window);
        if (c.n_past <= limit && usable) {
            memory = c.memory;
            store.restore_recent(c.recent, c.n_past, c.n_closed);
            counts.n_replayed_tokens += n_done - c.n_past;
            n_done = c.n_past;
            saved.forget_after(n_done);
            forget_hot();
            return;
        }
    }
    counts.n_replayed_tokens += n_done;
    memory.assign(hp.n_layer, {});
    store.set_closed(0);
    n_done = 0;
    saved.clear();
    forget_hot();
}

// Chunks that are open again will close with other keys.
void session::forget_hot() {
    if (gpu != nullptr) {
        gpu->forget_from(store.n_closed());
    }
}

void session::rewind(int64_t n_past) {
    truncate(n_past);
    saved.forget_after(n_past);
    if (n_done > n_past) {
        restore(n_past);
    }
}

// A history of that length for measurements: copies of closed chunks, and of their tokens, behind them.
void session::repeat(int64_t n_tokens) {
    const int64_t n = tokens.size(), more = n_tokens - n, c = params.method.n_chunk_tokens;
    if (params.method.positions == ACTQKV_POSITIONS_EXACT || file != nullptr || store.is_mapped()) {
        throw error(ACTQKV_ERR_ARGUMENT, "copies of chunks need clamped positions, and no KV file");
    }
    if (n_tokens > params.n_ctx) {
        throw error(ACTQKV_ERR_FULL, format("%lld tokens do not fit n_ctx %d", (long long) n_tokens, params.n_ctx));
    }
    if (n_done < n || n % params.n_window != 0 || more < 0 || more % params.n_window != 0 || more % c != 0) {
        throw error(ACTQKV_ERR_ARGUMENT,
                    format("%lld tokens, %lld of them read, cannot become %lld: expected more, in "
                           "whole windows of %d and chunks of %lld",
                           (long long) n, (long long) n_done, (long long) n_tokens, params.n_window, (long long) c));
    }
    close_chunks(n);
    const int64_t n_closed = store.n_closed(), first = params.n_sink, end = first + n_closed * c;
    if (n_closed == 0) {
        throw error(ACTQKV_ERR_ARGUMENT, format("of %lld tokens no chunk is closed yet, read more", (long long) n));
    }
    history longer;
    longer.tokens.reserve(n_tokens);
    longer.phases.reserve(n_tokens);
    longer.append(tokens, 0, end);
    for (int64_t left = more; left > 0; left -= end - first) {
        longer.append(tokens, first, std::min(end, first + left));
    }
    longer.append(tokens, end, n);
    store.repeat_chunks(more / c, n, params.n_threads);
    tokens = std::move(longer);
    n_done = n_tokens;
    saved.clear(); // of open blocks that are elsewhere now
    if (gpu != nullptr) {
        gpu->forget_from(n_closed);
    }
    keep_checkpoint();
}

} // namespace actqkv
