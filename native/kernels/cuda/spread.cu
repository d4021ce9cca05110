// spread - a summary of where a chunk's keys lie and how far they spread, and their scores; formulas: ../cpu/spread.cpp.
//
// Scores: a warp per summary, a lane per block of q4_0, against a query in shared memory, whose blocks lie a word further
// apart than they need to, so that the lanes read from different banks: memory-bound.
#include "common.cuh"

namespace actqkv::cuda {
namespace {

constexpr int THREADS = 128, N_WARPS = 8, BLOCK = 32, Q4_BYTES = 18;
constexpr int QUERY_BLOCKS = 256; // of a query in shared memory at a time

__host__ __device__ inline int64_t blocks_of_head(int d) { return divided_up(d, BLOCK); }

struct layout {
    int n_head_kv, d;
    __host__ __device__ int64_t padded() const { return blocks_of_head(d) * BLOCK; }
    __host__ __device__ int64_t tail() const { return n_head_kv * blocks_of_head(d) * Q4_BYTES; }
    __host__ __device__ int64_t bytes() const { return tail() + 2 * (int64_t) n_head_kv; }
};

__device__ uint16_t * halfs_at(uint8_t * at) { return reinterpret_cast<uint16_t *>(at); }
__device__ const uint16_t * halfs_at(const uint8_t * at) { return reinterpret_cast<const uint16_t *>(at); }

// Mean of channel e over c keys; 0 of none.
__device__ float mean_of(const actqkv_f16 * keys, int d, int c, int e) {
    float sum = 0;
    for (int j = 0; j < c; j++) {
        sum += wide(keys[(int64_t) j * d + e]);
    }
    return c > 0 ? sum / (float) c : 0;
}

// A row in shared memory, turned by the block.
__device__ void turn_by_block(float * x, int d) {
    turn(x, d, (int) threadIdx.x, THREADS, [] { __syncthreads(); });
}

// x in [0, 15] as a whole number, 0 for NaN.
__device__ int whole(float x) { return !(x > 0) ? 0 : x > 15 ? 15 : (int) x; }

// x [d] in shared memory, complete for all threads, as head g's part of a spread. A warp per block of q4_0: the scale is of
// the first of the values furthest from 0.
__device__ void store_head(const float * x, double variance, const layout & shape, int g, uint8_t * spread) {
    const int lane = (int) threadIdx.x % WARP;
    const int64_t n_blocks = blocks_of_head(shape.d);
    for (int b = (int) threadIdx.x / WARP; b < n_blocks; b += THREADS / WARP) {
        const int e = b * BLOCK + lane;
        const float mine = e < shape.d ? x[e] : 0;
        float extreme = fabsf(mine) > 0 ? mine : 0;
        int first = lane;
        for (int step = WARP / 2; step > 0; step /= 2) {
            const float other = __shfl_xor_sync(ALL, extreme, step);
            const int other_first = __shfl_xor_sync(ALL, first, step);
            const bool further = fabsf(other) > fabsf(extreme);
            const bool sooner = fabsf(other) == fabsf(extreme) && other_first < first;
            extreme = further || sooner ? other : extreme;
            first = further || sooner ? other_first : first;
        }
        const float scale = extreme / -8, inverse = scale != 0 ? 1 / scale : 0;
        const int q = whole(mine * inverse + 8.5f), above = __shfl_xor_sync(ALL, q, BLOCK / 2);
        uint8_t * to = spread + (g * n_blocks + b) * Q4_BYTES;
        if (lane == 0) {
            *halfs_at(to) = narrow(scale);
        }
        if (lane < BLOCK / 2) {
            to[2 + lane] = (uint8_t) (q | above << 4);
        }
    }
    if (threadIdx.x == 0) {
        halfs_at(spread + shape.tail())[g] = narrow((float) sqrt(variance));
    }
}

// A block per KV head.
__global__ void mean_kernel(const actqkv_f16 * keys, int64_t key_stride, int d, int c, float * mean) {
    for (int e = (int) threadIdx.x; e < d; e += THREADS) {
        mean[(int64_t) blockIdx.x * d + e] = mean_of(keys + blockIdx.x * key_stride, d, c, e);
    }
}

// A block per KV head.
__global__ void __launch_bounds__(THREADS) spread_kernel(const actqkv_f16 * keys, int64_t key_stride,
                                                         const float * centre, layout shape, int c, uint8_t * spread) {
    float * x = reinterpret_cast<float *>(dynamic_shared()); // [d]
    __shared__ double part[WARP];
    const int g = (int) blockIdx.x, d = shape.d;
    const actqkv_f16 * from = keys + g * key_stride;
    double squares = 0;
    for (int e = (int) threadIdx.x; e < d; e += THREADS) {
        const float mean = mean_of(from, d, c, e);
        for (int j = 0; j < c; j++) {
            const float rest = wide(from[(int64_t) j * d + e]) - mean;
            squares += rest * rest;
        }
        x[e] = mean - centre[(int64_t) g * d + e];
    }
    squares = sum_block(squares, part);
    turn_by_block(x, d);
    store_head(x, squares / ((double) c * d), shape, g, spread);
}

// A block per KV head.
__global__ void __launch_bounds__(THREADS) query_kernel(const float * query, int r, layout shape, float * folded) {
    float * x = reinterpret_cast<float *>(dynamic_shared()); // [d]
    __shared__ float part[WARP];
    const int g = (int) blockIdx.x, d = shape.d;
    float * to = folded + g * shape.padded();
    float reach = 0;
    for (int h = 0; h < r; h++) {
        for (int e = (int) threadIdx.x; e < d; e += THREADS) {
            x[e] = query[((int64_t) g * r + h) * d + e];
        }
        turn_by_block(x, d);
        for (int e = (int) threadIdx.x; e < shape.padded(); e += THREADS) { // each thread its own channels
            const float value = e < d ? x[e] : 0;
            to[e] = h == 0 ? value : to[e] + value;
            reach += fabsf(value);
        }
        __syncthreads();
    }
    reach = sum_block(reach, part);
    if (threadIdx.x == 0) {
        folded[shape.n_head_kv * shape.padded() + g] = reach;
    }
}

// Product of a block of q4_0 with 32 values.
__device__ float q4_product(const uint8_t * block, const float * query) {
    const uint16_t * pairs = halfs_at(block) + 1;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < BLOCK / 4; i++) { // two bytes: values 2i and 2i + 1, and those 16 further
        const int four = pairs[i];
        sum += (float) ((four & 15) - 8) * query[2 * i] + (float) ((four >> 8 & 15) - 8) * query[2 * i + 1];
        sum += (float) ((four >> 4 & 15) - 8) * query[2 * i + BLOCK / 2] +
               (float) ((four >> 12) - 8) * query[2 * i + 1 + BLOCK / 2];
    }
    return wide(*halfs_at(block)) * sum;
}

// grid.x: summaries, in turns.
__global__ void __launch_bounds__(N_WARPS * WARP)
    scores_kernel(const float * folded, const uint8_t * spreads, int64_t n, layout shape, float * scores) {
    __shared__ float query[QUERY_BLOCKS][BLOCK + 1];
    const int warp = (int) threadIdx.x / WARP, lane = (int) threadIdx.x % WARP;
    const int64_t n_blocks = shape.n_head_kv * blocks_of_head(shape.d), tail = shape.tail(), bytes = shape.bytes();
    const float * reach = folded + n_blocks * BLOCK;
    for (int64_t first = 0; first < n_blocks; first += QUERY_BLOCKS) {
        const int n_here = (int) (n_blocks - first < QUERY_BLOCKS ? n_blocks - first : QUERY_BLOCKS);
        __syncthreads(); // what was there has been read
        for (int i = (int) threadIdx.x; i < n_here * BLOCK; i += N_WARPS * WARP) {
            query[i / BLOCK][i % BLOCK] = folded[first * BLOCK + i];
        }
        __syncthreads();
        for (int64_t i = (int64_t) blockIdx.x * N_WARPS + warp; i < n; i += (int64_t) gridDim.x * N_WARPS) {
            const uint8_t * row = spreads + i * bytes;
            float sum = 0;
            for (int b = lane; b < n_here; b += WARP) {
                sum += q4_product(row + (first + b) * Q4_BYTES, query[b]);
            }
            for (int g = lane; first == 0 && g < shape.n_head_kv; g += WARP) {
                sum += reach[g] * wide(halfs_at(row + tail)[g]);
            }
            sum = sum_lanes<WARP>(sum);
            if (lane == 0) {
                scores[i] = first == 0 ? sum : scores[i] + sum;
            }
        }
    }
}

} // namespace

