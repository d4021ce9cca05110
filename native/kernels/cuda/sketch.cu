// sketch - a chunk's keys in about one bit per channel, and their scores; formulas, tables and layout: ../cpu/sketch.cpp.
//
// Scores: a warp per candidate and KV head, a lane per key, which looks its signs up in the tables of the group's query
// heads in shared memory. Bound by those lookups.
#include "common.cuh"

namespace actqkv::cuda {
namespace {

constexpr int N_WARPS = 8, PATTERNS = 16, KEYS = 32;
constexpr float GREATEST = 63;                 // of a table's entry
constexpr size_t MOST_TABLES_BYTES = 40 << 10; // in shared memory, without asking for more

__host__ __device__ inline int64_t padded(int64_t c) { return divided_up(c, KEYS) * KEYS; }

struct chunk_sketch {
    uint16_t * mean;  // [d]
    uint16_t * sizes; // [n]
    uint8_t * signs;  // [d/8][n]
};

__device__ chunk_sketch parts_of(uint8_t * sketch, int d, int n) {
    uint16_t * mean = reinterpret_cast<uint16_t *>(sketch);
    return {mean, mean + d, sketch + 2 * (d + n)};
}

// A block per KV head; a warp per key once the mean is known.
__global__ void __launch_bounds__(N_WARPS * WARP)
    sketch_kernel(const actqkv_f16 * keys, int64_t key_stride, int d, int c, int64_t bytes, uint8_t * sketches) {
    float * mean = reinterpret_cast<float *>(dynamic_shared());
    const actqkv_f16 * from = keys + blockIdx.x * key_stride;
    const int n = (int) padded(c), lane = (int) threadIdx.x % WARP;
    const chunk_sketch to = parts_of(sketches + blockIdx.x * bytes, d, n);
    for (int e = (int) threadIdx.x; e < d; e += N_WARPS * WARP) {
        float sum = 0;
        for (int j = 0; j < c; j++) {
            sum += wide(from[(int64_t) j * d + e]) / (float) c;
        }
        mean[e] = sum;
        to.mean[e] = narrow(sum);
    }
    __syncthreads();
    for (int j = (int) threadIdx.x / WARP; j < n; j += N_WARPS) {
        const actqkv_f16 * key = from + (int64_t) (j < c ? j : c - 1) * d;
        float size = 0;
        for (int first = 0; first < d; first += WARP) {
            const int e = first + lane;
            const float rest = e < d ? wide(key[e]) - mean[e] : 0;
            size += fabsf(rest);
            const unsigned signs = __ballot_sync(ALL, e < d && !(rest < 0));
            if (lane < WARP / 8 && first / 8 + lane < d / 8) {
                to.signs[(int64_t) (first / 8 + lane) * n + j] = (uint8_t) (signs >> 8 * lane);
            }
        }
        size = sum_lanes<WARP>(size);
        if (lane == 0) {
            to.sizes[j] = narrow(size / (float) d);
        }
    }
}

struct candidates {
    const float * query; // [H][d]
    const uint8_t * sketches;
    const int32_t * chunks;
    int64_t bytes; // of one KV head's sketch
    int n, n_head_kv, r, d, n_keys;
    int n_pass; // query heads whose tables are in shared memory at a time
    float scale;
    float * scores; // [H][n]
};

// A warp makes the tables [d/4][16] of one query; returns what an entry of 1 stands for.
__device__ float make_tables(const float * q, int d, int8_t * tables) {
    const int lane = (int) threadIdx.x % WARP;
    float most = 0;
    for (int p = lane; p < d / 4; p += WARP) {
        most = fmaxf(most, fabsf(q[4 * p]) + fabsf(q[4 * p + 1]) + fabsf(q[4 * p + 2]) + fabsf(q[4 * p + 3]));
    }
    most = max_lanes<WARP>(most);
    const bool has_some = most > 0 && isfinite(most) && isfinite(GREATEST / most);
    const float inverse = has_some ? GREATEST / most : 0;
    for (int at = lane; at < d / 4 * PATTERNS; at += WARP) {
        const float * four = q + at / PATTERNS * 4;
        float sum = -four[0] - four[1] - four[2] - four[3];
        for (int e = 0; e < 4; e++) {
            sum += at >> e & 1 ? 2 * four[e] : 0;
        }
        tables[at] = (int8_t) (has_some ? (int) rintf(sum * inverse) : 0);
    }
    return has_some ? 1 / inverse : 0;
}

// grid.x: candidates, in turns; grid.y: KV heads.
__global__ void __launch_bounds__(N_WARPS * WARP) sketch_scores_kernel(candidates a) {
    int8_t * tables = reinterpret_cast<int8_t *>(dynamic_shared());
    float * steps = reinterpret_cast<float *>(tables + (int64_t) a.n_pass * a.d * 4);
    const int warp = (int) threadIdx.x / WARP, lane = (int) threadIdx.x % WARP, g = (int) blockIdx.y;
    for (int begin = 0; begin < a.r; begin += a.n_pass) {
        const int n_now = a.r - begin < a.n_pass ? a.r - begin : a.n_pass;
        const float * queries = a.query + (int64_t) (g * a.r + begin) * a.d;
        __syncthreads(); // the tables before have been read
        for (int x = warp; x < n_now; x += N_WARPS) {
            const float step = make_tables(queries + (int64_t) x * a.d, a.d, tables + (int64_t) x * a.d * 4);
            if (lane == 0) {
                steps[x] = step;
            }
        }
        __syncthreads();
        for (int i = (int) blockIdx.x * N_WARPS + warp; i < a.n; i += (int) gridDim.x * N_WARPS) {
            const int64_t at = ((int64_t) a.chunks[i] * a.n_head_kv + g) * a.bytes;
            const chunk_sketch sketch = parts_of(const_cast<uint8_t *>(a.sketches) + at, a.d, a.n_keys);
            for (int x = 0; x < n_now; x++) {
                const int8_t * table = tables + (int64_t) x * a.d * 4;
                float best = -INFINITY, mean = 0;
                for (int j = lane; j < a.n_keys; j += WARP) {
                    int sum = 0;
#pragma unroll 4
                    for (int byte = 0; byte < a.d / 8; byte++) {
                        const int signs = sketch.signs[(int64_t) byte * a.n_keys + j];
                        sum += table[(2 * byte) * PATTERNS + (signs & 15)];
                        sum += table[(2 * byte + 1) * PATTERNS + (signs >> 4)];
                    }
                    best = fmaxf(best, wide(sketch.sizes[j]) * (float) sum);
                }
                for (int e = lane; e < a.d; e += WARP) {
                    mean += queries[(int64_t) x * a.d + e] * wide(sketch.mean[e]);
                }
                best = max_lanes<WARP>(best);
                mean = sum_lanes<WARP>(mean);
                if (lane == 0) {
                    a.scores[(int64_t) (g * a.r + begin + x) * a.n + i] = a.scale * (mean + steps[x] * best);
                }
            }
        }
    }
}

int64_t bytes_of(int32_t d, int32_t c) { return 2 * d + (2 + d / 8) * padded(c); }

} // namespace

int32_t sketch(actqkv_cuda_stream * s, const actqkv_f16 * keys, int64_t key_stride, int32_t n_head_kv, int32_t d_head,
               int32_t c, uint8_t * sketches) {
    return launch(s, sketch_kernel, dim3((unsigned) n_head_kv), dim3(N_WARPS * WARP), d_head * sizeof(float), keys,
                  key_stride, d_head, c, bytes_of(d_head, c), sketches);
}

int32_t sketch_scores(actqkv_cuda_stream * s, const float * query, const uint8_t * sketches, const int32_t * chunks,
                      int32_t n, int32_t n_head, int32_t n_head_kv, int32_t d_head, int32_t c, float scale,
                      float * scores) {
    const int32_t r = n_head / n_head_kv, fitting = (int32_t) (MOST_TABLES_BYTES / (4 * d_head + sizeof(float)));
    const int32_t n_pass = r < fitting ? r : fitting;
    const candidates a = {query,  sketches, chunks, bytes_of(d_head, c), n, n_head_kv, r, d_head, (int) padded(c),
                          n_pass, scale,    scores};
    // So many blocks that every multiprocessor has some, and tables are made for several candidates.
    const int64_t wanted = divided_up(n, N_WARPS), most = divided_up(8 * (int64_t) s->n_multiprocessors, n_head_kv);
    return launch(s, sketch_scores_kernel,
                  dim3((unsigned) (wanted < most ? wanted : most), n > 0 ? (unsigned) n_head_kv : 0),
                  dim3(N_WARPS * WARP), (size_t) n_pass * (4 * d_head + sizeof(float)), a);
}

} // namespace actqkv::cuda
