#include "runner.h"

#include "../error.h"

#include "ggml-cpu.h"

#include <algorithm>

namespace actqkv {
namespace {

constexpr size_t N_CACHED_WINDOWS = 8; // full windows, single tokens and the last few ragged ends

// Hands out 64-byte aligned arrays of one buffer; with base NULL it only counts.
struct arena {
    char * base;
    size_t used = 0;

    template <typename T> void take(T *& array, int64_t n) {
        array = base == nullptr ? nullptr : reinterpret_cast<T *>(base + used);
        used += (n * sizeof(T) + 63) / 64 * 64;
    }
};

void lay_out(arena & a, window_tensors & t, const hparams & hp, int64_t m) {
    const int64_t E = hp.n_channels(), K = hp.n_kv_channels();
    for (int32_t ** array : {&t.token, &t.position, &t.far_position, &t.zero}) {
        a.take(*array, m);
    }
    a.take(t.x, m * hp.n_embd);
    for (float ** array : {&t.attn, &t.q, &t.q_near, &t.q_far}) {
        a.take(*array, m * E);
    }
    for (float ** array : {&t.k, &t.k_near, &t.k_far, &t.v}) {
        a.take(*array, m * K);
    }
}

// Of the segments of one size of window.
size_t context_bytes(const hparams & hp) {
    return (hp.n_layer + 1) *
           (N_TENSORS_PER_SEGMENT * ggml_tensor_overhead() + ggml_graph_overhead_custom(N_TENSORS_PER_SEGMENT, false));
}

} // namespace

runner::runner(const hparams & hp, const weights & w, int n_window, int n_far, int n_threads)
    : hp(hp), w(w), backend(ggml_backend_cpu_init()) {
    if (!backend) {
        throw error(ACTQKV_ERR_COMPUTE, "ggml's CPU backend did not start");
    }
    ggml_backend_cpu_set_n_threads(backend.get(), n_threads);

    arena measure = {nullptr};
    lay_out(measure, tensors, hp, n_window);
    io_buffer.reset(ggml_backend_alloc_buffer(backend.get(), measure.used + 64));
    if (!io_buffer) {
        throw error(ACTQKV_ERR_MEMORY, format("cannot allocate %zu bytes for the window's tensors", measure.used));
    }
    ggml_backend_buffer_clear(io_buffer.get(), 0);
    arena place = {(char *) ggml_backend_buffer_get_base(io_buffer.get())};
    lay_out(place, tensors, hp, n_window);
    std::fill_n(tensors.far_position, n_window, n_far);

    allocator.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
    prepare(n_window, 1); // the largest window first, so that later ones fit its buffer
}

uint64_t runner::memory_plan(const hparams & hp, int64_t n_ff, int n_window) {
    const int64_t E = hp.n_channels(), K = hp.n_kv_channels();
    window_tensors tensors = {};
    arena measure = {nullptr};
    lay_out(measure, tensors, hp, n_window);
    // Beside those: a segment's intermediate results, and the input of a product as ggml converts it.
    const int64_t row = 4 * hp.n_embd + 4 * n_ff + E + K;
    return measure.used + sizeof(float) * (n_window * row + 2 * hp.n_vocab) +
           (N_CACHED_WINDOWS + 1) * context_bytes(hp);
}

runner::built runner::build(int m, int n_out) const {
    built b = {m, n_out, ggml_context_ptr(ggml_init({context_bytes(hp), nullptr, true})), {}};
    const int n = hp.n_layer + (n_out > 0 ? 1 : 0);
    for (int il = 0; il < n; il++) {
        b.segments.push_back(build_segment(b.ctx.get(), hp, w, tensors, io_buffer.get(), il, m, n_out));
    }
    return b;
}

// Segments run one after another, so all share one buffer: first grow it to the largest, then place each.
void runner::allocate(built & b) {
    const size_t before = ggml_gallocr_get_buffer_size(allocator.get(), 0);
    for (const segment & s : b.segments) {
        if (!ggml_gallocr_reserve(allocator.get(), s.graph)) {
            throw error(ACTQKV_ERR_MEMORY, format("cannot allocate the graph's buffer for %d tokens", b.m));
        }
    }
    if (ggml_gallocr_get_buffer_size(allocator.get(), 0) != before) {
        cache.clear(); // their tensors lay in the buffer that was just replaced
    }
    for (const segment & s : b.segments) {
        ggml_gallocr_alloc_graph(allocator.get(), s.graph);
    }
}

void runner::prepare(int m, int n_out) {
    const auto found =
        std::find_if(cache.begin(), cache.end(), [&](const built & b) { return b.m == m && b.n_out == n_out; });
    if (found != cache.end()) {
        cache.splice(cache.begin(), cache, found);
        return;
    }
    built b = build(m, n_out);
    allocate(b);
    cache.push_front(std::move(b));
    if (cache.size() > N_CACHED_WINDOWS) {
        cache.pop_back();
    }
}

void runner::run(int il) {
    const ggml_status status = ggml_backend_graph_compute(backend.get(), cache.front().segments[il].graph);
    if (status != GGML_STATUS_SUCCESS) {
        throw error(ACTQKV_ERR_COMPUTE, format("segment %d: %s", il, ggml_status_to_string(status)));
    }
}

void runner::read_logits(float * out) const {
    const ggml_tensor * logits = cache.front().segments.back().logits;
    ggml_backend_tensor_get(logits, out, 0, ggml_nbytes(logits));
}

uint64_t runner::segment_bytes(int il) const {
    const auto bytes = [](const ggml_tensor * t) { return t == nullptr ? 0 : (uint64_t) ggml_nbytes(t); };
    uint64_t total = 0;
    if (il > 0) {
        const layer_weights & l = w.layers[il - 1];
        total += bytes(l.wo) + bytes(l.gate) + bytes(l.up) + bytes(l.down);
    }
    if (il < hp.n_layer) {
        const layer_weights & l = w.layers[il];
        return total + bytes(l.wq) + bytes(l.wk) + bytes(l.wv);
    }
    return total + bytes(w.output);
}

} // namespace actqkv
