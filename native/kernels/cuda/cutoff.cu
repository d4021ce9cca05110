// cutoff - how spread out a layer's scores are, and its k best chunks; formulas: ../cpu/cutoff.cpp.
//
// One block each: there are 4,096 scores at 128K tokens and 32,768 at 1M, 4 to 32 per thread. Few scores have few threads.
#include "common.cuh"

namespace actqkv::cuda {
namespace {

constexpr int MANY = 1024, FEW = 128, MOST_OF_FEW = 512, N_DIGITS = 256;

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

// Unsigned numbers in the order of the scores: -0 equals 0, NaN is 0 and below all.
__host__ __device__ inline uint32_t sortable(float score) {
    score += 0.0f;
    uint32_t bits;
    memcpy(&bits, &score, 4);
    return score != score ? 0 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// How many threads before this one say yes; *total: how many do. counts: shared, WARP ints. Ends with a barrier.
template <int THREADS> __device__ int count_before(bool yes, int * counts, int * total) {
    const unsigned votes = __ballot_sync(ALL, yes);
    const int lane = (int) threadIdx.x % WARP, warp = (int) threadIdx.x / WARP;
    if (lane == 0) {
        counts[warp] = __popc(votes);
    }
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1));
    *total = 0;
    for (int i = 0; i < THREADS / WARP; i++) {
        before += i < warp ? counts[i] : 0;
        *total += counts[i];
    }
    __syncthreads();
    return before;
}

// The k-th greatest of the sortable scores, 8 bits at a time from the top; *n_above: how many are greater.
template <int THREADS> __device__ uint32_t threshold_of(const float * scores, int64_t n, int k, int * n_above) {
    __shared__ int n_with[N_DIGITS];
    __shared__ int digit, above;
    uint32_t prefix = 0, mask = 0;
    int wanted = k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = (int) threadIdx.x; i < N_DIGITS; i += THREADS) {
            n_with[i] = 0;
        }
        __syncthreads();
        for (int64_t b = threadIdx.x; b < n; b += THREADS) {
            const uint32_t key = sortable(scores[b]);
            if ((key & mask) == prefix) {
                atomicAdd(&n_with[key >> shift & 255], 1);
            }
        }
        __syncthreads();
        if (threadIdx.x < WARP) { // each lane the digits of one range, the highest range first
            constexpr int N_MINE = N_DIGITS / WARP;
            const int top = N_DIGITS - 1 - (int) threadIdx.x * N_MINE;
            int mine = 0;
            for (int i = 0; i < N_MINE; i++) {
                mine += n_with[top - i];
            }
            int before = mine; // of the ranges up to this one, then before it
            for (int step = 1; step < WARP; step *= 2) {
                const int lower = __shfl_up_sync(ALL, before, step);
                before += (int) threadIdx.x >= step ? lower : 0;
            }
            before -= mine;
            if (before < wanted && wanted <= before + mine) { // of one lane
                int i = top;
                while (before + n_with[i] < wanted) {
                    before += n_with[i--];
                }
                digit = i;
                above = before;
            }
        }
        __syncthreads();
        prefix |= (uint32_t) digit << shift;
        mask |= 255u << shift;
        wanted -= above;
        __syncthreads();
    }
    *n_above = k - wanted;
    return prefix;
}

// All above the k-th best, and of its equals the first ones, in order of the index.
template <int THREADS> __global__ void __launch_bounds__(THREADS)
    top_k_kernel(const float * scores, int64_t n, int k, int32_t * chosen) {
    __shared__ int counts[WARP];
    int n_above;
    const uint32_t threshold = threshold_of<THREADS>(scores, n, k, &n_above);
    int n_equal_left = k - n_above, n_written = 0;
    for (int64_t first = 0; first < n; first += THREADS) {
        const int64_t b = first + threadIdx.x;
        const uint32_t key = b < n ? sortable(scores[b]) : 0;
        int n_equal, n_chosen;
        const bool equal = b < n && key == threshold;
        const bool first_equals = count_before<THREADS>(equal, counts, &n_equal) < n_equal_left;
        const bool mine = b < n && (key > threshold || (equal && first_equals));
        const int at = n_written + count_before<THREADS>(mine, counts, &n_chosen);
        if (mine) {
            chosen[at] = (int32_t) b;
        }
        n_written += n_chosen;
        n_equal_left -= n_equal < n_equal_left ? n_equal : n_equal_left;
    }
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
                  1 / temperature, entropy);
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
