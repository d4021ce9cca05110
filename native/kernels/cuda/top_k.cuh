// The best of many scores, by one block (../cpu/cutoff.cpp: top_k).
#pragma once

#include "common.cuh"

namespace actqkv::cuda {

constexpr int MANY = 1024, FEW = 128, MOST_OF_FEW = 512; // threads; numbers that few of them take
constexpr int N_DIGITS = 256;

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

// By a block of THREADS, 0 < k < n: all above the k-th best, and of its equals the first ones, in order of the index.
template <int THREADS> __device__ void choose_best(const float * scores, int64_t n, int k, int32_t * chosen) {
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

} // namespace actqkv::cuda
