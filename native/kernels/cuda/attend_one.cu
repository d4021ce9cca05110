// attend for one query per head: flash-decoding (Dao, Haziza, Massa, Sizov 2023).
//
// The passes are split over blocks, a block's passes over its warps. T lanes share a key of at most T*PIECE channels, so
// that a warp takes WARP/T keys at a time, each read of K and V serving R query heads. Every warp has an online softmax
// of its own; a block's are joined in shared memory, the blocks' by whichever block of a KV head ends last, in the
// order of the splits, so that the result does not depend on who that was.
#include "attend.cuh"

#include <cmath>

namespace actqkv::cuda {
namespace {

constexpr int N_WARPS = 4, N_UNROLLED = 4; // keys per lane group in flight

__device__ float factor_of(float most, float joint) { return most == -INFINITY ? 0.0f : expf(most - joint); }

// The online softmax of R heads over the keys that a lane group has met: PIECE channels per lane.
template <int R> struct softmax {
    float most[R], sum[R], mixed[R][PIECE];
};

template <int T, int R> __device__ void meet(const attention & a, const tile & t, bool near, int g,
                                             const float (&q)[R][PIECE], softmax<R> & state) {
    constexpr int N_KEYS = WARP / T;
    const int lane = (int) threadIdx.x % WARP, group = lane / T, e = lane % T * PIECE;
    const int64_t row = row_bytes(t.type, a.d);
    const uint8_t * keys = keys_of(t, near, g);
    const uint8_t * values = t.v + g * t.v_stride;
    for (int first = 0; first < t.n; first += N_KEYS * N_UNROLLED) {
        float weights[N_UNROLLED][R];
#pragma unroll
        for (int u = 0; u < N_UNROLLED; u++) {
            const int j = first + u * N_KEYS + group;
            float k[PIECE];
            read_piece(t.type, t.aligned, keys + (j < t.n ? j : t.n - 1) * row, e, a.d, k);
#pragma unroll
            for (int x = 0; x < R; x++) {
                float dot = 0;
#pragma unroll
                for (int i = 0; i < PIECE; i++) {
                    dot += q[x][i] * k[i];
                }
                dot = sum_lanes<T>(dot);
                weights[u][x] = j < t.n ? a.scale * dot : -INFINITY;
            }
        }
#pragma unroll
        for (int x = 0; x < R; x++) {
            float most = state.most[x];
#pragma unroll
            for (int u = 0; u < N_UNROLLED; u++) {
                most = fmaxf(most, weights[u][x]);
            }
            const float factor = factor_of(state.most[x], most);
            state.most[x] = most;
            state.sum[x] *= factor;
#pragma unroll
            for (int i = 0; i < PIECE; i++) {
                state.mixed[x][i] *= factor;
            }
#pragma unroll
            for (int u = 0; u < N_UNROLLED; u++) {
                weights[u][x] = factor_of(weights[u][x], most);
                state.sum[x] += weights[u][x];
            }
        }
#pragma unroll
        for (int u = 0; u < N_UNROLLED; u++) {
            const int j = first + u * N_KEYS + group;
            float v[PIECE];
            read_piece(t.type, t.aligned, values + (j < t.n ? j : t.n - 1) * row, e, a.d, v);
#pragma unroll
            for (int x = 0; x < R; x++) {
#pragma unroll
                for (int i = 0; i < PIECE; i++) {
                    state.mixed[x][i] += weights[u][x] * v[i];
                }
            }
        }
    }
}

// Joins the lane groups of a warp; every lane gets the whole for its channels.
template <int T, int R> __device__ void join_groups(softmax<R> & state) {
#pragma unroll
    for (int step = T; step < WARP; step *= 2) {
#pragma unroll
        for (int x = 0; x < R; x++) {
            const float other = __shfl_xor_sync(ALL, state.most[x], step);
            const float most = fmaxf(state.most[x], other);
            const float mine = factor_of(state.most[x], most), theirs = factor_of(other, most);
            state.most[x] = most;
            state.sum[x] = state.sum[x] * mine + __shfl_xor_sync(ALL, state.sum[x], step) * theirs;
#pragma unroll
            for (int i = 0; i < PIECE; i++) {
                state.mixed[x][i] = state.mixed[x][i] * mine + __shfl_xor_sync(ALL, state.mixed[x][i], step) * theirs;
            }
        }
    }
}

// grid.x: splits; grid.y: KV heads x groups of R query heads.
template <int T, int R> __global__ void __launch_bounds__(N_WARPS * WARP) one_kernel(attention a, uint32_t * tickets) {
    __shared__ float mixed[N_WARPS][R][T * PIECE];
    __shared__ float most[N_WARPS][R], sum[N_WARPS][R];
    __shared__ float factors[N_SPLITS_MAX][R];
    __shared__ float totals[R];
    __shared__ bool is_last;

    const int n_splits = (int) gridDim.x, split = (int) blockIdx.x;
    const int n_groups = (a.r + R - 1) / R, g = (int) blockIdx.y / n_groups, x0 = (int) blockIdx.y % n_groups * R;
    const int n_heads = a.r - x0 < R ? a.r - x0 : R, h0 = g * a.r + x0;
    const int warp = (int) threadIdx.x / WARP, lane = (int) threadIdx.x % WARP;

    softmax<R> state;
    float q[R][PIECE];
#pragma unroll
    for (int x = 0; x < R; x++) {
        state.most[x] = -INFINITY;
        state.sum[x] = 0;
#pragma unroll
        for (int i = 0; i < PIECE; i++) {
            state.mixed[x][i] = 0;
            q[x][i] = 0;
        }
    }
    const int from = (int) ((int64_t) a.n_passes * split / n_splits);
    const int to = (int) ((int64_t) a.n_passes * (split + 1) / n_splits);
    int met = -1; // which queries q holds
    for (int p = from + warp; p < to; p += N_WARPS) {
        const int32_t pass = a.passes[p];
        const tile t = a.tiles[(int64_t) g * a.list_stride + tile_of(pass)];
        if (met != query_of(pass)) {
            met = query_of(pass);
            const float * queries = queries_of(a, query_of(pass)) + (int64_t) h0 * a.d;
            const int e = lane % T * PIECE;
#pragma unroll
            for (int x = 0; x < R; x++) {
#pragma unroll
                for (int i = 0; i < PIECE; i++) {
                    q[x][i] = x < n_heads && e + i < a.d ? queries[x * a.d + e + i] : 0;
                }
            }
        }
        meet<T, R>(a, t, is_near(t, query_of(pass)), g, q, state);
    }
    join_groups<T, R>(state);
    if (lane < T) {
#pragma unroll
        for (int x = 0; x < R; x++) {
            most[warp][x] = state.most[x]; // of equal value in all these lanes
            sum[warp][x] = state.sum[x];
#pragma unroll
            for (int i = 0; i < PIECE; i++) {
                mixed[warp][x][lane * PIECE + i] = state.mixed[x][i];
            }
        }
    }
    __syncthreads();

    // This split's result, from its warps'.
    const int stride = a.d + 2;
    for (int i = (int) threadIdx.x; i < n_heads * stride; i += N_WARPS * WARP) {
        const int x = i / stride, e = i % stride;
        float joint = most[0][x], result = 0;
        for (int w = 1; w < N_WARPS; w++) {
            joint = fmaxf(joint, most[w][x]);
        }
        for (int w = 0; w < N_WARPS; w++) {
            result += factor_of(most[w][x], joint) * (e < a.d ? mixed[w][x][e] : sum[w][x]);
        }
        a.partial[((int64_t) split * a.n_head + h0 + x) * stride + e] = e == a.d + 1 ? joint : result;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&tickets[blockIdx.y], 1u) == (uint32_t) n_splits - 1;
    }
    __syncthreads();
    if (!is_last) {
        return;
    }
    __threadfence();

