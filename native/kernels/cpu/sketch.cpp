// sketch - a chunk's keys in about one bit per channel, to score many candidates where their keys would be too much to
// read: the mean of the keys of one KV head, and of each key the signs of what is left, times their mean size. Keys are
// turned first (kernels.h), and queries alike, so that no channel sticks out of what one size per key has to stand for.
//
//     mu = mean_j k_j      m_j = mean_e |k_je - mu_e|      k'_j = mu + m_j sign(k_j - mu)
//     score_b = scale * max_j q . k'_j = scale * (q . mu + max_j m_j sum_e +-q_e)
//
// mu in whole multiples of its largest / 127, m of its largest / 255. Signs lie by fours of channels, so that the sum over
// e is d/4 lookups: table p of a query holds +-q_4p .. +-q_(4p+3) for each of the 16 patterns, as whole multiples of 1/63 of
// the largest, plus 63. Sums times sizes are rounded to 1/256 of the largest size, which is less than tables lose, so that 16
// bits hold them. Reads the candidates' sketches once, a chunk's for all heads at a time: bound by lookups and memory alike.
// The idea of fours and tables in registers: Andre et al. 2015 (VLDB), for product quantisation. One bit per channel of
// turned vectors: Gao and Long 2024 (SIGMOD).
//
// Layout, of one KV head: f16 steps of mu and m, i8 mu[d], u8 m[C], u8 signs[d/8][C] with channel 8i+e in bit e of row i;
// set: not negative. C is c rounded up to 32; what is beyond c repeats the last key.
#include <math.h>

#include "half.h"
#include "ops.h"
#include "parallel.h"

namespace actqkv {
namespace {

constexpr int N_HEADS = 64;            // query heads at a time, fewer where ...
constexpr int TABLES_BYTES = 16 << 10; // ... their tables would leave the first-level cache
constexpr int MAX_D = 1024;            // head dimensions, of which two queries' tables fit
constexpr int MAX_KEYS = 1024;
constexpr int PATTERNS = 16;              // of four signs
constexpr int GREATEST = SKETCH_OFFSET;   // of a table: two entries, each plus the offset, add up within a byte
constexpr float ROUNDER = 3 << 22;        // float + this - this: to whole, ties to even; loops of it become vectors
constexpr int QUERIES = TABLES_BYTES / 2; // numbers of turned queries, of heads whose tables fit

int64_t padded(int64_t c) { return (c + SKETCH_KEYS - 1) / SKETCH_KEYS * SKETCH_KEYS; }

// Tables of a turned query as sketch_job has them, and what an entry of 1 stands for.
float make_tables(const float * q, int32_t d, int rows, uint8_t * tables) {
    float most = 0, all = 0;
    for (int32_t p = 0; p < d; p += 4) {
        const float sum = fabsf(q[p]) + fabsf(q[p + 1]) + fabsf(q[p + 2]) + fabsf(q[p + 3]);
        most = sum > most ? sum : most;
        all += sum;
    }
    const bool has_some = most > 0 && isfinite(all) && isfinite(GREATEST / most);
    const float inverse = has_some ? GREATEST / most : 0;
    memset(tables, 0, sketch_table_bytes(d, rows));
    for (int32_t p = 0; p < d / 4; p++) {
        const float * four = q + 4 * p;
        float sums[PATTERNS] = {-four[0] - four[1] - four[2] - four[3]};
        for (int e = 0; e < 4; e++) {
            for (int i = 0; i < 1 << e; i++) {
                sums[i + (1 << e)] = sums[i] + 2 * four[e];
            }
        }
        uint8_t entries[PATTERNS];
        for (int i = 0; i < PATTERNS; i++) {
            const float whole = has_some ? sums[i] * inverse + ROUNDER - ROUNDER : 0;
            entries[i] = (uint8_t) ((int) whole + SKETCH_OFFSET);
        }
        const int row = p / 2, half = p % 2;
        uint8_t * table = tables + ((row / rows * 2 + half) * rows + row % rows) * rows * PATTERNS;
        for (int copy = 0; copy < rows; copy++) {
            memcpy(table + copy * PATTERNS, entries, PATTERNS);
        }
    }
    return has_some ? 1 / inverse : 0;
}

// x / step as a whole number, at most `most` far from 0; 0 where it is not finite.
int in_steps(float x, float step, int most) {
    const float whole = step > 0 ? x / step + ROUNDER - ROUNDER : 0;
    return whole > (float) most ? most : whole < (float) -most ? -most : whole == whole ? (int) whole : 0;
}

// The step in which `greatest` is `most`, as f16 has it; stored at p.
float store_step(float greatest, int most, uint8_t * p) {
    const float step = greatest / (float) most;
    store_half(isfinite(step) ? step : 0, p);
    return load_half(p);
}

// The formula, with tables of one row.
float score_scalar(const float * q, const uint8_t * tables, float step, const uint8_t * sketch, int32_t d, int32_t n) {
    const uint8_t *mu = sketch + SKETCH_HEADER, *sizes = mu + d, *signs = sizes + n;
    double mean = 0;
    for (int32_t e = 0; e < d; e++) {
        mean += (double) q[e] * (int8_t) mu[e];
    }
    int best = INT16_MIN;
    for (int32_t j = 0; j < n; j++) {
        int sum = -SKETCH_OFFSET * (d / 4);
        for (int32_t i = 0; i < d / 8; i++) {
            const int byte = signs[(int64_t) i * n + j];
            sum += tables[2 * i * PATTERNS + (byte & 15)] + tables[(2 * i + 1) * PATTERNS + (byte >> 4)];
        }
        const int product = (sum * sizes[j] + 128) >> 8;
        best = product > best ? product : best;
    }
    return load_half(sketch) * (float) mean + load_half(sketch + 2) * step * (float) best;
}

void scores_scalar(const sketch_job * job) {
    for (int32_t i = job->from; i < job->to; i++) {
        for (int32_t x = 0; x < job->n_vec; x++) {
            const int32_t h = job->head + x;
            const uint8_t * sketch =
                job->sketches + (job->chunks[i] * (int64_t) job->n_head_kv + h / job->r) * job->bytes;
            job->scores[(int64_t) h * job->n + i] =
                job->scale * score_scalar(job->queries + x * job->stride,
                                          job->tables + x * sketch_table_bytes(job->d, 1), job->steps[x], sketch,
                                          job->d, job->n_keys);
        }
    }
}

} // namespace
} // namespace actqkv

