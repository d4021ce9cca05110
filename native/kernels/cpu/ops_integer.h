// The greatest products of q8_0 and q4_0 rows, for refine, whose queries may be rounded to 16 bits: W rows at a time, a
// row per lane, so that nothing is added up across lanes. Included once per instruction set, behind ops_simd.h.
//
//     query block  x_i = t p_i, p_i 16 bits     row block  k_i = s (q_i - OFFSET)
//     x . k = sum over blocks of  s t (sum_i p_i q_i - OFFSET sum_i p_i)      the sums exact in 32 bits
#pragma once

#include <math.h>

#include "ops_simd.h"

// 32 values of a query. Of each four that follow each other, the first and third share a word, as do the other two.
struct query_block {
    int32_t pairs[actqkv::BLOCK / 2];
    int32_t sum;
    float scale;
};

static int64_t n_blocks_of(int64_t width) { return (width + actqkv::BLOCK - 1) / actqkv::BLOCK; }

static int64_t integer_query_bytes(int64_t width) { return n_blocks_of(width) * (int64_t) sizeof(query_block); }

static void integer_pack_query(const float * query, int64_t width, void * packed) {
    query_block * blocks = (query_block *) packed;
    for (int64_t b = 0; b < n_blocks_of(width); b++) {
        const float * x = query + b * actqkv::BLOCK;
        const int n = width - b * actqkv::BLOCK < actqkv::BLOCK ? (int) actqkv::HALF_BLOCK : (int) actqkv::BLOCK;
        float most = 0;
        for (int i = 0; i < n; i++) {
            most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        }
        const float inverse = most > 0 ? 32767 / most : 0;
        int16_t p[actqkv::BLOCK] = {0};
        blocks[b].sum = 0;
        blocks[b].scale = most / 32767;
        for (int i = 0; i < n; i++) {
            p[i] = (int16_t) lrintf(x[i] * inverse);
            blocks[b].sum += p[i];
        }
        for (int i = 0; i < actqkv::BLOCK / 2; i++) {
            const int at = i / 2 * 4 + i % 2;
            blocks[b].pairs[i] = (int32_t) ((uint32_t) (uint16_t) p[at] | (uint32_t) (uint16_t) p[at + 2] << 16);
        }
    }
}

constexpr int N_WORDS = 8; // of half a block, two values in each

// Half h of a block of a row's bytes: where they lie, and as words of two values, in the order of query_block::pairs.
struct q8_integers {
    typedef q8_rows rows;
    static constexpr int BYTES = actqkv::Q8_BYTES, OFFSET = 0;
    static int at(int h) { return 2 + (int) actqkv::HALF_BLOCK * h; }
    static inline void words(const vi * quads, int, vi * w) {
        UNROLL
        for (int j = 0; j < 4; j++) {
            w[2 * j] = vi_shift_signed<8>(vi_shift_left<8>(quads[j]));
            w[2 * j + 1] = vi_shift_signed<8>(quads[j]);
        }
    }
};

struct q4_integers {
    typedef q4_rows rows;
    static constexpr int BYTES = actqkv::Q4_BYTES, OFFSET = 8;
    static int at(int) { return 2; }
    static inline void words(const vi * quads, int h, vi * w) {
        const vi nibble = vi_set1(0x000f000f);
        UNROLL
        for (int j = 0; j < 4; j++) {
            w[2 * j] = vi_and(h == 0 ? quads[j] : vi_shift_right<4>(quads[j]), nibble);
            w[2 * j + 1] = h == 0 ? vi_and(vi_shift_right<8>(quads[j]), nibble) : vi_shift_right<12>(quads[j]);
        }
    }
};

// sum[x] = x-th query . W rows
template <class I, int NV>
static inline void products_of(const query_block * queries, int64_t n_blocks, const uint8_t * const * row, vf * sum) {
    UNROLL
    for (int x = 0; x < NV; x++) {
        sum[x] = v_zero();
    }
    for (int64_t b = 0; b < n_blocks; b++) {
        const query_block * q = queries + b;
        vi acc[NV];
        UNROLL
        for (int x = 0; x < NV; x++) {
            acc[x] = vi_set1(-I::OFFSET * q[x * n_blocks].sum);
        }
        UNROLL
        for (int h = 0; h < 2; h++) {
            vi quads[4], words[N_WORDS];
            vi_load_quads(row, b * I::BYTES + I::at(h), quads);
            I::words(quads, h, words);
            UNROLL
            for (int x = 0; x < NV; x++) {
                UNROLL
                for (int i = 0; i < N_WORDS; i++) {
                    acc[x] = vi_dot(acc[x], words[i], vi_set1(q[x * n_blocks].pairs[N_WORDS * h + i]));
                }
            }
        }
        const vf scale = v_load_halves(row, b * I::BYTES);
        UNROLL
        for (int x = 0; x < NV; x++) {
            sum[x] = v_fma(v_of_vi(acc[x]), v_mul(scale, v_set1(q[x * n_blocks].scale)), sum[x]);
        }
    }
}

// best[x] = max(best[x], x-th query . W rows)
template <class I, int NV>
static inline void greatest_of(const query_block * queries, int64_t n_blocks, const uint8_t * const * row, vf * best) {
    vf sum[NV];
    products_of<I, NV>(queries, n_blocks, row, sum);
    UNROLL
    for (int x = 0; x < NV; x++) {
        best[x] = v_max(best[x], sum[x]);
    }
}

constexpr int INTEGER_VECS = W == 16 ? 4 : 2; // 8 words and as many sums, accumulators and maxima as fit the registers

template <class I> static void integer_greatest(const void * packed, int n_vec, const void * rows, int64_t n,
                                                int64_t width, float * best, const void * ahead) {
    const query_block * queries = (const query_block *) packed;
    const int64_t n_blocks = n_blocks_of(width), bytes = n_blocks * I::BYTES;
    vf most[actqkv::N_GREATEST];
    for (int x = 0; x < n_vec; x++) {
        most[x] = v_set1(-__builtin_inff());
    }
    for (int64_t b = 0; b < n; b += W) {
        const int n_row = n - b < W ? (int) (n - b) : W;
        const uint8_t * row[W]; // where rows run out, the first stands in for the missing ones
        for (int i = 0; i < W; i++) {
            row[i] = (const uint8_t *) rows + (b + (i < n_row ? i : 0)) * bytes;
        }
        if (ahead) {
            fetch((const uint8_t *) ahead + b * bytes, n_row * bytes);
        }
        int x = 0;
        for (; x + INTEGER_VECS <= n_vec; x += INTEGER_VECS) {
            greatest_of<I, INTEGER_VECS>(queries + x * n_blocks, n_blocks, row, most + x);
        }
        for (; x < n_vec; x++) {
            greatest_of<I, 1>(queries + x * n_blocks, n_blocks, row, most + x);
        }
    }
    for (int x = 0; x < n_vec; x++) {
        best[x] = v_greatest(most[x]);
    }
}