    // All splits' results, read past the first level, which knows nothing of other multiprocessors' writes.
    const float * parts = a.partial + (int64_t) h0 * stride;
    const int64_t next = (int64_t) a.n_head * stride;
    if ((int) threadIdx.x < n_heads) {
        const int x = (int) threadIdx.x;
        float joint = -INFINITY, total = 0;
        for (int i = 0; i < n_splits; i++) {
            joint = fmaxf(joint, __ldcg(parts + i * next + x * stride + a.d + 1));
        }
        for (int i = 0; i < n_splits; i++) {
            const float factor = factor_of(__ldcg(parts + i * next + x * stride + a.d + 1), joint);
            factors[i][x] = factor;
            total += factor * __ldcg(parts + i * next + x * stride + a.d);
        }
        totals[x] = total;
        a.stats[2 * (h0 + x)] = joint;
        a.stats[2 * (h0 + x) + 1] = total;
    }
    __syncthreads();
    for (int i = (int) threadIdx.x; i < n_heads * a.d; i += N_WARPS * WARP) {
        const int x = i / a.d, e = i % a.d;
        float result = 0;
        for (int k = 0; k < n_splits; k++) {
            result += factors[k][x] * __ldcg(parts + k * next + x * stride + e);
        }
        a.out[(int64_t) (h0 + x) * a.d + e] = result / totals[x];
    }
    if (threadIdx.x == 0) {
        tickets[blockIdx.y] = 0; // for the next kernel
    }
}

template <int T, int R> int32_t run(actqkv_cuda_stream * s, const attention & a) {
    const int n_rows = a.n_head_kv * ((a.r + R - 1) / R);
    if (n_rows > N_TICKETS) {
        return cudaErrorInvalidValue;
    }
    constexpr int BLOCKS_PER_MULTIPROCESSOR = 4;
    const int64_t wanted = divided_up((int64_t) BLOCKS_PER_MULTIPROCESSOR * s->n_multiprocessors, n_rows);
    int64_t n_splits = divided_up(a.n_passes, N_WARPS);
    n_splits = n_splits < wanted ? n_splits : wanted;
    n_splits = n_splits < N_SPLITS_MAX ? n_splits : N_SPLITS_MAX;
    return launch(s, one_kernel<T, R>, dim3((unsigned) n_splits, (unsigned) n_rows), dim3(N_WARPS * WARP), 0, a,
                  s->tickets);
}

template <int R> int32_t for_lanes(actqkv_cuda_stream * s, const attention & a) {
    return a.d <= 4 * PIECE    ? run<4, R>(s, a)
           : a.d <= 8 * PIECE  ? run<8, R>(s, a)
           : a.d <= 16 * PIECE ? run<16, R>(s, a)
                               : run<32, R>(s, a);
}

} // namespace

int32_t attend_one(actqkv_cuda_stream * s, const attention & a) {
    return a.r == 1   ? for_lanes<1>(s, a)
           : a.r == 2 ? for_lanes<2>(s, a)
           : a.r <= 4 ? for_lanes<4>(s, a)
                      : for_lanes<8>(s, a);
}

} // namespace actqkv::cuda
