// Memory of a GPU.
#pragma once

#include "../kernels/cuda/kernels_cuda.h"

#include <cstdint>

namespace actqkv {

// Bytes that an array takes where another one, aligned alike, follows it.
constexpr uint64_t padded(uint64_t n_bytes) { return (n_bytes + 255) / 256 * 256; }

// n_bytes of a device's memory, to be given back by cuda.give_back. ACTQKV_ERR_MEMORY, which names `what` it was for and
// what is free, where the device has not as much.
uint8_t * take_gpu_memory(const actqkv_cuda & cuda, int32_t device, uint64_t n_bytes, const char * what);

} // namespace actqkv
