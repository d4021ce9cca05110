// kernels_cuda.h - the kernels of ../kernels.h on an NVIDIA GPU, with the memory and the streams they need.
//
// libactqkv_cuda is a library of its own, beside libactqkv, and is loaded at run time: a machine without a driver never
// opens it. It exports one function that returns one table. Functions have the names, the order and the meaning of
// kernels.h; what differs:
//   * a stream stands first, in place of impl; n_threads is gone. The call returns once the work is queued.
//   * arrays lie in the GPU's memory. Structs and what is said to be of the host are read before the call returns.
//   * every function that can fail returns a status: 0, or a number that error_text() puts into words.
// Results are bit-equal from run to run on one GPU.
// A stream is used by one thread at a time; two streams by two threads is fine.
#ifndef ACTQKV_KERNELS_CUDA_H
#define ACTQKV_KERNELS_CUDA_H

#include "../kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

// [cdef begin]

enum actqkv_cuda_limits { ACTQKV_CUDA_INTERFACE = 6, ACTQKV_CUDA_MAX_D_HEAD = 256 };

struct actqkv_cuda_stream;

struct actqkv_cuda_device {
    char name[128];
    int32_t major, minor; // compute capability
    int32_t n_multiprocessors;
    uint64_t memory_bytes, free_bytes;
};

struct actqkv_cuda {
    int32_t interface;    // ACTQKV_CUDA_INTERFACE of the header it was built with
    int32_t toolkit;      // CUDA version it was built with: 1000 * major + 10 * minor
    const char * targets; // GPU architectures it was built for, as CMake lists them

    // ---- devices

    const char * (*error_text)(int32_t status);
    // CUDA version that the driver supports, as toolkit; 0: no driver.
    int32_t (*driver_version)(int32_t * version);
    int32_t (*n_devices)(int32_t * n);
    // Takes memory of the GPU for CUDA's own state, some hundred MB.
    int32_t (*device)(int32_t index, struct actqkv_cuda_device * found);

    // ---- memory: of a GPU, and of the host in a form that copies reach at full speed

    int32_t (*take)(int32_t device, uint64_t bytes, void ** memory);
    int32_t (*give_back)(void * memory);
    int32_t (*take_pinned)(uint64_t bytes, void ** memory);
    int32_t (*give_back_pinned)(void * memory);
    // Pins memory that is there already; bytes and start are rounded to the host's granularity by the driver.
    int32_t (*pin)(void * memory, uint64_t bytes);
    int32_t (*unpin)(void * memory);
    // same: whether kernels read the pinned memory at the address that it has on the host.
    int32_t (*reaches)(int32_t device, const void * pinned, int32_t * same);

    // ---- streams: what is queued on one runs in order

    int32_t (*open)(int32_t device, struct actqkv_cuda_stream ** stream);
    // Waits for what is queued. NULL is allowed.
    void (*close)(struct actqkv_cuda_stream * stream);
    // Between any two of GPU, pinned and ordinary memory, which stays as it is until the next wait. From ordinary
    // memory it may wait for the copy.
    int32_t (*copy)(struct actqkv_cuda_stream * stream, void * to, const void * from, uint64_t bytes);
    // The same of n_rows rows, which lie `stride` bytes apart in both.
    int32_t (*copy_rows)(struct actqkv_cuda_stream * stream, void * to, const void * from, uint64_t stride,
                         uint64_t row_bytes, uint64_t n_rows);
    int32_t (*fill)(struct actqkv_cuda_stream * stream, void * memory, int32_t byte, uint64_t bytes);
    // What is queued on `stream` from now on waits for what is queued on `before` now. The host does not wait.
    int32_t (*follow)(struct actqkv_cuda_stream * stream, struct actqkv_cuda_stream * before);
    // The host waits for all that is queued; reports what failed since the last wait.
    int32_t (*wait)(struct actqkv_cuda_stream * stream);
    // GPU time between the two, in ms; stop_clock waits.
    int32_t (*start_clock)(struct actqkv_cuda_stream * stream);
    int32_t (*stop_clock)(struct actqkv_cuda_stream * stream, float * ms);

    // ---- kernels, in the order of kernels.h

    int32_t (*to_f16)(struct actqkv_cuda_stream * stream, const float * src, actqkv_f16 * dst, int64_t n);

    // running: of the host, its arrays on the GPU; n_tokens and n_windows are of after the call at once.
    int32_t (*probe_update)(struct actqkv_cuda_stream * stream, struct actqkv_running * running, const float * z,
                            int32_t m, int64_t n_channels, int32_t published, int32_t cap);
    int32_t (*probe_weights)(struct actqkv_cuda_stream * stream, const struct actqkv_running * running, const float * z,
                             int32_t m, int64_t n_channels, float * bias, float * weights);
    int32_t (*probe_mix)(struct actqkv_cuda_stream * stream, const float * z, const float * weights, int32_t m,
                         int64_t n_channels, float * probe);

    int32_t (*summarize)(struct actqkv_cuda_stream * stream, int32_t kind, int32_t n_representatives,
                         const actqkv_f16 * keys, int64_t key_stride, const float * sums, int64_t sum_stride,
                         int32_t n_head, int32_t n_head_kv, int32_t d_head, int32_t c, actqkv_f16 * rep, float * norm);

