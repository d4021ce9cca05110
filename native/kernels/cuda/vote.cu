// vote - one list of chunks per KV head, chosen by its group's query heads; formulas: ../cpu/vote.cpp.
//
// A block per KV head; each thread writes and later reads again its own chunks only.
#include "common.cuh"

namespace actqkv::cuda {
namespace {

constexpr int THREADS = 1024;

__device__ float join_votes(float vote, float x, bool sum) {
    const float most = fmaxf(vote, x);
    return sum ? most + log1pf(expf(fminf(vote, x) - most)) : most;
}

__global__ void __launch_bounds__(THREADS)
    vote_kernel(const float * scores, int64_t n, int r, bool sum, float * votes) {
    __shared__ float part[WARP];
    __shared__ double wide_part[WARP];
    float * vote = votes + blockIdx.x * n;
    for (int x = 0; x < r; x++) {
        const float * score = scores + ((int64_t) blockIdx.x * r + x) * n;
        float most = -INFINITY;
        for (int64_t b = threadIdx.x; b < n; b += THREADS) {
            most = fmaxf(most, score[b]);
        }
        most = max_block(most, part);
        double z = 0;
        for (int64_t b = threadIdx.x; b < n; b += THREADS) {
            z += expf(score[b] - most);
        }
        const float shift = (float) (most + log(sum_block(z, wide_part)));
        for (int64_t b = threadIdx.x; b < n; b += THREADS) {
            vote[b] = x == 0 ? score[b] - shift : join_votes(vote[b], score[b] - shift, sum);
        }
    }
}

} // namespace

int32_t vote(actqkv_cuda_stream * s, const float * scores, int64_t n, int32_t n_head, int32_t n_head_kv, int32_t sum,
             float * votes) {
    return launch(s, vote_kernel, dim3(n > 0 ? (unsigned) n_head_kv : 0), dim3(THREADS), 0, scores, n,
                  n_head / n_head_kv, sum != 0, votes);
}

} // namespace actqkv::cuda
