// score - how well each chunk's summary answers the probe, and the same for every query head of a method with lists per
// KV head; formulas: ../cpu/score.cpp and ../cpu/vote.cpp.
//
// A warp per summary, which reads it once for up to N_QUERIES queries: memory-bound. Queries stay in the first level.
#include "common.cuh"

namespace actqkv::cuda {
namespace {

constexpr int N_QUERIES = 4, N_WARPS = 8;

struct dots {
    const float * queries; // [n_queries][width]
    const actqkv_f16 * reps;
    int64_t block_stride, n, width;
    int n_queries; // of each block of rows
    float * scores;
    // of a cosine or a scaled product; scores of several queries are not scaled
    const float * norms;
    float probe_norm, scale;
    bool aligned;
};

__device__ float finished(const dots & a, int64_t b, float dot) {
    float factor = a.scale;
    if (a.norms != nullptr) {
        const float divisor = a.norms[b] * a.probe_norm;
        factor = divisor > 0 && isfinite(divisor) ? a.scale / divisor : 0;
    }
    return factor == 0 ? 0 : dot * factor;
}

// grid.x: N_WARPS rows each; grid.y: blocks of rows.
template <int Q> __global__ void dots_kernel(dots a) {
    const int64_t b = (int64_t) blockIdx.x * N_WARPS + threadIdx.x / WARP;
    const int lane = (int) threadIdx.x % WARP;
    if (b >= a.n) {
        return; // a whole warp
    }
    const uint8_t * row = reinterpret_cast<const uint8_t *>(a.reps + blockIdx.y * a.block_stride + b * a.width);
    const float * queries = a.queries + (int64_t) blockIdx.y * a.n_queries * a.width;
    for (int first = 0; first < a.n_queries; first += Q) {
        float sums[Q] = {};
#pragma unroll 2
        for (int64_t e = lane * PIECE; e < a.width; e += WARP * PIECE) {
            float values[PIECE];
            read_piece(F16, a.aligned, row, (int) e, (int) a.width, values);
#pragma unroll
            for (int x = 0; x < Q; x++) {
                const float * query = queries + (first + x < a.n_queries ? first + x : first) * a.width + e;
#pragma unroll
                for (int i = 0; i < PIECE; i++) {
                    sums[x] += values[i] * (a.aligned || e + i < a.width ? query[i] : 0);
                }
            }
        }
#pragma unroll
        for (int x = 0; x < Q; x++) {
            const float sum = sum_lanes<WARP>(sums[x]);
            if (lane == 0 && first + x < a.n_queries) {
                a.scores[((int64_t) blockIdx.y * a.n_queries + first + x) * a.n + b] = finished(a, b, sum);
            }
        }
    }
}

template <int Q> int32_t run(actqkv_cuda_stream * s, dots a, int32_t n_blocks) {
    a.aligned = a.width % PIECE == 0 && a.block_stride % PIECE == 0 && is_aligned(a.reps);
    return launch(s, dots_kernel<Q>, dim3((unsigned) divided_up(a.n, N_WARPS), (unsigned) n_blocks),
                  dim3(N_WARPS * WARP), 0, a);
}

} // namespace

int32_t score(actqkv_cuda_stream * s, const float * probe, float probe_norm, const actqkv_f16 * reps,
              const float * norms, int64_t n, int64_t width, float scale, float * scores) {
    return run<1>(s, {probe, reps, 0, n, width, 1, scores, norms, probe_norm, scale, false}, 1);
}

int32_t head_scores(actqkv_cuda_stream * s, const float * queries, const actqkv_f16 * reps, int64_t block_stride,
                    int32_t n_blocks, int64_t n, int64_t width, int32_t n_head, float * scores) {
    return run<N_QUERIES>(s, {queries, reps, block_stride, n, width, n_head / n_blocks, scores, nullptr, 0, 1, false},
                          n_blocks);
}

} // namespace actqkv::cuda
