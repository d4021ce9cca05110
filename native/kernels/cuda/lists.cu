// lists - the chunks of a list brought together, be they hot or in the memory of the host, which is pinned.
#include "common.cuh"

namespace actqkv::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int64_t PART_BYTES = 8 << 10; // of a chunk, copied by one block

struct gathering {
    const uint8_t * slots;
    int64_t slot_stride;
    const int32_t * slot_of;
    const uint8_t * rest;
    const int32_t * chunks;
    int64_t bytes;
    uint8_t * to;
};

// grid.x: chunks; grid.y: parts of each, of `part` words.
template <typename Word> __global__ void __launch_bounds__(THREADS) gather_kernel(gathering a, int64_t part) {
    const int32_t chunk = a.chunks[blockIdx.x], slot = a.slot_of != nullptr ? a.slot_of[chunk] : chunk;
    const Word * from =
        reinterpret_cast<const Word *>(slot >= 0 ? a.slots + slot * a.slot_stride : a.rest + (int64_t) chunk * a.bytes);
    Word * to = reinterpret_cast<Word *>(a.to + (int64_t) blockIdx.x * a.bytes);
    const int64_t n = a.bytes / (int64_t) sizeof(Word), begin = blockIdx.y * part;
    const int64_t end = begin + part < n ? begin + part : n;
#pragma unroll 2
    for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
        to[i] = from[i];
    }
}

template <typename Word> int32_t run(actqkv_cuda_stream * s, const gathering & a, int32_t n) {
    return launch(s, gather_kernel<Word>, dim3((unsigned) n, (unsigned) divided_up(a.bytes, PART_BYTES)), dim3(THREADS),
                  0, a, PART_BYTES / (int64_t) sizeof(Word));
}

} // namespace

int32_t gather(actqkv_cuda_stream * s, const uint8_t * slots, int64_t slot_stride, const int32_t * slot_of,
               const uint8_t * rest, const int32_t * chunks, int32_t n, int64_t bytes, uint8_t * to) {
    const gathering a = {slots, slot_stride, slot_of, rest, chunks, bytes, to};
    const bool aligned =
        bytes % 16 == 0 && slot_stride % 16 == 0 && is_aligned(slots) && is_aligned(rest) && is_aligned(to);
    return aligned ? run<uint4>(s, a, n) : run<uint16_t>(s, a, n);
}

} // namespace actqkv::cuda
