// The GPU's copy of a store's ring: sinks and open blocks in f16. What has changed of a block, from its first changed token
// to its last, is copied when the block is attended.
#pragma once

#include "../kernels/cuda/kernels_cuda.h"
#include "store.h"

#include <vector>

namespace actqkv {

class gpu_ring {
public:
    // Bytes of the device's memory that a ring takes.
    static uint64_t bytes(const kv_layout & layout, int n_layer);

    // memory: bytes() of them, 16-byte aligned. Copies are queued on `compute`, before what reads them.
    gpu_ring(const actqkv_cuda & cuda, actqkv_cuda_stream * compute, const kv_store & store, int n_layer,
             uint8_t * memory);

    // The store's tokens [first, last) of a layer were written.
    void changed(int il, int64_t first, int64_t last);
    void all_changed() { stale.assign(stale.size(), run{0, INT32_MAX}); }

    // Has the span, of one block of the ring, point to the GPU's copy. Returns the bytes that had to be copied.
    uint64_t bring(int il, actqkv_span & span);

private:
    size_t slot_of(int il, int64_t block) const;

    const actqkv_cuda & cuda;
    actqkv_cuda_stream * compute;
    const kv_store & store;
    struct run {
        int32_t first, last; // tokens of a block; none where they are equal
    };
    uint64_t array_bytes;   // of one array of one layer
    uint8_t * memory;       // [layer][near, far, v]
    std::vector<run> stale; // [layer][sinks, then the ring's blocks]
};

} // namespace actqkv
