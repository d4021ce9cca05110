// Owns the backends (the CPU's, and one of every device that has weights), the window's tensors and the built segments; the
// only place that runs ggml graphs.
#pragma once

#include "builder.h"

#include "ggml-cpp.h"

#include <list>
#include <vector>

namespace actqkv {

class runner {
public:
    // Room for windows of up to n_window tokens. ACTQKV_ERR_MODEL where a device does not compute what our graph needs.
    runner(const hparams & hp, const weights & w, int n_window, int n_far, int n_threads);

    const window_tensors & io() const { return tensors; }

    // Builds (or finds) the segments for windows of m tokens with logits for the last n_out.
    void prepare(int m, int n_out);

    // Computes segment il of the prepared window. Throws ACTQKV_ERR_COMPUTE.
    void run(int il);

    // Copies the logits of the last segment, n_out rows of n_vocab.
    void read_logits(float * out) const;

    // Bytes of weights that segment il reads, for statistics.
    uint64_t segment_bytes(int il) const;

    // Bytes of the devices' memory that it holds, weights aside.
    uint64_t device_bytes() const;

    // Bytes that a runner allocates at most on the CPU, and on each device, with logits of one token per window.
    static uint64_t memory_plan(const hparams & hp, int64_t n_ff, int n_window);

private:
    struct built {
        int m, n_out;
        ggml_context_ptr ctx;
        std::vector<segment> segments; // n_layer + 1; the last is empty for n_out == 0
    };

    // The CPU, or a device.
    struct computer {
        ggml_backend_ptr backend;
        ggml_backend_buffer_ptr io_buffer;
        ggml_gallocr_ptr allocator;
        ggml_tensor * io; // of a device: all of its mirror, as bytes
    };

    void add_computer(ggml_backend_dev_t device, ggml_backend_buffer_type_t io_type, int n_threads);
    built build(int m, int n_out) const;
    void check_supported(const segment & s) const;
    void allocate(built & b);
    size_t allocated_bytes() const;
    void run_on_device(const computer & on, const graph_part & part, int il);

    const hparams & hp;
    const weights & w;
    uint64_t io_bytes;
    ggml_context_ptr io_ctx;
    std::vector<computer> computers; // the CPU is the first
    std::vector<io_place> places;    // of each
    window_tensors tensors = {};
    std::list<built> cache; // most recently used first
};

} // namespace actqkv