int32_t mean(actqkv_cuda_stream * s, const actqkv_f16 * keys, int64_t key_stride, int32_t n_head_kv, int32_t d_head,
             int32_t c, float * mean) {
    return launch(s, mean_kernel, dim3((unsigned) n_head_kv), dim3(THREADS), 0, keys, key_stride, d_head, c, mean);
}

int32_t spread(actqkv_cuda_stream * s, const actqkv_f16 * keys, int64_t key_stride, const float * centre,
               int32_t n_head_kv, int32_t d_head, int32_t c, uint8_t * spread) {
    return launch(s, spread_kernel, dim3((unsigned) n_head_kv), dim3(THREADS), d_head * sizeof(float), keys, key_stride,
                  centre, layout{n_head_kv, d_head}, c, spread);
}

int32_t spread_query(actqkv_cuda_stream * s, const float * query, int32_t n_head, int32_t n_head_kv, int32_t d_head,
                     float * folded) {
    return launch(s, query_kernel, dim3((unsigned) n_head_kv), dim3(THREADS), d_head * sizeof(float), query,
                  n_head / n_head_kv, layout{n_head_kv, d_head}, folded);
}

int32_t spread_scores(actqkv_cuda_stream * s, const float * folded, const uint8_t * spreads, int64_t n,
                      int32_t n_head_kv, int32_t d_head, float * scores) {
    // So many blocks that every multiprocessor has some, and a query is loaded for several summaries.
    const int64_t wanted = divided_up(n, N_WARPS), most = 4 * (int64_t) s->n_multiprocessors;
    return launch(s, scores_kernel, dim3((unsigned) (wanted < most ? wanted : most)), dim3(N_WARPS * WARP), 0, folded,
                  spreads, n, layout{n_head_kv, d_head}, scores);
}

} // namespace actqkv::cuda
