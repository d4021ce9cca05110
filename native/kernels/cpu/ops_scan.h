// One query's products with sketched keys (ops.h: scan_job), SKETCH_ROWS rows of VB keys at a time. Included once per
// instruction set; all static.
#pragma once

#include "ops.h"
#include "ops_simd.h"

constexpr int CELLS_AHEAD = 4;                                  // fetched before they are needed
constexpr int SKETCH_STEP = 2 * 16 * SKETCH_ROWS * SKETCH_ROWS; // bytes of tables that SKETCH_ROWS rows meet

// products [VB]: sums of entries times sizes, of keys whose signs lie m bytes apart
static inline void scan_keys(const uint8_t * tables, const uint8_t * sizes, const uint8_t * signs, int64_t m, int32_t d,
                             int16_t * products) {
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
    vw_store_keys(products, vw_scaled(sum[0], size[0]), vw_scaled(sum[1], size[1]));
}

FETCHES static inline void fetch_cell(const actqkv::scan_job & job, int32_t i) {
    if (i < job.n_cells) {
        fetch(job.cells[i].keys, (job.cells[i].n + 15) / 16 * 16 * (3 + job.d / 8));
    }
}

static int64_t simd_scan(const actqkv::scan_job * job) {
    int64_t n = 0;
    for (int32_t i = 0; i < CELLS_AHEAD; i++) {
        fetch_cell(*job, i);
    }
    for (int32_t i = 0; i < job->n_cells; i++) {
        const actqkv::scan_cell & cell = job->cells[i];
        const int64_t m = (cell.n + 15) / 16 * 16;
        fetch_cell(*job, i + CELLS_AHEAD);
        const float factor = cell.size * job->step;
        for (int32_t k = 0; k < cell.n; k += VB, n += VB) {
            int16_t products[VB];
            uint16_t chunks[VB];
            scan_keys(job->tables, cell.keys + k, cell.keys + 3 * m + k, m, job->d, products);
            memcpy(chunks, cell.keys + m + 2 * k, sizeof(chunks));
            float * logits = job->logits + n;
            int32_t * found = job->chunks + n;
            for (int32_t j = 0; j < VB; j++) { // all, so that this becomes vectors: what is too many is overwritten
                logits[j] = cell.base + factor * (float) products[j];
                found[j] = cell.first_chunk + chunks[j];
            }
        }
        n -= (VB - cell.n % VB) % VB;
    }
    return n;
}
