// The GPU's side of hot chunks: memory for the slots, and a stream of its own that fills them while another computes.
//
// A layer's turn:  hot.plan(l) -> join() -> hot.prefetch(l + 1) -> queue the attention of l -> finished_reading()
// so that copies for the next layer run beside the attention of this one, and wait only for readers before it.
#pragma once

#include "../kernels/cuda/kernels_cuda.h"
#include "hot_chunks.h"

#include <functional>

namespace actqkv {

class gpu_chunks : public mover {
public:
    // Keys and values of one chunk in CPU memory, chunk_bytes / 2 each. Pinned memory is copied several times faster.
    struct source {
        const void * keys;
        const void * values;
    };
    using finder = std::function<source(int il, int32_t chunk)>;

    // Takes n_layer * n_slots * chunk_bytes of the device's memory. `compute` is the stream whose kernels read the slots;
    // it outlives this. Throws ACTQKV_ERR_MEMORY with both sizes where the device has less.
    gpu_chunks(const actqkv_cuda & cuda, int32_t device, actqkv_cuda_stream * compute, int n_layer, int32_t n_slots,
               uint64_t chunk_bytes, finder find);
    ~gpu_chunks() override;
    gpu_chunks(const gpu_chunks &) = delete;
    gpu_chunks & operator=(const gpu_chunks &) = delete;

    // On the GPU, laid out as on the CPU.
    const uint8_t * keys(int il, int32_t slot) const {
        return slots + ((uint64_t) il * n_slots + (uint64_t) slot) * chunk_bytes;
    }
    const uint8_t * values(int il, int32_t slot) const { return keys(il, slot) + chunk_bytes / 2; }

    void start(int il, int32_t chunk, int32_t slot) override;
    // What `compute` queues from now on comes after the copies started so far. Only the GPU waits.
    void join();

    // Waits until all copies have ended: before the memory that they read is written, or no longer pinned. A GPU that has
    // failed says so in the next call.
    void settle();

    // Copies started from now on come after all that `compute` has queued so far.
    void finished_reading();

private:
    void check(int32_t status, const char * what) const;

    const actqkv_cuda & cuda;
    actqkv_cuda_stream * compute;
    actqkv_cuda_stream * copies = nullptr;
    uint64_t n_slots, chunk_bytes;
    finder find;
    uint8_t * slots = nullptr;
};

} // namespace actqkv
