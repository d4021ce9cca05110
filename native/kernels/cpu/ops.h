// The inner loops that depend on the instruction set, written once in ops_*.h over simd.h and compiled once per
// instruction set (ops_avx2.cpp, ops_avx512.cpp, ...). Everything that decides, splits or synchronises is
// compiled for the plain machine, in NAME.cpp, and calls these through one table.
#pragma once

#include "kernels.h"

namespace actqkv {

// Keys are multiplied in panels of this many columns; see ops::pack_k.
constexpr int N_PANEL = 64;

constexpr int N_GREATEST = 16; // queries; see row_ops::greatest

// Whether what will be read soon is fetched into the first-level cache, or the second: as the processor does it better
// (native/README.md has figures).
extern const bool fetches_to_first;

// Added to every entry of a query's tables, so that none is negative.
constexpr int SKETCH_OFFSET = 63;
constexpr int MAX_SKETCH_ROWS = 2; // of signs, that a vector holds

// Bytes of one query's tables where a vector holds `rows` rows of signs: 16 entries for each four channels. For a vector of
// two rows, tables lie as it takes them: those of the low fours of both rows, each twice, then those of the high fours.
static inline int64_t sketch_table_bytes(int32_t d, int rows) {
    return (d / 8 + rows - 1) / rows * rows * 2 * 16 * rows;
}

// Keys that lie around one centre, as cells.h has them.
struct scan_cell {
    const uint8_t * keys;
    int32_t n, first_chunk;
    float base, size; // the query's product with the centre; what a key's size of 1 stands for
};

// Cells whose centres lie together (cells.h), and queries that meet them at a time.
constexpr int CENTRES = 16, CENTRE_HEADS = 4;

// Queries of a KV head against the centres of a stretch.
struct centre_job {
    int32_t d, n_vec;
    const int32_t * fours;     // [n_vec][d/4] four channels of a query each, in signed bytes
    const int32_t * offsets;   // [n_vec] 8 times their sum
    const float * query_steps; // [n_vec] what 1 stands for
    const float * factors;     // [n_vec] of reaches
    const uint8_t * blocks;    // of CENTRES cells each (cells.h)
    int64_t block_bytes, n;    // cells
    float * scores;            // [n_vec][lds]
    int64_t lds;
};

// One query head's products with sketched keys (search.cpp has the formula).
struct scan_job {
    const uint8_t * tables; // sketch_table_bytes(), 64-byte aligned
    float step;             // what a sum of 1 stands for, times 256
    int32_t d;
    const scan_cell *cells, *ahead;
    int32_t n_cells, n_ahead; // ahead: fetched meanwhile, for the job after this one
    float * logits;           // those of all keys of all cells, then room for 32 more
    int32_t * chunks;         // and their chunks
};

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

    // best[x] = the greatest row_b . query_x over n > 0 rows, of n_vec <= N_GREATEST queries [n_vec][width]
    void (*greatest)(const float * queries, int n_vec, const void * rows, int64_t n, int64_t width, float * best,
                     const void * ahead);

    // The same of queries that lie packed one behind the other: query_bytes(width) each, rounded to 16 bits. NULL where
    // there is no such thing.
    int64_t (*query_bytes)(int64_t width);
    void (*pack_query)(const float * query, int64_t width, void * packed);
    void (*greatest_packed)(const void * packed, int n_vec, const void * rows, int64_t n, int64_t width, float * best,
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

    // found[j] = the first row i of rows [n_rows][d] with the greatest row_i . key_j - halves[i], of the first n keys of a
    // panel; 0 where none is a number. found has room for N_PANEL.
    void (*nearest)(const float * rows, int n_rows, int d, const float * halves, const float * k_panel, int n,
                    int32_t * found);

    // scores[x*lds + i], i < n: query_step * step * (sum over channels of query * centre - offset) + factor * reach
    void (*centre_scores)(const centre_job * job);

    // Fills the job's logits and chunks; how many. sketch_rows: rows of signs that a vector holds, for the tables.
    int64_t (*scan)(const scan_job * job);
    int sketch_rows;

    // scores[i] = query . row, and the sum over g < n_head_kv of reach[g] (f32) times the half that lies 2*g behind the
    // row's n_blocks blocks of q4_0; rows lie one behind the other. query [32*n_blocks].
    void (*spread_scores)(const float * query, int64_t n_blocks, const float * reach, int32_t n_head_kv,
                          const uint8_t * spreads, int64_t n, float * scores);

    float (*max)(const float * x, int64_t n);

    // The least and the greatest of n > 0 numbers; false where one of them is NaN.
    bool (*limits)(const float * x, int64_t n, float * least, float * greatest);

    // most[b] = the greatest of x[b], x[b + width], .. of n >= width; false where one of them is NaN.
    bool (*greatest_of_columns)(const float * x, int64_t n, int64_t width, float * most);

    // found = all i with low <= x[i] <= high, ascending; returns how many
    int64_t (*find)(const float * x, int64_t n, float low, float high, int32_t * found);

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
