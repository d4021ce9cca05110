// Queries against sketches (ops.h: sketch_job), SKETCH_ROWS rows of VB keys at a time. Included once per instruction set;
// all static.
#pragma once

#include "ops.h"
#include "ops_simd.h"

constexpr int SKETCH_HEADS = 4;                                 // that share one read of a sketch
constexpr int SKETCH_STEP = 2 * 16 * SKETCH_ROWS * SKETCH_ROWS; // bytes of tables that SKETCH_ROWS rows meet
constexpr int SKETCHES_AHEAD = 2;                               // chunks fetched before they are needed

// mean[x] = query x . mu, best[x] = the greatest sum of entries times size, of NV queries; beyond, the first's
template <int NV> static inline void sketch_heads(const float * queries, int64_t stride, const uint8_t * tables,
                                                  int64_t table_bytes, const uint8_t * sketch, int32_t d, int32_t n,
                                                  float * mean, float * best) {
    const uint8_t *mu = sketch + actqkv::SKETCH_HEADER, *sizes = mu + d, *signs = sizes + n;
    vw greatest[NV];
    UNROLL
    for (int x = 0; x < NV; x++) {
        greatest[x] = vw_set1(INT16_MIN);
    }
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
        vw size[2];
        vb_sizes(sizes + at, size);
        UNROLL
        for (int x = 0; x < NV; x++) {
            vw sum[2];
            vb_words(sums[x], sum);
            const vw most = vw_max(vw_scaled(sum[0], size[0]), vw_scaled(sum[1], size[1]));
            greatest[x] = vw_max(greatest[x], most);
        }
    }
    vf product[SKETCH_HEADS], most[SKETCH_HEADS];
    UNROLL
    for (int x = 0; x < SKETCH_HEADS; x++) {
        product[x] = v_zero();
        most[x] = vw_greatest(greatest[x < NV ? x : 0]);
    }
    LOOP for (int32_t e = 0; e < d; e += W) { // queries end with zeros, and sizes lie behind mu
        const vf m = v_load_i8(mu + e);
        UNROLL
        for (int x = 0; x < NV; x++) {
            product[x] = v_fma(v_load(queries + x * stride + e), m, product[x]);
        }
    }
    v_sum_four(product, mean);
    v_greatest_four(most, best);
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
            const float * queries = job->queries + x * job->stride;
            const uint8_t * tables = job->tables + x * table_bytes;
            float mean[SKETCH_HEADS], best[SKETCH_HEADS];
            switch (n_vec) {
            case 1:
                sketch_heads<1>(queries, job->stride, tables, table_bytes, chunk + at, job->d, job->n_keys, mean, best);
                break;
            case 2:
                sketch_heads<2>(queries, job->stride, tables, table_bytes, chunk + at, job->d, job->n_keys, mean, best);
                break;
            case 3:
                sketch_heads<3>(queries, job->stride, tables, table_bytes, chunk + at, job->d, job->n_keys, mean, best);
                break;
            default:
                sketch_heads<4>(queries, job->stride, tables, table_bytes, chunk + at, job->d, job->n_keys, mean, best);
                break;
            }
            const float mean_step = v_half(chunk + at), size_step = v_half(chunk + at + 2);
            for (int32_t j = 0; j < n_vec; j++) {
                job->scores[(int64_t) (h + j) * job->n + i] =
                    job->scale * (mean_step * mean[j] + size_step * job->steps[x + j] * best[j]);
            }
        }
    }
}
