// Sums of table entries (ops.h: sketch_best), for VB keys at a time. Included once per instruction set; all static.
#pragma once

#include "ops.h"
#include "ops_simd.h"

template <int NV> static inline void sketch_vectors(const int8_t * tables, const uint8_t * sizes, const uint8_t * signs,
                                                    int32_t d, int32_t n, float * best) {
    vf greatest[NV];
    UNROLL
    for (int x = 0; x < NV; x++) {
        greatest[x] = v_set1(-__FLT_MAX__);
    }
    for (int32_t at = 0; at < n; at += VB) {
        vsums sums[NV];
        UNROLL
        for (int x = 0; x < NV; x++) {
            sums[x] = vb_no_sums();
        }
        for (int32_t i = 0; i < d / 8; i++) {
            const vb pattern = vb_load(signs + (int64_t) i * n + at), low = vb_low(pattern), high = vb_high(pattern);
            UNROLL
            for (int x = 0; x < NV; x++) {
                const int8_t * table = tables + (int64_t) x * d * 4 + i * 32;
                sums[x] = vb_sum(sums[x], vb_add(vb_lookup(table, low), vb_lookup(table + 16, high)));
            }
        }
        UNROLL
        for (int j = 0; j < VB / W; j++) {
            const vf size = v_load_f16((const uint16_t *) sizes + at + j * W);
            UNROLL
            for (int x = 0; x < NV; x++) {
                greatest[x] = v_max(greatest[x], v_mul(vb_floats(sums[x], j), size));
            }
        }
    }
    UNROLL
    for (int x = 0; x < NV; x++) {
        best[x] = v_greatest(greatest[x]);
    }
}

static void simd_sketch_best(const int8_t * tables, int n_vec, const uint8_t * sizes, const uint8_t * signs, int32_t d,
                             int32_t n, float * best) {
    for (int x = 0; x < n_vec; x += 4) {
        const int8_t * t = tables + (int64_t) x * d * 4;
        switch (n_vec - x) {
        case 1:
            sketch_vectors<1>(t, sizes, signs, d, n, best + x);
            break;
        case 2:
            sketch_vectors<2>(t, sizes, signs, d, n, best + x);
            break;
        case 3:
            sketch_vectors<3>(t, sizes, signs, d, n, best + x);
            break;
        default:
            sketch_vectors<4>(t, sizes, signs, d, n, best + x);
            break;
        }
    }
}
