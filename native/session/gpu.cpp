#include "gpu.h"

#include "../error.h"

#include <algorithm>

namespace actqkv {
namespace {

constexpr uint64_t ALIGNMENT = 256;

uint64_t padded(uint64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

} // namespace

gpu_attention::gpu_attention(const actqkv_cuda & cuda, int32_t device, uint64_t limit_bytes, const hparams & hp,
                             const actqkv_params & params, const kv_store & store, int32_t n_most)
    : cuda(cuda), n_most(n_most), last_plans(hp.n_layer) {
    const kv_layout & layout = store.layout();
    // Sinks, and the blocks that no chunk is closed of: the ring, of which one block may be cut where local begins.
    widest = {hp.n_head,
              hp.n_head_kv,
              hp.d_head,
              params.n_window,
              0,
              n_most + layout.n_recent_blocks + 3,
              layout.recent_tokens() + layout.n_chunk_tokens,
              0};
    widest.n_keys = widest.n_open + (int64_t) n_most * layout.n_chunk_tokens + params.n_window;
    widest.n_summed = hp.n_head * std::max<int64_t>(widest.n_keys, params.n_local + params.n_window);
    const uint64_t bytes = work_bytes(), chunk_bytes = 2 * (uint64_t) layout.chunk_bytes();
    if (limit_bytes < bytes + hot_chunks::least_bytes(hp.n_layer, chunk_bytes, n_most)) {
        constexpr double MIB = 1024.0 * 1024.0;
        throw error(
            ACTQKV_ERR_MEMORY,
            format("%.0f MiB of GPU memory: a window needs %.0f MiB, and the %d chunks that each of %d layers may "
                   "attend another %.0f MiB",
                   limit_bytes / MIB, bytes / MIB + 1, n_most, hp.n_layer,
                   hot_chunks::least_bytes(hp.n_layer, chunk_bytes, n_most) / MIB + 1));
    }
    try {
        check(cuda.open(device, &compute));
        void * taken = nullptr;
        check(cuda.take(device, bytes, &taken));
        work = (uint8_t *) taken;
        // More slots than chunks would be of no use.
        const int64_t n_useful = std::max<int64_t>({layout.n_chunks_max(params.n_ctx), n_most, 1});
        const uint64_t useful_bytes = hot_chunks::least_bytes(hp.n_layer, chunk_bytes, (int32_t) n_useful);
        const uint64_t chunks_limit = std::min(limit_bytes - bytes, useful_bytes);
        const int32_t n_slots = hot_chunks::n_slots_for(hp.n_layer, chunk_bytes, chunks_limit);
        chunks = std::make_unique<gpu_chunks>(
            cuda, device, compute, hp.n_layer, n_slots, chunk_bytes, [&store, &layout](int il, int32_t chunk) {
                const actqkv_span s =
                    store.span(il, chunk + 1, layout.block_first(chunk + 1), layout.block_first(chunk + 2), false);
                return gpu_chunks::source{s.far != nullptr ? s.far : s.near, s.v};
            });
        hot = std::make_unique<hot_chunks>(hp.n_layer, chunk_bytes, chunks_limit, n_most, *chunks);
    } catch (...) {
        chunks.reset();
        cuda.give_back(work);
        cuda.close(compute);
        throw;
    }
}

gpu_attention::~gpu_attention() {
    cuda.wait(compute);
    chunks.reset();
    cuda.give_back(work);
    cuda.close(compute);
}

uint64_t gpu_attention::work_bytes() const {
    const shape & w = widest;
    const uint64_t m = w.n_window, row = (uint64_t) w.n_head_kv * w.d_head * sizeof(actqkv_f16);
    const uint64_t q = padded(m * w.n_head * w.d_head * sizeof(float));
    return 4 * q + 2 * padded(m * row) + padded(w.n_summed * sizeof(float)) + padded(w.n_spans * sizeof(double)) +
           3 * (w.n_open * row + w.n_spans * ALIGNMENT) +
           padded(cuda.attend_scratch(w.n_head, w.n_head_kv, w.d_head, w.n_window, w.n_keys, (int32_t) w.n_spans, 1));
}

void gpu_attention::check(int32_t status) const {
    if (status != 0) {
        throw error(ACTQKV_ERR_COMPUTE, format("GPU: %s", cuda.error_text(status)));
    }
}

uint8_t * gpu_attention::place(uint64_t bytes) {
    uint8_t * at = work + used;
    used += padded(bytes);
    return at;
}

template <typename T> T * gpu_attention::send(const T * from, uint64_t bytes) {
    uint8_t * to = place(bytes);
    check(cuda.copy(compute, to, from, bytes));
    return (T *) to;
}

bool gpu_attention::fits(const actqkv_attend_args & args, int32_t n_chunks) const {
    int64_t n_keys = args.m;
    for (int32_t s = 0; s < args.n_spans; s++) {
        n_keys += args.spans[s].n_tok;
    }
    return args.span_stride == 0 && n_chunks <= n_most && args.n_spans <= widest.n_spans && n_keys <= widest.n_keys &&
           (args.weight_sums == nullptr || args.n_head * args.sum_stride <= widest.n_summed);
}

void gpu_attention::attend(int il, const actqkv_attend_args & args, const int32_t * planned, int32_t n_chunks,
                           int32_t first_chunk) {
    const std::vector<int32_t> slots = hot->plan(il, planned, n_chunks);
    last_plans[il].assign(planned, planned + n_chunks);
    const int next = (il + 1) % (int) last_plans.size();
    hot->prefetch(next, last_plans[next].data(), (int32_t) last_plans[next].size());

    used = 0;
    actqkv_attend_args on_gpu = args;
    const uint64_t q = (uint64_t) args.m * args.n_head * args.d_head * sizeof(float);
    const uint64_t own = args.n_head_kv * args.window_stride * sizeof(actqkv_f16);
    const uint64_t sums = args.n_head * args.sum_stride * sizeof(float);
    on_gpu.q_near = send(args.q_near, q);
    on_gpu.q_far = send(args.q_far, q);
    on_gpu.q_turned = args.q_turned != nullptr ? send(args.q_turned, q) : nullptr;
    on_gpu.k_window = send(args.k_window, own);
    on_gpu.v_window = send(args.v_window, own);
    on_gpu.out = (float *) place(q);
    on_gpu.weight_sums = args.weight_sums != nullptr ? send(args.weight_sums, sums) : nullptr;
    on_gpu.span_mass = args.span_mass != nullptr ? (double *) place(args.n_spans * sizeof(double)) : nullptr;

    spans.assign(args.spans, args.spans + args.n_spans);
    for (int32_t i = 0; i < args.n_spans; i++) {
        actqkv_span & s = spans[i];
        if (i >= first_chunk && i < first_chunk + n_chunks) {
            const int32_t slot = slots[i - first_chunk];
            (s.far != nullptr ? s.far : s.near) = chunks->keys(il, slot);
            s.v = chunks->values(il, slot);
            continue;
        }
        const uint64_t rows = (uint64_t) s.n_tok * actqkv_row_bytes(s.kv_type, args.d_head);
        const auto bytes = [&](int64_t stride) { return (uint64_t) (args.n_head_kv - 1) * stride + rows; };
        s.far = s.far != nullptr ? send(s.far, bytes(s.far_stride)) : nullptr;
        s.near = s.near != nullptr ? send(s.near, bytes(s.near_stride)) : nullptr;
        s.v = send(s.v, bytes(s.v_stride));
    }
    on_gpu.spans = spans.data();
    on_gpu.scratch = place(0);
    check(cuda.attend(compute, &on_gpu));
    chunks->finished_reading();
    check(cuda.copy(compute, args.out, on_gpu.out, q));
    if (args.weight_sums != nullptr) {
        check(cuda.copy(compute, args.weight_sums, on_gpu.weight_sums, sums));
    }
    if (args.span_mass != nullptr) {
        check(cuda.copy(compute, args.span_mass, on_gpu.span_mass, args.n_spans * sizeof(double)));
    }
    check(cuda.wait(compute));
    if (args.span_mass != nullptr) {
        hot->add_mass(il, planned, args.span_mass + first_chunk, n_chunks);
    }
    calls++;
}

void gpu_attention::forget_from(int64_t n_closed) {
    hot->forget_from((int32_t) n_closed);
    for (std::vector<int32_t> & plan : last_plans) {
        plan.clear(); // it may name chunks that are open again
    }
}

} // namespace actqkv
