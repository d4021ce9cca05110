#include "gpu_ring.h"

#include "../error.h"

namespace actqkv {
namespace {

constexpr int N_ARRAYS = 3; // near, far, v

} // namespace

uint64_t gpu_ring::bytes(const kv_layout & layout, int n_layer) {
    return (uint64_t) n_layer * N_ARRAYS * layout.recent_tokens() * layout.token_stride() * sizeof(actqkv_f16);
}

gpu_ring::gpu_ring(const actqkv_cuda & cuda, actqkv_cuda_stream * compute, const kv_store & store, int n_layer,
                   uint8_t * memory)
    : cuda(cuda), compute(compute), store(store), array_bytes(bytes(store.layout(), 1) / N_ARRAYS), memory(memory),
      stale((size_t) n_layer * (1 + store.layout().n_recent_blocks), true) {}

size_t gpu_ring::slot_of(int il, int64_t block) const {
    const int64_t n = store.layout().n_recent_blocks;
    return (size_t) (il * (1 + n) + (block == 0 ? 0 : 1 + (block - 1) % n));
}

void gpu_ring::changed(int il, int64_t first, int64_t last) {
    const kv_layout & layout = store.layout();
    for (int64_t block = layout.block_of(first); first < last && block <= layout.block_of(last - 1); block++) {
        stale[slot_of(il, block)] = true;
    }
}

uint64_t gpu_ring::bring(int il, actqkv_span & span) {
    const kv_layout & layout = store.layout();
    const int64_t block = layout.block_of(span.first);
    const uint64_t at = layout.recent_offset(block) * sizeof(actqkv_f16);
    const uint64_t n = layout.block_tokens(block) * layout.token_stride() * sizeof(actqkv_f16);
    const bool copied = stale[slot_of(il, block)];
    uint64_t n_copied = 0;
    const kv_store::ring here = store.ring_of(il);
    const uint8_t * arrays[N_ARRAYS] = {(const uint8_t *) here.near, (const uint8_t *) here.far,
                                        (const uint8_t *) here.v};
    const uint8_t ** pointers[N_ARRAYS] = {&span.near, &span.far, &span.v};
    for (int a = 0; a < N_ARRAYS; a++) {
        uint8_t * there = memory + ((uint64_t) il * N_ARRAYS + a) * array_bytes;
        if (copied) { // all three: another span of the block may be of another sort
            const int32_t status = cuda.copy(compute, there + at, arrays[a] + at, n);
            if (status != 0) {
                throw error(ACTQKV_ERR_COMPUTE, format("copying open blocks: %s", cuda.error_text(status)));
            }
            n_copied += n;
        }
        if (*pointers[a] != nullptr) {
            *pointers[a] = there + (*pointers[a] - arrays[a]);
        }
    }
    stale[slot_of(il, block)] = false;
    return n_copied;
}

} // namespace actqkv
