// sketch - a chunk's keys in about one bit per channel, to score many candidates where their keys would be too much to
// read: the mean of the keys of one KV head, and of each key the signs of what is left, times their mean size.
//
//     mu = mean_j k_j      m_j = mean_e |k_je - mu_e|      k'_j = mu + m_j sign(k_j - mu)
//     score_b = scale * max_j q . k'_j = scale * (q . mu + max_j m_j sum_e +-q_e)
//
// Signs lie by fours of channels, so that the sum over e is d/4 lookups: table p of a query holds +-q_4p .. +-q_(4p+3)
// for each of the 16 patterns, as whole multiples of 1/63 of the largest, plus 63. Reads the candidates' sketches once,
// a chunk's for all heads at a time: bound by lookups and memory alike. The idea of fours and tables in registers:
// Andre et al. 2015 (VLDB), for product quantisation.
//
// Layout, of one KV head: f16 mu[d], f16 m[C], u8 signs[d/8][C] with channel 8i+e in bit e of row i; set: not negative.
// C is c rounded up to 32; what is beyond c repeats the last key.
#include <math.h>

#include "half.h"
#include "ops.h"
#include "parallel.h"

namespace actqkv {
namespace {

constexpr int N_HEADS = 64;             // query heads at a time, fewer where ...
constexpr int TABLES_BYTES = 16 << 10;  // ... their tables would leave the first-level cache
constexpr int MAX_D = 1024;             // head dimensions, of which two queries' tables fit
constexpr int PATTERNS = 16;            // of four signs
constexpr int GREATEST = SKETCH_OFFSET; // of a table: two entries, each plus the offset, add up within a byte
constexpr float ROUNDER = 3 << 22;      // float + this - this: to whole, ties to even; loops of it become vectors

int64_t padded(int64_t c) { return (c + SKETCH_KEYS - 1) / SKETCH_KEYS * SKETCH_KEYS; }

// Tables of a query as sketch_job has them, and what an entry of 1 stands for.
float make_tables(const float * q, int32_t d, int rows, uint8_t * tables) {
    float most = 0;
    for (int32_t p = 0; p < d; p += 4) {
        const float sum = fabsf(q[p]) + fabsf(q[p + 1]) + fabsf(q[p + 2]) + fabsf(q[p + 3]);
        most = sum > most ? sum : most;
    }
    const bool has_some = most > 0 && isfinite(most) && isfinite(GREATEST / most);
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

// The formula, with tables of one row: q . mu + step * max_j m_j times the sum of key j's entries, less the offsets.
float score_scalar(const float * q, const uint8_t * tables, float step, const uint8_t * sketch, int32_t d, int32_t n) {
    const uint8_t *sizes = sketch + 2 * d, *signs = sizes + 2 * n;
    double mean = 0;
    for (int32_t e = 0; e < d; e++) {
        mean += (double) q[e] * load_half(sketch + 2 * e);
    }
    float best = -INFINITY;
    for (int32_t j = 0; j < n; j++) {
        int sum = -SKETCH_OFFSET * (d / 4);
        for (int32_t i = 0; i < d / 8; i++) {
            const int byte = signs[(int64_t) i * n + j];
            sum += tables[2 * i * PATTERNS + (byte & 15)] + tables[(2 * i + 1) * PATTERNS + (byte >> 4)];
        }
        const float score = load_half(sizes + 2 * j) * (float) sum;
        best = score > best ? score : best;
    }
    return (float) mean + step * best;
}

void scores_scalar(const sketch_job * job) {
    for (int32_t i = job->from; i < job->to; i++) {
        for (int32_t x = 0; x < job->n_vec; x++) {
            const int32_t h = job->head + x;
            const uint8_t * sketch =
                job->sketches + (job->chunks[i] * (int64_t) job->n_head_kv + h / job->r) * job->bytes;
            job->scores[(int64_t) h * job->n + i] =
                job->scale * score_scalar(job->queries + (int64_t) h * job->d,
                                          job->tables + x * sketch_table_bytes(job->d, 1), job->steps[x], sketch,
                                          job->d, job->n_keys);
        }
    }
}

} // namespace
} // namespace actqkv

extern "C" int64_t actqkv_sketch_bytes(int32_t d_head, int32_t c) {
    const bool has_one = d_head % 8 == 0 && d_head <= actqkv::MAX_D;
    return has_one ? 2 * d_head + (2 + d_head / 8) * actqkv::padded(c) : 0;
}

extern "C" void actqkv_sketch(const actqkv_f16 * keys, int64_t key_stride, int32_t n_head_kv, int32_t d_head, int32_t c,
                              uint8_t * sketches) {
    const int64_t n = actqkv::padded(c), bytes = actqkv_sketch_bytes(d_head, c);
    for (int32_t g = 0; g < n_head_kv; g++, sketches += bytes) {
        const actqkv_f16 * from = keys + g * key_stride;
        float mean[actqkv::MAX_D];
        actqkv_mean(from, 0, 1, d_head, c, mean);
        for (int32_t e = 0; e < d_head; e++) {
            store_half(mean[e], sketches + 2 * e);
        }
        uint8_t *sizes = sketches + 2 * d_head, *signs = sizes + 2 * n;
        memset(signs, 0, d_head / 8 * n);
        for (int64_t j = 0; j < n; j++) {
            const actqkv_f16 * key = from + (j < c ? j : c - 1) * d_head;
            float size = 0;
            for (int32_t e = 0; e < d_head; e++) {
                const float rest = half_to_float(key[e]) - mean[e];
                size += fabsf(rest);
                signs[e / 8 * n + j] |= (uint8_t) (!(rest < 0) << e % 8);
            }
            store_half(size / (float) d_head, sizes + 2 * j);
        }
    }
}

extern "C" void actqkv_sketch_scores(int32_t impl, const float * query, const uint8_t * sketches,
                                     const int32_t * chunks, int32_t n, int32_t n_head, int32_t n_head_kv,
                                     int32_t d_head, int32_t c, float scale, float * scores, int32_t n_threads) {
    using namespace actqkv;
    const ops * op = ops_for(impl);
    const int rows = op ? op->sketch_rows : 1;
    const int64_t table_bytes = sketch_table_bytes(d_head, rows);
    const int32_t fitting = (int32_t) (TABLES_BYTES / table_bytes), most = fitting < N_HEADS ? fitting : N_HEADS;
    parallel(n_threads, [=](int ith, int nth) {
        alignas(64) uint8_t tables[TABLES_BYTES];
        float steps[N_HEADS];
        sketch_job job = {};
        job.queries = query;
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
                steps[x] = make_tables(query + (int64_t) (h + x) * d_head, d_head, rows, tables + x * table_bytes);
            }
            (op ? op->sketch_scores : scores_scalar)(&job);
        }
    });
}
