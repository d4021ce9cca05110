#include "runner.h"

#include "../error.h"

#include "ggml-cpu.h"

#include <algorithm>

namespace actqkv {
namespace {

constexpr size_t N_CACHED_WINDOWS = 8; // full windows, single tokens and the last few ragged ends

constexpr size_t ALIGNMENT = 256; // of every backend's tensors

// Hands out aligned arrays of one buffer; with base NULL it only counts.
struct arena {
    char * base;
    size_t used = 0;

    template <typename T> void take(T *& array, int64_t n) {
        array = base == nullptr ? nullptr : reinterpret_cast<T *>(base + used);
        used += (n * sizeof(T) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
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
    const size_t graphs = N_PARTS_PER_SEGMENT * ggml_graph_overhead_custom(N_TENSORS_PER_SEGMENT, false);
    return (hp.n_layer + 1) * (N_TENSORS_PER_SEGMENT * ggml_tensor_overhead() + graphs);
}

void check_computed(ggml_status status, int il) {
    if (status != GGML_STATUS_SUCCESS) {
        throw error(ACTQKV_ERR_COMPUTE, format("segment %d: %s", il, ggml_status_to_string(status)));
    }
}

} // namespace

runner::runner(const hparams & hp, const weights & w, int n_window, int n_far, int n_threads) : hp(hp), w(w) {
    arena measure = {nullptr};
    lay_out(measure, tensors, hp, n_window);
    io_bytes = measure.used;
    std::vector<ggml_backend_dev_t> devices = {w.embd_device, w.output_device};
    for (const layer_weights & l : w.layers) {
        devices.push_back(l.device);
    }
    std::sort(devices.begin(), devices.end());
    devices.erase(std::unique(devices.begin(), devices.end()), devices.end());
    devices.erase(std::remove(devices.begin(), devices.end(), nullptr), devices.end());
    io_ctx.reset(ggml_init({(devices.size() + 1) * ggml_tensor_overhead(), nullptr, true}));
    // Memory of the host that copies to a device reach at full speed, where there is such.
    ggml_backend_buffer_type_t host = devices.empty() ? nullptr : ggml_backend_dev_host_buffer_type(devices[0]);
    add_computer(nullptr, host, n_threads);
    for (ggml_backend_dev_t device : devices) {
        add_computer(device, nullptr, n_threads);
    }
    arena place = {places[0].base};
    lay_out(place, tensors, hp, n_window);
    std::fill_n(tensors.far_position, n_window, n_far);
    prepare(n_window, 1); // the largest window first, so that later ones fit its buffer
}

// io_type: of the memory for the window's tensors; NULL: the backend's own.
void runner::add_computer(ggml_backend_dev_t device, ggml_backend_buffer_type_t io_type, int n_threads) {
    const char * name = device != nullptr ? ggml_backend_dev_name(device) : "CPU";
    computer c = {};
    c.backend.reset(device != nullptr ? ggml_backend_dev_init(device, nullptr) : ggml_backend_cpu_init());
    if (!c.backend) {
        throw error(ACTQKV_ERR_COMPUTE, format("ggml's %s backend did not start", name));
    }
    if (device == nullptr) {
        ggml_backend_cpu_set_n_threads(c.backend.get(), n_threads);
    }
    ggml_backend_buffer_type_t own = ggml_backend_get_default_buffer_type(c.backend.get());
    c.io_buffer.reset(ggml_backend_buft_alloc_buffer(io_type != nullptr ? io_type : own, io_bytes + ALIGNMENT));
    if (!c.io_buffer) {
        throw error(ACTQKV_ERR_MEMORY, format("cannot allocate %llu bytes for the window's tensors on %s",
                                              (unsigned long long) io_bytes, name));
    }
    ggml_backend_buffer_clear(c.io_buffer.get(), 0);
    char * base = (char *) ggml_backend_buffer_get_base(c.io_buffer.get());
    c.io = ggml_new_tensor_1d(io_ctx.get(), GGML_TYPE_I8, (int64_t) io_bytes);
    ggml_backend_tensor_alloc(c.io_buffer.get(), c.io, base);
    c.allocator.reset(ggml_gallocr_new(own));
    places.push_back({device, c.io_buffer.get(), base});
    computers.push_back(std::move(c));
}

uint64_t runner::device_bytes() const {
    uint64_t total = 0;
    for (size_t i = 1; i < computers.size(); i++) {
        total += io_bytes + ggml_gallocr_get_buffer_size(computers[i].allocator.get(), 0);
    }
    return total;
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
        b.segments.push_back(build_segment(b.ctx.get(), hp, w, tensors, places, il, m, n_out));
        check_supported(b.segments.back());
    }
    return b;
}

void runner::check_supported(const segment & s) const {
    for (const graph_part & part : s.parts) {
        const ggml_backend_t backend = computers[part.place].backend.get();
        for (int i = 0; part.place > 0 && i < ggml_graph_n_nodes(part.graph); i++) {
            const ggml_tensor * node = ggml_graph_node(part.graph, i);
            if (!ggml_backend_supports_op(backend, node)) {
                throw error(ACTQKV_ERR_MODEL, format("%s does not compute %s of %s; keep its layers on the CPU",
                                                     ggml_backend_name(backend), ggml_op_desc(node), node->name));
            }
        }
    }
}

size_t runner::allocated_bytes() const {
    size_t total = 0;
    for (const computer & c : computers) {
        total += ggml_gallocr_get_buffer_size(c.allocator.get(), 0);
    }
    return total;
}

// Parts run one after another, so all of a backend share one buffer: first grow it to the largest, then place each.
void runner::allocate(built & b) {
    const size_t before = allocated_bytes();
    for (const segment & s : b.segments) {
        for (const graph_part & part : s.parts) {
            if (!ggml_gallocr_reserve(computers[part.place].allocator.get(), part.graph)) {
                cache.clear(); // the buffer that their tensors lay in is gone
                throw error(ACTQKV_ERR_MEMORY, format("cannot allocate the graph's buffer for %d tokens", b.m));
            }
        }
    }
    if (allocated_bytes() != before) {
        cache.clear(); // their tensors lay in the buffer that was just replaced
    }
    for (const segment & s : b.segments) {
        for (const graph_part & part : s.parts) {
            ggml_gallocr_alloc_graph(computers[part.place].allocator.get(), part.graph);
        }
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
    for (const graph_part & part : cache.front().segments[il].parts) {
        const computer & on = computers[part.place];
        if (part.place > 0) {
            run_on_device(on, part, il);
            continue;
        }
        check_computed(ggml_backend_graph_compute(on.backend.get(), part.graph), il);
    }
}

// All is queued, and waited for once.
void runner::run_on_device(const computer & on, const graph_part & part, int il) {
    char * host = places[0].base;
    ggml_backend_t backend = on.backend.get();
    for (const io_range & r : part.to) {
        ggml_backend_tensor_set_async(backend, on.io, host + r.offset, r.offset, r.bytes);
    }
    const ggml_status status = ggml_backend_graph_compute_async(backend, part.graph);
    for (const io_range & r : part.from) {
        ggml_backend_tensor_get_async(backend, on.io, host + r.offset, r.offset, r.bytes);
    }
    ggml_backend_synchronize(backend);
    check_computed(status, il);
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