extern "C" int64_t actqkv_sketch_bytes(int32_t d_head, int32_t c) {
    const bool has_one = d_head % 8 == 0 && d_head <= actqkv::MAX_D && c <= actqkv::MAX_KEYS;
    return has_one ? actqkv::SKETCH_HEADER + d_head + (1 + d_head / 8) * actqkv::padded(c) : 0;
}

extern "C" void actqkv_sketch(const actqkv_f16 * keys, int64_t key_stride, int32_t n_head_kv, int32_t d_head, int32_t c,
                              uint8_t * sketches) {
    using namespace actqkv;
    const int64_t n = padded(c), bytes = actqkv_sketch_bytes(d_head, c);
    for (int32_t g = 0; g < n_head_kv; g++, sketches += bytes) {
        const actqkv_f16 * from = keys + g * key_stride;
        uint8_t *mu = sketches + SKETCH_HEADER, *sizes = mu + d_head, *signs = sizes + n;
        float mean[MAX_D], rest[MAX_D], size[MAX_KEYS], most = 0, greatest = 0;
        actqkv_mean(from, 0, 1, d_head, c, mean);
        memset(signs, 0, d_head / 8 * n);
        for (int64_t j = 0; j < n; j++) {
            const actqkv_f16 * key = from + (j < c ? j : c - 1) * d_head;
            for (int32_t e = 0; e < d_head; e++) {
                rest[e] = half_to_float(key[e]) - mean[e];
            }
            actqkv_turn(rest, 1, d_head);
            float sum = 0;
            for (int32_t e = 0; e < d_head; e++) {
                sum += fabsf(rest[e]);
                signs[e / 8 * n + j] |= (uint8_t) (!(rest[e] < 0) << e % 8);
            }
            size[j] = sum / (float) d_head;
            greatest = size[j] > greatest ? size[j] : greatest;
        }
        actqkv_turn(mean, 1, d_head);
        for (int32_t e = 0; e < d_head; e++) {
            most = fabsf(mean[e]) > most ? fabsf(mean[e]) : most;
        }
        const float step = store_step(most, 127, sketches), size_step = store_step(greatest, 255, sketches + 2);
        for (int32_t e = 0; e < d_head; e++) {
            mu[e] = (uint8_t) in_steps(mean[e], step, 127);
        }
        for (int64_t j = 0; j < n; j++) {
            sizes[j] = (uint8_t) in_steps(size[j], size_step, 255);
        }
    }
}

extern "C" void actqkv_sketch_scores(int32_t impl, const float * query, const uint8_t * sketches,
                                     const int32_t * chunks, int32_t n, int32_t n_head, int32_t n_head_kv,
                                     int32_t d_head, int32_t c, float scale, float * scores, int32_t n_threads) {
    using namespace actqkv;
    const ops * op = ops_for(impl);
    const int rows = op ? op->sketch_rows : 1;
    const int64_t table_bytes = sketch_table_bytes(d_head, rows), stride = padded(d_head);
    const int32_t fitting = (int32_t) (TABLES_BYTES / table_bytes), most = fitting < N_HEADS ? fitting : N_HEADS;
    parallel(n_threads, [=](int ith, int nth) {
        alignas(64) uint8_t tables[TABLES_BYTES];
        float turned[QUERIES];
        float steps[N_HEADS];
        sketch_job job = {};
        job.queries = turned;
        job.stride = stride;
        job.tables = tables;
        job.steps = steps;
        job.r = n_head / n_head_kv;
        job.d = d_head;
        job.n_keys = (int32_t) padded(c);
        job.sketches = sketches;
        job.bytes = actqkv_sketch_bytes(d_head, c);
        job.n_head_kv = n_head_kv;
        job.chunks = chunks;
        job.from = (int32_t) ((int64_t) n * ith / nth);
        job.to = (int32_t) ((int64_t) n * (ith + 1) / nth);
        job.n = n;
        job.scale = scale;
        job.scores = scores;
        for (int32_t h = 0; job.from < job.to && h < n_head; h += job.n_vec) {
            job.head = h;
            job.n_vec = n_head - h < most ? n_head - h : most;
            for (int32_t x = 0; x < job.n_vec; x++) {
                float * q = turned + x * stride;
                memset(q, 0, stride * sizeof(float));
                memcpy(q, query + (int64_t) (h + x) * d_head, d_head * sizeof(float));
                actqkv_turn(q, 1, d_head);
                steps[x] = 256 * make_tables(q, d_head, rows, tables + x * table_bytes);
            }
            (op ? op->sketch_scores : scores_scalar)(&job);
        }
    });
}
