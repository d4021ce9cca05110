// vote - one list of chunks per KV head, chosen by its group's query heads, or one for all, by all of them; formulas:
// ../cpu/vote.cpp.
//
// A block per KV head. Its warps share out the query heads' sums, several warps a head where there are few; then each
// thread joins the votes of its own chunks.
#include "common.cuh"

namespace actqkv::cuda {
namespace {

constexpr int MANY = 1024, FEW = 128, MOST_OF_FEW = 512; // threads; numbers that few of them take

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

template <int THREADS> __global__ void __launch_bounds__(THREADS)
    vote_kernel(const float * scores, int64_t n, int r, int n_parts, bool sum, float * votes) {
    float * shifts = reinterpret_cast<float *>(dynamic_shared()); // [r]
    const float * of_group = scores + (int64_t) blockIdx.x * r * n;
    make_shifts<THREADS / WARP>(of_group, n, r, n_parts, shifts);
    for (int64_t b = threadIdx.x; b < n; b += THREADS) {
        float vote = of_group[b] - shifts[0];
        for (int h = 1; h < r; h++) {
            vote = join_votes(vote, of_group[h * n + b] - shifts[h], sum);
        }
        votes[blockIdx.x * n + b] = vote;
    }
}

} // namespace

int32_t vote(actqkv_cuda_stream * s, const float * scores, int64_t n, int32_t n_head, int32_t n_head_kv, int32_t sum,
             float * votes) {
    const int r = n_head / n_head_kv;
    const bool few = n * r <= MOST_OF_FEW;
    const int n_threads = few ? FEW : MANY;
    int n_parts = 1;
    while (2 * n_parts * r <= n_threads / WARP) {
        n_parts *= 2;
    }
    return launch(s, few ? vote_kernel<FEW> : vote_kernel<MANY>, dim3(n > 0 ? (unsigned) n_head_kv : 0),
                  dim3((unsigned) n_threads), r * sizeof(float), scores, n, r, n_parts, sum != 0, votes);
}

} // namespace actqkv::cuda
