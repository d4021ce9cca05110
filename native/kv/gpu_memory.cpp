#include "gpu_memory.h"

#include "../error.h"

namespace actqkv {

uint8_t * take_gpu_memory(const actqkv_cuda & cuda, int32_t device, uint64_t n_bytes, const char * what) {
    constexpr double MIB = 1024.0 * 1024.0;
    void * taken = nullptr;
    const int32_t status = cuda.take(device, n_bytes, &taken);
    if (status != 0) {
        actqkv_cuda_device found = {};
        cuda.device(device, &found);
        throw error(ACTQKV_ERR_MEMORY, format("%.0f MiB for %s on GPU %d, which has %.0f MiB free: %s", n_bytes / MIB,
                                              what, device, found.free_bytes / MIB, cuda.error_text(status)));
    }
    return (uint8_t *) taken;
}

} // namespace actqkv
