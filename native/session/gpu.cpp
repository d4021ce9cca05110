#include "gpu.h"

#include "../error.h"
#include "../kv/gpu_memory.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

namespace actqkv {
namespace {

constexpr double MIB = 1024.0 * 1024.0;

double now_ms() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

} // namespace

// ---- memory

gpu_attention::shape gpu_attention::widest_of(const hparams & hp, const actqkv_params & params, int32_t n_most) {
    const kv_layout layout = kv_store::layout_for(hp, params);
    // Sinks, and the blocks that no chunk is closed of: the ring, of which one block may be cut where local begins.
    shape w = {hp.n_head, hp.n_head_kv, hp.d_head, params.n_window, 0, n_most + layout.n_recent_blocks + 3, 0};
    w.n_keys = layout.recent_tokens() + (int64_t) (n_most + 1) * layout.n_chunk_tokens + params.n_window;
    w.n_summed = hp.n_head * std::max<int64_t>(w.n_keys, params.n_local + params.n_window);
    return w;
}

// Queries in three forms, the window's own keys and values, weight sums.
uint64_t gpu_attention::sent_bytes(const shape & w) {
    const uint64_t m = w.n_window, q = padded(m * w.n_head * w.d_head * sizeof(float));
    return 3 * q + 2 * padded(m * w.n_head_kv * w.d_head * sizeof(actqkv_f16)) + padded(w.n_summed * sizeof(float));
}

// A step's queries and output, a window's keys and values, and sums.
uint64_t gpu_attention::staged_bytes_of(const shape & w) {
    const uint64_t q = padded((uint64_t) w.n_head * w.d_head * sizeof(float));
    const uint64_t own = padded((uint64_t) w.n_window * w.n_head_kv * w.d_head * sizeof(actqkv_f16));
    return 4 * q + 2 * own + padded(w.n_summed * sizeof(float));
}

uint64_t gpu_attention::work_bytes(const actqkv_cuda & cuda, const shape & w) {
    const uint64_t out = padded((uint64_t) w.n_window * w.n_head * w.d_head * sizeof(float));
    return sent_bytes(w) + out +
           padded(cuda.attend_scratch(w.n_head, w.n_head_kv, w.d_head, w.n_window, w.n_keys, (int32_t) w.n_spans, 1));
}

actqkv_gpu_memory gpu_attention::memory_plan(const actqkv_cuda & cuda, const hparams & hp, const actqkv_params & params,
                                             int32_t n_most) {
    const kv_layout layout = kv_store::layout_for(hp, params);
    const uint64_t chunk_bytes = 2 * (uint64_t) layout.chunk_bytes();
    const int64_t n_useful = std::max<int64_t>({layout.n_chunks_max(params.n_ctx), n_most, 1});
    actqkv_gpu_memory p = {};
    p.window_bytes = work_bytes(cuda, widest_of(hp, params, n_most)) + padded(gpu_ring::bytes(layout, hp.n_layer));
    const uint64_t plans = gpu_planner::bytes(cuda, hp, params, n_most);
    p.least_bytes = p.window_bytes + hot_chunks::least_bytes(hp.n_layer, chunk_bytes, n_most);
    p.planning_bytes = plans > 0 ? p.least_bytes + plans : 0;
    p.useful_bytes = p.window_bytes + plans + hot_chunks::least_bytes(hp.n_layer, chunk_bytes, (int32_t) n_useful);
    return p;
}

gpu_attention::gpu_attention(const actqkv_cuda & cuda, int32_t device, uint64_t limit_bytes, const hparams & hp,
                             const actqkv_params & params, const kv_store & store, int32_t n_most)
    : cuda(cuda), store(store), widest(widest_of(hp, params, n_most)), n_most(n_most), device(device), told(hp.n_layer),
      last_plans(hp.n_layer) {
    const actqkv_gpu_memory p = memory_plan(cuda, hp, params, n_most);
    if (limit_bytes < p.least_bytes) {
        throw error(
            ACTQKV_ERR_MEMORY,
            format("%.0f MiB of GPU memory: a window needs %.0f MiB, and the %d chunks that each of %d layers may "
                   "attend another %.0f MiB",
                   limit_bytes / MIB, p.window_bytes / MIB + 1, n_most, hp.n_layer,
                   (p.least_bytes - p.window_bytes) / MIB + 1));
    }
    try {
        const uint64_t plans_bytes = p.planning_bytes > 0 ? p.planning_bytes - p.least_bytes : 0;
        const bool with_plans = plans_bytes > 0 && limit_bytes >= p.planning_bytes;
        const uint64_t for_chunks = std::min<uint64_t>(limit_bytes, p.useful_bytes) - p.window_bytes;
        take_memory(with_plans ? plans_bytes : 0, for_chunks - (with_plans ? plans_bytes : 0), hp, params);
    } catch (...) {
        chunks.reset();
        cuda.give_back(plans_memory);
        cuda.give_back_pinned(ordinary.empty() ? staged : nullptr);
        cuda.give_back(ring_memory);
        cuda.give_back(work);
        cuda.close(compute);
        throw;
    }
}

void gpu_attention::take_memory(uint64_t plans_bytes, uint64_t chunks_limit, const hparams & hp,
                                const actqkv_params & params) {
    const auto take = [&](uint64_t bytes, const char * what) {
        memory_bytes += bytes;
        return take_gpu_memory(cuda, device, bytes, what);
    };
    const kv_layout & layout = store.layout();
    const uint64_t chunk_bytes = 2 * (uint64_t) layout.chunk_bytes();
    const int32_t n_slots = hot_chunks::n_slots_for(hp.n_layer, chunk_bytes, chunks_limit);
    check(cuda.open(device, &compute));
    work = take(work_bytes(cuda, widest), "a window");
    ring_memory = take(padded(gpu_ring::bytes(layout, hp.n_layer)), "open blocks");
    chunks = std::make_unique<gpu_chunks>(
        cuda, device, compute, hp.n_layer, n_slots, chunk_bytes, [this, &layout](int il, int32_t chunk) {
            const actqkv_span s =
                store.span(il, chunk + 1, layout.block_first(chunk + 1), layout.block_first(chunk + 2), false);
            return gpu_chunks::source{s.far != nullptr ? s.far : s.near, s.v};
        });
    memory_bytes += (uint64_t) hp.n_layer * n_slots * chunk_bytes;
    hot = std::make_unique<hot_chunks>(hp.n_layer, chunk_bytes, chunks_limit, n_most, *chunks);
    ring = std::make_unique<gpu_ring>(cuda, compute, store, hp.n_layer, ring_memory);
    pinned = std::make_unique<pinned_chunks>(cuda, store, hp.n_layer, layout.n_chunks_max(params.n_ctx));
    staged_bytes = staged_bytes_of(widest);
    if (plans_bytes > 0) {
        plans_memory = take(plans_bytes, "plans");
        plans = std::make_unique<gpu_planner>(cuda, compute, store, hp, params, n_most, plans_memory);
        staged_bytes += plans->report_bytes();
    }
    void * pinned_memory = nullptr;
    if (cuda.take_pinned(staged_bytes, &pinned_memory) == 0) {
        staged = (uint8_t *) pinned_memory;
    } else { // copied through the driver's own memory
        ordinary.resize(staged_bytes);
        staged = ordinary.data();
    }
}

gpu_attention::~gpu_attention() {
    cuda.wait(compute);
    chunks.reset(); // waits for its copies, which read pinned memory
    cuda.give_back(plans_memory);
    pinned.reset();
    cuda.give_back_pinned(ordinary.empty() ? staged : nullptr);
    cuda.give_back(ring_memory);
    cuda.give_back(work);
    cuda.close(compute);
}

void gpu_attention::check(int32_t status) const {
    if (status != 0) {
        throw error(ACTQKV_ERR_COMPUTE, format("GPU: %s", cuda.error_text(status)));
    }
}

// ---- a call

uint64_t gpu_attention::place(uint64_t bytes) {
    const uint64_t at = used;
    used += padded(bytes);
    return at;
}

// Copied from where it lies, which is pinned where weights are on a GPU: staging it would take longer than the copy.
template <typename T> T * gpu_attention::send_large(const T * from, uint64_t bytes) {
    if (from == nullptr) {
        return nullptr;
    }
    T * there = (T *) (work + place(bytes));
    check(cuda.copy(compute, there, from, bytes));
    return there;
}

// Copied together with all that is staged since `first`.
template <typename T> T * gpu_attention::stage(const T * from, uint64_t bytes, uint64_t first) {
    if (from == nullptr) {
        return nullptr;
    }
    const uint64_t at = place(bytes);
    memcpy(staged + (at - first), from, bytes);
    return (T *) (work + at);
}

bool gpu_attention::fits(const actqkv_attend_args & args, int32_t n_chunks) const {
    int64_t n_keys = args.m;
    for (int32_t s = 0; s < args.n_spans; s++) {
        n_keys += args.spans[s].n_tok;
    }
    return args.span_stride == 0 && args.span_mass == nullptr && n_chunks <= n_most && args.n_spans <= widest.n_spans &&
           n_keys <= widest.n_keys && (args.weight_sums == nullptr || args.n_head * args.sum_stride <= widest.n_summed);
}

// Spans on the GPU, but for those of planned chunks.
void gpu_attention::make_spans(int il, const actqkv_attend_args & args, int32_t first_chunk, int32_t n_chunks) {
    spans.assign(args.spans, args.spans + args.n_spans);
    for (int32_t i = 0; i < args.n_spans; i++) {
        if (i < first_chunk || i >= first_chunk + n_chunks) {
            counts.to_bytes += ring->bring(il, spans[i]);
        }
    }
}

void gpu_attention::put(int32_t at, const uint8_t * keys, const uint8_t * values) {
    actqkv_span & s = spans[at];
    (s.far != nullptr ? s.far : s.near) = keys;
    s.v = values;
}

// Queues the copies of what attention reads beside spans: of a step all in one, of a window queries from where they lie.
// Weight sums come last, where the results follow.
actqkv_attend_args gpu_attention::send_all(const actqkv_attend_args & args) {
    used = 0;
    actqkv_attend_args on_gpu = args;
    const uint64_t q = (uint64_t) args.m * args.n_head * args.d_head * sizeof(float);
    const uint64_t own = args.n_head_kv * args.window_stride * sizeof(actqkv_f16);
    const bool met_far = std::any_of(args.spans, args.spans + args.n_spans, [](const actqkv_span & s) {
        return s.far != nullptr && s.kv_type == ACTQKV_KV_F16;
    });
    const bool large = args.m > 1;
    if (large) {
        on_gpu.q_near = send_large(args.q_near, q);
        on_gpu.q_far = send_large(met_far ? args.q_far : nullptr, q);
        on_gpu.q_turned = send_large(args.q_turned, q);
    }
    const uint64_t first = used;
    if (!large) {
        on_gpu.q_near = stage(args.q_near, q, first);
        on_gpu.q_far = stage(args.q_far, q, first); // summaries may be met by them, if no key is
        on_gpu.q_turned = stage(args.q_turned, q, first);
    }
    on_gpu.k_window = stage(args.k_window, own, first);
    on_gpu.v_window = stage(args.v_window, own, first);
    results = used;
    on_gpu.weight_sums = stage(args.weight_sums, args.n_head * args.sum_stride * sizeof(float), first);
    check(cuda.copy(compute, work + first, staged, used - first));
    counts.to_bytes += used;
    on_gpu.out = (float *) (work + place(q));
    return on_gpu;
}

// Attention over `spans`, and the host's only wait.
void gpu_attention::run(const actqkv_attend_args & args, actqkv_attend_args & on_gpu, const void * report,
                        uint64_t report_bytes) {
    on_gpu.spans = spans.data();
    on_gpu.scratch = work + used;
    check(cuda.attend(compute, &on_gpu));
    chunks->finished_reading();
    // What comes back takes the place of what was staged, which has been read by then; a window's output goes where it is
    // wanted.
    const uint64_t q = (uint64_t) args.m * args.n_head * args.d_head * sizeof(float);
    const bool large = args.m > 1;
    const uint64_t n = used - results - (large ? padded(q) : 0);
    if (n > 0) {
        check(cuda.copy(compute, staged, work + results, n));
    }
    if (large) {
        check(cuda.copy(compute, args.out, on_gpu.out, q));
    }
    if (report != nullptr) {
        check(cuda.copy(compute, staged + n, report, report_bytes));
    }
    const double before = now_ms();
    check(cuda.wait(compute));
    counts.wait_ms += now_ms() - before;
    const auto result = [&](const void * there) { return staged + ((const uint8_t *) there - (work + results)); };
    if (!large) {
        memcpy(args.out, result(on_gpu.out), q);
    }
    if (args.weight_sums != nullptr) {
        memcpy(args.weight_sums, result(on_gpu.weight_sums), args.n_head * args.sum_stride * sizeof(float));
    }
    counts.n_calls++;
    counts.from_bytes += used - results + report_bytes;
}

void gpu_attention::attend(int il, const actqkv_attend_args & args, const int32_t * planned, int32_t n_chunks,
                           int32_t first_chunk) {
    actqkv_attend_args on_gpu = send_all(args);
    make_spans(il, args, first_chunk, n_chunks);
    const uint64_t n_missed = hot->stats().n_misses;
    const std::vector<int32_t> & slots = hot->plan(il, planned, n_chunks);
    for (int32_t i = 0; i < n_chunks; i++) {
        put(first_chunk + i, chunks->keys(il, slots[i]), chunks->values(il, slots[i]));
    }
    counts.n_stalls += hot->stats().n_misses > n_missed;
    chunks->join();
    last_plans[il].assign(planned, planned + n_chunks);
    const int next = (il + 1) % (int) last_plans.size();
    hot->prefetch(next, last_plans[next].data(), (int32_t) last_plans[next].size());
    run(args, on_gpu, nullptr, 0);
}

gpu_planner::result gpu_attention::answer(int il, const actqkv_attend_args & args, int32_t first_chunk,
                                          const choice & c, float temperature, const gpu_queries & q) {
    const uint64_t key_bytes = (uint64_t) store.layout().chunk_bytes();
    counts.to_bytes += plans->bring(il);
    if (told[il] != hot->changes(il)) {
        plans->set_slots(il, hot->slots_of(il));
        counts.to_bytes += hot->slots_of(il).size() * sizeof(int32_t);
        told[il] = hot->changes(il);
    }
    make_spans(il, args, first_chunk, (int32_t) c.k);
    for (int32_t i = 0; i < (int32_t) c.k; i++) {
        put(first_chunk + i, plans->keys() + i * key_bytes, plans->values() + i * key_bytes);
    }
    actqkv_attend_args on_gpu = send_all(args);
    chunks->join(); // slots are read where the table has them, whoever filled them
    const auto there = [&](const float * query) {
        return query == args.q_near ? on_gpu.q_near : query == args.q_far ? on_gpu.q_far : on_gpu.q_turned;
    };
    plans->make(il, c, temperature, {there(q.q_scored), there(q.q_chunks)}, chunks->keys(il, 0));
    run(args, on_gpu, plans->report(), plans->report_bytes());
    gpu_planner::result found = plans->read_report(c, staged + (used - results));

    // What was not hot came over the bus: keys of all that were refined, values of what was chosen of them.
    const auto n_cold = [&](const std::vector<int32_t> & list) {
        return (uint64_t) std::count_if(list.begin(), list.end(), [&](int32_t b) { return !hot->is_hot(il, b); });
    };
    counts.to_bytes +=
        (n_cold(found.chunks) + n_cold(found.refined.empty() ? found.chunks : found.refined)) * key_bytes;
    const uint64_t n_missed = hot->stats().n_misses;
    hot->plan(il, found.chunks.data(), (int32_t) found.chunks.size()); // for the next step
    counts.n_stalls += hot->stats().n_misses > n_missed;
    last_plans[il] = found.chunks;
    counts.n_planned++;
    return found;
}

// ---- closed chunks

void gpu_attention::closed(int64_t n_closed) {
    pinned->reach(n_closed);
    see_chunks();
    for (int il = 0; il < (int) last_plans.size() && pinned->has(n_closed) && n_filled < n_closed; il++) {
        hot->fill(il, (int32_t) n_filled, (int32_t) n_closed);
    }
    n_filled = n_closed;
    bring_stretches(n_closed);
}

// Where steps may be planned. They lie in ordinary memory, where longer ones take their place: copies are waited for.
void gpu_attention::bring_stretches(int64_t n_closed) {
    uint64_t n_copied = 0;
    for (int il = 0; il < (int) last_plans.size() && plans != nullptr && sees_chunks && pinned->has(n_closed); il++) {
        n_copied += plans->bring_stretches(il);
    }
    counts.to_bytes += n_copied;
    if (n_copied > 0) {
        check(cuda.wait(compute));
    }
}

// Whether kernels read chunks where they lie in the host's memory.
void gpu_attention::see_chunks() {
    if (!looked && pinned->bytes() > 0) {
        looked = true;
        int32_t same = 0;
        cuda.reaches(device, store.chunk_keys(0), &same);
        sees_chunks = same != 0;
    }
}

void gpu_attention::unpin() {
    chunks->settle();
    pinned->leave();
}

void gpu_attention::forget_from(int64_t n_closed) {
    chunks->settle(); // they are about to be written again
    hot->forget_from((int32_t) n_closed);
    n_filled = std::min(n_filled, n_closed);
    if (plans != nullptr) {
        plans->forget_from(n_closed);
    }
    ring->all_changed();
    for (std::vector<int32_t> & plan : last_plans) {
        plan.clear(); // it may name chunks that are open again
    }
}

// ---- statistics

actqkv_gpu_stats gpu_attention::stats() const {
    const hot_stats & s = hot->stats();
    actqkv_gpu_stats all = counts;
    all.n_slots = hot->n_slots();
    all.n_hits = s.n_hits;
    all.n_misses = s.n_misses;
    all.n_prefetched = s.n_prefetched;
    all.n_wasted = s.n_wasted;
    all.to_bytes += s.bytes;
    all.memory_bytes = memory_bytes;
    all.pinned_bytes = pinned->bytes();
    return all;
}

void gpu_attention::reset_stats() {
    counts = {};
    hot->reset_stats();
}

} // namespace actqkv
