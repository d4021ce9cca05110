// The inner loops that depend on the instruction set, written once in ops_simd.h over simd.h and compiled once per
// instruction set (ops_avx2.cpp, ops_avx512.cpp, ...). Everything that decides, splits or synchronises is
// compiled for the plain machine, in NAME.cpp, and calls these through one table.
#pragma once

#include "kernels.h"

namespace actqkv {

// Keys are multiplied in panels of this many columns; see ops::pack_k.
constexpr int N_PANEL = 64;

constexpr int N_GREATEST = 16; // queries; see row_ops::greatest

// Keys of a sketch come in multiples of this.
constexpr int SKETCH_KEYS = 32;

// What reads keys and values as they are kept. `rows` has n rows of the type, one behind the other.
struct row_ops {
    // out[x*ldo + b] = row_b . vec_x for n_vec vectors [n_vec][width] and n rows of width values, each read once. As many
    // bytes from `ahead` on are fetched into the cache meanwhile (NULL: none).
    void (*dots)(const float * vecs, int n_vec, const void * rows, int64_t n, int64_t width, float * out, int64_t ldo,
                 const void * ahead);

    // out[x*ldo + e] += sum_b weights[x*ldw + b] * rows[b][e] for n rows of width values
    void (*mix)(const float * weights, int64_t ldw, int n_vec, const void * rows, int64_t n, int64_t width, float * out,
                int64_t ldo, const void * ahead);

    // Transposes n keys of d values into columns [column, column + n) of a panel of N_PANEL columns and d rows, in f32.
    // The order inside is the micro kernel's own: sub-panels of as many columns as it has registers for.
    void (*pack_k)(const void * keys, int n, int d, float * panel, int column);

    // The same for n values of d numbers as rows [row, row + n) of a panel of N_PANEL rows and d_pad columns; d_pad is d
    // rounded up to 16, the columns between are 0.
    void (*pack_v)(const void * values, int n, int d, int d_pad, float * panel, int row);

    // best[x] = the greatest row_b . query_x over n > 0 rows, of n_vec <= N_GREATEST queries that lie packed one behind
    // the other: query_bytes(width) each, rounded to 16 bits. NULL where `dots` is what there is.
    int64_t (*query_bytes)(int64_t width);
    void (*pack_query)(const float * query, int64_t width, void * packed);
    void (*greatest)(const void * packed, int n_vec, const void * rows, int64_t n, int64_t width, float * best,
                     const void * ahead);
};

struct ops {
    // dst[i] = half(src[i])
    void (*to_f16)(const float * src, actqkv_f16 * dst, int64_t n);

    // acc[i] += row[i]
    void (*add_f16)(const actqkv_f16 * row, float * acc, int64_t n);

    // By enum actqkv_kv_type.
    row_ops f16, q8_0, q4_0;

    const row_ops & of(int32_t type) const {
        return type == ACTQKV_KV_Q8_0 ? q8_0 : type == ACTQKV_KV_Q4_0 ? q4_0 : f16;
    }

    // logits[i*ldl + c] = q_i . key_c for n_rows queries [n_rows][d] and the panel's N_PANEL columns
    void (*logits)(const float * q, int n_rows, int d, const float * k_panel, float * logits, int64_t ldl);

    // out[i*ldo + e] += sum over the panel's first n rows of weights[i*ldw + c] * v_c[e], e < d_pad
    void (*values)(const float * weights, int64_t ldw, int n_rows, const float * v_panel, int n, int d_pad, float * out,
                   int64_t ldo);

    // best[x] = max over n keys, a multiple of SKETCH_KEYS, of sizes[j] (f16) times the sum over i < d/8 of
    // tables[x][2i][byte & 15] + tables[x][2i+1][byte >> 4] with byte = signs[i*n + j]; tables [n_vec][d/4][16].
    void (*sketch_best)(const int8_t * tables, int n_vec, const uint8_t * sizes, const uint8_t * signs, int32_t d,
                        int32_t n, float * best);

    float (*max)(const float * x, int64_t n);

    // x[i] = 2^(x[i] - shift), 0 for -infinity; returns the sum
    float (*exp2_sum)(float * x, int64_t n, float shift);

    // sum_i e^(x_i - shift) of x_i <= shift
    float (*exp_sum)(const float * x, int64_t n, float shift);

    // Of n_vec rows of n scores, each less its shift: most[b] <- max(most[b], the scores of column b), and
    // sums[b] = e^(most[b] before - most[b] now) + the sum of e^(score - most[b] now)
    void (*join_exps)(const float * scores, int64_t lds, int n_vec, const float * shifts, int64_t n, float * most,
                      float * sums);

    float (*sum)(const float * x, int64_t n);

    // dst[i] += factor * src[i];  dst[i] *= factor
    void (*add_scaled)(float * dst, const float * src, int64_t n, float factor);
    void (*scale)(float * dst, int64_t n, float factor);

    // Per channel e of n: mean and mean square deviation over m rows z + i*ldz
    void (*column_stats)(const float * z, int64_t ldz, int32_t m, int64_t n, float * mean, float * var);

    // sum_e (z[e] - mean[e])^2 * inv[e]
    float (*weighted_distance)(const float * z, const float * mean, const float * inv, int64_t n);

    // *z = sum_i e^x_i, *zx = sum_i x_i e^x_i of x_i = (scores[i] - shift) * factor <= 0
    void (*exp_moments)(const float * scores, int64_t n, float shift, float factor, double * z, double * zx);
};

// NULL when impl is scalar or cannot run here.
const ops * ops_for(int32_t impl);

} // namespace actqkv
