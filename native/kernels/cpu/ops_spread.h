// Products with rows of q4_0, and what follows each (ops.h: spread_scores). Included once per instruction
// set, behind ops_integer.h where there is one; all static.
#pragma once

#include "ops_simd.h"

#if defined(__AVX2__)

constexpr int64_t QUERY_BLOCKS = 128; // at a time, of as many heads, so that no memory is needed beside the stack

// W rows at a time, a row per lane; where rows run out, the first stands in for the missing ones.
static void simd_spread_scores(const float * query, int64_t n_blocks, const float * reach, int32_t n_head_kv,
                               const uint8_t * spreads, int64_t n, float * scores, int64_t lds) {
    const int64_t tail = n_head_kv * n_blocks * actqkv::Q4_BYTES, bytes = tail + 2 * n_head_kv;
    const int32_t n_heads = (int32_t) (QUERY_BLOCKS / n_blocks);
    for (int32_t first = 0; first < n_head_kv; first += n_heads) {
        const int32_t end = n_head_kv - first < n_heads ? n_head_kv : first + n_heads;
        query_block packed[QUERY_BLOCKS];
        integer_pack_query(query + first * n_blocks * actqkv::BLOCK, (end - first) * n_blocks * actqkv::BLOCK, packed);
        for (int64_t b = 0; b < n; b += W) {
            const int n_row = n - b < W ? (int) (n - b) : W;
            const uint8_t * row[W];
            for (int i = 0; i < W; i++) {
                row[i] = spreads + (b + (i < n_row ? i : 0)) * bytes;
                if (b + W + i < n) {
                    fetch(spreads + (b + W + i) * bytes + first * n_blocks * actqkv::Q4_BYTES,
                          (end - first) * n_blocks * actqkv::Q4_BYTES);
                }
            }
            for (int32_t g = first; g < end; g++) {
                vf sum;
                products_of<q4_integers, 1>(packed + (g - first) * n_blocks, n_blocks, row, g * n_blocks, &sum);
                sum = v_fma(v_load_halves(row, tail + 2 * g), v_set1(reach[g]), sum);
                v_store_n(scores + g * lds + b, sum, n_row);
            }
        }
    }
}

#else

static void simd_spread_scores(const float * query, int64_t n_blocks, const float * reach, int32_t n_head_kv,
                               const uint8_t * spreads, int64_t n, float * scores, int64_t lds) {
    const int64_t tail = n_head_kv * n_blocks * actqkv::Q4_BYTES, bytes = tail + 2 * n_head_kv;
    for (int64_t i = 0; i < n; i++) {
        const uint8_t * row = spreads + i * bytes;
        for (int32_t g = 0; g < n_head_kv; g++) {
            vf sum = v_zero();
            for (int64_t e = g * n_blocks * actqkv::BLOCK; e < (g + 1) * n_blocks * actqkv::BLOCK; e += W) {
                sum = v_fma(q4_rows::load_at(row, e), v_load(query + e), sum);
            }
            scores[g * lds + i] = v_sum(sum) + reach[g] * v_half(row + tail + 2 * g);
        }
    }
}

#endif
