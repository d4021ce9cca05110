// sketch - a chunk's keys in about one bit per channel, and their scores; formulas, tables and layout: ../cpu/sketch.cpp.
//
// Scores: a warp per candidate and KV head, a lane per key, which looks its signs up in the tables of the group's query
// heads in shared memory. Bound by those lookups.
#include "common.cuh"

namespace actqkv::cuda {
namespace {

constexpr int N_WARPS = 8, PATTERNS = 16, KEYS = 32, HEADER = 4;
constexpr float GREATEST = 63;                 // of a table's entry
constexpr size_t MOST_TABLES_BYTES = 40 << 10; // in shared memory, without asking for more

__host__ __device__ inline int64_t padded(int64_t c) { return divided_up(c, KEYS) * KEYS; }

struct chunk_sketch {
    uint16_t * steps; // of mean and sizes
    int8_t * mean;    // [d]
    uint8_t * sizes;  // [n]
    uint8_t * signs;  // [d/8][n]
};

__device__ chunk_sketch parts_of(uint8_t * sketch, int d, int n) {
    int8_t * mean = reinterpret_cast<int8_t *>(sketch + HEADER);
    uint8_t * sizes = sketch + HEADER + d;
    return {reinterpret_cast<uint16_t *>(sketch), mean, sizes, sizes + n};
}

__device__ void turn_by_warp(float * x, int d) {
    turn(x, d, (int) threadIdx.x % WARP, WARP, [] { __syncwarp(); });
}

// x / step as a whole number, at most `most` far from 0; 0 where it is not finite.
__device__ int in_steps(float x, float step, float most) {
    const float whole = step > 0 ? rintf(x / step) : 0;
    return whole == whole ? (int) fminf(fmaxf(whole, -most), most) : 0;
}

// The step in which the greatest magnitude of x [n] is `most`, as f16 has it; a warp stores it at *to.
__device__ float store_step(const float * x, int n, float most, uint16_t * to) {
    float greatest = 0;
    for (int i = (int) threadIdx.x % WARP; i < n; i += WARP) {
        greatest = fmaxf(greatest, fabsf(x[i]));
    }
    const float step = max_lanes<WARP>(greatest) / most;
    const uint16_t half = narrow(isfinite(step) ? step : 0);
    if (threadIdx.x % WARP == 0) {
        *to = half;
    }
    return wide(half);
}

// A block per KV head; a warp per key once the mean is known. Shared memory: mean [d], sizes [n], a key [d] per warp.
__global__ void __launch_bounds__(N_WARPS * WARP)
    sketch_kernel(const actqkv_f16 * keys, int64_t key_stride, int d, int c, int64_t bytes, uint8_t * sketches) {
    const int n = (int) padded(c), warp = (int) threadIdx.x / WARP, lane = (int) threadIdx.x % WARP;
    float * mean = reinterpret_cast<float *>(dynamic_shared());
    float *sizes = mean + d, *rest = sizes + n + (int64_t) warp * d;
    const actqkv_f16 * from = keys + blockIdx.x * key_stride;
    const chunk_sketch to = parts_of(sketches + blockIdx.x * bytes, d, n);
    for (int e = (int) threadIdx.x; e < d; e += N_WARPS * WARP) {
        float sum = 0;
        for (int j = 0; j < c; j++) {
            sum += wide(from[(int64_t) j * d + e]) / (float) c;
        }
        mean[e] = sum;
    }
    __syncthreads();
    for (int j = warp; j < n; j += N_WARPS) {
        const actqkv_f16 * key = from + (int64_t) (j < c ? j : c - 1) * d;
        for (int e = lane; e < d; e += WARP) {
            rest[e] = wide(key[e]) - mean[e];
        }
        turn_by_warp(rest, d);
        float size = 0;
        for (int first = 0; first < d; first += WARP) {
            const int e = first + lane;
            const float mine = e < d ? rest[e] : 0;
            size += fabsf(mine);
            const unsigned signs = __ballot_sync(ALL, e < d && !(mine < 0));
            if (lane < WARP / 8 && first / 8 + lane < d / 8) {
                to.signs[(int64_t) (first / 8 + lane) * n + j] = (uint8_t) (signs >> 8 * lane);
            }
        }
        size = sum_lanes<WARP>(size);
        if (lane == 0) {
            sizes[j] = size / (float) d;
        }
        __syncwarp(); // before the next key's rest
    }
    __syncthreads();
    if (warp == 0) {
        turn_by_warp(mean, d);
        const float step = store_step(mean, d, 127, to.steps);
        for (int e = lane; e < d; e += WARP) {
            to.mean[e] = (int8_t) in_steps(mean[e], step, 127);
        }
    } else if (warp == 1) {
        const float step = store_step(sizes, n, 255, to.steps + 1);
        for (int j = lane; j < n; j += WARP) {
            to.sizes[j] = (uint8_t) in_steps(sizes[j], step, 255);
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

// A warp turns one query [d] and makes its tables [d/4][16]; returns what an entry of 1 stands for.
__device__ float make_tables(const float * query, int d, float * q, int8_t * tables) {
    const int lane = (int) threadIdx.x % WARP;
    for (int e = lane; e < d; e += WARP) {
        q[e] = query[e];
    }
    turn_by_warp(q, d);
    float most = 0, all = 0;
    for (int p = lane; p < d / 4; p += WARP) {
        const float sum = fabsf(q[4 * p]) + fabsf(q[4 * p + 1]) + fabsf(q[4 * p + 2]) + fabsf(q[4 * p + 3]);
        most = fmaxf(most, sum);
        all += sum;
    }
    most = max_lanes<WARP>(most);
    all = sum_lanes<WARP>(all);
    const bool has_some = most > 0 && isfinite(all) && isfinite(GREATEST / most);
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
    float * turned = reinterpret_cast<float *>(dynamic_shared());
    float * steps = turned + (int64_t) a.n_pass * a.d;
    int8_t * tables = reinterpret_cast<int8_t *>(steps + a.n_pass);
    const int warp = (int) threadIdx.x / WARP, lane = (int) threadIdx.x % WARP, g = (int) blockIdx.y;
    for (int begin = 0; begin < a.r; begin += a.n_pass) {
        const int n_now = a.r - begin < a.n_pass ? a.r - begin : a.n_pass;
        const float * queries = a.query + (int64_t) (g * a.r + begin) * a.d;
        __syncthreads(); // the tables before have been read
        for (int x = warp; x < n_now; x += N_WARPS) {
            const int64_t at = (int64_t) x * a.d;
            const float step = make_tables(queries + at, a.d, turned + at, tables + 4 * at);
            if (lane == 0) {
                steps[x] = 256 * step;
            }
        }
        __syncthreads();
        for (int i = (int) blockIdx.x * N_WARPS + warp; i < a.n; i += (int) gridDim.x * N_WARPS) {
            const int64_t at = ((int64_t) a.chunks[i] * a.n_head_kv + g) * a.bytes;
            const chunk_sketch sketch = parts_of(const_cast<uint8_t *>(a.sketches) + at, a.d, a.n_keys);
            for (int x = 0; x < n_now; x++) {
                const int8_t * table = tables + (int64_t) x * a.d * 4;
                int best = INT16_MIN;
                float mean = 0;
                for (int j = lane; j < a.n_keys; j += WARP) {
                    int sum = 0;
#pragma unroll 4
                    for (int byte = 0; byte < a.d / 8; byte++) {
                        const int signs = sketch.signs[(int64_t) byte * a.n_keys + j];
                        sum += table[(2 * byte) * PATTERNS + (signs & 15)];
                        sum += table[(2 * byte + 1) * PATTERNS + (signs >> 4)];
                    }
                    const int product = (sum * sketch.sizes[j] + 128) >> 8;
                    best = product > best ? product : best;
                }
                for (int e = lane; e < a.d; e += WARP) {
                    mean += turned[(int64_t) x * a.d + e] * (float) sketch.mean[e];
                }
                const float most = max_lanes<WARP>((float) best);
                mean = wide(sketch.steps[0]) * sum_lanes<WARP>(mean);
                if (lane == 0) {
                    a.scores[(int64_t) (g * a.r + begin + x) * a.n + i] =
                        a.scale * (mean + wide(sketch.steps[1]) * steps[x] * most);
                }
            }
        }
    }
}

int64_t bytes_of(int32_t d, int32_t c) { return HEADER + d + (1 + d / 8) * padded(c); }

// Of shared memory, that a query takes.
size_t query_bytes(int32_t d) { return (size_t) d * (sizeof(float) + 4) + sizeof(float); }

} // namespace

int32_t sketch(actqkv_cuda_stream * s, const actqkv_f16 * keys, int64_t key_stride, int32_t n_head_kv, int32_t d_head,
               int32_t c, uint8_t * sketches) {
    return launch(s, sketch_kernel, dim3((unsigned) n_head_kv), dim3(N_WARPS * WARP),
                  ((N_WARPS + 1) * d_head + padded(c)) * sizeof(float), keys, key_stride, d_head, c,
                  bytes_of(d_head, c), sketches);
}

int32_t sketch_scores(actqkv_cuda_stream * s, const float * query, const uint8_t * sketches, const int32_t * chunks,
                      int32_t n, int32_t n_head, int32_t n_head_kv, int32_t d_head, int32_t c, float scale,
                      float * scores) {
    const int32_t r = n_head / n_head_kv, fitting = (int32_t) (MOST_TABLES_BYTES / query_bytes(d_head));
    const int32_t n_pass = r < fitting ? r : fitting;
    const candidates a = {query,  sketches, chunks, bytes_of(d_head, c), n, n_head_kv, r, d_head, (int) padded(c),
                          n_pass, scale,    scores};
    // So many blocks that every multiprocessor has some, and tables are made for several candidates.
    const int64_t wanted = divided_up(n, N_WARPS), most = divided_up(8 * (int64_t) s->n_multiprocessors, n_head_kv);
    return launch(s, sketch_scores_kernel,
                  dim3((unsigned) (wanted < most ? wanted : most), n > 0 ? (unsigned) n_head_kv : 0),
                  dim3(N_WARPS * WARP), n_pass * query_bytes(d_head), a);
}

} // namespace actqkv::cuda
