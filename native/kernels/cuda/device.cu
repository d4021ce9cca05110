// device - GPUs, their memory, streams and copies; and the table of everything.
#include "common.cuh"

#include <new>

#ifndef ACTQKV_CUDA_TARGETS
#define ACTQKV_CUDA_TARGETS "unknown"
#endif

namespace actqkv::cuda {
namespace {

__global__ void to_f16_kernel(const float * src, actqkv_f16 * dst, int64_t n) {
    for (int64_t i = (int64_t) blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t) gridDim.x * blockDim.x) {
        dst[i] = narrow(src[i]);
    }
}

const char * error_text(int32_t status) { return cudaGetErrorString((cudaError_t) status); }

// What a call outside of streams failed with is an answer, not a state: wait() must not report it once more.
int32_t answered(cudaError_t status) {
    if (status != cudaSuccess) {
        cudaGetLastError();
    }
    return status;
}

int32_t driver_version(int32_t * version) {
    int found = 0;
    const cudaError_t status = cudaDriverGetVersion(&found);
    *version = found;
    return answered(status);
}

int32_t n_devices(int32_t * n) {
    int found = 0;
    const cudaError_t status = cudaGetDeviceCount(&found);
    *n = found;
    return answered(status);
}

int32_t attribute(cudaDeviceAttr which, int index) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, which, index) == cudaSuccess ? value : 0;
}

int32_t device(int32_t index, actqkv_cuda_device * found) {
    *found = {};
    cudaDeviceProp properties;
    cudaError_t status = cudaGetDeviceProperties(&properties, index);
    if (status != cudaSuccess || (status = cudaSetDevice(index)) != cudaSuccess) {
        return answered(status);
    }
    static_assert(sizeof(found->name) <= sizeof(properties.name), "names are cut to the shorter");
    memcpy(found->name, properties.name, sizeof(found->name) - 1);
    found->major = properties.major;
    found->minor = properties.minor;
    found->n_multiprocessors = properties.multiProcessorCount;
    size_t free = 0, total = 0;
    status = cudaMemGetInfo(&free, &total);
    found->free_bytes = free;
    found->memory_bytes = total;
    return answered(status);
}

int32_t take(int32_t device, uint64_t bytes, void ** memory) {
    *memory = nullptr;
    const cudaError_t status = cudaSetDevice(device);
    return answered(status != cudaSuccess ? status : cudaMalloc(memory, bytes));
}

int32_t give_back(void * memory) { return answered(cudaFree(memory)); }

int32_t take_pinned(uint64_t bytes, void ** memory) {
    *memory = nullptr;
    return answered(cudaHostAlloc(memory, bytes, cudaHostAllocPortable));
}

int32_t give_back_pinned(void * memory) { return memory != nullptr ? answered(cudaFreeHost(memory)) : 0; }

int32_t pin(void * memory, uint64_t bytes) {
    return answered(cudaHostRegister(memory, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped));
}

int32_t unpin(void * memory) { return answered(cudaHostUnregister(memory)); }

int32_t reaches(int32_t device, const void * pinned, int32_t * same) {
    *same = 0;
    cudaError_t status = cudaSetDevice(device);
    void * there = nullptr;
    if (status == cudaSuccess) {
        status = cudaHostGetDevicePointer(&there, const_cast<void *>(pinned), 0);
    }
    *same = status == cudaSuccess && there == pinned;
    return answered(status);
}

void close(actqkv_cuda_stream * s) {
    if (s == nullptr) {
        return;
    }
    cudaSetDevice(s->device);
    if (s->stream != nullptr) {
        cudaStreamSynchronize(s->stream);
    }
    for (cudaEvent_t event : {s->passed, s->started, s->stopped}) {
        if (event != nullptr) {
            cudaEventDestroy(event);
        }
    }
    cudaFree(s->tickets);
    if (s->pinned != nullptr) {
        cudaFreeHost(s->pinned);
    }
    if (s->stream != nullptr) {
        cudaStreamDestroy(s->stream);
    }
    delete s;
}

int32_t fill_stream(actqkv_cuda_stream * s) {
    cudaError_t status = cudaSetDevice(s->device);
    if (status == cudaSuccess) {
        status = cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking);
    }
    if (status == cudaSuccess) {
        status = cudaEventCreateWithFlags(&s->passed, cudaEventDisableTiming);
    }
    if (status == cudaSuccess) {
        status = cudaEventCreate(&s->started);
    }
    if (status == cudaSuccess) {
        status = cudaEventCreate(&s->stopped);
    }
    if (status == cudaSuccess) {
        status = cudaMalloc((void **) &s->tickets, N_TICKETS * sizeof(uint32_t));
    }
    if (status == cudaSuccess) {
        status = cudaMemsetAsync(s->tickets, 0, N_TICKETS * sizeof(uint32_t), s->stream);
    }
    if (status == cudaSuccess) {
        status = cudaStreamSynchronize(s->stream);
    }
    return status;
}

