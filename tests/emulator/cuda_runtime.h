// As much of CUDA as native/kernels/cuda uses, on the host: the same kernel texts, compiled as plain C++, run here.
//
// Every thread of a block is a fiber. A fiber runs until a barrier, a warp's exchange or its end; whoever comes next is
// drawn at random, and so are the blocks, so that a missing barrier shows. Memory of the "GPU" ends at a page that
// cannot be touched: reading or writing behind an array is a segmentation fault, and an access that is not aligned an
// illegal instruction. Memory that nobody wrote to is NaN. A launch that some card would refuse is refused, and so is one
// with pointers to ordinary memory.
//
// What is queued on a stream runs when somebody waits, of several streams in random turns: what one should have waited
// for of another shows, and so does memory of the host that is written or freed too early. Ordinary memory is read at
// once or late, at random, since the driver promises neither.
//
// How often the host would have waited is counted: where it asks to, and where a copy from or to ordinary memory comes
// behind a kernel, or behind another stream, on its own stream (actqkv_emulator_n_waits).
//
// What this does not show: what the real compiler makes of the text, blocks side by side, memory ordering, speed.
//
// The GPU's faults are asked for by the environment, as numbers: ACTQKV_EMULATOR_DEVICES, _DRIVER, _MAJOR (of the compute
// capability), _FREE (bytes of memory), and _FAIL_MALLOC, _FAIL_PIN, _FAIL_COPY, _FAIL_LAUNCH: the n-th call and all after it fail.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local // one block runs at a time; by thread, so that they lie together (poison())
#define __launch_bounds__(...)

#define CUDART_VERSION 13000
#define ACTQKV_CUDA_TARGETS "emulated"

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

namespace emulator {

struct place {
    dim3 thread, block, block_size, grid;
};
extern place here; // of the fiber that runs

void wait_block();
// What every lane of the warp gives, at all[lane].
const uint64_t * exchange(uint64_t mine);
unsigned char * shared_memory();
int lane();

} // namespace emulator

inline const dim3 &threadIdx = emulator::here.thread, &blockIdx = emulator::here.block;
inline const dim3 &blockDim = emulator::here.block_size, &gridDim = emulator::here.grid;

inline void __syncthreads() { emulator::wait_block(); }
inline void __syncwarp() { emulator::exchange(0); }
inline void __threadfence() {}

template <typename T> T __shfl_xor_sync(unsigned, T x, int step) {
    static_assert(sizeof(T) <= 8, "one register or two");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &x, sizeof(T));
    bits = emulator::exchange(bits)[emulator::lane() ^ step];
    __builtin_memcpy(&x, &bits, sizeof(T));
    return x;
}

template <typename T> T __shfl_up_sync(unsigned, T x, int step) {
    static_assert(sizeof(T) <= 8, "one register or two");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &x, sizeof(T));
    const uint64_t * all = emulator::exchange(bits);
    bits = all[emulator::lane() >= step ? emulator::lane() - step : emulator::lane()];
    __builtin_memcpy(&x, &bits, sizeof(T));
    return x;
}

inline unsigned __ballot_sync(unsigned, bool yes) {
    const uint64_t * all = emulator::exchange(yes);
    unsigned votes = 0;
    for (int i = 0; i < 32; i++) {
        votes |= (unsigned) all[i] << i;
    }
    return votes;
}

// Products of four signed bytes each, and c.
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) {
        c += (int8_t) (a >> 8 * i) * (int8_t) (b >> 8 * i);
    }
    return c;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename T> T __ldcg(const T * p) { return *p; }

template <typename T> T atomicAdd(T * to, T x) {
    const T before = *to;
    *to += x;
    return before;
}

namespace actqkv::cuda {

using std::isfinite;

inline unsigned char * dynamic_shared() { return emulator::shared_memory(); }

// mma.m16n8k16 of f16 with f32 sums, from what each lane holds by the PTX manual.
void emulated_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

} // namespace actqkv::cuda

// ---- the runtime's functions

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorLaunchFailure = 719
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDefault = 4 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum {
    cudaHostAllocPortable = 1,
    cudaHostRegisterPortable = 1,
    cudaHostRegisterMapped = 2,
    cudaStreamNonBlocking = 1,
    cudaEventDisableTiming = 2
};

typedef struct emulated_stream * cudaStream_t;
typedef struct emulated_event * cudaEvent_t;

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

const char * cudaGetErrorString(cudaError_t status);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int * version);
cudaError_t cudaGetDeviceCount(int * n);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp * properties, int index);
cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr which, int index);
cudaError_t cudaSetDevice(int index);
cudaError_t cudaMemGetInfo(size_t * free, size_t * total);
cudaError_t cudaMalloc(void ** memory, size_t bytes);
cudaError_t cudaFree(void * memory);
cudaError_t cudaHostAlloc(void ** memory, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void * memory);
cudaError_t cudaHostRegister(void * memory, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void * memory);
cudaError_t cudaHostGetDevicePointer(void ** there, void * memory, unsigned flags);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t * stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreate(cudaEvent_t * event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t * event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float * ms, cudaEvent_t from, cudaEvent_t to);
cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemcpy2DAsync(void * to, size_t to_pitch, const void * from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void * memory, int byte, size_t bytes, cudaStream_t stream);
cudaError_t cudaFuncSetAttribute(const void * kernel, cudaFuncAttribute which, int value);

namespace emulator {
// Whether it is memory of the GPU, or of the host and pinned, as a whole.
bool is_known(const void * memory, size_t bytes);

// Whether a card reaches what a kernel's parameter points to; structs are not looked into.
template <typename T> bool reaches(const T & parameter) {
    if constexpr (std::is_pointer_v<T>) {
        return parameter == nullptr || is_known(parameter, 1);
    }
    return true;
}

// Queues a grid, of which `body` is a thread.
cudaError_t launch(const cudaLaunchConfig_t & config, const void * kernel, std::function<void()> body);
} // namespace emulator

template <typename... Parameters, typename... Arguments> cudaError_t
cudaLaunchKernelEx(const cudaLaunchConfig_t * config, void (*kernel)(Parameters...), Arguments &&... arguments) {
    const std::tuple<Parameters...> copies(arguments...);
    static_assert(sizeof(copies) <= 4096, "what a card takes as parameters");
    if (!std::apply([](const auto &... one) { return (emulator::reaches(one) && ...); }, copies)) {
        return cudaErrorInvalidValue;
    }
    return emulator::launch(*config, (const void *) kernel, [kernel, copies] { std::apply(kernel, copies); });
}
