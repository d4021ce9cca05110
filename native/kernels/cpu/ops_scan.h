// One query's products with sketched keys (ops.h: scan_job), SKETCH_ROWS rows of VB keys at a time. Included once per
// instruction set; all static.
#pragma once

#include "ops.h"
#include "ops_simd.h"

constexpr int SKETCH_STEP = 2 * 16 * SKETCH_ROWS * SKETCH_ROWS; // bytes of tables that SKETCH_ROWS rows meet

// Of VB keys, whose signs lie m bytes apart: sums of entries times sizes
static inline void scan_keys(const uint8_t * tables, const uint8_t * sizes, const uint8_t * signs, int64_t m, int32_t d,
                             vf (&products)[VB / W]) {
    vsums sums = vb_start(-actqkv::SKETCH_OFFSET * (d / 4));
    LOOP for (int32_t i = 0; i < d / 8; i += SKETCH_ROWS) {
        const vb pattern = vb_load_rows(signs + i * m, m);
        const uint8_t * table = tables + i / SKETCH_ROWS * SKETCH_STEP;
        const vb a = vb_lookup(table, vb_low(pattern));
        const vb b = vb_lookup(table + SKETCH_STEP / 2, vb_high(pattern));
        sums = vb_sum(sums, vb_add(a, b));
    }
    vw size[2], sum[2];
    vb_sizes(sizes, size);
    vb_words(sums, sum);
    vw words[2];
    vw_in_order(vw_scaled(sum[0], size[0]), vw_scaled(sum[1], size[1]), words);
    v_of_words(words[0], products);
    v_of_words(words[1], products + VB / W / 2);
}

// Cells [from, to) of those ahead, as far as there are so many.
FETCHES static inline void fetch_ahead(const actqkv::scan_job & job, int32_t from, int32_t to) {
    for (int32_t i = from; i < to && i < job.n_ahead; i++) {
        fetch(job.ahead[i].keys, (job.ahead[i].n + 15) / 16 * 16 * (3 + job.d / 8));
    }
}

static int64_t simd_scan(const actqkv::scan_job * job) {
    int64_t n = 0;
    for (int32_t i = 0; i < job->n_cells; i++) {
        const actqkv::scan_cell & cell = job->cells[i];
        const int64_t m = (cell.n + 15) / 16 * 16;
        fetch_ahead(*job, i, i + 1);
        const vf base = v_set1(cell.base), factor = v_set1(cell.size * job->step);
        for (int32_t k = 0; k < cell.n; k += VB, n += VB) { // what is too many is overwritten
            vf products[VB / W];
            scan_keys(job->tables, cell.keys + k, cell.keys + 3 * m + k, m, job->d, products);
            UNROLL
            for (int j = 0; j < VB / W; j++) {
                v_store(job->logits + n + j * W, v_fma(products[j], factor, base));
            }
            uint16_t chunks[VB];
            memcpy(chunks, cell.keys + m + 2 * k, sizeof(chunks));
            for (int j = 0; j < VB; j++) { // becomes vectors
                job->chunks[n + j] = cell.first_chunk + chunks[j];
            }
        }
        n -= (VB - cell.n % VB) % VB;
    }
    fetch_ahead(*job, job->n_cells, job->n_ahead);
    return n;
}
