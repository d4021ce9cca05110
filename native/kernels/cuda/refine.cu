// refine - the score of a chunk by its keys themselves; formula: ../cpu/refine.cpp.
//
// A block per candidate. T lanes share a key of at most T*PIECE channels (or several turns of them), so that a warp
// takes WARP/T keys at a time, each for N_QUERIES query heads.
#include "common.cuh"

namespace actqkv::cuda {
namespace {

constexpr int N_QUERIES = 4, N_WARPS = 4;

struct candidates {
    const float * query; // [H][d]
    const uint8_t * keys;
    const int32_t * chunks;
    int64_t chunk_bytes, row_bytes;
    int type, r, n_head, d, c;
    float scale;
    float * scores; // [H][candidates]
    bool aligned;
};

// Scores of the chunk's best keys for the query heads h .. h + n - 1 of one KV head.
template <int T> __device__ void best_keys(const candidates & a, const uint8_t * keys, int h, int n, float * part) {
    constexpr int N_GROUPS = N_WARPS * WARP / T;
    const int lane = (int) threadIdx.x % T, group = (int) threadIdx.x / T;
    float best[N_QUERIES];
#pragma unroll
    for (int x = 0; x < N_QUERIES; x++) {
        best[x] = -INFINITY;
    }
    // Every lane runs every turn, since all of a warp take part in its sums; the last key stands for missing ones.
    for (int turn = 0; turn < a.c; turn += N_GROUPS) {
        const int key = turn + group < a.c ? turn + group : a.c - 1;
        float sums[N_QUERIES] = {};
        for (int e = lane * PIECE; e < a.d; e += T * PIECE) {
            float values[PIECE];
            read_piece(a.type, a.aligned, keys + key * a.row_bytes, e, a.d, values);
#pragma unroll
            for (int x = 0; x < N_QUERIES; x++) {
                const float * query = a.query + (int64_t) (h + (x < n ? x : 0)) * a.d + e;
#pragma unroll
                for (int i = 0; i < PIECE; i++) {
                    sums[x] += values[i] * (e + i < a.d ? query[i] : 0);
                }
            }
        }
#pragma unroll
        for (int x = 0; x < N_QUERIES; x++) {
            best[x] = fmaxf(best[x], sum_lanes<T>(sums[x]));
        }
    }
#pragma unroll
    for (int x = 0; x < N_QUERIES; x++) {
        const float most = max_block(best[x], part);
        if (threadIdx.x == 0 && x < n) {
            a.scores[(int64_t) (h + x) * gridDim.x + blockIdx.x] = a.scale * most;
        }
    }
}

template <int T> __global__ void __launch_bounds__(N_WARPS * WARP) refine_kernel(candidates a) {
    __shared__ float part[WARP];
    const int64_t number = a.chunks != nullptr ? a.chunks[blockIdx.x] : (int64_t) blockIdx.x;
    const uint8_t * chunk = a.keys + number * a.chunk_bytes;
    for (int h = 0, n; h < a.n_head; h += n) {
        const int g = h / a.r, rest = a.r - h % a.r; // of this group
        n = rest < N_QUERIES ? rest : N_QUERIES;
        best_keys<T>(a, chunk + (int64_t) g * a.c * a.row_bytes, h, n, part);
    }
}

} // namespace

int32_t refine(actqkv_cuda_stream * s, const float * query, int32_t type, const uint8_t * keys, const int32_t * chunks,
               int32_t n, int32_t n_head, int32_t n_head_kv, int32_t d_head, int32_t c, float scale, float * scores) {
    candidates a = {};
    a.query = query;
    a.keys = keys;
    a.chunks = chunks;
    a.row_bytes = row_bytes(type, d_head);
    a.chunk_bytes = a.row_bytes * n_head_kv * c;
    a.type = type;
    a.r = n_head / n_head_kv;
    a.n_head = n_head;
    a.d = d_head;
    a.c = c;
    a.scale = scale;
    a.scores = scores;
    a.aligned = type == F16 && d_head % PIECE == 0 && is_aligned(keys);
    const auto kernel = d_head <= 4 * PIECE    ? refine_kernel<4>
                        : d_head <= 8 * PIECE  ? refine_kernel<8>
                        : d_head <= 16 * PIECE ? refine_kernel<16>
                                               : refine_kernel<32>;
    return launch(s, kernel, dim3((unsigned) n), dim3(N_WARPS * WARP), 0, a);
}

} // namespace actqkv::cuda
