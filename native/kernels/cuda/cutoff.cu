// cutoff - how spread out a layer's scores are, and its k best chunks; formulas: ../cpu/cutoff.cpp.
//
// One block each: there are 4,096 scores at 128K tokens and 32,768 at 1M, 4 to 32 per thread. Few scores have few threads.
#include <cfloat>

#include "top_k.cuh"

namespace actqkv::cuda {
namespace {

template <int THREADS> __global__ void __launch_bounds__(THREADS)
    entropy_kernel(const float * scores, int64_t n, float factor, float * entropy) {
    __shared__ float part[WARP];
    __shared__ double wide_part[WARP];
    float most = -INFINITY, n_strange = 0;
    for (int64_t b = threadIdx.x; b < n; b += THREADS) {
        most = fmaxf(most, scores[b]);
        n_strange += isfinite(scores[b]) ? 0 : 1;
    }
    most = max_block(most, part);
    n_strange = sum_block(n_strange, part);
    double z = 0, zx = 0;
    for (int64_t b = threadIdx.x; n_strange == 0 && b < n; b += THREADS) {
        const float x = (scores[b] - most) * factor, e = expf(x);
        z += e;
        zx += e == 0 ? 0 : x * e;
    }
    z = sum_block(z, wide_part);
    zx = sum_block(zx, wide_part);
    if (threadIdx.x == 0) {
        const double h = n_strange == 0 ? (log(z) - zx / z) / log((double) n) : 0;
        *entropy = (float) (h < 0 ? 0 : h > 1 ? 1 : h);
    }
}

template <int THREADS> __global__ void __launch_bounds__(THREADS)
    top_k_kernel(const float * scores, int64_t n, int k, int32_t * chosen) {
    choose_best<THREADS>(scores, n, k, chosen);
}

__global__ void all_kernel(int32_t n, int32_t * chosen) {
    const int32_t b = (int32_t) (blockIdx.x * blockDim.x + threadIdx.x);
    if (b < n) {
        chosen[b] = b;
    }
}

} // namespace

int32_t entropy(actqkv_cuda_stream * s, const float * scores, int64_t n, float temperature, float * entropy) {
    if (n <= 1 || !(temperature > 0)) {
        return clear(s, entropy, sizeof(float));
    }
    const bool few = n <= MOST_OF_FEW;
    return launch(s, few ? entropy_kernel<FEW> : entropy_kernel<MANY>, dim3(1), dim3(few ? FEW : MANY), 0, scores, n,
                  fminf(1 / temperature, FLT_MAX), entropy);
}

int32_t top_k(actqkv_cuda_stream * s, const float * scores, int64_t n, int32_t k, int32_t * chosen) {
    if (k >= n) {
        return launch(s, all_kernel, dim3((unsigned) divided_up(n, 256)), dim3(256), 0, (int32_t) n, chosen);
    }
    const bool few = n <= MOST_OF_FEW;
    return k <= 0 ? 0
                  : launch(s, few ? top_k_kernel<FEW> : top_k_kernel<MANY>, dim3(1), dim3(few ? FEW : MANY), 0, scores,
                           n, k, chosen);
}

} // namespace actqkv::cuda