int32_t open(int32_t device, actqkv_cuda_stream ** stream) {
    *stream = nullptr;
    actqkv_cuda_stream * s = new (std::nothrow) actqkv_cuda_stream();
    if (s == nullptr) {
        return cudaErrorMemoryAllocation;
    }
    s->device = device;
    s->n_multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    const int32_t status = fill_stream(s);
    if (status != cudaSuccess) {
        close(s);
        cudaGetLastError();
        return status;
    }
    if (take_pinned(PINNED_BYTES, (void **) &s->pinned) != 0) {
        s->pinned = nullptr; // ordinary memory does
    }
    *stream = s;
    return 0;
}

int32_t copy(actqkv_cuda_stream * s, void * to, const void * from, uint64_t bytes) {
    const cudaError_t status = cudaSetDevice(s->device);
    return status != cudaSuccess ? status : cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, s->stream);
}

int32_t copy_rows(actqkv_cuda_stream * s, void * to, const void * from, uint64_t stride, uint64_t row_bytes,
                  uint64_t n_rows) {
    if (row_bytes == stride) { // a run of memory
        return copy(s, to, from, row_bytes * n_rows);
    }
    const cudaError_t status = cudaSetDevice(s->device);
    return status != cudaSuccess
               ? status
               : cudaMemcpy2DAsync(to, stride, from, stride, row_bytes, n_rows, cudaMemcpyDefault, s->stream);
}

int32_t fill(actqkv_cuda_stream * s, void * memory, int32_t byte, uint64_t bytes) {
    const cudaError_t status = cudaSetDevice(s->device);
    return status != cudaSuccess ? status : cudaMemsetAsync(memory, byte, bytes, s->stream);
}

int32_t follow(actqkv_cuda_stream * s, actqkv_cuda_stream * before) {
    cudaError_t status = cudaSetDevice(before->device);
    if (status == cudaSuccess) {
        status = cudaEventRecord(before->passed, before->stream);
    }
    if (status == cudaSuccess) {
        status = cudaSetDevice(s->device);
    }
    return status != cudaSuccess ? status : cudaStreamWaitEvent(s->stream, before->passed, 0);
}

void forget_sent(actqkv_cuda_stream * s) {
    s->pinned_used = 0;
    s->sent.clear();
}

int32_t wait(actqkv_cuda_stream * s) {
    cudaError_t status = cudaSetDevice(s->device);
    if (status == cudaSuccess) {
        status = cudaStreamSynchronize(s->stream);
    }
    const cudaError_t launched = cudaGetLastError();
    forget_sent(s);
    return status != cudaSuccess ? status : launched;
}

int32_t start_clock(actqkv_cuda_stream * s) {
    const cudaError_t status = cudaSetDevice(s->device);
    return status != cudaSuccess ? status : cudaEventRecord(s->started, s->stream);
}

int32_t stop_clock(actqkv_cuda_stream * s, float * ms) {
    *ms = 0;
    cudaError_t status = cudaSetDevice(s->device);
    if (status == cudaSuccess) {
        status = cudaEventRecord(s->stopped, s->stream);
    }
    if (status == cudaSuccess) {
        status = cudaEventSynchronize(s->stopped);
        forget_sent(s);
    }
    return status != cudaSuccess ? status : cudaEventElapsedTime(ms, s->started, s->stopped);
}

} // namespace

int32_t to_f16(actqkv_cuda_stream * s, const float * src, actqkv_f16 * dst, int64_t n) {
    constexpr int THREADS = 256, MOST_BLOCKS = 4096;
    const int64_t blocks = divided_up(n, THREADS);
    return launch(s, to_f16_kernel, dim3((unsigned) (blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS)), dim3(THREADS), 0,
                  src, dst, n);
}

} // namespace actqkv::cuda

extern "C" const actqkv_cuda * actqkv_cuda_table(void) {
    using namespace actqkv::cuda;
    static const actqkv_cuda table = {
        ACTQKV_CUDA_INTERFACE,
        CUDART_VERSION,
        ACTQKV_CUDA_TARGETS,
        error_text,
        driver_version,
        n_devices,
        device,
        take,
        give_back,
        take_pinned,
        give_back_pinned,
        pin,
        unpin,
        reaches,
        open,
        close,
        copy,
        copy_rows,
        fill,
        follow,
        wait,
        start_clock,
        stop_clock,
        to_f16,
        probe_update,
        probe_weights,
        probe_mix,
        summarize,
        score,
        mean,
        spread,
        spread_query,
        spread_scores,
        head_scores,
        vote,
        search_scratch,
        search_score,
        search_vote,
        refine,
        entropy,
        top_k,
        elect,
        gather,
        attend_scratch,
        attend,
    };
    return &table;
}
