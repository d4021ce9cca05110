// Queries against sketches (ops.h: sketch_job), SKETCH_ROWS rows of VB keys at a time. Included once per instruction set;
// all static.
#pragma once

#include "ops.h"
#include "ops_simd.h"

constexpr int SKETCH_HEADS = 4;                                 // that share one read of a sketch
constexpr int SKETCH_STEP = 2 * 16 * SKETCH_ROWS * SKETCH_ROWS; // bytes of tables that SKETCH_ROWS rows meet
constexpr int SKETCHES_AHEAD = 2;                               // chunks fetched before they are needed

// mean[x] = query x . mu, best[x] = the greatest sum of entries times size, of NV queries; beyond, the first's
template <int NV> static inline void sketch_heads(const float * queries, const uint8_t * tables, int64_t table_bytes,
                                                  const uint8_t * sketch, int32_t d, int32_t n, float * mean,
                                                  float * best) {
    vf sum[SKETCH_HEADS], greatest[SKETCH_HEADS];
    UNROLL
    for (int x = 0; x < NV; x++) {
        sum[x] = v_zero();
        greatest[x] = v_set1(-__FLT_MAX__);
    }
    const uint16_t * mu = (const uint16_t *) sketch;
    const uint16_t * sizes = mu + d;
    const uint8_t * signs = (const uint8_t *) (sizes + n);
    for (int32_t at = 0; at < n; at += VB) {
        vsums sums[NV];
        UNROLL
        for (int x = 0; x < NV; x++) {
            sums[x] = vb_start(-actqkv::SKETCH_OFFSET * (d / 4));
        }
        LOOP for (int32_t i = 0; i < d / 8; i += SKETCH_ROWS) {
            const vb pattern = vb_load_rows(signs + (int64_t) i * n + at, n, d / 8 - i);
            const vb low = vb_low(pattern), high = vb_high(pattern);
            const uint8_t * table = tables + i / SKETCH_ROWS * SKETCH_STEP;
            UNROLL
            for (int x = 0; x < NV; x++) {
                const vb a = vb_lookup(table + x * table_bytes, low);
                const vb b = vb_lookup(table + x * table_bytes + SKETCH_STEP / 2, high);
                sums[x] = vb_sum(sums[x], vb_add(a, b));
            }
        }
        vf size[VB / W];
        vb_sizes(sizes + at, size);
        UNROLL
        for (int x = 0; x < NV; x++) {
            vf whole[VB / W];
            vb_floats(sums[x], whole);
            UNROLL
            for (int j = 0; j < VB / W; j++) {
                greatest[x] = v_max(greatest[x], v_mul(whole[j], size[j]));
            }
        }
    }
    int32_t e = 0;
    for (; e + W <= d; e += W) {
        const vf m = v_load_f16(mu + e);
        UNROLL
        for (int x = 0; x < NV; x++) {
            sum[x] = v_fma(v_load(queries + x * d + e), m, sum[x]);
        }
    }
    if (e < d) {
        const vf m = v_load_f16_n(mu + e, d - e);
        UNROLL
        for (int x = 0; x < NV; x++) {
            sum[x] = v_fma(v_load_n(queries + x * d + e, d - e, 0), m, sum[x]);
        }
    }
    UNROLL
    for (int x = NV; x < SKETCH_HEADS; x++) {
        sum[x] = sum[0];
        greatest[x] = greatest[0];
    }
    v_sum_four(sum, mean);
    v_greatest_four(greatest, best);
}

static void simd_sketch_scores(const actqkv::sketch_job * job) {
    const int64_t table_bytes = actqkv::sketch_table_bytes(job->d, SKETCH_ROWS),
                  chunk_bytes = job->n_head_kv * job->bytes;
    for (int32_t i = job->from; i < job->to; i++) {
        const uint8_t * chunk = job->sketches + job->chunks[i] * chunk_bytes;
        const uint8_t * next =
            i + SKETCHES_AHEAD < job->to ? job->sketches + job->chunks[i + SKETCHES_AHEAD] * chunk_bytes : nullptr;
        for (int32_t x = 0, n_vec; x < job->n_vec; x += n_vec) {
            const int32_t h = job->head + x, left = job->n_vec - x, of_group = job->r - h % job->r;
            n_vec = left < of_group ? left : of_group;
            n_vec = n_vec < SKETCH_HEADS ? n_vec : SKETCH_HEADS;
            const int64_t at = h / job->r * job->bytes;
            if (next && (x == 0 || h % job->r == 0)) {
                fetch(next + at, job->bytes);
            }
            const float * queries = job->queries + (int64_t) h * job->d;
            const uint8_t * tables = job->tables + x * table_bytes;
            float mean[SKETCH_HEADS], best[SKETCH_HEADS];
            switch (n_vec) {
            case 1:
                sketch_heads<1>(queries, tables, table_bytes, chunk + at, job->d, job->n_keys, mean, best);
                break;
            case 2:
                sketch_heads<2>(queries, tables, table_bytes, chunk + at, job->d, job->n_keys, mean, best);
                break;
            case 3:
                sketch_heads<3>(queries, tables, table_bytes, chunk + at, job->d, job->n_keys, mean, best);
                break;
            default:
                sketch_heads<4>(queries, tables, table_bytes, chunk + at, job->d, job->n_keys, mean, best);
                break;
            }
            for (int32_t j = 0; j < n_vec; j++) {
                job->scores[(int64_t) (h + j) * job->n + i] = job->scale * (mean[j] + job->steps[x + j] * best[j]);
            }
        }
    }
}
