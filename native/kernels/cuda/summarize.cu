// summarize - what stands for a closed chunk of c keys; formulas: ../cpu/summarize.cpp.
//
// A block per row of the summary. Each token counts how many tokens come before it in the order "larger sum first, then
// lower index": it is a representative when those are fewer than n_representatives.
#include "common.cuh"

namespace actqkv::cuda {
namespace {

constexpr int KIND_HEAD = 0, KIND_MEAN = 2, KIND_BOUNDS = 3; // enum actqkv_summary; 1 is per KV head
constexpr int THREADS = 128;

struct shape {
    int n_representatives, n_sums, r, d, c; // n_sums query heads' attention per row
    int64_t key_stride, sum_stride;
    bool per_head;
};

__global__ void mean_kernel(shape a, const actqkv_f16 * keys, const float * sums, actqkv_f16 * rep) {
    float * attention = reinterpret_cast<float *>(dynamic_shared()); // [c]
    int * taken = reinterpret_cast<int *>(attention + a.c);          // [c]
    __shared__ int n_taken;
    const int row = (int) blockIdx.x, g = a.per_head ? row / a.r : row, h = a.per_head ? row : row * a.r;
    if (threadIdx.x == 0) {
        n_taken = 0;
    }
    for (int t = (int) threadIdx.x; t < a.c; t += THREADS) {
        float sum = 0;
        for (int x = 0; x < a.n_sums; x++) {
            const float one = sums[(h + x) * a.sum_stride + t];
            sum += isfinite(one) ? one : 0;
        }
        attention[t] = sum;
    }
    __syncthreads();
    const bool ranked = a.n_sums > 0 && a.n_representatives > 0 && a.n_representatives < a.c;
    for (int t = (int) threadIdx.x; t < a.c; t += THREADS) {
        int n_before = 0;
        for (int u = 0; ranked && u < a.c; u++) {
            n_before += attention[u] > attention[t] || (attention[u] == attention[t] && u < t);
        }
        taken[t] = ranked && attention[t] > 0 && n_before < a.n_representatives;
        if (taken[t]) {
            atomicAdd(&n_taken, 1);
        }
    }
    __syncthreads();
    const bool enough = n_taken == a.n_representatives && ranked;
    const float n = (float) (enough ? a.n_representatives : a.c);
    for (int e = (int) threadIdx.x; e < a.d; e += THREADS) {
        float sum = 0;
        for (int t = 0; t < a.c; t++) {
            if (!enough || taken[t]) {
                sum += wide(keys[g * a.key_stride + (int64_t) t * a.d + e]);
            }
        }
        rep[(int64_t) row * a.d + e] = narrow(sum / n);
    }
}

// A block per KV head.
__global__ void bounds_kernel(int64_t key_stride, int d, int c, const actqkv_f16 * keys, actqkv_f16 * low,
                              actqkv_f16 * high) {
    const actqkv_f16 * head = keys + blockIdx.x * key_stride;
    for (int e = (int) threadIdx.x; e < d; e += THREADS) {
        float lo = wide(head[e]), hi = lo;
        for (int t = 1; t < c; t++) {
            const float k = wide(head[(int64_t) t * d + e]);
            lo = k < lo ? k : lo;
            hi = k > hi ? k : hi;
        }
        low[(int64_t) blockIdx.x * d + e] = narrow(lo); // exact: it was half
        high[(int64_t) blockIdx.x * d + e] = narrow(hi);
    }
}

// One block: *norm = sqrt(repeats * sum of squares).
__global__ void norm_kernel(const actqkv_f16 * rep, int64_t n, int repeats, float * norm) {
    __shared__ double part[WARP];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += THREADS) {
        const double x = wide(rep[i]);
        sum += x * x;
    }
    sum = sum_block(sum, part);
    if (threadIdx.x == 0) {
        *norm = (float) sqrt(sum * repeats);
    }
}

} // namespace

int32_t summarize(actqkv_cuda_stream * s, int32_t kind, int32_t n_representatives, const actqkv_f16 * keys,
                  int64_t key_stride, const float * sums, int64_t sum_stride, int32_t n_head, int32_t n_head_kv,
                  int32_t d_head, int32_t c, actqkv_f16 * rep, float * norm) {
    const unsigned n_rows = (unsigned) (kind == KIND_HEAD ? n_head : n_head_kv);
    const int r = n_head / n_head_kv;
    int32_t status;
    if (kind == KIND_BOUNDS) {
        status = launch(s, bounds_kernel, dim3(n_rows), dim3(THREADS), 0, key_stride, d_head, c, keys, rep,
                        rep + (int64_t) n_head_kv * d_head);
        return status != 0 ? status : clear(s, norm, sizeof(float));
    }
    const int n_sums = sums == nullptr || kind == KIND_MEAN ? 0 : kind == KIND_HEAD ? 1 : r;
    const shape a = {n_representatives, n_sums, r, d_head, c, key_stride, sum_stride, kind == KIND_HEAD};
    status = launch(s, mean_kernel, dim3(n_rows), dim3(THREADS), (size_t) c * (sizeof(float) + sizeof(int)), a, keys,
                    sums, rep);
    return status != 0 ? status
                       : launch(s, norm_kernel, dim3(1), dim3(THREADS), 0, rep, (int64_t) n_rows * d_head,
                                kind == KIND_HEAD ? 1 : r, norm);
}

} // namespace actqkv::cuda
