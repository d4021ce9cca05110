// vote - one list of chunks per KV head, chosen by its group's query heads, or one for all, by all of them; formulas:
// ../cpu/vote.cpp.
//
// A block per KV head. Its warps share out the query heads' sums, several warps a head where there are few; then each
// thread joins the votes of its own chunks.
#include "top_k.cuh"

namespace actqkv::cuda {
namespace {

__device__ float join_votes(float vote, float x, bool sum) {
    const float most = fmaxf(vote, x);
    return sum ? most + log1pf(expf(fminf(vote, x) - most)) : most;
}

// shifts [r]: ln sum_b e^s_hb, in shared memory; n_parts warps to a head, N_WARPS / n_parts heads at a time.
template <int N_WARPS>
__device__ void make_shifts(const float * scores, int64_t n, int r, int n_parts, float * shifts) {
    __shared__ float mosts[N_WARPS];
    __shared__ double sums[N_WARPS];
    const int warp = (int) threadIdx.x / WARP, lane = (int) threadIdx.x % WARP, n_heads = N_WARPS / n_parts;
    for (int first = 0; first < r; first += n_heads) {
        const int h = first + warp / n_parts, part = warp % n_parts;
        const float * score = scores + (int64_t) (h < r ? h : 0) * n;
        const int64_t from = n * part / n_parts, to = n * (part + 1) / n_parts;
        float most = -INFINITY;
        for (int64_t b = from + lane; b < to; b += WARP) {
            most = fmaxf(most, score[b]);
        }
        most = max_lanes<WARP>(most);
        double sum = 0;
        for (int64_t b = from + lane; b < to; b += WARP) {
            sum += expf(score[b] - most);
        }
        for (int step = WARP / 2; step > 0; step /= 2) {
            sum += __shfl_xor_sync(ALL, sum, step);
        }
        if (lane == 0) {
            mosts[warp] = most;
            sums[warp] = sum;
        }
        __syncthreads();
        if (part == 0 && lane == 0 && h < r) {
            float joint = most;
            for (int i = 1; i < n_parts; i++) {
                joint = fmaxf(joint, mosts[warp + i]);
            }
            double total = 0;
            for (int i = 0; i < n_parts; i++) {
                total += mosts[warp + i] == -INFINITY ? 0 : sums[warp + i] * exp((double) (mosts[warp + i] - joint));
            }
            shifts[h] = (float) (joint + log(total));
        }
        __syncthreads();
    }
}

// votes [n] of r query heads, scores [r][n]. shifts: shared, [r].
template <int THREADS> __device__ void make_votes(const float * scores, int64_t n, int r, int n_parts, bool sum,
                                                  float * shifts, float * votes) {
    make_shifts<THREADS / WARP>(scores, n, r, n_parts, shifts);
    for (int64_t b = threadIdx.x; b < n; b += THREADS) {
        float vote = scores[b] - shifts[0];
        for (int h = 1; h < r; h++) {
            vote = join_votes(vote, scores[h * n + b] - shifts[h], sum);
        }
        votes[b] = vote;
    }
}

// A block per KV head.
template <int THREADS> __global__ void __launch_bounds__(THREADS)
    vote_kernel(const float * scores, int64_t n, int r, int n_parts, bool sum, float * votes) {
    float * shifts = reinterpret_cast<float *>(dynamic_shared());
    make_votes<THREADS>(scores + (int64_t) blockIdx.x * r * n, n, r, n_parts, sum, shifts, votes + blockIdx.x * n);
}

// One block.
template <int THREADS> __global__ void __launch_bounds__(THREADS)
    elect_kernel(const float * scores, int n, int r, int n_parts, int k, const int32_t * candidates, float * votes,
                 int32_t * at, int32_t * elected) {
    float * shifts = reinterpret_cast<float *>(dynamic_shared());
    make_votes<THREADS>(scores, n, r, n_parts, true, shifts, votes);
    __syncthreads();
    choose_best<THREADS>(votes, n, k, at);
    __syncthreads();
    for (int i = (int) threadIdx.x; i < k; i += THREADS) {
        elected[i] = candidates[at[i]];
    }
}

struct warps {
    bool few;
    int n_threads, n_parts; // warps of a head
};

warps warps_for(int64_t n, int r) {
    warps w = {n * r <= MOST_OF_FEW, 0, 1};
    w.n_threads = w.few ? FEW : MANY;
    while (2 * w.n_parts * r <= w.n_threads / WARP) {
        w.n_parts *= 2;
    }
    return w;
}

} // namespace

int32_t vote(actqkv_cuda_stream * s, const float * scores, int64_t n, int32_t n_head, int32_t n_head_kv, int32_t sum,
             float * votes) {
    const int r = n_head / n_head_kv;
    const warps w = warps_for(n, r);
    return launch(s, w.few ? vote_kernel<FEW> : vote_kernel<MANY>, dim3(n > 0 ? (unsigned) n_head_kv : 0),
                  dim3((unsigned) w.n_threads), r * sizeof(float), scores, n, r, w.n_parts, sum != 0, votes);
}

int32_t elect(actqkv_cuda_stream * s, const float * scores, int32_t n, int32_t n_head, int32_t k,
              const int32_t * candidates, float * votes, int32_t * at, int32_t * elected) {
    if (k < 1 || k >= n) {
        return cudaErrorInvalidValue;
    }
    const warps w = warps_for(n, n_head);
    return launch(s, w.few ? elect_kernel<FEW> : elect_kernel<MANY>, dim3(1), dim3((unsigned) w.n_threads),
                  n_head * sizeof(float), scores, n, n_head, w.n_parts, k, candidates, votes, at, elected);
}

} // namespace actqkv::cuda
