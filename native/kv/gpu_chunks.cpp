#include "gpu_chunks.h"

#include "../error.h"
#include "gpu_memory.h"

#include <utility>

namespace actqkv {

gpu_chunks::gpu_chunks(const actqkv_cuda & cuda, int32_t device, actqkv_cuda_stream * compute, int n_layer,
                       int32_t n_slots, uint64_t chunk_bytes, finder find)
    : cuda(cuda), compute(compute), n_slots((uint64_t) n_slots), chunk_bytes(chunk_bytes), find(std::move(find)) {
    slots = take_gpu_memory(cuda, device, (uint64_t) n_layer * this->n_slots * chunk_bytes, "chunks");
    const int32_t opened = cuda.open(device, &copies);
    if (opened != 0) {
        cuda.give_back(slots);
        throw error(ACTQKV_ERR_COMPUTE, format("GPU %d opens no stream: %s", device, cuda.error_text(opened)));
    }
}

gpu_chunks::~gpu_chunks() {
    cuda.wait(compute);
    cuda.close(copies);
    cuda.give_back(slots);
}

void gpu_chunks::check(int32_t status, const char * what) const {
    if (status != 0) {
        throw error(ACTQKV_ERR_COMPUTE, format("%s: %s", what, cuda.error_text(status)));
    }
}

void gpu_chunks::start(int il, int32_t chunk, int32_t slot) {
    const source from = find(il, chunk);
    check(cuda.copy(copies, const_cast<uint8_t *>(keys(il, slot)), from.keys, chunk_bytes / 2), "copying keys");
    check(cuda.copy(copies, const_cast<uint8_t *>(values(il, slot)), from.values, chunk_bytes / 2), "copying values");
}

void gpu_chunks::join() { check(cuda.follow(compute, copies), "waiting for chunks"); }

void gpu_chunks::settle() { cuda.wait(copies); }

void gpu_chunks::finished_reading() { check(cuda.follow(copies, compute), "waiting for attention"); }

} // namespace actqkv
