// The table of inner loops for the instruction set of this translation unit. Included once per instruction set.
#pragma once

#include "ops_centres.h"
#include "ops_floats.h"
#include "ops_scan.h"
#include "ops_simd.h"

#if defined(__AVX2__)
#include "ops_integer.h"
#define ACTQKV_INTEGERS(I) integer_query_bytes, integer_pack_query, integer_greatest<I>
#else
#define ACTQKV_INTEGERS(I) nullptr, nullptr, nullptr
#endif

#include "ops_spread.h"

#define ACTQKV_ROW_OPS(R, ...)                                                                                         \
    {simd_dots<R>, simd_mix<R>, simd_pack_k<R>, simd_pack_v<R>, simd_greatest<R>, __VA_ARGS__}
#define ACTQKV_OPS                                                                                                     \
    {simd_to_f16,                                                                                                      \
     simd_add_f16,                                                                                                     \
     ACTQKV_ROW_OPS(f16_rows, nullptr, nullptr, nullptr),                                                              \
     ACTQKV_ROW_OPS(q8_rows, ACTQKV_INTEGERS(q8_integers)),                                                            \
     ACTQKV_ROW_OPS(q4_rows, ACTQKV_INTEGERS(q4_integers)),                                                            \
     simd_logits,                                                                                                      \
     simd_values,                                                                                                      \
     simd_nearest,                                                                                                     \
     simd_centre_scores,                                                                                               \
     simd_scan,                                                                                                        \
     SKETCH_ROWS,                                                                                                      \
     simd_spread_scores,                                                                                               \
     simd_max,                                                                                                         \
     simd_limits,                                                                                                      \
     simd_greatest_of_columns,                                                                                         \
     simd_find,                                                                                                        \
     simd_exp2_sum,                                                                                                    \
     simd_exp_sum,                                                                                                     \
     simd_join_exps,                                                                                                   \
     simd_sum,                                                                                                         \
     simd_add_scaled,                                                                                                  \
     simd_scale,                                                                                                       \
     simd_column_stats,                                                                                                \
     simd_weighted_distance,                                                                                           \
     simd_exp_moments}
