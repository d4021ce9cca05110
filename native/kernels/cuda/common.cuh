// What the CUDA files share. Plain C++ beside CUDA's own words, so that tests/emulator compiles the same text for the
// host: launches go through cudaLaunchKernelEx, dynamic shared memory and the tensor cores through a function each.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels_cuda.h"

struct actqkv_cuda_stream {
    int device;
    int n_multiprocessors;
    cudaStream_t stream;
    cudaEvent_t passed, started, stopped;
    uint32_t * tickets; // [N_TICKETS], zero between kernels; see attend_one.cu
    // What copies that are queued read, until the next wait: pinned memory, so that the host is not held up behind
    // kernels; ordinary memory where that is full, or could not be pinned. A copy may begin after the call that queued it
    // has returned, of ordinary memory too where a GPU reads such memory itself (Grace, HMM).
    uint8_t * pinned;
    uint64_t pinned_used;
    std::vector<std::vector<uint8_t>> sent;
};

namespace actqkv::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr int N_TICKETS = 4096;
constexpr uint64_t PINNED_BYTES = 1 << 20; // of a stream: a call sends some ten KB

// Queues kernel(arguments...); an empty grid is nothing to do.
template <typename... Parameters, typename... Arguments>
int32_t launch(actqkv_cuda_stream * s, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
               Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0) {
        return 0;
    }
    cudaError_t status = cudaSetDevice(s->device);
    constexpr size_t WITHOUT_ASKING = 48 << 10;
    if (status == cudaSuccess && shared_bytes > WITHOUT_ASKING) {
        status = cudaFuncSetAttribute((const void *) kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      (int) shared_bytes);
    }
    if (status != cudaSuccess) {
        return status;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = s->stream;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Queues a run of zeros.
inline int32_t clear(actqkv_cuda_stream * s, void * memory, size_t bytes) {
    const cudaError_t status = cudaSetDevice(s->device);
    return status != cudaSuccess ? status : cudaMemsetAsync(memory, 0, bytes, s->stream);
}

__host__ __device__ inline int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

#ifdef __CUDACC__
__device__ inline unsigned char * dynamic_shared() {
    extern __shared__ __align__(16) unsigned char shared[];
    return shared;
}
#endif

// ---- calls

// Hands out arrays of one piece of memory; with base NULL it only counts.
struct arena {
    uint8_t * base;
    uint64_t used = 0;

    template <typename T> T * take(uint64_t n) {
        T * array = base == nullptr ? nullptr : reinterpret_cast<T *>(base + used);
        used += (n * sizeof(T) + 255) / 256 * 256;
        return array;
    }
};

// Memory for a copy that is about to be queued.
inline uint8_t * to_send(actqkv_cuda_stream * s, uint64_t bytes) {
    if (s->pinned == nullptr || bytes > PINNED_BYTES - s->pinned_used) {
        return s->sent.emplace_back(bytes).data();
    }
    s->pinned_used += bytes;
    return s->pinned + (s->pinned_used - bytes);
}

// ---- half precision

__host__ __device__ inline float wide(uint16_t half) {
#ifdef __CUDA_ARCH__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
#else
    const uint32_t sign = (uint32_t) (half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    uint32_t bits = exponent == 31 ? 0x7f800000u | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13;
    if (exponent == 0) {
        const float small = (float) mantissa * 5.9604644775390625e-8f; // 2^-24
        memcpy(&bits, &small, 4);
    }
    bits |= sign;
    float x;
    memcpy(&x, &bits, 4);
    return x;
#endif
}

// To nearest, ties to even.
__host__ __device__ inline uint16_t narrow(float x) {
#ifdef __CUDA_ARCH__
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t) (bits >> 16 & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) {
        return (uint16_t) (sign | 0x7e00 | (bits >> 13 & 0x3ff));
    }
    if (bits >= 0x477ff000u) { // 65520 and above
        return (uint16_t) (sign | 0x7c00);
    }
    if (bits < 0x38800000u) { // below 2^-14: adding 0.5 aligns and rounds the mantissa
        float small;
        memcpy(&small, &bits, 4);
        small += 0.5f;
        memcpy(&bits, &small, 4);
        return (uint16_t) (sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1);
    return (uint16_t) (sign | ((bits - 0x38000000u) >> 13));
#endif
}

// ---- turning

constexpr int MOST_TURNED = 256; // values of a segment of actqkv_turn

// A row in shared memory times the Hadamard matrix, in place, by n_threads threads, of which this is one. wait() has all of
// them come together; begins and ends with it.
template <typename Wait> __device__ void turn(float * x, int d, int thread, int n_threads, Wait && wait) {
    const int power = d & -d, p = power < MOST_TURNED ? power : MOST_TURNED;
    for (int half = 1; half < p; half *= 2) {
        wait();
        for (int i = thread; i < d / 2; i += n_threads) {
            const int at = i / half * 2 * half + i % half;
            const float a = x[at], b = x[at + half];
            x[at] = a + b;
            x[at + half] = a - b;
        }
    }
    wait();
    const float factor = 1 / sqrtf((float) p);
    for (int i = thread; i < d; i += n_threads) {
        x[i] *= factor;
    }
    wait();
}

// ---- rows of keys, values and summaries

constexpr int F16 = ACTQKV_KV_F16, Q4_0 = ACTQKV_KV_Q4_0, Q8_0 = ACTQKV_KV_Q8_0;
constexpr int PIECE = 8; // values that a lane takes at a time: 16 bytes of f16

__host__ __device__ inline int64_t row_bytes(int type, int64_t n) {
    return type == F16 ? 2 * n : divided_up(n, 32) * (type == Q8_0 ? 34 : 18);
}

// out[i] = value first + i of a row, i < PIECE; 0 from value n on. first is a multiple of PIECE. aligned: of f16, that
// the row lies at a multiple of 16 bytes and n is a multiple of PIECE.
__host__ __device__ inline void read_piece(int type, bool aligned, const uint8_t * row, int first, int n, float * out) {
    if (first >= n) {
        for (int i = 0; i < PIECE; i++) {
            out[i] = 0;
        }
    } else if (type == F16 && aligned) {
        const uint4 raw = *reinterpret_cast<const uint4 *>(row + 2 * first);
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
        for (int i = 0; i < 4; i++) {
            out[2 * i] = wide((uint16_t) words[i]);
            out[2 * i + 1] = wide((uint16_t) (words[i] >> 16));
        }
    } else if (type == F16) {
        const uint16_t * halfs = reinterpret_cast<const uint16_t *>(row) + first;
        for (int i = 0; i < PIECE; i++) {
            out[i] = first + i < n ? wide(halfs[i]) : 0;
        }
    } else {
        // A block of 32 values: f16 scale, then 32 signed bytes (q8_0), or 16 bytes with value i in the low and i + 16
        // in the high half of byte i (q4_0). Its bytes lie at multiples of 2.
        const int at = first % 32;
        const uint16_t * block = reinterpret_cast<const uint16_t *>(row + first / 32 * (type == Q8_0 ? 34 : 18));
        const float scale = wide(block[0]);
        const uint16_t * pairs = block + 1 + (type == Q8_0 ? at : at % 16) / 2;
        const int shift = type == Q4_0 && at >= 16 ? 4 : 0;
        for (int i = 0; i < PIECE / 2; i++) {
            const int low = pairs[i] & 0xff, high = pairs[i] >> 8;
            out[2 * i] = scale * (float) (type == Q8_0 ? (int) (int8_t) low : (low >> shift & 15) - 8);
            out[2 * i + 1] = scale * (float) (type == Q8_0 ? (int) (int8_t) high : (high >> shift & 15) - 8);
        }
        for (int i = 0; i < PIECE; i++) {
            out[i] = first + i < n ? out[i] : 0;
        }
    }
}

inline bool is_aligned(const void * p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---- reductions, in a fixed order

// Over the T lanes that hold one thing together, T a power of 2; every lane gets the sum.
template <int T> __device__ inline float sum_lanes(float x) {
    for (int step = T / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(ALL, x, step);
    }
    return x;
}

template <int T> __device__ inline float max_lanes(float x) {
    for (int step = T / 2; step > 0; step /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    }
    return x;
}

// Over a block of n threads (a multiple of WARP, at most 1024). part: shared, WARP numbers. Ends with a barrier, so
// that part may be used again at once.
template <typename Number, typename Join> __device__ inline Number join_block(Number x, Number * part, Join && join) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        x = join(x, __shfl_xor_sync(ALL, x, step));
    }
    const int n_warps = (int) blockDim.x / WARP;
    if (threadIdx.x % WARP == 0) {
        part[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    x = part[0];
    for (int i = 1; i < n_warps; i++) {
        x = join(x, part[i]);
    }
    __syncthreads();
    return x;
}

template <typename Number> __device__ inline Number sum_block(Number x, Number * part) {
    return join_block(x, part, [](Number a, Number b) { return a + b; });
}

__device__ inline float max_block(float x, float * part) {
    return join_block(x, part, [](float a, float b) { return fmaxf(a, b); });
}

// ---- the kernels, a file each, as the table names them

int32_t to_f16(actqkv_cuda_stream *, const float *, actqkv_f16 *, int64_t);
int32_t probe_update(actqkv_cuda_stream *, actqkv_running *, const float *, int32_t, int64_t, int32_t, int32_t);
int32_t probe_weights(actqkv_cuda_stream *, const actqkv_running *, const float *, int32_t, int64_t, float *, float *);
int32_t probe_mix(actqkv_cuda_stream *, const float *, const float *, int32_t, int64_t, float *);
int32_t summarize(actqkv_cuda_stream *, int32_t, int32_t, const actqkv_f16 *, int64_t, const float *, int64_t, int32_t,
                  int32_t, int32_t, int32_t, actqkv_f16 *, float *);
int32_t score(actqkv_cuda_stream *, const float *, float, const actqkv_f16 *, const float *, int64_t, int64_t, float,
              float *);
int32_t mean(actqkv_cuda_stream *, const actqkv_f16 *, int64_t, int32_t, int32_t, int32_t, float *);
int32_t spread(actqkv_cuda_stream *, const actqkv_f16 *, int64_t, const float *, int32_t, int32_t, int32_t, uint8_t *);
int32_t spread_query(actqkv_cuda_stream *, const float *, int32_t, int32_t, int32_t, float *);
int32_t spread_scores(actqkv_cuda_stream *, const float *, const uint8_t *, int64_t, int32_t, int32_t, float *);
int32_t head_scores(actqkv_cuda_stream *, const float *, const actqkv_f16 *, int64_t, int32_t, int64_t, int64_t,
                    int32_t, float *);
int32_t vote(actqkv_cuda_stream *, const float *, int64_t, int32_t, int32_t, int32_t, float *);
uint64_t search_scratch(const actqkv_search_args *);
int32_t search_score(actqkv_cuda_stream *, const actqkv_search_args *);
int32_t search_vote(actqkv_cuda_stream *, const actqkv_search_args *);
int32_t refine(actqkv_cuda_stream *, const float *, int32_t, const uint8_t *, const int32_t *, int32_t, int32_t,
               int32_t, int32_t, int32_t, float, float *);
int32_t entropy(actqkv_cuda_stream *, const float *, int64_t, float, float *);
int32_t top_k(actqkv_cuda_stream *, const float *, int64_t, int32_t, int32_t *);
int32_t elect(actqkv_cuda_stream *, const float *, int32_t, int32_t, int32_t, const int32_t *, float *, int32_t *,
              int32_t *);
int32_t gather(actqkv_cuda_stream *, const uint8_t *, int64_t, const int32_t *, const uint8_t *, const int32_t *,
               int32_t, int64_t, uint8_t *);
uint64_t attend_scratch(int32_t, int32_t, int32_t, int32_t, int64_t, int32_t, int32_t);
int32_t attend(actqkv_cuda_stream *, const actqkv_attend_args *);

} // namespace actqkv::cuda
