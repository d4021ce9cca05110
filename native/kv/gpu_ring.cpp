#include "gpu_ring.h"

#include "../error.h"

#include <algorithm>

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
      stale((size_t) n_layer * (1 + store.layout().n_recent_blocks), run{0, INT32_MAX}) {}

size_t gpu_ring::slot_of(int il, int64_t block) const {
    const int64_t n = store.layout().n_recent_blocks;
    return (size_t) (il * (1 + n) + (block == 0 ? 0 : 1 + (block - 1) % n));
}

void gpu_ring::changed(int il, int64_t first, int64_t last) {
    const kv_layout & layout = store.layout();
    for (int64_t block = layout.block_of(first); first < last && block <= layout.block_of(last - 1); block++) {
        const int64_t begin = layout.block_first(block), end = layout.block_first(block + 1);
        const run now = {(int32_t) (std::max(first, begin) - begin), (int32_t) (std::min(last, end) - begin)};
        run & old = stale[slot_of(il, block)];
        old = old.first == old.last ? now : run{std::min(old.first, now.first), std::max(old.last, now.last)};
    }
}

uint64_t gpu_ring::bring(int il, actqkv_span & span) {
    const kv_layout & layout = store.layout();
    const int64_t block = layout.block_of(span.first);
    const uint64_t row = layout.d_head * sizeof(actqkv_f16), head = layout.block_tokens(block) * row;
    run & changed = stale[slot_of(il, block)];
    const uint64_t n = (std::min(changed.last, layout.block_tokens(block)) - changed.first) * row; // of each head
    const uint64_t at = layout.recent_offset(block) * sizeof(actqkv_f16) + changed.first * row;
    uint64_t n_copied = 0;
    const kv_store::ring here = store.ring_of(il);
    const uint8_t * arrays[N_ARRAYS] = {(const uint8_t *) here.near, (const uint8_t *) here.far,
                                        (const uint8_t *) here.v};
    const uint8_t ** pointers[N_ARRAYS] = {&span.near, &span.far, &span.v};
    for (int a = 0; a < N_ARRAYS; a++) {
        uint8_t * there = memory + ((uint64_t) il * N_ARRAYS + a) * array_bytes;
        if (n > 0) { // all three: another span of the block may be of another sort
            const int32_t status =
                cuda.copy_rows(compute, there + at, arrays[a] + at, head, n, (uint64_t) layout.n_head_kv);
            if (status != 0) {
                throw error(ACTQKV_ERR_COMPUTE, format("copying open blocks: %s", cuda.error_text(status)));
            }
            n_copied += n * layout.n_head_kv;
        }
        if (*pointers[a] != nullptr) {
            *pointers[a] = there + (*pointers[a] - arrays[a]);
        }
    }
    changed = {0, 0};
    return n_copied;
}

} // namespace actqkv
