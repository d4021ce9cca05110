// The nearest of some rows to each key (ops.h: nearest), and products with centres (centre_scores), W cells at a time, a cell
// per lane. Included once per instruction set; all static.
#pragma once

#include "ops.h"
#include "ops_simd.h"

// Rows [from, from + NR) for NV vectors of keys: whose closeness is best so far, and of which row.
template <int NR, int NV> static inline void compare(const float * rows, int from, int d, const float * halves,
                                                     const float * panel, vf * best, vf * found) {
    vf acc[NR][NV];
    UNROLL
    for (int i = 0; i < NR; i++) {
        UNROLL
        for (int j = 0; j < NV; j++) {
            acc[i][j] = v_set1(-halves[from + i]);
        }
    }
    multiply(rows + (int64_t) from * d, d, panel, TILE_COLUMNS, d, acc);
    UNROLL
    for (int i = 0; i < NR; i++) {
        UNROLL
        for (int j = 0; j < NV; j++) {
            found[j] = v_where_greater(acc[i][j], best[j], v_set1((float) (from + i)), found[j]);
            best[j] = v_where_greater(acc[i][j], best[j], acc[i][j], best[j]);
        }
    }
}

template <int NV> static void nearest_of(const float * rows, int n_rows, int d, const float * halves,
                                         const float * panel, int32_t * found) {
    constexpr int NR = 4;
    vf best[NV], numbers[NV];
    UNROLL
    for (int j = 0; j < NV; j++) {
        best[j] = v_set1(-__builtin_inff());
        numbers[j] = v_zero();
    }
    int from = 0;
    for (; from + NR <= n_rows; from += NR) {
        compare<NR, NV>(rows, from, d, halves, panel, best, numbers);
    }
    for (; from < n_rows; from++) {
        compare<1, NV>(rows, from, d, halves, panel, best, numbers);
    }
    float whole[NV * W];
    UNROLL
    for (int j = 0; j < NV; j++) {
        v_store(whole + j * W, numbers[j]);
    }
    for (int j = 0; j < NV * W; j++) {
        found[j] = (int32_t) whole[j];
    }
}

static void simd_nearest(const float * rows, int n_rows, int d, const float * halves, const float * k_panel, int n,
                         int32_t * found) {
    for (int c = 0; c < n; c += TILE_COLUMNS) {
        const float * panel = k_panel + (int64_t) c * d;
        switch ((n - c + W - 1) / W) {
        case 1:
            nearest_of<1>(rows, n_rows, d, halves, panel, found + c);
            break;
        case 2:
            nearest_of<2>(rows, n_rows, d, halves, panel, found + c);
            break;
        default:
            nearest_of<TILE_VECTORS>(rows, n_rows, d, halves, panel, found + c);
            break;
        }
    }
}

constexpr int BLOCKS_AHEAD = 8; // fetched before they are needed

// Blocks [from, to), as far as the job has so many.
FETCHES static inline void fetch_blocks(const actqkv::centre_job & job, int64_t from, int64_t to) {
    for (int64_t i = from; i < to && i * actqkv::CENTRES < job.n; i++) {
        fetch(job.blocks + i * job.block_bytes, job.block_bytes);
    }
}

#if defined(__AVX2__)

// NV queries and W cells from `first` on.
template <int NV> static inline void centre_products(const actqkv::centre_job & job, int32_t head, int64_t first) {
    const vi nibbles = vi_set1(0x0f0f0f0f);
    const uint8_t * block = job.blocks + first / actqkv::CENTRES * job.block_bytes + first % actqkv::CENTRES * 4;
    const uint8_t * row = block + 8 * actqkv::CENTRES;
    vi acc[NV];
    UNROLL
    for (int x = 0; x < NV; x++) {
        acc[x] = vi_set1(-job.offsets[head + x]);
    }
    for (int32_t w = 0; w < job.d / 8; w++, row += 4 * actqkv::CENTRES) {
        const vi pairs = vi_load(row);
        const vi low = vi_and(pairs, nibbles), high = vi_and(vi_shift_right<4>(pairs), nibbles);
        UNROLL
        for (int x = 0; x < NV; x++) {
            const int32_t * fours = job.fours + (int64_t) (head + x) * job.d / 4 + 2 * w;
            acc[x] = vi_dot_bytes(acc[x], low, vi_set1(fours[0]));
            acc[x] = vi_dot_bytes(acc[x], high, vi_set1(fours[1]));
        }
    }
    const vf step = v_load((const float *) block), reach = v_load((const float *) block + actqkv::CENTRES);
    const int64_t n_here = job.n - first;
    UNROLL
    for (int x = 0; x < NV; x++) {
        const vf product = v_mul(v_of_vi(acc[x]), v_mul(step, v_set1(job.query_steps[head + x])));
        const vf score = v_fma(reach, v_set1(job.factors[head + x]), product);
        float * scores = job.scores + (head + x) * job.lds + first;
        if (n_here >= W) {
            v_store(scores, score);
        } else {
            v_store_n(scores, score, (int) n_here);
        }
    }
}

static void simd_centre_scores(const actqkv::centre_job * job) {
    fetch_blocks(*job, 0, BLOCKS_AHEAD);
    for (int64_t first = 0; first < job->n; first += W) {
        if (first % actqkv::CENTRES == 0) {
            const int64_t next = first / actqkv::CENTRES + BLOCKS_AHEAD;
            fetch_blocks(*job, next, next + 1);
        }
        int32_t x = 0;
        for (; x + actqkv::CENTRE_HEADS <= job->n_vec; x += actqkv::CENTRE_HEADS) {
            centre_products<actqkv::CENTRE_HEADS>(*job, x, first);
        }
        for (; x < job->n_vec; x++) {
            centre_products<1>(*job, x, first);
        }
    }
}

#else

static void simd_centre_scores(const actqkv::centre_job * job) {
    constexpr int n = actqkv::CENTRES;
    fetch_blocks(*job, 0, BLOCKS_AHEAD);
    for (int64_t first = 0; first < job->n; first += n) {
        const uint8_t * block = job->blocks + first / n * job->block_bytes;
        const float * steps = (const float *) block;
        fetch_blocks(*job, first / n + BLOCKS_AHEAD, first / n + BLOCKS_AHEAD + 1);
        for (int32_t x = 0; x < job->n_vec; x++) {
            const uint8_t * row = block + 8 * n;
            const int8_t * q = (const int8_t *) (job->fours + (int64_t) x * job->d / 4);
            int32_t acc[n];
            for (int i = 0; i < n; i++) {
                acc[i] = -job->offsets[x];
            }
            for (int32_t w = 0; w < job->d / 8; w++, row += 4 * n, q += 8) {
                for (int i = 0; i < n; i++) {
                    for (int e = 0; e < 4; e++) {
                        acc[i] += q[e] * (row[4 * i + e] & 15) + q[4 + e] * (row[4 * i + e] >> 4);
                    }
                }
            }
            const float step = job->query_steps[x], factor = job->factors[x];
            for (int i = 0; i < n && first + i < job->n; i++) {
                job->scores[x * job->lds + first + i] = step * steps[i] * (float) acc[i] + factor * steps[n + i];
            }
        }
    }
}

#endif