    int32_t (*score)(struct actqkv_cuda_stream * stream, const float * probe, float probe_norm, const actqkv_f16 * reps,
                     const float * norms, int64_t n, int64_t width, float scale, float * scores);

    int32_t (*mean)(struct actqkv_cuda_stream * stream, const actqkv_f16 * keys, int64_t key_stride, int32_t n_head_kv,
                    int32_t d_head, int32_t c, float * mean);
    int32_t (*spread)(struct actqkv_cuda_stream * stream, const actqkv_f16 * keys, int64_t key_stride,
                      const float * centre, int32_t n_head_kv, int32_t d_head, int32_t c, uint8_t * spread);
    // Spreads lie at a multiple of 2 bytes.
    int32_t (*spread_query)(struct actqkv_cuda_stream * stream, const float * query, int32_t n_head, int32_t n_head_kv,
                            int32_t d_head, float * folded);
    // The query is not rounded.
    int32_t (*spread_scores)(struct actqkv_cuda_stream * stream, const float * folded, const uint8_t * spreads,
                             int64_t n, int32_t n_head_kv, int32_t d_head, float * scores);

    int32_t (*head_scores)(struct actqkv_cuda_stream * stream, const float * queries, const actqkv_f16 * reps,
                           int64_t block_stride, int32_t n_blocks, int64_t n, int64_t width, int32_t n_head,
                           float * scores);
    int32_t (*vote)(struct actqkv_cuda_stream * stream, const float * scores, int64_t n, int32_t n_head,
                    int32_t n_head_kv, int32_t sum, float * votes);

    // args and its list of stretches are of the host, every array that they point to is of the GPU, scratch at a
    // multiple of 256. n_threads is not read. Of the list, search_scratch() reads n_keys and in_order, and it grows
    // with all sizes.
    uint64_t (*search_scratch)(const struct actqkv_search_args * args);
    // Queries are rounded as on the CPU: against centres to 1/127 of the largest channel, against keys to 1/63 of the
    // most that any four channels can give. Votes are sums of whole multiples of 2^-40.
    int32_t (*search_score)(struct actqkv_cuda_stream * stream, const struct actqkv_search_args * args);
    int32_t (*search_vote)(struct actqkv_cuda_stream * stream, const struct actqkv_search_args * args);

    // chunks may be NULL: those that lie one behind the other.
    int32_t (*refine)(struct actqkv_cuda_stream * stream, const float * query, int32_t type, const uint8_t * keys,
                      const int32_t * chunks, int32_t n, int32_t n_head, int32_t n_head_kv, int32_t d_head, int32_t c,
                      float scale, float * scores);

    // *entropy lies on the GPU.
    int32_t (*entropy)(struct actqkv_cuda_stream * stream, const float * scores, int64_t n, float temperature,
                       float * entropy);
    // chosen [min(k, n)]. Needs no scratch.
    int32_t (*top_k)(struct actqkv_cuda_stream * stream, const float * scores, int64_t n, int32_t k, int32_t * chosen);

    // ---- lists of chunks on the GPU, from their scores to their attention

    // vote() of all n_head heads together by their sum, top_k() of the votes, and the names of the elected, 0 < k < n:
    // elected[i] = candidates[at[i]], i < k; votes [n] and at [k] are left as well.
    int32_t (*elect)(struct actqkv_cuda_stream * stream, const float * scores, int32_t n, int32_t n_head, int32_t k,
                     const int32_t * candidates, float * votes, int32_t * at, int32_t * elected);
    // `bytes` each of the n listed chunks, one behind the other: of chunk b at slots + slot_of[b] * slot_stride, or, where
    // slot_of[b] is negative, at rest + b * bytes, which may be pinned memory of the host. slot_of NULL: slot b. All lie at
    // multiples of 2 bytes, and `bytes` is one.
    int32_t (*gather)(struct actqkv_cuda_stream * stream, const uint8_t * slots, int64_t slot_stride,
                      const int32_t * slot_of, const uint8_t * rest, const int32_t * chunks, int32_t n, int64_t bytes,
                      uint8_t * to);

    // ---- attend

    // Bytes of scratch on the GPU for at most so many keys and queries, in n_lists lists of at most n_spans spans.
    uint64_t (*attend_scratch)(int32_t n_head, int32_t n_head_kv, int32_t d_head, int32_t m, int64_t n_keys,
                               int32_t n_spans, int32_t n_lists);
    // args and its list of spans are of the host, every array that they point to is of the GPU. n_threads is not read.
    // Refuses (status of an invalid value) d_head above ACTQKV_CUDA_MAX_D_HEAD.
    int32_t (*attend)(struct actqkv_cuda_stream * stream, const struct actqkv_attend_args * args);
};

// Opens libactqkv_cuda (path NULL: the one beside libactqkv) and returns its table, which stays valid. NULL where there
// is none, or one of another interface; reason [size] then says why in one line.
const struct actqkv_cuda * actqkv_cuda_load(const char * path, char * reason, int32_t size);

// [cdef end]

// What libactqkv_cuda exports.
const struct actqkv_cuda * actqkv_cuda_table(void);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif // ACTQKV_KERNELS_CUDA_H
