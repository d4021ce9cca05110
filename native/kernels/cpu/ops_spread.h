// Products with rows of q4_0, and what follows each (ops.h: spread_scores). Included once per instruction
// set, behind ops_integer.h where there is one; all static.
#pragma once

#include "ops_simd.h"

#if defined(__AVX2__)

constexpr int64_t QUERY_BLOCKS = 128; // at a time, so that no memory is needed beside the stack

// W rows at a time, a row per lane; where rows run out, the first stands in for the missing ones.
static void simd_spread_scores(const float * query, int64_t n_blocks, const float * reach, int32_t n_head_kv,
                               const uint8_t * spreads, int64_t n, float * scores) {
    const int64_t tail = n_blocks * actqkv::Q4_BYTES, bytes = tail + 2 * n_head_kv;
    for (int64_t from = 0; from < n_blocks; from += QUERY_BLOCKS) {
        const int64_t n_here = n_blocks - from < QUERY_BLOCKS ? n_blocks - from : QUERY_BLOCKS;
        query_block packed[QUERY_BLOCKS];
        integer_pack_query(query + from * actqkv::BLOCK, n_here * actqkv::BLOCK, packed);
        for (int64_t b = 0; b < n; b += W) {
            const int n_row = n - b < W ? (int) (n - b) : W;
            const uint8_t * row[W];
            for (int i = 0; i < W; i++) {
                row[i] = spreads + (b + (i < n_row ? i : 0)) * bytes + from * actqkv::Q4_BYTES;
                if (b + W + i < n) {
                    fetch(spreads + (b + W + i) * bytes + from * actqkv::Q4_BYTES, n_here * actqkv::Q4_BYTES);
                }
            }
            vf sum;
            products_of<q4_integers, 1>(packed, n_here, row, &sum);
            if (from == 0) {
                for (int32_t g = 0; g < n_head_kv; g++) {
                    sum = v_fma(v_load_halves(row, tail + 2 * g), v_set1(reach[g]), sum);
                }
            } else {
                sum = v_add(sum, v_load_n(scores + b, n_row, 0));
            }
            v_store_n(scores + b, sum, n_row);
        }
    }
}

#else

static void simd_spread_scores(const float * query, int64_t n_blocks, const float * reach, int32_t n_head_kv,
                               const uint8_t * spreads, int64_t n, float * scores) {
    const int64_t tail = n_blocks * actqkv::Q4_BYTES, bytes = tail + 2 * n_head_kv;
    for (int64_t i = 0; i < n; i++) {
        const uint8_t * row = spreads + i * bytes;
        vf sum = v_zero();
        for (int64_t e = 0; e < n_blocks * actqkv::BLOCK; e += W) {
            sum = v_fma(q4_rows::load_at(row, e), v_load(query + e), sum);
        }
        scores[i] = v_sum(sum);
        for (int32_t g = 0; g < n_head_kv; g++) {
            scores[i] += reach[g] * v_half(row + tail + 2 * g);
        }
    }
}

#endif
